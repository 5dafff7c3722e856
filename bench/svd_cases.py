"""Cases of `fastrank bench svd`: operands, variants, and the spectra they are judged by."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrank.bench import harness, svd_peers, timing
from fastrank.bench.cases import Unavailable
from fastrank.bench.memory import Memory, measure
from fastrank.kernels.packing import SparseMask
from fastrank.kernels.svd import FactoredSum, PackedSparse, truncated_svd
from fastrank.kernels.svd.reference import materialise

# the least share of the best energy that a variant may reach and still be timed: what is below
# computes something else. Approximations are compared, so their shares are in the rows
WORST = 0.5
# matrices of a batch that results are judged by: a true spectrum costs more than all variants
JUDGED = 4


@dataclass(frozen=True)
class SvdCase:
    """G matrices to be cut to a rank.

    Args:
        kind: "sparse" (1 % masked Gaussian values), "factored" (a sum of Q thin products, as ten
            clients' adapters that share part of what they learned) or "dense" (decaying spectra).
        G, N, K: how many, of which shape.
        R: the rank asked for.
        Q: products of a factored sum, 0 for others.
    """

    kind: str
    G: int
    N: int
    K: int
    R: int
    Q: int = 0
    accuracy: str = "default"

    @property
    def name(self) -> str:
        size = f"{self.N}" if self.N == self.K else f"{self.N}x{self.K}"
        q = f"-q{self.Q}" if self.Q else ""
        level = "" if self.accuracy == "default" else f"-{self.accuracy}"
        return f"{self.kind}-{self.G}x{size}{q}-r{self.R}{level}"

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, **vars(self), "dtype": "float32", "density": 0.01}


def cases(device: torch.device, quick: bool) -> list[SvdCase]:
    """What a server has to decompose; the cases that goals are about first."""
    if quick:
        return [SvdCase("sparse", 3, 96, 96, 4), SvdCase("factored", 3, 96, 96, 4, 24),
                SvdCase("dense", 2, 96, 64, 4)]  # fmt: skip
    if device.type == "cuda":
        return [
            SvdCase("sparse", 72, 768, 768, 64),
            SvdCase("factored", 72, 4096, 4096, 16, 160),
            *(SvdCase("sparse", 72, 768, 768, r) for r in (8, 16, 32)),
            SvdCase("sparse", 72, 3072, 768, 16),
            SvdCase("sparse", 24, 4096, 4096, 16),
            SvdCase("sparse", 8, 11008, 4096, 16),
            SvdCase("factored", 72, 768, 768, 16, 160),
            SvdCase("factored", 72, 768, 768, 64, 64),
            SvdCase("dense", 24, 768, 768, 16),
        ]
    return [
        SvdCase("sparse", 24, 768, 768, 16),
        SvdCase("factored", 24, 768, 768, 16, 160),
        SvdCase("sparse", 24, 768, 768, 16, accuracy="fast"),
        SvdCase("sparse", 24, 768, 768, 16, accuracy="tight"),
        SvdCase("sparse", 24, 768, 768, 64),
        SvdCase("sparse", 4, 3072, 768, 16),
        SvdCase("factored", 24, 768, 768, 64, 64),
        SvdCase("dense", 24, 768, 768, 16),
    ]


@dataclass
class SvdOperands:
    """What the variants of a case share: the operand, and its matrices where one needs them."""

    case: SvdCase
    operand: Tensor | FactoredSum | PackedSparse

    @staticmethod
    def of(case: SvdCase, device: torch.device) -> SvdOperands:
        """The same draws for every run of a case."""
        g = torch.Generator().manual_seed(0)
        G, N, K, Q = case.G, case.N, case.K, case.Q
        if case.kind == "sparse":
            masks = [SparseMask((N, K), 0.01, seed=0, tensor_id=f"layer.{i}") for i in range(G)]
            values = [torch.randn(m.nnz, generator=g).to(device) for m in masks]
            return SvdOperands(case, PackedSparse(values, masks))
        if case.kind == "factored":
            r = max(1, Q // 10)  # a client's rank
            shared_b, shared_a = (torch.randn(s, generator=g) for s in ((G, N, r), (G, r, K)))
            B = shared_b.repeat(1, 1, -(-Q // r))[:, :, :Q] + torch.randn(G, N, Q, generator=g)
            A = shared_a.repeat(1, -(-Q // r), 1)[:, :Q] + torch.randn(G, Q, K, generator=g)
            weights = torch.full((Q,), 0.1)
            return SvdOperands(case, FactoredSum(B.to(device), A.to(device), weights.to(device)))
        left, right = (torch.randn(s, generator=g) for s in ((G, N, min(N, K)), (G, min(N, K), K)))
        decay = 1.0 / torch.arange(1, min(N, K) + 1)
        return SvdOperands(case, (left * decay @ right).to(device))

    @functools.cached_property
    def dense(self) -> Tensor:
        """The matrices, fp32 `[G, N, K]`."""
        return materialise(self.operand).float()

    @functools.cached_property
    def judged(self) -> Tensor:
        """The matrices that results are judged by, float64."""
        return materialise(_first(self.operand, JUDGED))

    @functools.cached_property
    def best(self) -> Tensor:
        """The energy of their best approximations, float64, by LAPACK or its like."""
        return torch.linalg.svdvals(self.judged)[:, : self.case.R].square().sum(1)


def _first(operand: Tensor | FactoredSum | PackedSparse, count: int):
    if isinstance(operand, FactoredSum):
        return FactoredSum(operand.B[:count], operand.A[:count], operand.weights)
    if isinstance(operand, PackedSparse):
        return PackedSparse(operand.values[:count], operand.masks[:count])
    return operand[:count]


Triple = tuple[Tensor, Tensor, Tensor]  # U [G, N, r], S [G, r], Vh [G, r, K]
Builder = Callable[[SvdOperands], Callable[[], Triple]]


def fastrank(given: SvdOperands) -> Callable[[], Triple]:
    """truncated_svd on the operand as it comes from the wire."""
    case = given.case

    def run() -> Triple:
        return truncated_svd(given.operand, case.R, accuracy=case.accuracy)[:3]

    return run


def linalg_svd(given: SvdOperands) -> Callable[[], Triple]:
    """torch.linalg.svd of the dense batch, cut off."""
    r, dense = given.case.R, given.dense

    def run() -> Triple:
        U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
        return U[:, :, :r], S[:, :r], Vh[:, :r]

    return run


def linalg_svd_looped(given: SvdOperands) -> Callable[[], Triple]:
    """The same, matrix by matrix, as servers do it."""
    r, dense = given.case.R, given.dense

    def run() -> Triple:
        found = [torch.linalg.svd(one, full_matrices=False) for one in dense]
        U, S, Vh = (torch.stack(part) for part in zip(*found, strict=True))
        return U[:, :, :r], S[:, :r], Vh[:, :r]

    return run


def svd_lowrank(given: SvdOperands, niter: int) -> Callable[[], Triple]:
    """torch.svd_lowrank of the dense batch with q = r."""
    r, dense = given.case.R, given.dense

    def run() -> Triple:
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(dense, q=r, niter=niter)
        return U, S, V.mT

    return run


def plain_torch(given: SvdOperands) -> Callable[[], Triple]:
    """The best pipeline of torch's own batched calls that we know: dense products, CholeskyQR2,
    subspace iteration, a small SVD. Eight iterations with sixteen more columns."""
    case, dense = given.case, given.dense
    width = min(case.R + 16, case.N, case.K)

    def orthonormal(Y: Tensor) -> Tensor:
        for _ in range(2):
            L, _ = torch.linalg.cholesky_ex(Y.mT @ Y)
            Y = torch.linalg.solve_triangular(L.mT, Y, upper=True, left=False)
        return Y

    def refuse_deficient() -> None:
        first = dense @ torch.randn(case.K, width, device=dense.device)
        if not orthonormal(orthonormal(first)).isfinite().all():
            raise Unavailable("its Cholesky steps break down on blocks of deficient rank")

    refuse_deficient()

    def run() -> Triple:
        g = torch.Generator(dense.device).manual_seed(0)
        omega = torch.randn(case.G, case.K, width, generator=g, device=dense.device)
        Q = orthonormal(dense @ omega)
        for _ in range(8):
            Q = orthonormal(dense @ orthonormal(dense.mT @ Q))
        U, S, Vh = torch.linalg.svd(Q.mT @ dense, full_matrices=False)
        return (Q @ U)[:, :, : case.R], S[:, : case.R], Vh[:, : case.R]

    return run


def builders(case: SvdCase, device: torch.device) -> Mapping[str, Builder]:
    """Variant name -> builder, fastrank first."""
    found: dict[str, Builder] = {"fastrank": fastrank, "torch.linalg.svd": linalg_svd}
    if device.type == "cuda":
        found["torch.linalg.svd-loop"] = linalg_svd_looped
    found |= {
        "svd_lowrank": functools.partial(svd_lowrank, niter=2),
        "svd_lowrank-8": functools.partial(svd_lowrank, niter=8),
        "plain-torch": plain_torch,
    }
    return found | (svd_peers.ON_CPU if device.type == "cpu" else svd_peers.ON_GPU)


# the host waits for the device in them, or they work on the CPU: no CUDA graph can hold them
_SYNCHRONISE = ("torch.linalg.svd", "torch.linalg.svd-loop", "cupy")
# memory is what torch allocates; theirs is their own
_NOT_TORCH = (*svd_peers.ON_CPU, *svd_peers.ON_GPU)


@dataclass
class SvdCell(harness.Cell):
    """All variants of one case on the same operand. `error` is 1 minus the energy ratio, of the
    matrix whose energy is furthest from the best."""

    case: SvdCase
    builders: Mapping[str, Builder]

    def prepare(self) -> None:
        """Build every variant, then measure its energy and memory: results before speed."""
        given = SvdOperands.of(self.case, self.device)
        for name, build in self.builders.items():
            self.found[name] = harness.Measured()
            step = self._guarded(name, lambda build=build: build(given))
            if step is not None:
                self.steps[name] = step
                self._guarded(name, lambda name=name: self._judge(name, given))
        for name, entry in self.found.items():
            if entry.skipped is not None:
                self.steps.pop(name, None)

    def measure(
        self, mode: str, clock: timing.Clock, seconds: float
    ) -> dict[str, harness.Measured]:
        """Time what was built; a graph holds what never waits for the device."""
        if mode != "full-graph":
            return super().measure(mode, clock, seconds)
        every = self.steps
        self.steps = {name: step for name, step in every.items() if name not in _SYNCHRONISE}
        try:
            found = super().measure(mode, clock, seconds)
        finally:
            self.steps = every
        for name in every.keys() & set(_SYNCHRONISE):
            found[name].skipped = "the host waits for the device in it: no graph can hold it"
        return found

    def _judge(self, name: str, given: SvdOperands) -> None:
        entry, kept = self.found[name], []
        step = self.steps[name]
        if name in _NOT_TORCH:
            kept.append(step())
        else:
            entry.memory = _memory(lambda: kept.append(step()), self.device)
        U, S, Vh = (part[:JUDGED].double() for part in kept.pop())
        # what U and Vh hold of the matrices themselves: S alone could claim anything
        held = (U.mT @ given.judged.to(U.device) @ Vh.mT).diagonal(dim1=1, dim2=2)
        if not torch.allclose(held, S, rtol=1e-2, atol=1e-4 * float(S.max())):
            raise harness.WrongResult("S is not what U and Vh hold of the matrices")
        ratio = held.square().sum(1).cpu() / given.best.cpu()
        low, high = float(ratio.min()), float(ratio.max())
        if not (low > WORST and high < 1 + 1e-4):
            raise harness.WrongResult(f"share of the best energy from {low:.4f} to {high:.4f}")
        entry.error = max(0.0, 1 - low)


def _memory(step: Callable[[], object], device: torch.device) -> Memory:
    if device.type == "cuda":
        step()
    return measure(step, (), device)
