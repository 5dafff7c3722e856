"""`fastrank bench simulate --memory`: what more clients in parallel cost and give.

Peak memory and time of a round of sixteen clients, by how many of them share a pass. There is one
base model however many they are; what grows is a pass's activations and the stacked adapters. The
number is given, not chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastrank.bench import harness, timing
from fastrank.bench.progress import Report, milliseconds
from fastrank.bench.results_file import Results, Row
from fastrank.bench.simulate_cases import SimCase
from fastrank.bench.simulate_cell import BASELINE, Builder, RoundCell

TOGETHER = (1, 2, 4, 8, 16)
_CLIENTS = 16
_STEPS = 2  # of a client in a round: times are of a step, and six variants are many
_COLUMNS = (("case", 30), ("in parallel", 11), ("base MB", 8), ("more MB", 8), ("peft more MB", 12),
            ("ms", 8), ("peft ms", 8))  # fmt: skip


def cases(device: torch.device, quick: bool) -> list[SimCase]:
    """Cohorts of sixteen."""
    if quick:
        return [SimCase("encoder-1x32", _CLIENTS, 2, 8, local_steps=3)]
    if device.type == "cuda":
        return [SimCase("encoder-12x768", _CLIENTS, 4, 128, "bfloat16")]
    return [
        SimCase("encoder-6x384", _CLIENTS, 4, 32, local_steps=_STEPS),
        SimCase("encoder-2x128", _CLIENTS, 4, 16, local_steps=_STEPS),
    ]


def measure(device: torch.device, quick: bool, results: Results, seconds: float) -> None:
    """Measure the cases that `results` lacks."""
    todo = [c for c in cases(device, quick) if not results.has(_name(c, TOGETHER[-1]), "memory")]
    clock = timing.clock_for(device)
    with Report(_COLUMNS) as report:
        report.start(len(todo) * len(TOGETHER))
        for case in todo:
            cell = RoundCell(case, {_variant(n): _builder(n) for n in TOGETHER}, device)
            cell.prepare()
            found = cell.measure("memory", clock, seconds / len(todo))
            rows = []
            for n in TOGETHER:
                point = case.as_dict() | {"name": _name(case, n), "clients_in_parallel": n}
                pair = {"fastrank": found[_variant(n)], BASELINE: found[BASELINE]}
                rows += harness.rows("simulate", point, "memory", pair, [("fastrank", BASELINE)])
            if cell.contest is not None:
                base = {"base_bytes": cell.contest.base_bytes(), "executor": "client-parallel"}
                rows = [row | base for row in rows]
            cell.close()
            results.add(rows)
            for row in rows:
                report.row(_cells(case, row))


def _variant(together: int) -> str:
    return f"fastrank-{together}"


def _builder(together: int) -> Builder:
    return lambda contest, steps: contest.by(
        contest.executor("client-parallel", together, steps=steps)
    )


def _name(case: SimCase, together: int) -> str:
    return f"memory-{case.name}-{together}"


def _cells(case: SimCase, row: Row) -> Sequence[str]:
    together = str(row["case"]["clients_in_parallel"])
    if "skipped" in row:
        return [case.name, together, f"skipped: {row['skipped']}"]
    keys = ("base_bytes", "peak_bytes", "baseline_peak_bytes")
    return [
        case.name,
        together,
        *(f"{row[key] / 1e6:.1f}" for key in keys),
        milliseconds(row["median_s"]),
        milliseconds(row["baseline_median_s"]),
    ]
