"""What the tuning sweep compares: points, the candidates at each, and how a candidate is run.

A point is a kernel or a choice between two routes, for one kind of operands, rank and shape. Its
candidates compute the same thing; each is checked against float64 before its time is believed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrank.kernels.common import dropout_keep
from fastrank.kernels.common.launch import gpu_of
from fastrank.kernels.lowrank import launchers
from fastrank.kernels.lowrank.arguments import Aux, Branch
from fastrank.kernels.lowrank.calls import Call, start
from fastrank.kernels.lowrank.choices import override, table_for
from fastrank.kernels.lowrank.tiles import shared_bytes, tile_type

# what a run computes: one tensor, or S and G where both come from one read
Result = Tensor | tuple[Tensor, Tensor]
Run = Callable[[], Result]

# (rows, wide columns, warps, stages), ranks up to 16, 32 and 64 alike
_SHRINK = [
    (32, 64, 4, 3), (32, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3),
    (64, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (128, 32, 8, 3),
]  # fmt: skip
_GRAM = [
    (32, 64, 4, 3), (32, 128, 8, 3), (32, 128, 4, 4), (64, 64, 4, 3), (64, 128, 8, 3),
    (64, 128, 4, 2), (32, 256, 8, 3), (16, 128, 4, 4),
]  # fmt: skip
TILES: dict[str, list[tuple[int, ...]]] = {
    "shrink": _SHRINK,
    "expand": [(32, 128, 4, 1), (64, 128, 4, 1), (64, 128, 8, 1), (32, 256, 8, 1), (64, 64, 4, 1),
               (128, 64, 8, 1), (128, 128, 8, 1), (16, 256, 4, 1)],
    "gram": _GRAM,
    "dual": [(64, 256, 8, 3), (64, 256, 8, 2), (64, 128, 8, 3), (32, 256, 8, 3), (32, 128, 4, 3),
             (32, 128, 8, 2)],
    "gemm": [(128, 256, 64, 8, 8, 3), (128, 256, 64, 8, 8, 4), (256, 128, 64, 8, 8, 3),
             (128, 128, 64, 8, 8, 4), (128, 128, 64, 8, 4, 3), (128, 128, 64, 8, 8, 3),
             (128, 128, 32, 8, 4, 4), (128, 128, 32, 8, 8, 4), (64, 256, 64, 8, 8, 4),
             (256, 256, 32, 8, 8, 2), (64, 128, 64, 8, 4, 4)],
}  # fmt: skip
TILES["gemm_any"] = TILES["gemm"]
STEPS = ("forward", "dx", "dx_any")

# how far a result may be from float64, relative Frobenius: sixteen-bit operands or outputs are
# rounded once, three tf32 products are held to fp32's accuracy
_ROUNDED, _ACCURATE = 1e-2, 1e-5


@dataclass(frozen=True)
class Point:
    """One comparison. kind: a kernel of tiles.py, or "forward", "dx", "dx_any", "dual-route"."""

    kind: str
    operands: str
    R: int
    M: int
    W: int
    C: int = 0  # 0 where nothing is contracted

    @property
    def key(self) -> str:
        tail = f"x{self.C}" if self.C else ""
        return f"{self.kind}/{self.operands}/r{self.R}/{self.M}x{self.W}{tail}"


@dataclass(frozen=True)
class Candidate:
    name: str
    run: Run
    error: Callable[[Any], float]  # of a result, against float64
    tolerance: float
    tile: tuple[int, ...] | None = None  # None: a route


def points() -> list[Point]:
    """What is swept on a GPU; the shape that targets are about comes first."""
    found = []
    rows = (8192, 2048, 32768)
    for operands in ("half", "tf32"):
        for R in (16, 64, 32):
            for M in rows:
                for kind in ("shrink", "expand", "gram", "dual", "dual-route"):
                    if R < 64 or not kind.startswith("dual"):
                        found.append(Point(kind, operands, R, M, 4096))
    shapes = [(4096, 4096), (2048, 2048), (8192, 8192), (14336, 4096), (4096, 14336)]
    for operands in ("half", "mixed"):
        for R in (16, 64):
            for W, C in shapes:
                for M in rows:
                    found += [Point(step, operands, R, M, W, C) for step in STEPS]
    return found


class Operands:
    """Tensors of a point, and the call that its launches share."""

    def __init__(self, point: Point, device: torch.device) -> None:
        self.point, self.device = point, device
        g = torch.Generator(device).manual_seed(0)
        half = torch.float16 if device.type == "cpu" else torch.bfloat16

        def draw(*shape: int, dtype: torch.dtype = half, gain: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=g, device=device) * gain).to(dtype)

        M, W, R, C = point.M, point.W, point.R, point.C or point.W
        adapters = half if point.operands == "half" else torch.float32
        self.dropout = point.kind == "dx_any"
        # x is what is read: (M, C) by a product, (M, W) by the rest
        self.x = draw(M, C)
        self.p = draw(M, R, dtype=torch.float32)
        self.A = draw(R, W, dtype=adapters)
        self.B = draw(W, R, dtype=adapters, gain=R**-0.5)
        if point.C:  # weight as the layer has it: (N, K)
            forward = point.kind == "forward"
            self.weight = draw(*((W, C) if forward else (C, W)), gain=C**-0.5)
            self.w = self.weight.t() if forward else self.weight
        p = 0.1 if self.dropout else 0.0
        seed = torch.tensor([7], device=device)
        self._branch = Branch(0.5, p, R, R, "triton", None, "peft")
        self._aux = Aux(seed, None, None, None, None)

    def call(self, tiles: dict | None = None) -> Call:
        """The call, with tiles that go before the table's."""
        with override({"tiles": tiles or {}}):
            return start(self.x.dtype, self.A, self.B, None, self._branch, self._aux)[0]

    @property
    def q(self) -> tuple[Tensor, tuple[int, int]]:
        """B where y is written and dY read, A where dX is, with strides over (ranks, columns)."""
        if self.point.kind in ("dx", "dx_any", "expand"):
            return self.A, self.A.stride()
        return self.B, self.B.stride()[::-1]

    def rows(self) -> Tensor:
        """Rows that are checked: the first and the last."""
        M = self.point.M
        return torch.cat([torch.arange(min(M, 128)), torch.arange(max(M - 128, 0), M)]).to(
            self.device
        )


def candidates(point: Point, o: Operands) -> Iterator[Candidate]:
    """All of a point, those that can't fit the device left out."""
    if point.kind == "dual-route":
        yield from _dual_routes(o)
    elif point.kind in STEPS:
        yield from _products(o)
    else:
        for tile, call in _tiled(o, point.kind, point.operands):
            run, error = _kernel_run(o, call)
            name = "x".join(map(str, tile))
            yield Candidate(name, run, error, _tolerance(point), tile)


def _tolerance(point: Point) -> float:
    wide_result = point.kind not in ("expand", *STEPS)
    return _ACCURATE if wide_result and point.operands != "half" else _ROUNDED


def _tiled(o: Operands, kernel: str, operands: str) -> Iterator[tuple[tuple[int, ...], Call]]:
    gpu, R = gpu_of(o.device), o.point.R
    block_r = min(R, 32) if kernel.startswith("gemm") else R
    for numbers in TILES[kernel]:
        tile = tile_type(kernel)(*numbers)
        if shared_bytes(kernel, operands, block_r, tile, gpu.hip) <= gpu.shared:
            rules = {str(block_r): [{"tile": list(numbers)}]}
            yield numbers, o.call({kernel: {operands: rules}})


def _kernel_run(o: Operands, call: Call) -> tuple[Run, Callable[[Any], float]]:
    kind = o.point.kind
    q, strides = o.q
    if kind == "shrink":
        return lambda: launchers.shrink(call, o.x, q, strides, False), lambda got: _shrunk(o, got)
    if kind == "expand":
        out = torch.zeros_like(o.x)

        def expand() -> Tensor:
            launchers.expand_(call, out, o.p, q, strides, None, 0.5, False, True)
            return out

        return expand, lambda got: _expanded(o, got)

    if kind == "dual":
        return lambda: _both(o, call), lambda got: max(_shrunk(o, got[0]), _grammed(o, got[1]))
    return lambda: _finished(o, call, launchers.gram(call, o.x, o.p, False)), lambda got: _grammed(
        o, got
    )


def _both(o: Operands, call: Call) -> tuple[Tensor, Tensor]:
    """U and dB from one read of dY, which is x here."""
    q, strides = o.q
    shrunk, parts = launchers.dual(call, o.x, o.p, q, strides)
    return shrunk, _finished(o, call, parts)


def _finished(o: Operands, call: Call, parts: Tensor) -> Tensor:
    out = torch.empty_like(o.B)
    strides = o.B.stride()[::-1]
    launchers.finish(call, parts, out, strides, o.B, strides, None, False)
    return out


def _dual_routes(o: Operands) -> Iterator[Candidate]:
    call = o.call()
    q, strides = o.q

    def two_reads() -> tuple[Tensor, Tensor]:
        shrunk = launchers.shrink(call, o.x, q, strides, False)
        return shrunk, _finished(o, call, launchers.gram(call, o.x, o.p, False))

    for name, run in (("two_reads", two_reads), ("one_read", lambda: _both(o, call))):
        yield Candidate(
            name,
            run,
            lambda got: max(_shrunk(o, got[0]), _grammed(o, got[1])),
            _tolerance(o.point),
        )


def _products(o: Operands) -> Iterator[Candidate]:
    """The vendor's product with an add in place, then the gemm with each of its tiles."""
    call, (q, strides) = o.call(), o.q
    forward, tolerance = o.point.kind == "forward", _tolerance(o.point)

    def vendor() -> Tensor:
        out = F.linear(o.x, o.weight) if forward else o.x @ o.weight
        launchers.expand_(call, out, o.p, q, strides, None, 0.5, o.dropout, True)
        return out

    yield Candidate("vendor", vendor, lambda got: _multiplied(o, got), tolerance)
    kernel = "gemm_any" if o.dropout else "gemm"
    for tile, tiled in _tiled(o, kernel, o.point.operands):

        def gemm(tiled: Call = tiled) -> Tensor:
            return launchers.gemm(tiled, o.x, o.w, None, o.p, q, strides, None, o.dropout)

        name = "x".join(map(str, tile))
        yield Candidate(name, gemm, lambda got: _multiplied(o, got), tolerance, tile)


def _relative(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def _shrunk(o: Operands, got: Tensor) -> float:
    rows = o.rows()
    return _relative(got[rows], o.x[rows].double() @ o.B.double())


def _expanded(o: Operands, got: Tensor) -> float:
    """The kernel has added as often as it ran; the first run is what is looked at."""
    rows = o.rows()
    return _relative(got[rows], 0.5 * (o.p[rows].double() @ o.A.double()))


def _grammed(o: Operands, got: Tensor) -> float:
    some = slice(0, 256)
    return _relative(got[some], 0.5 * (o.x[:, some].double().T @ o.p.double()))


def _multiplied(o: Operands, got: Tensor) -> float:
    rows = o.rows()
    q = o.A if o.point.kind != "forward" else o.B.T
    branch = 0.5 * (o.p[rows].double() @ q.double())
    if o.dropout:
        seed = torch.tensor([7], device=o.device)
        branch *= dropout_keep(seed, len(rows), o.point.W, 0.1, rows) / 0.9
    return _relative(got[rows], o.x[rows].double() @ o.w.double() + branch)


def on_small_shapes(some: list[Point], M: int, W: int) -> list[Point]:
    """The same comparisons on shapes that the interpreter can run."""
    made: dict[str, Any] = {}
    for point in some:
        small = replace(point, M=M, W=W, C=W if point.C else 0)
        made[small.key] = small
    return list(made.values())


def table_of(device: torch.device) -> Any:
    """The choices that serve a device now."""
    return table_for(gpu_of(device))
