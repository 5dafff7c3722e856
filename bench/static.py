"""What can be said of the GPU kernels without a GPU: `python -m fastrank.bench.static --out DIR`.

DIR/static.json and DIR/README.md hold, for every kernel variant that the shipped tables select at
the benchmark's shapes, what the compilers made of it (registers, spills, shared memory, tensor-core
instructions), and for every shape the launches with their bytes, the time that a roofline predicts
and the overhead over the frozen layer, for each route. Predictions, not measurements: no launch
costs anything in them, nothing overlaps, and a Triton product is as fast as the vendor's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from fastrank.bench.layer_plan import MODES, Launch, step_plan
from fastrank.kernels.common.aot import TARGETS, compile_kernel, signature_of
from fastrank.kernels.lowrank.choices import override


class Machine(NamedTuple):
    """Figures of NVIDIA's data sheets, dense bf16."""

    target: str
    flops_per_second: float
    bytes_per_second: float
    fp32_flops_per_second: float  # outside the tensor cores


MACHINES = {
    "H200": Machine("sm_90", 989e12, 4.8e12, 67e12),
    "H100": Machine("sm_90", 989e12, 3.35e12, 67e12),
    "A100": Machine("sm_80", 312e12, 2.04e12, 19.5e12),
}
# what good kernels reach of them
_OF_FLOPS, _OF_BYTES = 0.72, 0.85
# products of fp32 operands on tensor cores, against bf16's rate
_SLOWER = {"half": 1.0, "tf32": 2.0, "tf32x3": 6.0}

_ALL_GEMM = {
    "routes": {
        step: {operands: [{"use": "gemm"}] for operands in ("half", "mixed")}
        for step in ("forward", "dx", "dx_any")
    }
}
_TWO_READS = {"routes": {"dual": {o: [{"use": "two_reads"}] for o in ("half", "tf32", "ieee")}}}
ROUTES: dict[str, dict] = {"shipped": {}, "two-reads": _TWO_READS, "gemm": _ALL_GEMM}

ROWS = (2048, 8192, 32768)
LAYERS = ((2048, 2048), (4096, 4096), (8192, 8192), (4096, 14336), (14336, 4096))
RANKS = (8, 16, 64)
DROPOUTS = (0.0, 0.1)


def seconds(launches: Iterable[Launch], machine: Machine) -> float:
    """Sum over the kernels, each bound by its bytes or its dots."""
    return sum(_kernel_seconds(launch, machine) for launch in launches)


def _kernel_seconds(launch: Launch, machine: Machine) -> float:
    moving = (launch.read + launch.written) / (_OF_BYTES * machine.bytes_per_second)
    computing = 0.0
    for kind, flops in launch.flops.items():
        if kind == "ieee":
            computing += flops / (_OF_FLOPS * machine.fp32_flops_per_second)
        else:
            computing += flops * _SLOWER[kind] / (_OF_FLOPS * machine.flops_per_second)
    return max(moving, computing)


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


def kernel_rows(
    targets: Iterable[str] = tuple(TARGETS),
    layers: Iterable[tuple[int, int]] = LAYERS,
    ranks: Iterable[int] = RANKS,
    modes: Iterable[str] = tuple(MODES),
) -> Iterator[dict[str, Any]]:
    """One row for each specialisation that a step at these shapes launches, on each target."""
    for target in targets:
        gpu, found = TARGETS[target][1], {}
        for (K, N), R, mode, p, route in product(layers, ranks, modes, DROPOUTS, ROUTES):
            with override(ROUTES[route]):
                for launch in step_plan(ROWS[1], K, N, R, gpu, dropout=p, mode=mode):
                    if launch.kernel is not None:
                        name, specialised = _specialised(launch)
                        found.setdefault(name, (launch.kernel, *specialised))
        for name, (kernel, types, constants, options) in sorted(found.items()):
            report = compile_kernel(kernel, types, constants, target, options, count=True)
            row = {"target": target, "kernel": name, "registers": report.registers}
            row |= {"spills": report.spills, "shared": report.shared}
            yield row | {"instructions": report.instructions}


_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


def _specialised(launch: Launch) -> tuple[str, tuple[dict, dict, dict]]:
    arguments = dict(launch.arguments)
    options = {n: arguments.pop(n) for n in _OPTIONS if n in arguments}
    types, constants = signature_of(launch.kernel, arguments)
    blocks = [constants[n] for n in ("BLOCK_M", "BLOCK_W", "BLOCK_C") if n in constants]
    blocks += [options["num_warps"], options["num_stages"]]
    parts = [launch.name, "x".join(map(str, blocks)), f"r{constants['BLOCK_R']}"]
    for pointer in ("x_ptr", "q_ptr", "out_ptr"):
        if pointer in types:
            parts.append(types[pointer].lstrip("*"))
    if str(constants.get("DOT")) == "fp32":
        parts.append(constants["PRECISION"])
    parts += [n.lower() for n, v in constants.items() if v is True]
    parts += [f"{n}-1" for n in ("stride_qr", "stride_wc") if constants.get(n) == 1]
    return " ".join(parts), (types, constants, options)


def page(kernels: list[dict], shapes: list[dict]) -> str:
    """The two tables for a reader."""
    lines = ["# Without a GPU: what the compilers and a roofline say", ""]
    lines += [
        "Made by `python -m fastrank.bench.static`; nothing here is measured. Times assume "
        f"{_OF_FLOPS:.0%} of dense bf16 peak and {_OF_BYTES:.0%} of memory bandwidth, no launch "
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
    lines += [
        "## Kernels",
        "",
        "| target | kernel | registers | spills | shared bytes | instructions |",
        "|---|---|---|---|---|---|",
    ]
    for row in kernels:
        counts = ", ".join(f"{n} {c}" for n, c in row["instructions"].items())
        lines.append(
            f"| {row['target']} | {row['kernel']} | {row['registers']} | {row['spills']} | "
            f"{row['shared']} | {counts} |"
        )
    return "\n".join(lines) + "\n"


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastrank.bench.static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the reports")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    shapes = list(shape_rows())
    print(f"{len(shapes)} plans; compiling the kernels they launch", flush=True)
    kernels = []
    for row in kernel_rows():
        kernels.append(row)
        print(f"{row['target']} {row['kernel']}: {row['registers']} registers", flush=True)
    environment = {"torch": torch.__version__, "triton": triton.__version__}
    found = {"environment": environment, "shapes": shapes, "kernels": kernels}
    (out / "static.json").write_text(_lines(found))
    (out / "README.md").write_text(page(kernels, shapes))
    spilling = [row["kernel"] for row in kernels if row["spills"]]
    if spilling:
        print(f"these spill registers: {json.dumps(spilling)}", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
