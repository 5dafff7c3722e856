"""What a person sees of a benchmark: a table's rows as they come, and a bar at a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Report:
    """Fixed-width columns; plain lines where rich is missing or the output is no terminal.

    Args:
        columns: (heading, width) of each; the first is left-aligned.
    """

    def __init__(self, columns: Sequence[tuple[str, int]]) -> None:
        self.columns = list(columns)
        self._console = _console()
        self._bar: Any = None
        self._task: Any = None

    def line(self, text: str) -> None:
        """One line of text."""
        if self._console is None:
            print(text, flush=True)
        else:
            self._console.print(text, soft_wrap=True)

    def start(self, total: int) -> None:
        """Print the heading; `total` rows will follow."""
        self.line(self._format([name for name, _ in self.columns]))
        if self._console is None or not self._console.is_terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        parts = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*parts, console=self._console, transient=True)
        self._task = self._bar.add_task("cases", total=total)
        self._bar.start()

    def row(self, cells: Sequence[str]) -> None:
        """One row, and a step of the bar."""
        self.line(self._format(cells))
        if self._bar is not None:
            self._bar.advance(self._task)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _format(self, cells: Sequence[str]) -> str:
        padded = []
        for index, (cell, (_, width)) in enumerate(zip(cells, self.columns, strict=False)):
            padded.append(cell.ljust(width) if index == 0 else cell.rjust(width))
        return " ".join(padded).rstrip()


def _console() -> Any:
    """rich's console, or None on a bare machine."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(highlight=False, markup=False)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1.0 else f"{seconds * 1e3:.0f}"
