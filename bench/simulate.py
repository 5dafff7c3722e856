"""`fastrank bench simulate`: clients trained side by side, against one after another with PEFT.

A time is that of one optimizer step of every client of a round (forward, backward, clipping,
AdamW): a round of the case's local steps is run, and divided by their number. What it holds beside
the steps, and what each variant is, is said in simulate_rounds.py. Before anything is timed, every
variant's updates are compared with PEFT's; `error` is an update's distance from float64's.

Rows of mode "full": "fastrank" is the executor that "auto" chooses; `executor` and
`clients_in_parallel` of the row say which. Memory is the peak of a round of one local step over the
models, of which each variant has one.

Rows of mode "round" (CPU): a whole round, with wire format and aggregation, against the same job in
Flower's simulation on Ray, where flwr is installed (simulate_flower.py).

--memory: rows of mode "memory", a case for each number of clients in parallel. `base_bytes` is the
one base model.

--profile: rows of mode "profile" say what a client-parallel step is made of. `variant` is a kind of
work, `baseline` the whole step, `share` the kind's part of it (simulate_profile.py).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastrank.bench import harness, options, simulate_cases, timing
from fastrank.bench.cases import Unavailable
from fastrank.bench.progress import Report, milliseconds
from fastrank.bench.results_file import Results, Row, failures
from fastrank.bench.simulate_cases import SimCase
from fastrank.bench.simulate_cell import BASELINE, Builder, RoundCell
from fastrank.bench.simulate_rounds import Contest, Round, executor_name
from fastrank.bench.variants import has_peft
from fastrank.errors import UsageError
from fastrank.memory import keep_freed_memory

DEFAULTS: dict[str, Any] = {**options.DEFAULTS, "memory": False, "profile": False}
# of a case: how many times PEFT's speed it is meant to have
GOALS = {
    "encoder-6x384-8x4x32": 2.0,
    "encoder-2x128-16x4x16": 5.0,
    "encoder-12x768-32x4x128-bf16": 8.0,
    "llama-16x2048-8x4x256-bf16": 1.5,
}
PAIRS = [
    ("fastrank", BASELINE),
    ("fastrank", "fastrank-sequential"),
    ("fastrank-sequential", BASELINE),
]
_COLUMNS = (("case", 30), ("executor", 18), ("peft ms", 9), ("one by one ms", 13),
            ("fastrank ms", 11), ("peft/fastrank", 13), ("goal", 5))  # fmt: skip
_SECONDS = {"cpu": 300.0, "cuda": 200.0}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line's options; their defaults are DEFAULTS."""
    add = parser.add_argument
    options.add_options(parser, quick="tiny models, under a minute", seconds="300 on a CPU")
    add("--memory", action="store_true", help="instead: peak memory by clients in parallel")
    add("--profile", action="store_true", help="instead: what a client-parallel step is made of")


def run(
    *,
    device: str,
    quick: bool,
    memory: bool,
    profile: bool,
    threads: int | None,
    seconds: float | None,
    out: str | Path | None,
    resume: bool,
) -> dict[str, Any]:
    """Measure the grid of a device; see `fastrank.bench.run`."""
    if not has_peft():
        raise UsageError("simulate needs PEFT, which is not installed: pip install peft")
    if memory and profile:
        raise UsageError("--memory and --profile are measured one at a time; give one of them")
    with options.session(device, threads, seconds, out, resume) as (where, results):
        if where.type == "cpu":
            keep_freed_memory()  # as the command line's simulate does; for every engine alike
        seconds = seconds or (4.0 if quick else _SECONDS[where.type])
        if memory:
            from fastrank.bench import simulate_memory

            simulate_memory.measure(where, quick, results, seconds)
        elif profile:
            from fastrank.bench import simulate_profile

            simulate_profile.measure(where, quick, results)
        else:
            measure_cases(simulate_cases.cases(where, quick), where, results, seconds)
            if where.type == "cpu":
                from fastrank.bench import simulate_flower

                simulate_flower.measure(quick, results)
            return options.finish(results)
        return results.content()


def _auto(contest: Contest, steps: int | None) -> Round:
    return contest.by(contest.executor("auto", steps=steps))


def _one_by_one(contest: Contest, steps: int | None) -> Round:
    if executor_name(contest.executor("auto")) == "sequential":
        raise Unavailable("auto chose one client after another, so fastrank's row is its own")
    return contest.by(contest.executor("sequential", steps=steps))


BUILDERS: Mapping[str, Builder] = {"fastrank": _auto, "fastrank-sequential": _one_by_one}


def measure_cases(
    cases: Sequence[SimCase],
    device: torch.device,
    results: Results,
    seconds: float,
    deadline: float = math.inf,
) -> bool:
    """Measure the cases that `results` lacks.

    Args:
        seconds: to spend on samples of all of them, about; every case gets its fewest samples.
        deadline: `time.monotonic()` after which no other case is begun.

    Returns:
        Whether all of them are measured.
    """
    each = seconds / sum(_weight(case) for case in cases)
    cases = [case for case in cases if not results.has(case.name, "full")]
    with Report(_COLUMNS) as report:
        where = results.environment
        report.line(
            f"{where['device']}, {where['threads']} threads, torch {where['torch']}, "
            f"peft {where['peft']}, fastrank {where['fastrank']}"
        )
        report.start(len(cases))
        for case in cases:
            if time.monotonic() > deadline:
                return False
            rows = measure_case(case, device, each * _weight(case))
            results.add(rows)
            report.row(_cells(rows))
            if failures(rows):
                harness.check_alive(device)
        report.close()
        for line in summary(results.rows):
            report.line(line)
    return True


def _weight(case: SimCase) -> float:
    """Share of the time: what is called often costs more than its FLOP, goals want more samples."""
    return (2e11 + case.local_steps * case.work) * (2 if case.name in GOALS else 1)


def measure_case(case: SimCase, device: torch.device, seconds: float) -> list[Row]:
    """The rows of one case; building and checking it takes time beside the samples' seconds."""
    cell = RoundCell(case, BUILDERS, device)
    cell.prepare()
    found = cell.measure("full", timing.clock_for(device), seconds)
    rows = harness.rows("simulate", case.as_dict(), "full", found, PAIRS)
    if cell.contest is not None:
        auto = cell.contest.executor("auto")
        facts = {"executor": executor_name(auto), "clients_in_parallel": auto.clients_in_parallel}
        alone = {"executor": "sequential", "clients_in_parallel": 1}
        base = {"base_bytes": cell.contest.base_bytes()}
        rows = [row | base | (facts if row["variant"] == "fastrank" else alone) for row in rows]
    cell.close()
    return rows


def _cells(rows: Sequence[Row]) -> list[str]:
    by = {(row["variant"], row["baseline"]): row for row in rows}
    row, name = by["fastrank", BASELINE], rows[0]["case"]["name"]
    if "skipped" in row:
        return [name, f"skipped: {row['skipped']}"]
    alone = by["fastrank-sequential", BASELINE]
    return [
        name,
        f"{row['executor']}:{row['clients_in_parallel']}",
        milliseconds(row["baseline_median_s"]),
        "-" if "skipped" in alone else milliseconds(alone["median_s"]),
        milliseconds(row["median_s"]),
        f"{row['speedup']:.2f}",
        f"{GOALS[name]:g}" if name in GOALS else "",
    ]


def summary(rows: Sequence[Row]) -> list[str]:
    """Lines about PEFT over fastrank: the cases that have goals, and the lowest of all."""
    taken = [
        row
        for row in rows
        if row["mode"] == "full"
        and (row["variant"], row["baseline"]) == ("fastrank", BASELINE)
        and "skipped" not in row
    ]
    lines = [
        f"{row['case']['name']}: {row['speedup']:.2f} times PEFT's steps a second, "
        f"goal {GOALS[row['case']['name']]:g}"
        for row in taken
        if row["case"]["name"] in GOALS
    ]
    if taken:
        lowest = min(taken, key=lambda row: row["speedup"])
        lines.append(
            f"lowest of {len(taken)} cases: {lowest['speedup']:.2f} ({lowest['case']['name']}, "
            f"{lowest['executor']})"
        )
    if failed := failures(rows):
        lines.append(f"{failed} rows failed")
    return lines
