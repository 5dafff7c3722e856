"""Whether the committed static report still says what the compilers make of the kernels.

At the Triton version that the report records everything is compared exactly. At any other registers
and shared memory are bounds: nothing spills, both keep within the target's limits, registers within
1.25 times the recorded number and 16 more, shared memory within 1.5 times and 4 KiB more (compilers
differ in how they allocate and lay out, not in what a kernel needs). What is planned before
anything is compiled (which variants there are, their grids, bytes and flops) is exact anywhere.

A sample compiles one variant of every kernel, on one target: of the kernel's rows the one at a
position that moves on with a number drawn from the commit, so that one commit gives one sample and
later ones in the end give all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastrank.bench.static import compiled_row, complaints, planned_row
from fastrank.bench.static_kernels import Variant
from fastrank.bench.static_machine import MOST_REGISTERS

COMMITTED = Path(__file__).parent / "results" / "static" / "static.json"
HOW = (
    "if that is meant, run `python -m fastrank.bench.static --out bench/results/static` "
    "and commit what it writes"
)
COMPILED = ("registers", "spills", "shared", "occupancy", "instructions")
# at another version of Triton: times, and beside that
REGISTER_BOUND, SHARED_BOUND = (1.25, 16), (1.5, 4096)

Row = Mapping[str, Any]
Key = tuple[str, str, str]


class Report(NamedTuple):
    """A committed report."""

    triton: str
    rows: dict[Key, Row]
    shapes: list[Row]


def load(path: Path = COMMITTED) -> Report:
    """The report as static.json holds it."""
    found = json.loads(path.read_text())
    rows = {(r["op"], r["target"], r["kernel"]): r for r in found["kernels"]}
    return Report(found["environment"]["triton"], rows, found["shapes"])


def key_of(variant: Variant) -> Key:
    return variant.op, variant.target, variant.name


def planning_differences(report: Report, variants: Iterable[Variant]) -> list[str]:
    """What the launchers choose, against the report; nothing is compiled."""
    found, left = [], dict(report.rows)
    for variant in variants:
        row = left.pop(key_of(variant), None)
        where = " ".join(key_of(variant))
        if row is None:
            found.append(f"{where} is launched and not in the report: {HOW}")
            continue
        # as JSON has it
        planned = json.loads(json.dumps(planned_row(variant)))
        found += _differences(where, row, planned, planned)
    found += [f"{' '.join(key)} is in the report and no longer launched: {HOW}" for key in left]
    return found


def compiled_differences(report: Report, variant: Variant, triton: str) -> list[str]:
    """What this version of Triton makes of a variant, against the report.

    Args:
        variant: one that the report has.
        triton: the version that is installed.
    """
    row, found = report.rows[key_of(variant)], compiled_row(variant)
    where = " ".join(key_of(variant))
    if triton == report.triton:
        return _differences(where, row, found, COMPILED)
    wrong = complaints(planned_row(variant) | found)
    bounds = {
        "registers": (*REGISTER_BOUND, MOST_REGISTERS[variant.target]),
        "shared": (*SHARED_BOUND, None),
    }
    for name, (times, more, limit) in bounds.items():
        most = int(times * row[name] + more)
        most = most if limit is None else min(most, limit)
        if found[name] > most:
            wrong.append(
                f"{where} takes {found[name]} {name} with Triton {triton}, where {most} are "
                f"allowed for the report's {row[name]} with {report.triton}: {HOW}"
            )
    return wrong


def _differences(where: str, row: Row, found: Row, names: Iterable[str]) -> list[str]:
    return [
        f"{where} has {name} {found[name]}, and {row.get(name)} in the report: {HOW}"
        for name in names
        if row.get(name) != found[name]
    ]


def sample(variants: Sequence[Variant], draw: int) -> list[Variant]:
    """One variant of each kernel.

    Args:
        variants: of all targets.
        draw: which; those of successive numbers go through all variants of a kernel.
    """
    kernels: dict[str, list[Variant]] = {}
    for variant in variants:
        kernels.setdefault(variant.function, []).append(variant)
    # kernels start at different places, so that every sample has every target
    return [each[(draw + i * len(each) // 3) % len(each)] for i, each in
            enumerate(kernels.values())]  # fmt: skip


def draw_of(commit: str | None) -> int:
    """The number that a commit's sample has; 0 where there is no checkout."""
    return 0 if commit is None else int(commit[:8], 16)
