"""Truncated SVD of a batch on a GPU: a filtered range finder, and an SVD of what it found.

    range     Y = A Ω, Q = orth(Y); then `passes` times: B = Aᵀ Q, Y = T_d(A Aᵀ) Q, Q = orth(Y)
    core      B = Aᵀ Q, R of B = Z R by the Cholesky factor of BᵀB, Rᵀ = U' Σ V'ᵀ by Jacobi
    finish    U = Q U', V Σ = B U', S the lengths of V Σ's columns

A Chebyshev filter (Zhou, Saad, Tiago, Chelikowsky, J. Comput. Phys. 219, 2006) suits the flat
spectra of masked updates: all below the block's smallest Ritz value stays, all above grows.

Key decisions
- Nothing waits for the device: degrees, repeated orthogonalisations and sweeps are decided there,
  matrix by matrix, and launches are the same for any values.
- Orthogonalisation is Cholesky QR with a float64 Gram matrix, once between filters and twice where
  orthonormal columns are needed, and once more where columns were dropped and drawn anew.
- Where a filter would grow the largest direction more than fp32 can stand beside the others, the
  degree falls, down to a plain step Y = A orth(B).
- S is measured on B itself, so neither the Gram matrix nor Jacobi's drift limits it; columns of V
  and U' are orthonormalised in order of S, which moves each by rounding only.
- A block as wide as the matrix holds everything: no filter then.
- Factors are made orthonormal and multiplied out as a core of their inner size (or of the matrix's
  own, where that is smaller: then that side keeps its factor). A core up to DIRECT is decomposed
  whole, which is exact to rounding; a larger one, of which few values are wanted, with the range
  finder and wider margins.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrank.kernels.svd import launchers
from fastrank.kernels.svd.launchers import CORE_GUARD, GUARD, Combine, Dense, Factor, Scales, Sparse
from fastrank.kernels.svd.operands import TruncatedSVD
from fastrank.kernels.svd.presets import Preset
from fastrank.kernels.svd.sparse import SparseBatch

# log of the most that a filter may grow the largest direction over one of the smallest Ritz value
MOST_GROWTH = 16.0
# a core of this size is decomposed whole
DIRECT = 256
# what a larger one is given beyond its rank, passes and degrees
_CORE_EXTRA, _CORE_PASSES, _CORE_DEGREE = 64, 5, 8


class Parts(NamedTuple):
    """A ≈ U diag(length) Vᵀ of each matrix, not yet in order nor signed."""

    U: Tensor  # fp32 (G, N, r), orthonormal
    V: Tensor  # fp32 (G, K, r), orthonormal
    length: Tensor  # float64 (G, r)
    status: Tensor  # int32 (G), of the core


class Orthonormal:
    """Orthonormal bases of blocks; `draws` counts the refill vectors taken so far."""

    def __init__(self, seed: Tensor) -> None:
        self.seed, self.draws = seed, 0

    def once(self, X: Tensor, by: Factor, wanted: Tensor | None = None) -> Tensor:
        """X R⁻¹."""
        self.draws += 1
        return launchers.apply_inverse(X, by, self.seed, self.draws, wanted)

    def basis(self, X: Tensor, passes: int, spare: int = 1) -> tuple[Tensor, list[Factor]]:
        """Q (G, M, q) and the factors whose product is R, first to last.

        Args:
            X: [G, M, q], M >= q, any strides.
            passes: for every matrix; after 1, Q is orthonormal to eps times X's condition.
            spare: more for matrices of which a column was dropped or weak.
        """
        factors: list[Factor] = []
        for i in range(passes + spare):
            wanted = factors[-1].again if i >= passes else None
            factors.append(launchers.factor(X, GUARD, wanted))
            X = self.once(X, factors[-1], wanted)
        return X, factors


def dense(A: Tensor, rank: int, preset: Preset, seed: int) -> TruncatedSVD:
    """Of matrices [G, N, K], fp32, bf16 or fp16, any strides."""
    scales = launchers.measure(A)
    return _of_operator(Dense(A, scales), scales, rank, preset, seed)


def sparse(batch: SparseBatch, rank: int, preset: Preset, seed: int) -> TruncatedSVD:
    """Of sparse matrices."""
    scales = launchers.measure(batch)
    return _of_operator(Sparse(batch, scales), scales, rank, preset, seed)


def factored(
    B: Tensor, A: Tensor, weights: Tensor | None, rank: int, preset: Preset, seed: int
) -> TruncatedSVD:
    """Of Σ_q weights_q b_q a_qᵀ, for B [G, N, Q], A [G, Q, K], weights [Q] or [G, Q].

    Exact to rounding at any preset while the core is at most DIRECT wide.
    """
    orthonormal = Orthonormal(launchers.seed_tensor(seed, B.device))
    left, right = _side(B, orthonormal), _side(A.mT, orthonormal)
    finite = (left.status | right.status) == 0
    each = left.size * right.size  # (G, Q), float64
    if weights is not None:
        each = each * weights
        finite = finite & each.isfinite().all(1)
    each = torch.where(finite[:, None], each, 0.0)
    most = each.abs().amax(1)
    _, exponent = torch.frexp(most)
    multiplier = torch.ldexp(torch.ones_like(most), -exponent)
    scaled = (each * multiplier[:, None]).float()
    safe = finite[:, None, None]
    L = torch.where(safe, left.R * scaled[:, None, :], 0.0)
    core = launchers.product(L, torch.where(safe, right.R, 0.0).mT)
    parts = _of_core(core, rank, preset, orthonormal, seed)
    U = parts.U if left.Q is None else launchers.product(left.Q, parts.U)
    V = parts.V if right.Q is None else launchers.product(right.Q, parts.V)
    norm2 = core.double().square().sum((1, 2)) / multiplier.square()
    status = torch.where(finite, 0, launchers.NONFINITE).int()
    scales = Scales(multiplier, norm2, status)
    return launchers.finish(U, V, parts.length, multiplier, scales, parts.status)


def _of_operator(
    operator: Dense | Sparse, scales: Scales, rank: int, preset: Preset, seed: int
) -> TruncatedSVD:
    seed_tensor = launchers.seed_tensor(seed, operator.device)
    parts = _range_and_core(operator, rank, preset, Orthonormal(seed_tensor))
    U, V, length, status = parts
    return launchers.finish(U, V, length, scales.multiplier, scales, status)


def _range_and_core(
    operator: Dense | Sparse, rank: int, preset: Preset, orthonormal: Orthonormal
) -> Parts:
    """Of matrices scaled to entries of about 1."""
    _, N, K = operator.shape
    width = min(rank + preset.extra, N, K)
    passes = 0 if width == min(N, K) else preset.passes
    Y = operator.apply(launchers.draw(orthonormal.seed, K, width))
    for _ in range(passes):
        Q, _ = orthonormal.basis(Y, 1)
        Y = _filtered(operator, Q, preset.degree, orthonormal)
    Q, _ = orthonormal.basis(Y, 2)
    return _core(operator.apply_t(Q), rank, orthonormal, Q)


def _filtered(operator: Dense | Sparse, Q: Tensor, degree: int, orthonormal: Orthonormal) -> Tensor:
    """T_d(A Aᵀ) Q, each matrix with its own degree d, at most `degree`."""
    B = operator.apply_t(Q)
    by = launchers.factor(B, GUARD)
    coefficients, mode = launchers.filter_steps(by, orthonormal.seed, degree, MOST_GROWTH)
    B = orthonormal.once(B, by, mode)
    older, Y = Q, operator.apply(B, Combine(coefficients[:, 0], Q, Q, torch.empty_like(Q)))
    for k in range(1, degree):
        step = coefficients[:, k]
        B = operator.apply_t(Y, gate=step)
        older, Y = Y, operator.apply(B, Combine(step, Y, older, out=older))
    return Y


def _core(B: Tensor, rank: int, orthonormal: Orthonormal, Q: Tensor | None = None) -> Parts:
    """Of A = Q Bᵀ with orthonormal Q [G, N, q] (None: the identity), for B [G, K, q], K >= q."""
    R = launchers.factor(B, CORE_GUARD).R
    rows, status = launchers.jacobi(R, rank)
    V = launchers.product(B, rows.mT)
    U, _ = orthonormal.basis(rows.mT, 2)
    V, factors = orthonormal.basis(V, 2)
    if Q is not None:
        U = launchers.product(Q, U)
    return Parts(U, V, factors[0].length, status)


class _Side(NamedTuple):
    """One factor X diag(size)⁻¹ = Q R: Q orthonormal, or None for the identity."""

    Q: Tensor | None
    R: Tensor  # fp32 (G, m, Q), columns of length about 1
    size: Tensor  # float64 (G, Q), powers of two
    status: Tensor  # int32 (G)


def _side(X: Tensor, orthonormal: Orthonormal) -> _Side:
    """Of X [G, n, Q]; where Q >= n, the identity and X itself."""
    _, n, Q = X.shape
    if Q >= n:
        _, exponent = torch.frexp(X.float().abs().amax(1))
        size = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)
        status = launchers.measure(X).status
        return _Side(None, (X / size[:, None, :]).float(), size, status)
    basis, factors = orthonormal.basis(X, 2)
    scale = factors[0].scale
    R = factors[0].R * scale.float()[:, None, :]
    for by in factors[1:]:
        R = launchers.product(by.R, R)
    return _Side(basis, R, 1.0 / scale, launchers.measure(X).status)


def _of_core(core: Tensor, rank: int, preset: Preset, orthonormal: Orthonormal, seed: int) -> Parts:
    """Of core matrices (G, m, k)."""
    _, m, k = core.shape
    if m > k:
        U, V, length, status = _of_core(core.mT, rank, preset, orthonormal, seed)
        return Parts(V, U, length, status)
    if m <= DIRECT or rank + _CORE_EXTRA > m // 2:
        return _core(core.mT, rank, orthonormal)
    wide = Preset(_CORE_PASSES, _CORE_DEGREE, _CORE_EXTRA, preset.missing)
    ones = torch.ones(core.shape[0], dtype=torch.float32, device=core.device)
    scales = Scales(ones, ones.double(), torch.zeros_like(ones, dtype=torch.int32))
    return _range_and_core(Dense(core, scales), rank, wide, orthonormal)
