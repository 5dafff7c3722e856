"""Orthonormal bases of thin blocks: Cholesky of the Gram matrix in float64, or Householder.

Columns are first made of equal length, so that the Gram matrix tells only how far they depend on
one another. Where they do (a LoRA's B starts at zero, clients may be identical: rank deficiency is
normal here, and every Cholesky variant fails on it, arXiv:1809.11085) Householder's QR takes those
matrices over; its Q is orthonormal whatever the block.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# The smallest squared pivot, of columns of length 1, that Cholesky is trusted with: the basis is
# then orthonormal to eps / pivot or better, eps float64's for Thin and fp32's for orthonormal.
_LEAST_PIVOT = {torch.float64: 1e-6, torch.float32: 1e-3}


class Thin(NamedTuple):
    """Y = Q R with Q not formed: Q P costs one product with the thin Y."""

    Y: Tensor  # [G, n, q]; Householder's Q for the matrices that needed it
    inverse: Tensor  # [G, q, q]: Q = Y inverse; the identity for those
    R: Tensor  # [G, q, q]

    def times(self, P: Tensor) -> Tensor:
        """Q P for P `[G, q, r]`."""
        return self.Y @ (self.inverse @ P)


def thin(Y: Tensor) -> Thin:
    """The factors of a float64 block `[G, n, q]`, n >= q."""
    inverse, R, good = _triangles(Y, _LEAST_PIVOT[torch.float64])
    bad = ~good
    if bad.any():
        Y = Y.clone()
        Y[bad], R[bad] = torch.linalg.qr(Y[bad])
        inverse[bad] = torch.eye(Y.shape[2], dtype=Y.dtype, device=Y.device)
    return Thin(Y, inverse, R)


def orthonormal(Y: Tensor) -> Tensor:
    """Orthonormal columns that span those of Y `[G, n, q]`, n >= q, in its dtype.

    Float64 goes to Householder's QR whole: one Cholesky step would not reach its precision.
    """
    if Y.dtype == torch.float64:
        return torch.linalg.qr(Y).Q
    wide = Y.double()
    inverse, _, good = _triangles(wide, _LEAST_PIVOT[torch.float32])
    Q = Y @ inverse.to(Y.dtype)
    bad = ~good
    if bad.any():
        Q[bad] = torch.linalg.qr(wide[bad]).Q.to(Y.dtype)
    return Q


def _triangles(Y: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """(R⁻¹, R, whether each can be trusted) with YᵀY = RᵀR, for a float64 block."""
    gram = Y.mT @ Y
    length = gram.diagonal(dim1=1, dim2=2).sqrt()
    scale = torch.where(length > 0, length, 1.0)
    # in place: fresh memory costs more than the arithmetic of cores of this size
    gram.div_(scale[:, :, None]).div_(scale[:, None, :])
    L, info = torch.linalg.cholesky_ex(gram)
    good = (info == 0) & (L.diagonal(dim1=1, dim2=2).square().amin(1) > least)
    eye = torch.eye(Y.shape[2], dtype=Y.dtype, device=Y.device)
    if not good.all():
        L = torch.where(good[:, None, None], L, eye)
    U = L.mT
    inverse = torch.linalg.solve_triangular(U, eye.expand_as(U), upper=True)
    return inverse.div_(scale[:, :, None]), U.mul_(scale[:, None, :]), good
