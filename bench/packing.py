"""`fastrank bench packing`: sparse updates from the mask to the average, and packed gradients.

Masks, pack and unpack, sums of many clients' updates, top-k codes, the weight gradient at a mask
and what training with it holds, each beside the dense way and the peers there are. Results are
judged before they are timed, and memory stands beside time: `error` is relative to float64, 0 where
results must be exact and are. Rows of top-k codes have `bits_per_index`, those of a whole model
`state_bytes`: its gradients and optimizer state.

64 clients' dense deltas are of 2048 x 2048 on a CPU (1.1 GB), of 4096 x 4096 on a GPU (4.3 GB).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastrank.bench import harness, options, plan, timing
from fastrank.bench.packing_cases import FORMATS, PackingCase, PackingCell, Work, cases
from fastrank.bench.packing_train import BackwardWork, FinetuneWork, WeightGradWork
from fastrank.bench.packing_wire import (
    AggregateWork,
    DecodeWork,
    EncodeWork,
    MaskWork,
    PackWork,
    TopKWork,
    UnpackWork,
)
from fastrank.bench.progress import Report, milliseconds
from fastrank.bench.results_file import Results, Row, failures

DEFAULTS = options.DEFAULTS
WORKS: dict[str, type[Work]] = {
    "mask": MaskWork,
    "pack": PackWork,
    "unpack": UnpackWork,
    "aggregate": AggregateWork,
    "topk": TopKWork,
    "topk-encode": EncodeWork,
    "topk-decode": DecodeWork,
    "weight-grad": WeightGradWork,
    "backward": BackwardWork,
    "finetune": FinetuneWork,
}


@dataclass(frozen=True)
class Goal:
    """What a row should show.

    Args:
        case, baseline: which row.
        key: "speedup" must be at least `bound`, "bits_per_index" at most; "peak_bytes" and
            "state_bytes" are shares of the baseline's, at most.
        devices: where it is one.
    """

    case: str
    baseline: str
    key: str
    bound: float
    devices: tuple[str, ...] = ("cpu", "cuda")

    def value(self, row: Row) -> float:
        share = self.key in ("peak_bytes", "state_bytes")
        return row[self.key] / row[f"baseline_{self.key}"] if share else row[self.key]

    def met(self, row: Row) -> bool:
        value = self.value(row)
        return value >= self.bound if self.key == "speedup" else value <= self.bound


GOALS = (
    Goal("mask-16.8M", "bernoulli-philox", "speedup", 50.0),
    Goal("aggregate-64", "dense", "speedup", 20.0),
    Goal("weight-grad-4096", "dense", "speedup", 0.95),
    Goal("weight-grad-4096", "dense", "peak_bytes", 1 / 8),
    Goal("backward-4096", "dense", "peak_bytes", 1 / 8),
    Goal("finetune-bert-base", "dense", "state_bytes", 0.02),
    Goal("topk-encode-16.8M", "zlib-bitmap", "bits_per_index", 9.0),
    Goal("weight-grad-4096-bfloat16", "dense", "speedup", 1.5, ("cuda",)),
    *(
        Goal(f"{way}-268M-{dtype}", "copy", "speedup", 0.85, ("cuda",))
        for way in ("pack", "unpack")
        for dtype in FORMATS
    ),
)
_COLUMNS = (("case", 30), ("baseline", 17), ("baseline ms", 11), ("fastrank ms", 11),
            ("speed-up", 8), ("goal", 5), ("MB", 8), ("theirs", 8), ("error", 8))  # fmt: skip
_SECONDS = {"cpu": 240.0, "cuda": 240.0}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line's options; their defaults are DEFAULTS."""
    options.add_options(parser, quick="small cases, seconds", seconds="default 240")


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
    cases: Sequence[PackingCase],
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
    todo = [c for c in cases if not results.has(c.name, harness.MODES[0])]
    budget = plan.Budget(seconds, [1.0] * len(todo))
    clock = timing.clock_for(device)
    with Report(_COLUMNS) as report:
        where = results.environment
        report.line(f"{where['device']}, {where['threads']} threads, torch {where['torch']}")
        report.start(len(todo))
        for case in todo:
            if time.monotonic() > deadline:
                return False
            found_rows = _measure(case, device, clock, budget.next())
            for row in found_rows:
                report.row(_cells(row))
            results.add(found_rows)
            if failures(found_rows):
                harness.check_alive(device)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        report.close()
        for line in summary(results.rows):
            report.line(line)
    return True


def _measure(
    case: PackingCase, device: torch.device, clock: timing.Clock, seconds: float
) -> list[Row]:
    begin = time.monotonic()
    work = WORKS[case.kind](case, device)
    cell = PackingCell.of(work)
    cell.prepare()
    modes = harness.MODES if device.type == "cuda" and work.graph else harness.MODES[:1]
    left = max(0.0, seconds - (time.monotonic() - begin))
    # "to-dense" is fastrank's too
    pairs = [("fastrank", name) for name in cell.builders if name not in ("fastrank", "to-dense")]
    if "to-dense" in cell.builders:
        pairs.append(("to-dense", "dense"))
    rows: list[Row] = []
    for mode in modes:
        if mode == "full-graph":
            cell.steps = {name: step for name, step in cell.steps.items() if name in work.graph}
            pairs = [pair for pair in pairs if set(pair) <= set(work.graph)]
        found = cell.measure(mode, clock, left / len(modes))
        for row in harness.rows("packing", case.as_dict(), mode, found, pairs):
            if "skipped" not in row:
                row |= work.extras(row["variant"])
                theirs = work.extras(row["baseline"])
                row |= {f"baseline_{key}": value for key, value in theirs.items()}
            rows.append(row)
    return rows


def goals_of(row: Row) -> list[Goal]:
    """The goals that a row is about. On a GPU they are about what the device does, a graph's row
    where there is one: a call from Python takes longer to start than many of these to run."""
    case, baseline = row["case"], row["baseline"]
    captured = case["device"] == "cuda" and baseline in WORKS[case["kind"]].graph
    if row["mode"] != ("full-graph" if captured else "full") or row["variant"] != "fastrank":
        return []
    return [
        goal
        for goal in GOALS
        if (goal.case, goal.baseline) == (case["name"], baseline) and case["device"] in goal.devices
    ]


def _cells(row: Row) -> list[str]:
    name, baseline = row["case"]["name"], row["baseline"]
    if row["mode"] != "full":
        name = f"{name} {row['mode'].removeprefix('full-')}"
    if row["variant"] != "fastrank":
        name = f"{name} {row['variant']}"
    if "skipped" in row:
        return [name, baseline, f"skipped: {row['skipped']}"]
    bound = [f"{goal.bound:g}" for goal in goals_of(row) if goal.key == "speedup"]
    return [
        name,
        baseline,
        milliseconds(row["baseline_median_s"]),
        milliseconds(row["median_s"]),
        f"{row['speedup']:.2f}",
        *(bound or [""]),
        f"{row['peak_bytes'] / 1e6:.3g}",
        f"{row['baseline_peak_bytes'] / 1e6:.3g}",
        "" if row["error"] is None else f"{row['error']:.1e}",
    ]


def summary(rows: Sequence[Row]) -> list[str]:
    """A line for every goal, for top-k codes, and one for failures."""
    lines = []
    for row in rows:
        for goal in goals_of(row):
            lines.append(f"{row['case']['name']}: {_against(goal, row)}")
    for row in rows:
        if "bits_per_index" in row and "skipped" not in row and row["mode"] == "full":
            lines.append(_codec(row))
    if failed := failures(rows):
        lines.append(f"{failed} rows failed")
    return lines


def _against(goal: Goal, row: Row) -> str:
    if "skipped" in row:
        return f"skipped: {row['skipped']}"
    value, verdict = goal.value(row), "" if goal.met(row) else ", missed"
    if goal.key == "speedup":
        return f"{value:.2f} times as fast as {goal.baseline} (goal {goal.bound:g}{verdict})"
    if goal.key == "bits_per_index":
        return f"{value:.2f} bits an index (goal at most {goal.bound:g}{verdict})"
    what = "peak memory" if goal.key == "peak_bytes" else "gradients and optimizer state"
    return f"{what} {value:.2%} of {goal.baseline}'s (goal at most {goal.bound:.3g}{verdict})"


def _codec(row: Row) -> str:
    k = round(row["case"]["N"] * row["case"]["K"] * row["case"]["density"])
    ours, theirs = k / row["median_s"] / 1e6, k / row["baseline_median_s"] / 1e6
    return (
        f"{row['case']['name']}: {row['bits_per_index']:.2f} bits an index, {ours:.0f} M a second;"
        f" {row['baseline']} {row['baseline_bits_per_index']:.2f} bits, {theirs:.0f} M"
    )
