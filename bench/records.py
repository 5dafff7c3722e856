"""What pages are written from: the committed results files, and figures of their rows."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastrank.bench.results_file import Row, read
from fastrank.errors import UsageError


@dataclass(frozen=True)
class Record:
    """One results file."""

    path: Path

    @cached_property
    def content(self) -> dict[str, Any]:
        return read(self.path)

    @property
    def rows(self) -> list[Row]:
        return self.content["rows"]

    def one(self, case: str, baseline: str, variant: str = "fastrank", mode: str = "full") -> Row:
        """The measured row of a case.

        Raises:
            UsageError: there is none, or it was skipped.
        """
        wanted = {"variant": variant, "baseline": baseline, "mode": mode}
        for row in self.rows:
            if row["case"]["name"] == case and wanted.items() <= row.items():
                if "skipped" in row:
                    raise UsageError(f"{self.path}: {case} against {baseline}: {row['skipped']}")
                return row
        raise UsageError(f"{self.path} has no row of {case} against {baseline}; measure it again")

    def measured(
        self, variant: str, baseline: str, where: Callable[[dict], bool] = lambda case: True
    ) -> list[Row]:
        """Rows of mode "full" that were not skipped and whose case passes."""
        return [
            row
            for row in self.rows
            if (row["variant"], row["baseline"], row["mode"]) == (variant, baseline, "full")
            and "skipped" not in row
            and where(row["case"])
        ]

    def layers(self, baseline: str, where: Callable[[dict], bool] = lambda case: True) -> list[Row]:
        """fastrank's rows of a layer grid, in PEFT's default precision."""
        return self.measured(
            "fastrank", baseline, lambda case: case["precision"] == "peft" and where(case)
        )

    @property
    def device(self) -> str:
        """Its name without what doesn't tell it from others."""
        name = self.content["environment"]["device"]
        for word in ("(R)", "(TM)", " Processor"):
            name = name.replace(word, "")
        return name.strip()

    @property
    def threads(self) -> int:
        return self.content["environment"]["threads"]

    def origin(self) -> str:
        """Where, with what and when it was measured, in a line."""
        where = self.content["environment"]
        commit = f"commit {str(where['commit'])[:7]}" + (" and changes" if where["dirty"] else "")
        return (
            f"`{self.path.name}`: {self.device}, {self.threads} threads, torch "
            f"{where['torch']}, peft {where['peft']}, {commit}, {where['date'][:10]}."
        )


def results_files(folder: Path) -> list[Path]:
    """The files of a folder that `fastrank bench` wrote, of those that hold anything."""
    found = []
    for path in sorted(folder.glob("*.json")):
        rows = json.loads(path.read_bytes()).get("rows")
        if rows and all("bench" in row for row in rows):
            found.append(path)
    return found


def geometric_mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.exp(sum(map(math.log, found)) / len(found))


def speedups(rows: Sequence[Row]) -> list[float]:
    return [row["speedup"] for row in rows]


@dataclass(frozen=True)
class Run:
    """The record of a federated run: its folder's summary.json and rounds.csv."""

    folder: Path

    @cached_property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_bytes())

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_bytes())

    @cached_property
    def rounds(self) -> list[dict[str, Any]]:
        """Numbers, None where a cell is empty."""
        with (self.folder / "rounds.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [{k: json.loads(v) if v else None for k, v in row.items()} for row in rows]


def ms(seconds: float) -> str:
    """Milliseconds for people: three digits, all of them above a hundred."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(ratio: float) -> str:
    return f"{ratio:.0f} times" if ratio >= 19.5 else f"{ratio:.2g} times"
