"""Which kernels the static report compiles: what the launchers launch at the published sizes.

    lowrank   one layer, forward and backward, at the shapes, ranks, precisions and routes of the
              overhead table; bytes and flops are those of 8192 x 4096 x 4096, rank 16 where that
              launches the kernel, else of the first shape that does
    grouped   64 adapters of ranks 4 to 64 on 8192 rows of one 4096 x 4096 layer
    svd       72 sparse matrices 768 x 768, 1 %, cut to rank 64; 72 sums of 160 thin products,
              4096 x 4096, cut to rank 16
    packing   1 % of 4096 x 4096: masks, pack, unpack, 64 clients' sum, the packed weight gradient
              of 4096 rows

None of them is listed by its signature: the real paths run on tensors without storage and their
launches are planned, as in the ahead-of-time tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from fastrank.bench.grouped_cases import spread
from fastrank.bench.layer_plan import MODES, step_plan
from fastrank.bench.static_steps import grouped_step, weight_grad_step
from fastrank.bench.static_work import Work, work
from fastrank.kernels.common.aot import TARGETS
from fastrank.kernels.common.launch import plan_launches, pretend
from fastrank.kernels.lowrank.choices import override
from fastrank.kernels.packing import SparseMask, draws, launchers
from fastrank.kernels.packing.variants import _packed
from fastrank.kernels.svd import triton_path as svd_path
from fastrank.kernels.svd.presets import PRESETS
from fastrank.kernels.svd.variants import OPTIONS, sparse_batch
from fastrank.kernels.svd.variants import _signature as signature

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
# whose launches come first, so that bytes and flops are theirs
_FIRST = ((4096, 4096), 16, "autocast")


@dataclass(frozen=True)
class Variant:
    """One kernel as it is compiled for a target, and a launch of it.

    Args:
        op: "lowrank", "grouped", "svd" or "packing".
        problem: what the launch is part of.
        types, constants, options: as compile_kernel takes them.
    """

    op: str
    target: str
    name: str
    problem: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    grid: tuple[int, ...]
    work: Work

    @property
    def function(self) -> str:
        """The kernel's own name."""
        return self.kernel.__name__.removesuffix("_kernel")


class _Found:
    """Variants in the order of their first launch, each specialisation once."""

    def __init__(self, op: str, target: str) -> None:
        self.op, self.target = op, target
        self._names: dict[tuple, str] = {}
        self._times: dict[str, int] = {}
        self.variants: list[Variant] = []

    def note(self, problem: str, kernel: Any, grid: tuple, arguments: Mapping, work: Work) -> None:
        """Of one launch, arguments with its options."""
        options = {n: arguments[n] for n in OPTIONS if n in arguments}
        rest = {n: value for n, value in arguments.items() if n not in OPTIONS}
        types, constants = signature(kernel, rest)
        parts = (types, {n: str(v) for n, v in constants.items()}, options)
        key = (kernel.__name__, *(tuple(sorted(d.items())) for d in parts))
        if key in self._names:
            return
        name = _name(kernel, types, constants, options)
        self._times[name] = self._times.get(name, 0) + 1
        if self._times[name] > 1:  # they differ in what the name leaves out, strides as a rule
            name = f"{name} #{self._times[name]}"
        self._names[key] = name
        grid = tuple(int(n) for n in grid)
        found = (problem, kernel, types, constants, options, grid, work)
        self.variants.append(Variant(self.op, self.target, name, *found))


_PREFIXES = ("lowrank_", "grouped_", "svd_", "packing_")
_BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_W", "BLOCK_C", "BLOCK_K", "BLOCK_H", "BLOCK_L", "BLOCK_Q",
           "BLOCK", "ROWS", "STRATA", "WIDTH", "ITEMS")  # fmt: skip
_POINTERS = ("x_ptr", "dense_ptr", "a_ptr", "values_ptr", "q_ptr", "out_ptr")


def _name(kernel: Any, types: Mapping, constants: Mapping, options: Mapping) -> str:
    """Kernel, tile with warps and stages, ranks, dtypes, flags."""
    short = kernel.__name__.removesuffix("_kernel")
    for prefix in _PREFIXES:
        short = short.removeprefix(prefix)
    blocks = [constants[n] for n in _BLOCKS if n in constants]
    blocks += [options["num_warps"], options["num_stages"]]
    parts = [short, "x".join(map(str, blocks))]
    if "BLOCK_R" in constants:
        parts.append(f"r{constants['BLOCK_R']}")
    parts += [types[n].lstrip("*") for n in _POINTERS if n in types]
    parts += [f"{n.lower()}-{constants[n]}" for n in ("FORMAT", "TYPE") if n in constants]
    if str(constants.get("DOT", "fp32")) == "fp32" and "PRECISION" in constants:
        parts.append(constants["PRECISION"])
    parts += [n.lower() for n, v in constants.items() if v is True]
    parts += [f"{n}-1" for n in ("stride_qr", "stride_wc") if constants.get(n) == 1]
    return " ".join(parts)


def layer_variants(
    target: str,
    layers: Iterable[tuple[int, int]] = LAYERS,
    ranks: Iterable[int] = RANKS,
    modes: Iterable[str] = tuple(MODES),
) -> list[Variant]:
    """Of one layer's step at these shapes, by every route."""
    gpu, found, M = TARGETS[target][1], _Found("lowrank", target), ROWS[1]
    cases = sorted(product(layers, ranks, modes), key=lambda case: case != _FIRST)
    for ((K, N), R, mode), p, route in product(cases, DROPOUTS, ROUTES):
        problem = f"{M}x{K}x{N} r{R} {mode} p{p:g} {route}"
        with override(ROUTES[route]):
            for each in step_plan(M, K, N, R, gpu, dropout=p, mode=mode):
                if each.kernel is not None:
                    moved = Work(each.read, each.written, each.flops)
                    found.note(problem, each.kernel, each.grid, each.arguments, moved)
    return sorted(found.variants, key=lambda variant: variant.name)


def grouped_variants(target: str) -> list[Variant]:
    """Of 64 adapters on one layer: the benchmark's three precisions, with and without dropout."""
    rows, ranks = (128,) * 64, spread(4, 64, 64)
    calls = {}
    for mode, p in product(("bf16", "bf16-compute", "bf16-fp32"), DROPOUTS):
        options = {"mode": mode, "rows": rows, "ranks": ranks, "p": p, "K": 4096, "N": 4096}
        options |= {"e": False, "needs": (True, True, True, False), "device": "meta"}
        calls[f"8192x4096x4096 r4-64 {mode} p{p:g}"] = _call(grouped_step, **options)
    # masks and a draw together end in a kernel of their own
    options |= {"mode": "bf16-compute", "p": DROPOUTS[1], "masked": True}
    calls["8192x4096x4096 r4-64 bf16-compute p0.1 masked"] = _call(grouped_step, **options)
    return _planned("grouped", target, calls)


def svd_variants(target: str) -> list[Variant]:
    """Of the sparse and factored batches that goals are about."""
    preset = PRESETS["default"]
    nnz = 72 * SparseMask((768, 768), 0.01).nnz
    B, A = _meta(72, 4096, 160), _meta(72, 160, 4096)
    calls = {
        "sparse 72x768x768 r64": _call(
            svd_path.sparse, sparse_batch(72, 768, 768, nnz), 64, preset, 0
        ),
        "factored 72x4096x4096 Q160 r16": _call(
            svd_path.factored, B, A, _meta(160), 16, preset, 0
        ),
    }  # fmt: skip
    return _planned("svd", target, calls)


def packing_variants(target: str) -> list[Variant]:
    """Of every format at 1 %, and the packed gradient in bf16 and fp32."""
    shape, cpu = (4096, 4096), torch.device("cpu")
    mask = SparseMask(shape, 0.01)
    bernoulli = SparseMask(shape, 0.01, scheme="bernoulli")
    source = draws.stream(0, "", draws.ROUNDING, 0)
    dense, starts = _meta(*shape), torch.zeros(-(-mask.numel // launchers.ITEMS), dtype=torch.int64)
    calls = {
        "positions 16.8M 1 %": _call(launchers.positions, mask, cpu),
        "count bernoulli 16.8M": _call(launchers.count_kept, bernoulli, cpu),
        "write bernoulli 16.8M": _call(launchers.write_kept, bernoulli, starts, mask.nnz),
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        short = str(dtype).removeprefix("torch.")
        packed = _packed(mask, dtype, 256)
        rounding = source if dtype == torch.int8 else None
        calls |= {
            f"pack 16.8M {short}": _call(launchers.pack, dense, None, mask, dtype, 256, rounding),
            f"unpack 16.8M {short}": _call(launchers.unpack_add_, dense, None, packed, 0.5),
            f"64 clients {short}": _call(launchers.aggregate, [packed] * 64, [1.0] * 64),
            f"64 clients {short} own masks": _call(
                launchers.aggregate_dense, [packed] * 64, [1.0] * 64, dense
            ),
        }
    for dtype in (torch.bfloat16, torch.float32):
        short = str(dtype).removeprefix("torch.")
        sizes = {"M": 4096, "N": 4096, "K": 4096, "device": "meta"}
        calls[f"weight gradient 4096 {short}"] = _call(weight_grad_step, dtype, **sizes)
    return _planned("packing", target, calls)


OPS: dict[str, Callable[[str], list[Variant]]] = {
    "lowrank": layer_variants,
    "grouped": grouped_variants,
    "svd": svd_variants,
    "packing": packing_variants,
}


def every_variant(targets: Iterable[str] = tuple(TARGETS)) -> Iterator[Variant]:
    """All of the report, op by op, target by target."""
    for op, target in product(OPS, targets):
        yield from OPS[op](target)


def _planned(op: str, target: str, calls: Mapping[str, Callable[[], object]]) -> list[Variant]:
    found = _Found(op, target)

    for problem, call in calls.items():

        def note(kernel: Any, grid: tuple, arguments: dict, problem: str = problem) -> None:
            name = kernel.__name__.removesuffix("_kernel")
            found.note(problem, kernel, grid, arguments, work(name, grid, arguments))

        with plan_launches(note), pretend(TARGETS[target][1]), torch.no_grad():
            call()
    return found.variants


def _call(function: Callable, *positional: Any, **named: Any) -> Callable[[], object]:
    return lambda: function(*positional, **named)


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")
