"""The file that a benchmark writes: `environment`, `rows` and `peers`, whole at every moment.

FILE.csv beside FILE.json has the rows flat, each with its environment.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastrank.bench import peer_list
from fastrank.errors import UsageError

_IDENTITY = ("bench", "case", "mode", "variant", "baseline")
_NUMBERS = (
    "median_s",
    "q20_s",
    "q80_s",
    "baseline_median_s",
    "speedup",
    "peak_bytes",
    "baseline_peak_bytes",
    "error",
    "baseline_error",
)
_NULLABLE = ("peak_bytes", "baseline_peak_bytes", "error", "baseline_error")

Row = dict[str, Any]


class Results:
    """Rows of one benchmark, written after every change.

    Args:
        path: the file, or None to keep the rows in memory alone.
        environment: where the rows come from.
        resume: take up the rows of an earlier run that are in the file. They must come from the
            same device and versions; the first run's environment stays.

    Raises:
        UsageError: the file can't be read or written, or comes from elsewhere.
    """

    def __init__(
        self, path: Path | None, environment: Mapping[str, Any], *, resume: bool = False
    ) -> None:
        self.path, self.environment, self.rows = path, dict(environment), []
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"--out {path}: {path.parent} is no folder; make it, or give another")
        if path is not None and path.is_dir():
            raise UsageError(f"--out {path} is a folder; give a file's name")
        if path is not None and path.suffix == ".csv":
            raise UsageError(
                f"--out {path}: the table is made beside the JSON file; give {path.stem}.json"
            )
        if resume and path is not None and path.exists():
            before = read(path)
            _refuse_other_origin(path, before["environment"], self.environment)
            self.environment, self.rows = before["environment"], before["rows"]
        self._done = {(row["case"]["name"], row["mode"]) for row in self.rows}

    def has(self, name: str, mode: str) -> bool:
        """Whether a case has rows of that mode, skipped ones included."""
        return (name, mode) in self._done

    def add(self, rows: Iterable[Row]) -> None:
        """Check rows, append them and write the file.

        Raises:
            ValueError: a row that is not as `check_row` wants it.
        """
        for row in rows:
            check_row(row)
            self.rows.append(row)
            self._done.add((row["case"]["name"], row["mode"]))
        self.write()

    def check_writable(self) -> None:
        """Make the file where there is none: a bad path shows before the work, not after it."""
        if self.path is not None and not self.path.exists():
            self.write()

    def write(self) -> None:
        """Replace the file, and the table beside it, by the present rows."""
        if self.path is not None:
            write_json(self.path, self.content())
            if self.rows:
                _write(self.path.with_suffix(".csv"), flat(self.environment, self.rows))

    def content(self) -> dict[str, Any]:
        """What the file holds."""
        peers = peer_list.states(self.rows, self.environment.get("device_type", "cpu"))
        return {"environment": self.environment, "rows": self.rows, "peers": peers}


def flat(environment: Mapping[str, Any], rows: Iterable[Row]) -> str:
    """Rows as CSV: a column for every field, those of `case` and of the environment named so."""
    where = {f"environment.{key}": value for key, value in environment.items()}
    table = []
    for row in rows:
        case = {f"case.{key}": value for key, value in row["case"].items()}
        table.append(case | {k: v for k, v in row.items() if k != "case"} | where)
    columns: dict[str, None] = {key: None for key in _IDENTITY if key != "case"}
    for line in table:
        columns |= dict.fromkeys(key for key in line if key not in where)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, *where], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def write_json(path: Path, content: Any) -> None:
    """Replace a file in one step.

    Raises:
        UsageError: it can't be written.
        ValueError: a number in it is not finite.
    """
    _write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _write(path: Path, text: str) -> None:
    from fastrank.federated.checkpoint import write_atomic

    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}") from error


def check_row(row: Mapping[str, Any]) -> None:
    """Every row says what ran and either how fast or why not.

    Raises:
        ValueError: a key is missing or holds something else than was wanted.
    """
    missing = [key for key in _IDENTITY if key not in row]
    if missing:
        raise ValueError(f"row lacks {', '.join(missing)}: {dict(row)}")
    if not isinstance(row["case"], Mapping) or not isinstance(row["case"].get("name"), str):
        raise ValueError(f"case is {row['case']!r}; wanted an object with a name")
    if "skipped" in row:
        if not isinstance(row["skipped"], str) or not row["skipped"]:
            raise ValueError(f"skipped is {row['skipped']!r}; wanted the reason in words")
        return
    for key in _NUMBERS:
        if key not in row:
            raise ValueError(f"row lacks {key}: {dict(row)}")
        value = row[key]
        if value is None and key in _NULLABLE:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{key} is {value!r}; wanted a number")
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{key} is {value}; wanted a finite number that is not negative")


def failures(rows: Iterable[Row]) -> int:
    """Rows that could not be measured because something went wrong, not because it isn't there."""
    return sum(": failed: " in row.get("skipped", "") for row in rows)


def read(path: Path) -> dict[str, Any]:
    """A results file, checked.

    Raises:
        UsageError: there is none, or it is something else.
    """
    try:
        content = json.loads(path.read_bytes())
        rows = content["rows"]
        content["environment"]["device"]
        for row in rows:
            check_row(row)
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}; give a results file") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no results file of fastrank bench ({error})") from error
    return content


def _refuse_other_origin(path: Path, before: Mapping, now: Mapping) -> None:
    for key in ("device", "torch", "triton", "peft", "fastrank", "commit", "threads"):
        if before.get(key) != now.get(key):
            raise UsageError(
                f"{path} was measured with {key} {before.get(key)}, here it is {now.get(key)}; "
                "write to another file"
            )
