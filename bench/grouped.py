"""`fastrank bench grouped`: a training step of one frozen layer with many adapters, in one pass.

Rows of x belong to groups (clients), each with its own A and B. Three variants, interleaved:
"grouped" is `grouped_lowrank_linear`, "loop" a `lowrank_linear` for each group on its own rows and
parameters, and "frozen" the base alone over all rows. A step is forward and backward, x with a
gradient. Errors are against a float64 loop over groups.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastrank.bench import harness, options, plan, timing
from fastrank.bench.grouped_cases import BUILDERS, GroupedCase, GroupedCell, cases
from fastrank.bench.progress import Report, milliseconds
from fastrank.bench.results_file import Results, Row, failures

DEFAULTS = options.DEFAULTS
# of a case: its most time over the frozen layer's
GOALS = {"M8192-d4096-G64-R4to64-bf16": 0.15}
PAIRS = [("grouped", "frozen"), ("grouped", "loop"), ("loop", "frozen")]
_COLUMNS = (("case", 42), ("mode", 10), ("frozen ms", 10), ("loop ms", 9), ("grouped ms", 10),
            ("loop/grouped", 12), ("over frozen", 11))  # fmt: skip
_SECONDS = {"cpu": 60.0, "cuda": 60.0}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line's options; their defaults are DEFAULTS."""
    options.add_options(parser, quick="two small cases, seconds", seconds="default 60")


def run(
    *,
    device: str,
    quick: bool,
    threads: int | None,
    seconds: float | None,
    out: str | Path | None,
    resume: bool,
) -> dict[str, Any]:
    """Measure the cases of a device; see `fastrank.bench.run`."""
    with options.session(device, threads, seconds, out, resume) as (where, results):
        seconds = seconds or (2.0 if quick else _SECONDS[where.type])
        measure_cases(cases(where, quick), where, results, seconds)
        return options.finish(results)


def measure_cases(
    cases: Sequence[GroupedCase],
    device: torch.device,
    results: Results,
    seconds: float,
    deadline: float = math.inf,
) -> bool:
    """Measure the cases that `results` lacks.

    Args:
        seconds: to spend on all of them, about.
        deadline: `time.monotonic()` after which no other case is begun.

    Returns:
        Whether all of them are measured.
    """
    modes = harness.MODES if device.type == "cuda" else harness.MODES[:1]
    cases = [c for c in cases if not all(results.has(c.name, mode) for mode in modes)]
    budget = plan.Budget(seconds, [1.0] * len(cases))
    clock = timing.clock_for(device)
    with Report(_COLUMNS) as report:
        where = results.environment
        report.line(f"{where['device']}, {where['threads']} threads, torch {where['torch']}")
        report.start(len(cases) * len(modes))
        for case in cases:
            if time.monotonic() > deadline:
                return False
            begin, share = time.monotonic(), budget.next()
            cell = GroupedCell(case, BUILDERS, device)
            cell.prepare()
            left = max(0.0, share - (time.monotonic() - begin))
            found_rows = []
            for mode in modes:
                found = cell.measure(mode, clock, left / len(modes))
                rows = harness.rows("grouped", case.as_dict(), mode, found, PAIRS)
                found_rows += rows
                report.row(_cells(case, mode, rows))
            results.add(found_rows)
            if failures(found_rows):
                harness.check_alive(device)
            if device.type == "cuda":
                del cell, found
                torch.cuda.empty_cache()
        report.close()
        for line in summary(results.rows):
            report.line(line)
    return True


def _cells(case: GroupedCase, mode: str, rows: Sequence[Row]) -> list[str]:
    by = {(row["variant"], row["baseline"]): row for row in rows}
    frozen, loop = by["grouped", "frozen"], by["grouped", "loop"]
    if "skipped" in frozen:
        return [case.name, mode, f"skipped: {frozen['skipped']}"]
    looped = "skipped" not in loop
    return [
        case.name,
        mode,
        milliseconds(frozen["baseline_median_s"]),
        milliseconds(loop["baseline_median_s"]) if looped else "-",
        milliseconds(frozen["median_s"]),
        f"{loop['speedup']:.2f}" if looped else "-",
        f"{1 / frozen['speedup'] - 1:+.0%}",
    ]


def summary(rows: Sequence[Row]) -> list[str]:
    """A line for every row that a goal is about, and one for failures."""
    lines = []
    for row in rows:
        goal = GOALS.get(row["case"]["name"])
        if goal is not None and row["variant"] == "grouped" and row["baseline"] == "frozen":
            got = row.get("skipped") or f"{1 / row['speedup'] - 1:+.1%} over the frozen layer"
            lines.append(f"{row['case']['name']} {row['mode']}: {got}, goal at most {goal:+.0%}")
    if failed := failures(rows):
        lines.append(f"{failed} rows failed")
    return lines
