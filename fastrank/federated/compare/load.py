"""Finished runs, read back from their folders."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrank.errors import UsageError
from fastrank.federated.config import Config, method_options
from fastrank.federated.methods import METHODS

_WHOLE = ("round", "clients", "dropped", "bytes_up", "bytes_down", "payload_up", "payload_down",
          "head_up", "head_down", "trainable_params", "peak_memory")  # fmt: skip
_SUMMARY = ("accuracy", "rounds", "bytes_up", "bytes_down", "payload_up", "payload_down", "head_up",
            "head_down", "seconds", "peak_memory", "trainable_params")  # fmt: skip
_REAL = ("train_loss", "eval_loss", "accuracy", "seconds", "energy_j")


@dataclass(frozen=True)
class FinishedRun:
    """One run as its folder tells it.

    Attributes:
        folder: where it is.
        config: config.json.
        summary: summary.json.
        rows: rounds.csv; empty cells are None.
        metrics: metrics.jsonl, empty where the method records nothing.
        variant: what a file's [variants] calls it, where it was run from one; and the options that
            tell those variants apart.
    """

    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    variant: str = ""
    varied: frozenset[str] = frozenset()

    @property
    def options(self) -> dict[str, Any]:
        return self.config["options"]

    @property
    def method(self) -> str:
        return self.options["method"]

    @property
    def seed(self) -> int:
        return self.options["seed"]


def toml_files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.toml"))


def runs_in(folder: Path) -> tuple[list[FinishedRun], list[tuple[str, str]]]:
    """The finished runs right below a folder, and (name, reason) of the others there.

    Raises:
        UsageError: there is no run at all.
    """
    found = sorted(path.parent for path in folder.glob("*/config.json"))
    if not found:
        raise UsageError(
            f"{str(folder)!r} holds no run (no config.json), no .toml file and no folders of runs"
        )
    finished, others = [], []
    for path in found:
        if (path / "summary.json").exists():
            finished.append(load_run(path))
        else:
            others.append((str(path), unfinished(path)))
    return finished, others


def unfinished(folder: Path) -> str:
    """How far a run is that has no summary."""
    total = read_config(folder)["options"].get("num_rounds", "?")
    done = len(_read_rounds(folder)) if (folder / "rounds.csv").exists() else 0
    return f"not finished ({done} of {total} rounds); go on with it: fastrank resume {folder}"


def load_run(folder: Path) -> FinishedRun:
    """A finished run.

    Raises:
        UsageError: it isn't finished, or its files are damaged.
    """
    config = read_config(folder)
    if not (folder / "summary.json").exists():
        raise UsageError(f"the run in {str(folder)!r} is {unfinished(folder)}")
    summary = _read_json(folder / "summary.json")
    if missing := [name for name in _SUMMARY if name not in summary]:
        raise UsageError(f"{folder / 'summary.json'} lacks {', '.join(missing)}; was it edited?")
    rows = _read_rounds(folder)
    if not rows or summary.get("rounds") != len(rows):
        raise UsageError(
            f"{folder}: summary.json tells of {summary.get('rounds')} rounds, rounds.csv of "
            f"{len(rows)}; was one of them edited?"
        )
    metrics = []
    if (folder / "metrics.jsonl").exists():
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            try:
                metrics.append(json.loads(line))
            except ValueError as error:
                raise UsageError(f"{folder / 'metrics.jsonl'} is damaged: {error}") from error
    return FinishedRun(folder, config, summary, rows, metrics)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a run, finished or not."""
    config = _read_json(folder / "config.json")
    options = config.get("options")
    if not isinstance(options, dict) or not {"method", "seed"} <= set(options):
        raise UsageError(f"{folder / 'config.json'} is not a run's configuration; was it edited?")
    return {**config, "options": {**_defaults(options["method"]), **options}}


@functools.cache
def _defaults(method: str) -> dict[str, Any]:
    """What a run had of options that came after it: defaults leave everything as it was."""
    known = [*dataclasses.fields(Config)]
    if method in METHODS:
        own = set(method_options(METHODS[method]))
        known += [f for f in dataclasses.fields(METHODS[method]) if f.name in own]
    return {f.name: f.default for f in known if f.default is not dataclasses.MISSING}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is damaged: it holds no JSON object")
    return content


def _read_rounds(folder: Path) -> list[dict[str, Any]]:
    path = folder / "rounds.csv"
    try:
        with open(path, newline="") as file:
            return [
                {k: _number(row[k], int) for k in _WHOLE}
                | {k: _number(row[k], float) for k in _REAL}
                for row in csv.DictReader(file)
            ]
    except OSError as error:
        raise UsageError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{path} is not a run's ledger ({error}); was it edited?") from error


def _number(text: str, kind: type) -> Any:
    return None if text == "" else kind(text)
