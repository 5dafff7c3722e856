"""Time of one layer as ranks are pruned: r = 256 down to 0, by masks and by a prefix.

All points and the frozen base run in turn in one go, so that a fall is not the machine's drift. A
mask keeps ranks spread over all of them, as pruning does; a prefix keeps the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastrank.bench import harness, timing, variants
from fastrank.bench.cases import DTYPES, Case, LayerStep, Operands, Unavailable
from fastrank.bench.progress import Report, milliseconds
from fastrank.bench.results_file import Results, Row
from fastrank.kernels.lowrank import lowrank_linear

RANK = 256
POINTS = (256, 192, 128, 64, 32, 16, 0)
# how the ranks that are on are said -> what it costs is that kind's row
KINDS = ("host-mask", "device-mask", "prefix", "device-prefix")
_COLUMNS = (("case", 46), ("ranks", 14), ("mode", 10), ("frozen ms", 10), ("fastrank ms", 11),
            ("over frozen", 11), ("error", 9))  # fmt: skip


def cases(device: torch.device, quick: bool) -> list[Case]:
    """One layer a dtype; the GPU's is the one that the overhead targets are about."""
    if device.type == "cuda":
        M, d = (1024, 1024) if quick else (8192, 4096)
        return [Case(M, d, d, RANK, "bfloat16", bias=False, precision="16-bit")]
    M, d = (64, 96) if quick else (1024, 768)
    return [Case(M, d, d, RANK, dtype) for dtype in DTYPES]


def measure(device: torch.device, quick: bool, results: Results, seconds: float) -> None:
    """Measure the points that `results` lacks, and say where time rises as ranks fall."""
    modes = harness.MODES if device.type == "cuda" else harness.MODES[:1]
    todo = cases(device, quick)
    clock = timing.clock_for(device)
    with Report(_COLUMNS) as report:
        kinds = [kind for kind in KINDS if _why_not(kind, device) is None]
        report.start(len(todo) * len(modes) * len(kinds) * len(POINTS))
        for case in todo:
            if all(results.has(_name(case, KINDS[0], POINTS[0]), mode) for mode in modes):
                continue
            cell = harness.Cell(case, _builders(), device)
            cell.prepare()
            found_rows = []
            for mode in modes:
                found = cell.measure(mode, clock, seconds / len(todo) / len(modes))
                found_rows += _rows(case, mode, found)
            results.add(found_rows)
            for row in found_rows:
                if row["case"]["mask"] in kinds:
                    report.row(_cells(case, row))
        report.close()
        for line in summary(results.rows):
            report.line(line)


def _builders() -> dict[str, Callable]:
    made: dict[str, Callable] = {"frozen": variants.frozen}
    for kind in KINDS:
        made |= {f"{kind}-{ranks}": partial(_masked, kind=kind, ranks=ranks) for ranks in POINTS}
    return made


def _masked(case: Case, operands: Operands, *, kind: str, ranks: int) -> LayerStep:
    """`lowrank_linear` with so many ranks on."""
    device = operands.x.device
    reason = _why_not(kind, device)
    if reason is not None:
        raise Unavailable(reason)
    active, on = _active(kind, ranks, case.R, device)
    dtype = DTYPES[case.dtype] if case.precision == "16-bit" else torch.float32
    a, b = (nn.Parameter(t.to(dtype)) for t in (operands.A, operands.B))

    def layer(x: Tensor) -> Tensor:
        return lowrank_linear(x, operands.weight, operands.bias, a, b, active=active)

    x, trained = variants.leaf(operands.x), {"dA": a, "dB": b}
    frozen = [operands.weight]
    return LayerStep(layer, x, operands.dy, trained, frozen=frozen, active=on.to(device))


def _why_not(kind: str, device: torch.device) -> str | None:
    if kind.startswith("device") and device.type == "cpu":
        return "on a CPU every mask is a host mask"
    return None


def _active(kind: str, ranks: int, R: int, device: torch.device) -> tuple[Tensor | int, Tensor]:
    """What `active` is given, and which ranks that means, bool `[R]` on the CPU."""
    on = torch.zeros(R, dtype=torch.bool)
    if kind.endswith("prefix"):
        on[:ranks] = True
        prefix = torch.tensor(ranks, device=device) if kind == "device-prefix" else ranks
        return prefix, on
    # the same order for every point: each keeps a subset of what the one before kept
    order = torch.randperm(R, generator=torch.Generator().manual_seed(1))
    on[order[:ranks]] = True
    return (on if kind == "host-mask" else on.to(device)), on


def _name(case: Case, kind: str, ranks: int) -> str:
    return f"rank-sweep-{case.name}-{kind}-{ranks}"


def _rows(case: Case, mode: str, found: dict[str, harness.Measured]) -> list[Row]:
    made = []
    for kind in KINDS:
        for ranks in POINTS:
            point = case.as_dict() | {"name": _name(case, kind, ranks)}
            point |= {"mask": kind, "active": ranks}
            pair = {"fastrank": found[f"{kind}-{ranks}"], "frozen": found["frozen"]}
            made += harness.rows("lowrank", point, mode, pair, [("fastrank", "frozen")])
    return made


def _cells(case: Case, row: Row) -> Sequence[str]:
    point = row["case"]
    start = [case.name, f"{point['mask']} {point['active']}", row["mode"]]
    if "skipped" in row:
        return [*start, f"skipped: {row['skipped']}"]
    return [
        *start,
        milliseconds(row["baseline_median_s"]),
        milliseconds(row["median_s"]),
        f"{1 / row['speedup'] - 1:+.1%}",
        f"{row['error']:.1e}",
    ]


def summary(rows: Sequence[Row]) -> list[str]:
    """A line for every swept kind: its ends, and the largest rise from one point to the next."""
    series: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in rows:
        point = row["case"]
        if "active" in point and "skipped" not in row:
            key = (point["dtype"], point["mask"], row["mode"])
            series.setdefault(key, {})[point["active"]] = row
    lines = []
    for key, by_rank in series.items():
        ordered = [by_rank[ranks] for ranks in sorted(by_rank, reverse=True)]
        times = [row["median_s"] for row in ordered]
        rises = [after / before - 1 for before, after in pairwise(times)]
        lines.append(
            f"{' '.join(key)}: {milliseconds(times[0])} ms at {max(by_rank)} ranks, "
            f"{milliseconds(times[-1])} at {min(by_rank)} (frozen "
            f"{milliseconds(ordered[-1]['baseline_median_s'])}); largest rise "
            f"{max(0.0, *rises):.1%}"
        )
    return lines
