"""Range finder: subspace iteration filtered by Chebyshev polynomials of A Aᵀ.

The spectra that matter here, of masked updates, are almost flat: plain subspace iteration needs
dozens of products a digit. A Chebyshev filter of degree d damps everything below the block's
smallest Ritz value c and grows like cosh(d acosh(2 σ²/c - 1)) above it (Zhou, Saad, Tiago and
Chelikowsky, J. Comput. Phys. 219, 2006). Each pass turns the block to its Ritz vectors, filters it,
and orthogonalises. Where a spectrum falls fast, a filter would leave nothing of the small
directions but rounding, so each matrix has a degree of its own, down to one plain step.

A pass more costs a CPU no synchronisation: matrices go on until their energy has settled.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrank.kernels.svd.operators import Operator
from fastrank.kernels.svd.orthogonal import orthonormal
from fastrank.kernels.svd.presets import Preset
from fastrank.kernels.svd.sketch import sketch

# log of how much more a filter may grow a block's largest direction than its smallest: in fp32
# what is 1e7 times smaller drowns in the largest's rounding
_MOST_GROWTH = 11.5
_MOST_PASSES = 16
# beside the share of energy: how much longer than the best a remainder ‖A - U S Vh‖² may be
_REMAINDER = 1e-3


class Basis(NamedTuple):
    """What a range finder found: A is about Q Xᵀ."""

    Q: Tensor  # [G, N, q], orthonormal columns
    X: Tensor  # [G, K, q] = Aᵀ Q
    converged: Tensor  # bool [G]


def range_of(operator: Operator, rank: int, preset: Preset, seed: int) -> Basis:
    """A basis that holds the leading `rank` left directions of each matrix.

    A matrix is done when the energy that further passes would add, extrapolated from the last two,
    is at most `preset.missing` of what was found and too little to shorten the remainder visibly.
    Its result then stays as it is, whatever the others of the batch still need.
    """
    G, N, K = operator.shape
    width = preset.width(rank, N, K)
    omega = sketch(seed, K, width, device=operator.device).to(operator.dtype)
    Q = orthonormal(operator.apply(omega.expand(G, K, width)))
    X = operator.apply_t(Q)
    if width == min(N, K):  # the block holds everything
        return Basis(Q, X, torch.ones_like(operator.finite))
    norm2, floor = operator.norm2(), rounding(operator)
    energies: list[Tensor] = []
    found = Basis(Q, X, torch.zeros_like(operator.finite))
    for _ in range(_MOST_PASSES + 1):
        values, W = _ritz(X)
        energies.append(values[:, :rank].sum(1))
        now = _settled(energies, norm2, preset.missing, floor) & ~found.converged
        if found.converged.any():
            keep = found.converged[:, None, None]
            Q, X = torch.where(keep, found.Q, Q), torch.where(keep, found.X, X)
        found = Basis(Q, X, found.converged | now)
        if found.converged.all():
            break
        W = W.to(operator.dtype)
        Q = orthonormal(_filtered(operator, Q @ W, X @ W, values, preset.degree))
        X = operator.apply_t(Q)
    return found


def rounding(operator: Operator) -> float:
    """What rounding alone may do to ‖A‖² relative to itself: (10 n eps)²."""
    eps = torch.finfo(operator.dtype).eps
    return (10 * max(operator.shape[1:]) * eps) ** 2


def _ritz(X: Tensor) -> tuple[Tensor, Tensor]:
    """Squared Ritz values, descending, `[G, q]`, and the rotation to their vectors `[G, q, q]`."""
    X = X.double()
    values, vectors = torch.linalg.eigh(X.mT @ X)
    return values.flip(1).clamp_min(0.0), vectors.flip(2)


def _settled(energies: list[Tensor], norm2: Tensor, missing: float, floor: float) -> Tensor:
    """Whether the energy to come, a geometric series with the last two gains' ratio, is small."""
    if len(energies) < 3:
        return norm2 == 0
    gain, before = energies[-1] - energies[-2], energies[-2] - energies[-3]
    gain = gain.clamp_min(0.0)
    ratio = (gain / before.clamp_min(1e-300)).clamp(0.0, 0.9)
    to_come = gain * ratio / (1 - ratio)
    remainder = (norm2 - energies[-1]).clamp_min(0.0)
    enough = torch.minimum(missing * energies[-1], _REMAINDER * remainder) / 2
    return to_come <= enough + floor * norm2


def _filtered(operator: Operator, Q: Tensor, X: Tensor, values: Tensor, degree: int) -> Tensor:
    """T_d((A Aᵀ - e I) / e) Q with e = c / 2, by the three-term recurrence.

    Args:
        Q: `[G, N, q]`, Ritz vectors; X: `[G, K, q]` = Aᵀ Q; values: float64 `[G, q]`, their values.
    """
    top, c = values[:, 0], values[:, -1]
    growth = torch.acosh((2 * top / c.clamp_min(1e-300) - 1).clamp(1.0, 1e300))
    degrees = (_MOST_GROWTH / growth.clamp_min(1e-3)).floor().clamp(0, degree)
    plain = degrees < 1  # A Aᵀ Q / σ₁² alone
    half = torch.where(plain, top, c / 2)
    alpha = _column(torch.where(half > 0, half.reciprocal(), 0.0), Q)
    shift = _column(torch.where(plain, 0.0, 1.0), Q)
    before, block = Q, operator.apply(X).mul_(alpha).sub_(shift * Q)
    for step in range(2, int(degrees.max()) + 1):
        wide = operator.apply_t(block).mul_(2 * alpha)
        go = (step <= degrees)[:, None, None]
        if go.all():
            before, block = block, operator.apply(wide, minus=before.add_(block, alpha=2))
        else:
            following = operator.apply(wide, minus=before + 2 * block)
            before, block = torch.where(go, block, before), torch.where(go, following, block)
    return block


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype)[:, None, None]
