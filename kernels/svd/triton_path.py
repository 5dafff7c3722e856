"""Truncated SVD of a batch on a GPU: a filtered range finder, and an SVD of what it found.

    range     Y = A Ω, Q = orth(Y); then `passes` times: B = Aᵀ Q, Y = T_d(A Aᵀ) Q, Q = orth(Y)
    core      B = Aᵀ Q, R of B = Z R by the Cholesky factor of BᵀB, Rᵀ = U' Σ V'ᵀ by Jacobi
    finish    U = Q U', V Σ = B U', S the lengths of V Σ's columns

A Chebyshev filter (Zhou, Saad, Tiago, Chelikowsky, J. Comput. Phys. 219, 2006) suits the flat
spectra of masked updates: all below the block's smallest Ritz value stays, all above grows.

Key decisions
- Nothing waits for the device: degrees, repeated orthogonalisations and sweeps are decided there,
  matrix by matrix, and launches are the same for any values.
- Orthogonalisation is Cholesky QR with a float64 Gram matrix, repeated for matrices whose pivots
  were small, and where columns were dropped and drawn anew.
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

from fastrank.kernels.common.launch import cdiv
from fastrank.kernels.svd import launch_products, launchers
from fastrank.kernels.svd.launch_products import Combine, Dense, Scales, Sparse
from fastrank.kernels.svd.launchers import CORE_GUARD, FINE, GUARD, LOOSE, Factor
from fastrank.kernels.svd.operands import NONFINITE, TruncatedSVD
from fastrank.kernels.svd.presets import Preset
from fastrank.kernels.svd.sparse import SparseBatch

# log of the most that a filter may grow the largest direction over one of the smallest Ritz value
MOST_GROWTH = 16.0
# a core of this size is decomposed whole
DIRECT = 256
# what a larger one is given, unless its block would be half of it
CORE = Preset(5, 8, 64, 0.0)


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
        """X R⁻¹, into X itself for `wanted` matrices."""
        self.draws += 1
        return launchers.apply_inverse(X, by, self.seed, self.draws, wanted)

    def basis(self, X: Tensor, weak: float, spare: int) -> tuple[Tensor, list[Factor]]:
        """Q (G, M, q) and the factors whose product is R, first to last.

        Args:
            X: [G, M, q], M >= q, any strides.
            weak: see launchers.factor.
            spare: how many more passes there are for matrices that need them.
        """
        factors = [launchers.factor(X, GUARD, weak)]
        X = self.once(X, factors[0])
        for _ in range(spare):
            wanted = factors[-1].again
            factors.append(launchers.factor(X, GUARD, weak, wanted))
            X = self.once(X, factors[-1], wanted)
        return X, factors


def dense(A: Tensor, rank: int, preset: Preset, seed: int) -> TruncatedSVD:
    """Of matrices [G, N, K], fp32, bf16 or fp16, any strides."""
    scales = launch_products.measure(A)
    return _of_operator(Dense(A, scales), scales, rank, preset, seed)


def sparse(batch: SparseBatch, rank: int, preset: Preset, seed: int) -> TruncatedSVD:
    """Of sparse matrices."""
    scales = launch_products.measure(batch)
    return _of_operator(Sparse(batch, scales), scales, rank, preset, seed)


def factored(
    B: Tensor, A: Tensor, weights: Tensor | None, rank: int, preset: Preset, seed: int
) -> TruncatedSVD:
    """Of Σ_q weights_q b_q a_qᵀ, for B [G, N, Q], A [G, Q, K], weights [Q] or [G, Q].

    The same at any preset: exact to rounding where the core is decomposed whole.
    """
    orthonormal = Orthonormal(launch_products.seed_tensor(seed, B.device))
    left, right = _side(B, orthonormal), _side(A.mT, orthonormal)
    finite = (left.status | right.status) == 0
    each = left.size * right.size  # (G, Q), float64
    if weights is not None:
        each = each * weights
        finite = finite & each.isfinite().all(1)
    each = torch.where(finite[:, None], each, 0.0)
    most = each.abs().amax(1)
    multiplier = power_of_two(-torch.frexp(most).exponent)
    scaled = (each * multiplier[:, None]).float()
    safe = finite[:, None, None]
    L = torch.where(safe, left.R * scaled[:, None, :], 0.0)
    core = launch_products.product(L, torch.where(safe, right.R, 0.0).mT)
    parts = _of_core(core, rank, orthonormal)
    U = parts.U if left.Q is None else launch_products.product(left.Q, parts.U)
    V = parts.V if right.Q is None else launch_products.product(right.Q, parts.V)
    norm2 = core.double().square().sum((1, 2)) / multiplier.square()
    status = torch.where(finite, 0, NONFINITE).int()
    scales = Scales(multiplier, norm2, status)
    return launchers.finish(U, V, parts.length, multiplier, scales, parts.status)


def _of_operator(
    operator: Dense | Sparse, scales: Scales, rank: int, preset: Preset, seed: int
) -> TruncatedSVD:
    seed_tensor = launch_products.seed_tensor(seed, operator.device)
    parts = _range_and_core(operator, rank, preset, Orthonormal(seed_tensor))
    U, V, length, status = parts
    return launchers.finish(U, V, length, scales.multiplier, scales, status)


def _range_and_core(
    operator: Dense | Sparse, rank: int, preset: Preset, orthonormal: Orthonormal
) -> Parts:
    """Of matrices scaled to entries of about 1."""
    _, N, K = operator.shape
    # a multiple of 16: every load is whole then
    width = min(cdiv(rank + preset.extra, 16) * 16, N, K)
    passes = 0 if width == min(N, K) else preset.passes
    Y = operator.apply(launch_products.draw(orthonormal.seed, K, width))
    for _ in range(passes):
        Q, _ = orthonormal.basis(Y, LOOSE, 1)
        Y = _filtered(operator, Q, preset.degree, orthonormal)
    Q, _ = orthonormal.basis(Y, FINE, 2)
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
    V = launch_products.product(B, rows.mT)
    U, _ = orthonormal.basis(rows.mT, FINE, 2)
    V, factors = orthonormal.basis(V, FINE, 2)
    if Q is not None:
        U = launch_products.product(Q, U)
    return Parts(U, V, factors[0].length, status)


def power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent in float64, exact: torch.ldexp goes through fp32."""
    return ((1023 + exponent.long().clamp(-1022, 1023)) << 52).view(torch.float64)


class _Side(NamedTuple):
    """One factor X diag(size)⁻¹ = Q R: Q orthonormal, or None for the identity."""

    Q: Tensor | None
    R: Tensor  # fp32 (G, m, Q), columns of length about 1
    size: Tensor  # float64 (G, Q), powers of two
    status: Tensor  # int32 (G)


def _side(X: Tensor, orthonormal: Orthonormal) -> _Side:
    """Of X [G, n, Q]; where Q >= n, the identity and X itself."""
    _, n, Q = X.shape
    if n <= Q:
        size = power_of_two(torch.frexp(X.float().abs().amax(1)).exponent)
        status = launch_products.measure(X).status
        return _Side(None, (X / size[:, None, :]).float(), size, status)
    # Triton 3.6 can't widen sixteen bits to float64 on the way into a dot
    basis, factors = orthonormal.basis(X.float(), FINE, 2)
    scale = factors[0].scale
    R = factors[0].R * scale.float()[:, None, :]
    for by in factors[1:]:
        R = launch_products.product(by.R, R)
    return _Side(basis, R, 1.0 / scale, launch_products.measure(X).status)


def _of_core(core: Tensor, rank: int, orthonormal: Orthonormal) -> Parts:
    """Of core matrices (G, m, k)."""
    _, m, k = core.shape
    if m > k:
        U, V, length, status = _of_core(core.mT, rank, orthonormal)
        return Parts(V, U, length, status)
    if m <= DIRECT or rank + CORE.extra > m // 2:
        return _core(core.mT, rank, orthonormal)
    ones = torch.ones(core.shape[0], dtype=torch.float32, device=core.device)
    scales = Scales(ones, ones.double(), torch.zeros_like(ones, dtype=torch.int32))
    return _range_and_core(Dense(core, scales), rank, CORE, orthonormal)
