"""What can be said of the GPU kernels without a GPU: `python -m fastrank.bench.static --out DIR`.

DIR/static.json and DIR/README.md hold, for every kernel variant that the launchers choose at the
published sizes, what the compilers made of it (registers, spills, shared memory, occupancy,
tensor-core instructions), what a launch of it moves and multiplies and how long that takes at the
roofline; and for every shape of the layer benchmark its launches with their bytes, the time that a
roofline predicts and the overhead over the frozen layer, for each route. Predictions, not
measurements: no launch costs anything in them, nothing overlaps, a launch of few programs is as
fast as one that fills the device, and a Triton product is as fast as the vendor's.

The variants are listed in static_kernels.py, their work in static_work.py, peaks and occupancy in
static_machine.py; static_check.py compares a committed report with the kernels as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fastrank.bench.environment import environment
from fastrank.bench.layer_plan import Launch, step_plan
from fastrank.bench.static_kernels import (
    LAYERS,
    OPS,
    RANKS,
    ROUTES,
    ROWS,
    Variant,
    every_variant,
)
from fastrank.bench.static_machine import (
    MACHINES,
    MOST_WARPS,
    OF_BYTES,
    OF_FLOPS,
    PEAKS,
    Machine,
    occupancy,
    predicted,
)
from fastrank.errors import UsageError
from fastrank.kernels.common.aot import INSTRUCTIONS, TARGETS, compile_kernel
from fastrank.kernels.lowrank.choices import override

# instructions of matrix units
MATRIX = ("HGMMA", "HMMA", "DMMA", "v_mfma")
_TITLES = {
    "lowrank": "One layer",
    "grouped": "Many adapters on one layer",
    "svd": "Truncated SVD",
    "packing": "Masks, packing, packed gradients",
}


def seconds(launches: Iterable[Launch], machine: Machine) -> float:
    """Sum over the kernels, each bound by its bytes or its dots."""
    return sum(predicted(x.read + x.written, x.flops, machine)[0] for x in launches)


def frozen(M: int, K: int, N: int) -> list[Launch]:
    """The layer without an adapter: its product and dX."""
    sizes, flops = [2 * M * K, 2 * N * K, 2 * M * N], {"half": 2.0 * M * K * N}
    forward = Launch("product", "forward", (), sizes[0] + sizes[1], sizes[2], flops)
    backward = Launch("product", "backward", (), sizes[1] + sizes[2], sizes[0], flops)
    return [forward, backward]


def shape_rows(
    rows: Iterable[int] = ROWS,
    layers: Iterable[tuple[int, int]] = LAYERS,
    ranks: Iterable[int] = RANKS,
) -> Iterator[dict[str, Any]]:
    """One row for each shape, route and machine; fp32 adapters under bf16 autocast.

    Without dropout: a draw moves no bytes, and its arithmetic is nothing that a roofline knows.
    """
    for M, (K, N), R, route in product(rows, layers, ranks, ROUTES):
        for name, machine in MACHINES.items():
            gpu = TARGETS[machine.target][1]
            with override(ROUTES[route]):
                plan = step_plan(M, K, N, R, gpu)
            base, whole = seconds(frozen(M, K, N), machine), seconds(plan, machine)
            moved = sum(x.read + x.written for x in plan)
            moved -= sum(x.read + x.written for x in frozen(M, K, N))
            row = {"machine": name, "M": M, "K": K, "N": N, "R": R, "route": route}
            row |= {"launches": len(plan), "extra_bytes": moved}
            row |= {"frozen_us": round(base * 1e6, 2), "step_us": round(whole * 1e6, 2)}
            row["overhead"] = round(whole / base - 1, 4)
            if name == "H200":
                row["plan"] = [launch.text for launch in plan]
            yield row


def planned_row(variant: Variant) -> dict[str, Any]:
    """What is known of a variant before it is compiled."""
    moved = variant.work.read + variant.work.written
    time, bound = predicted(moved, variant.work.flops, PEAKS[variant.target][1])
    row = {"op": variant.op, "target": variant.target, "kernel": variant.name}
    row |= {"problem": variant.problem, "grid": list(variant.grid)}
    row |= {"warps": variant.options["num_warps"], **variant.work._asdict()}
    return row | {"predicted_us": round(time * 1e6, 2), "bound": bound}


def compiled_row(variant: Variant) -> dict[str, Any]:
    """What the compilers make of it."""
    parts = (variant.kernel, variant.types, variant.constants)
    report = compile_kernel(*parts, variant.target, variant.options, count=True)
    warps = variant.options["num_warps"]
    fitting = occupancy(variant.target, report.registers, report.shared, warps)
    row = {"registers": report.registers, "spills": report.spills, "shared": report.shared}
    return row | {"occupancy": fitting, "instructions": report.instructions}


def kernel_rows(variants: Iterable[Variant]) -> Iterator[dict[str, Any]]:
    """One row for each variant."""
    for variant in variants:
        yield planned_row(variant) | compiled_row(variant)


def complaints(row: Mapping[str, Any]) -> list[str]:
    """What is wrong with a row of the report; empty when nothing is."""
    found = []
    if row["spills"]:
        found.append("spills registers")
    if row["shared"] > TARGETS[row["target"]][1].shared:
        found.append("takes more shared memory than there is")
    if not row["occupancy"]:
        found.append("does not fit")
    multiplies = matrix_kinds(row["target"]) & row["flops"].keys()
    if multiplies and not any(row["instructions"].get(name) for name in MATRIX):
        found.append("multiplies without matrix units")
    return [f"{row['target']} {row['op']} {row['kernel']} {what}" for what in found]


def matrix_kinds(target: str) -> set[str]:
    """Kinds of products (see static_machine.predicted) that this target has matrix units for."""
    if target == "gfx942":
        return {"half", "ieee", "fp64"}
    return {"half", "tf32", "tf32x3"} | ({"fp64"} if "DMMA" in INSTRUCTIONS else set())


def page(kernels: list[dict], shapes: list[dict], made: Mapping[str, Any] | None = None) -> str:
    """The tables for a reader.

    Args:
        made: the report's environment.
    """
    lines = ["# Without a GPU: what the compilers and a roofline say", ""]
    where = ""
    if made:
        where = f" with Triton {made['triton']}, {made['date'][:10]}, commit {made['commit']}"
    lines += [
        f"Made by `python -m fastrank.bench.static`{where}; nothing here is measured. Times assume "
        f"{OF_FLOPS:.0%} of dense bf16 peak and {OF_BYTES:.0%} of memory bandwidth, no launch "
        "cost, no overlap, and a Triton product as fast as the vendor's; every tensor that a "
        "kernel touches moves once. float32 adapters over a bf16 base under bf16 autocast, no "
        "dropout: a draw moves no bytes, and its arithmetic is not predicted.",
        "",
        "## Predicted overhead over the frozen layer, forward and backward",
        "",
        "`shipped`: vendor products, in-place adds, dY read once for dB and dS where the table "
        "says so; `two-reads`: dY read twice; `gemm`: the low-rank term inside both products.",
        "",
        "| M | K | N | R | route | launches | extra MB | H200 | H100 | A100 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    keyed = {tuple(r[n] for n in ("M", "K", "N", "R", "route", "machine")): r
             for r in shapes}  # fmt: skip
    for (*shape, machine), row in keyed.items():
        if machine != "H200" or row["R"] != 16:
            continue
        cells = [f"{keyed[(*shape, name)]['overhead']:+.1%}" for name in MACHINES]
        extra = f"{row['extra_bytes'] / 1e6:.1f}"
        lines.append(f"| {' | '.join(map(str, shape))} | {row['launches']} | {extra} | "
                     f"{' | '.join(cells)} |")  # fmt: skip
    lines += ["", "Ranks 8 and 64, and the launches of each step, are in static.json.", ""]
    lines += ["## Kernels", "", _legend()]
    for op, title in _TITLES.items():
        rows = [row for row in kernels if row["op"] == op]
        if rows:
            lines += ["", f"### {title}", "", *_table(rows)]
    return "\n".join(lines) + "\n"


def _legend() -> str:
    peaks = ", ".join(f"{target} of {name}" for target, (name, _) in PEAKS.items())
    return (
        "A name has the kernel, its tile with warps and stages, the block of ranks, dtypes and "
        "flags; #2 differs from the one before in strides alone. Spills are bytes of stack on "
        "NVIDIA, registers on AMD. Occupancy is what registers and shared memory allow, in warps "
        f"a multiprocessor of {MOST_WARPS['sm_90']}, on AMD in waves a SIMD of "
        f"{MOST_WARPS['gfx942']}. MB, GFLOP and time are those of one launch in the problem named "
        f"last, times at the roofline of {peaks}: by what binds, bytes (B) or flops (F). Words "
        "drawn at random, launches too small to fill a device and values that decide how much is "
        "done (Jacobi counts one sweep) are beyond it. Float64 products of sm_80 and sm_90 "
        "(gram and factor of the SVD) run on instructions that are not counted."
    )


def _table(rows: list[dict]) -> list[str]:
    """One op's kernels."""
    lines = [
        "| target | kernel | registers | spills | shared bytes | occupancy | instructions | MB | "
        "GFLOP | µs | problem |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        counts = ", ".join(f"{n} {c}" for n, c in row["instructions"].items())
        moved = f"{(row['read'] + row['written']) / 1e6:.2f}"
        flops = f"{sum(row['flops'].values()) / 1e9:.2f}"
        time = f"{row['predicted_us']:.2f} {row['bound'][0].upper()}"
        cells = [row["target"], row["kernel"], row["registers"], row["spills"], row["shared"]]
        cells += [f"{row['occupancy']:g}", counts, moved, flops, time, row["problem"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _lines(found: dict[str, Any]) -> str:
    """JSON with one row a line."""
    parts = []
    for name, value in found.items():
        if isinstance(value, list):
            value = "[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]"
        else:
            value = json.dumps(value)
        parts.append(f"{json.dumps(name)}: {value}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _made() -> dict[str, Any]:
    """Where the report comes from; what it was compiled on doesn't matter."""
    everything = environment(torch.device("cpu"))
    names = ("triton", "torch", "fastrank", "python", "commit", "dirty", "date")
    return {name: everything[name] for name in names}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastrank.bench.static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the reports")
    parser.add_argument("--only", nargs="+", choices=list(OPS), metavar="OP",
                        help=f"compile these ({', '.join(OPS)}); the others' rows stay as DIR has "
                        "them")  # fmt: skip
    given = parser.parse_args(arguments)
    out, made, only = given.out, _made(), given.only or list(OPS)
    out.mkdir(parents=True, exist_ok=True)
    try:
        rows = _kept(out, set(OPS) - set(only), made["triton"])
    except UsageError as error:
        parser.error(str(error))
    shapes = list(shape_rows())
    print(f"{len(shapes)} plans; compiling the kernels they launch", flush=True)
    for row in kernel_rows(v for v in every_variant() if v.op in only):
        rows[row["op"]].append(row)
        named = f"{row['target']} {row['op']} {row['kernel']}"
        print(f"{named}: {row['registers']} registers", flush=True)
    kernels = [row for op in OPS for row in rows[op]]
    found = {"environment": made, "shapes": shapes, "kernels": kernels}
    (out / "static.json").write_text(_lines(found))
    (out / "README.md").write_text(page(kernels, shapes, made))
    wrong = [complaint for row in kernels for complaint in complaints(row)]
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    return 1 if wrong else 0


def _kept(out: Path, ops: set[str], triton: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of these ops as the folder's report has them, and no rows of the others.

    Raises:
        UsageError: there is no report, or another version of Triton made it.
    """
    found: dict[str, list[dict[str, Any]]] = {op: [] for op in OPS}
    if not ops:
        return found
    file = out / "static.json"
    if not file.is_file():
        raise UsageError(f"--only keeps the rest of {file}, which isn't there; go without --only")
    before = json.loads(file.read_text())
    if before["environment"]["triton"] != triton:
        raise UsageError(
            f"{file} was made with Triton {before['environment']['triton']}, here is {triton}; "
            "go without --only"
        )
    for row in before["kernels"]:
        if row["op"] in ops:
            found[row["op"]].append(row)
    return found


if __name__ == "__main__":
    sys.exit(main())
