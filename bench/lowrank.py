"""`fastrank bench lowrank`: a training step of one adapted linear layer, against PEFT's.

Each case times the frozen base, PEFT's layer, the same layer after `fastrank.patch`, and on a GPU
other published schedules, interleaved in one run. Rows compare fastrank with each of them, and each
with the frozen base.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastrank.bench import grids, harness, options, plan, timing
from fastrank.bench.cases import Case
from fastrank.bench.progress import Report, milliseconds
from fastrank.bench.rank_sweep import measure as measure_sweep
from fastrank.bench.results_file import Results, Row, failures

DEFAULTS: dict[str, Any] = {**options.DEFAULTS, "rank_sweep": False}
_COLUMNS = (
    ("case", 46),
    ("mode", 10),
    ("frozen ms", 10),
    ("peft ms", 10),
    ("fastrank ms", 11),
    ("peft/fastrank", 13),
    ("over frozen", 11),
)
# of the whole grid: minutes below the ten that it may take, for what the plan did not foresee
_SECONDS = {"cpu": 420.0, "cuda": 400.0}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line's options; their defaults are DEFAULTS."""
    options.add_options(parser, quick="a few small cases, seconds", seconds="420 on a CPU")
    parser.add_argument(
        "--rank-sweep", action="store_true", help="instead: one layer as its ranks are pruned"
    )


def run(
    *,
    device: str,
    quick: bool,
    rank_sweep: bool,
    threads: int | None,
    seconds: float | None,
    out: str | Path | None,
    resume: bool,
) -> dict[str, Any]:
    """Measure the grid of a device; see `fastrank.bench.run`."""
    with options.session(device, threads, seconds, out, resume) as (where, results):
        if rank_sweep:
            measure_sweep(where, quick, results, seconds or (10.0 if quick else 60.0))
            return results.content()
        seconds = seconds or (30.0 if quick else _SECONDS[where.type])
        measure_cases(grids.cases(where, quick), where, results, seconds)
        return options.finish(results)


def measure_cases(
    cases: Sequence[Case],
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
    every = len(cases)
    cases = [c for c in cases if not all(results.has(c.name, mode) for mode in modes)]
    if not cases:
        return True
    seconds *= len(cases) / every
    clock = timing.clock_for(device)
    _warm_up(device)
    rounds = plan.seconds_per_round(cases, device)
    budget = plan.Budget(seconds, plan.weights(rounds))
    with Report(_COLUMNS) as report, _light_collections():
        where = results.environment
        report.line(
            f"{where['device']}, {where['threads']} threads, torch {where['torch']}, "
            f"peft {where['peft']}, fastrank {where['fastrank']}"
        )
        about = max(seconds, plan.least(rounds)) / 60
        report.line(f"{len(cases)} cases, about {about:.1f} minutes")
        report.start(len(cases) * len(modes))
        for case in cases:
            if time.monotonic() > deadline:
                return False
            _measure_case(case, device, clock, budget.next(), modes, results, report)
        report.close()
        for line in summary(results.rows):
            report.line(line)
    return True


@contextmanager
def _light_collections() -> Iterator[None]:
    """Garbage collections that pass over what was imported: over 0.1 s less before each case."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _warm_up(device: torch.device) -> None:
    """Imports, thread pools and the profiler's start, on no case's account."""
    case = Case(64, 64, 64, 4, "float32")
    harness.Cell(case, grids.builders(case, device), device).prepare()


def _measure_case(
    case: Case,
    device: torch.device,
    clock: timing.Clock,
    seconds: float,
    modes: Sequence[str],
    results: Results,
    report: Report,
) -> None:
    begin = time.monotonic()
    made = grids.builders(case, device)
    cell = harness.Cell(case, made, device)
    cell.prepare()
    left = max(0.0, seconds - (time.monotonic() - begin))
    found_rows = []
    for mode in modes:
        found = cell.measure(mode, clock, left / len(modes))
        rows = harness.rows("lowrank", case.as_dict(), mode, found, grids.pairs(list(made)))
        found_rows += rows
        report.row(_cells(case, mode, rows))
    results.add(found_rows)
    if failures(found_rows):
        harness.check_alive(device)
    if device.type == "cuda":
        del cell, found
        gc.collect()  # PEFT's modules hold each other
        torch.cuda.empty_cache()


def _cells(case: Case, mode: str, rows: Sequence[Row]) -> list[str]:
    by = {(row["variant"], row["baseline"]): row for row in rows}
    over_peft, over_frozen = by["fastrank", "peft"], by["fastrank", "frozen"]
    if "skipped" in over_peft:
        return [case.name, mode, f"skipped: {over_peft['skipped']}"]
    return [
        case.name,
        mode,
        milliseconds(over_frozen["baseline_median_s"]),
        milliseconds(over_peft["baseline_median_s"]),
        milliseconds(over_peft["median_s"]),
        f"{over_peft['speedup']:.2f}",
        f"{1 / over_frozen['speedup'] - 1:+.0%}",
    ]


def summary(rows: Sequence[Row]) -> list[str]:
    """Lines about PEFT over fastrank: geometric mean, lowest case, cases below 1 and 0.97."""
    lines = []
    for mode in harness.MODES:
        taken = [
            row
            for row in rows
            if row["mode"] == mode
            and (row["variant"], row["baseline"]) == ("fastrank", "peft")
            and "skipped" not in row
        ]
        if not taken:
            continue
        ratios = [row["speedup"] for row in taken]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lowest = min(taken, key=lambda row: row["speedup"])
        lines.append(
            f"{mode}: PEFT / fastrank over {len(taken)} cases: geometric mean {mean:.3f}, "
            f"lowest {lowest['speedup']:.3f} ({lowest['case']['name']}), "
            f"{sum(r < 1 for r in ratios)} below 1, {sum(r < 0.97 for r in ratios)} below 0.97"
        )
    skipped = sum("skipped" in row for row in rows)
    if skipped:
        lines.append(f"{skipped} rows skipped, {failures(rows)} of them failures")
    return lines
