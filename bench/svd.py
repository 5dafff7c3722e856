"""`fastrank bench svd`: truncated SVD of a model's matrices at once, accuracy beside time.

Operands are what a server has: values at seeded positions (1 %), sums of clients' thin factors, and
dense matrices. The peers get them in their own form, dense or SciPy's sparse, made before the clock
starts. `error` is 1 minus the energy ratio: how much less of the matrices a result holds than the
best approximation of that rank. Times without it mean nothing here: `svd_lowrank`'s default leaves
a tenth to a fifth of the energy of such matrices behind. Freed memory is kept, for all of them: the
larger peers' releases would be everybody's page faults.

The merge (svd_merge.py) is `fastrank.merge_adapters` against PEFT's `add_weighted_adapter`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastrank.bench import harness, options, plan, svd_cases, svd_merge, timing
from fastrank.bench.progress import Report, milliseconds
from fastrank.bench.results_file import Results, Row, failures
from fastrank.memory import keep_freed_memory

DEFAULTS = options.DEFAULTS
# (case, baseline) -> least speed-up
GOALS = {
    ("sparse-24x768-r16", "torch.linalg.svd"): 10.0,
    ("sparse-24x768-r16", "svd_lowrank-8"): 1.0,
    ("sparse-24x768-r16", "sklearn"): 1.0,
    ("factored-24x768-q160-r16", "torch.linalg.svd"): 8.0,
    ("merge-bert-base-10", "peft-merge"): 10.0,
    ("sparse-72x768-r64", "plain-torch"): 3.0,
    ("sparse-72x768-r64", "torch.linalg.svd-loop"): 100.0,
    ("factored-72x4096-q160-r16", "plain-torch"): 3.0,
    ("factored-72x4096-q160-r16", "torch.linalg.svd-loop"): 100.0,
}
_COLUMNS = (("case", 30), ("baseline", 22), ("baseline ms", 11), ("fastrank ms", 11),
            ("speed-up", 8), ("goal", 5), ("missing", 9), ("theirs", 9))  # fmt: skip
_SECONDS = {"cpu": 180.0, "cuda": 240.0}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line's options; their defaults are DEFAULTS."""
    options.add_options(parser, quick="small cases, seconds", seconds="180 on a CPU")


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
        if where.type == "cpu":
            keep_freed_memory()
        todo = [*svd_cases.cases(where, quick), *svd_merge.cases(where, quick)]
        measure_cases(todo, where, results, seconds or (2.0 if quick else _SECONDS[where.type]))
        return options.finish(results)


def measure_cases(
    cases: Sequence[svd_cases.SvdCase | svd_merge.MergeCase],
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
    todo = [c for c in cases if not results.has(c.name, modes[0])]
    budget = plan.Budget(seconds, [1.0] * len(todo))
    clock = timing.clock_for(device)
    with Report(_COLUMNS) as report:
        where = results.environment
        report.line(f"{where['device']}, {where['threads']} threads, torch {where['torch']}")
        report.start(len(todo))
        for case in todo:
            if time.monotonic() > deadline:
                return False
            begin, share = time.monotonic(), budget.next()
            cell, baselines = _cell(case, device)
            cell.prepare()
            left = max(0.0, share - (time.monotonic() - begin))
            found_rows: list[Row] = []
            for mode in _modes(case, modes):
                found = cell.measure(mode, clock, left / len(modes))
                pairs = [("fastrank", baseline) for baseline in baselines]
                rows = harness.rows("svd", case.as_dict(), mode, found, pairs)
                found_rows += rows
                for row in rows:
                    report.row(_cells(row))
            results.add(found_rows)
            if failures(found_rows):
                harness.check_alive(device)
            del cell
            if device.type == "cuda":
                torch.cuda.empty_cache()
        report.close()
        for line in summary(results.rows):
            report.line(line)
    return True


def _cell(
    case: svd_cases.SvdCase | svd_merge.MergeCase, device: torch.device
) -> tuple[harness.Cell, list[str]]:
    if isinstance(case, svd_merge.MergeCase):
        return svd_merge.MergeCell(case, svd_merge.BUILDERS, device), ["peft-merge"]
    found = svd_cases.builders(case, device)
    return svd_cases.SvdCell(case, found, device), [name for name in found if name != "fastrank"]


def _modes(case: svd_cases.SvdCase | svd_merge.MergeCase, modes: Sequence[str]) -> Sequence[str]:
    # a merge changes modules, which no graph can hold; torch's own SVD synchronises and is skipped
    return modes[:1] if isinstance(case, svd_merge.MergeCase) else modes


def _cells(row: Row) -> list[str]:
    name, baseline = row["case"]["name"], row["baseline"]
    if row["mode"] != "full":
        name = f"{name} {row['mode'].removeprefix('full-')}"
    if "skipped" in row:
        return [name, baseline, f"skipped: {row['skipped']}"]
    goal = GOALS.get((row["case"]["name"], baseline))
    return [
        name,
        baseline,
        milliseconds(row["baseline_median_s"]),
        milliseconds(row["median_s"]),
        f"{row['speedup']:.1f}",
        "" if goal is None else f"{goal:g}",
        f"{row['error']:.1e}",
        f"{row['baseline_error']:.1e}",
    ]


def summary(rows: Sequence[Row]) -> list[str]:
    """A line for every goal, and one for failures."""
    lines = []
    for row in rows:
        goal = GOALS.get((row["case"]["name"], row["baseline"]))
        if goal is not None and row["mode"] == "full":
            got = row.get("skipped") or (
                f"{row['speedup']:.1f} times {row['baseline']} (goal {goal:g}), energy missing"
                f" {row['error']:.1e} against {row['baseline_error']:.1e}"
            )
            lines.append(f"{row['case']['name']}: {got}")
    if failed := failures(rows):
        lines.append(f"{failed} rows failed")
    return lines
