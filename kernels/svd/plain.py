"""Truncated SVD in plain torch: the CPU path, on LAPACK, with a float64 core.

Results are float64; the public function rounds them to the operand's precision.

Dense matrices that a block would fill anyway go to LAPACK whole. Others, and sparse ones, are
reduced by the range finder of filtered.py. Sums of thin products are reduced exactly: B = Q_B R_B
and Aᵀ = Q_A R_A, so that the sum's singular values are those of the small matrix R_B R_Aᵀ.
"""

import torch
from torch import Tensor, nn

from fastrank.kernels.svd.filtered import range_of
from fastrank.kernels.svd.operands import NONFINITE, NOT_CONVERGED, FactoredSum, TruncatedSVD
from fastrank.kernels.svd.operators import Dense, Factored, Operator, Sparse, power_of_two, widened
from fastrank.kernels.svd.orthogonal import thin
from fastrank.kernels.svd.presets import Preset
from fastrank.kernels.svd.sparse import SparseBatch

# a dense matrix is decomposed whole where the block has more than this part of its smaller side
_WHOLE = 0.25
# entries of a dense batch that are worked on at once: 256 MB in fp32
_CHUNK = 1 << 26


def dense(A: Tensor, rank: int, preset: Preset, seed: int) -> TruncatedSVD:
    """Of `[G, N, K]`, G at least 1."""
    G, N, K = A.shape
    each = max(1, _CHUNK // max(N * K, 1))
    if each < G:
        return joined([dense(part, rank, preset, seed) for part in A.split(each)])
    operator = Dense(A)
    if preset.width(rank, N, K) > _WHOLE * min(N, K):
        return whole(operator.A.double(), operator, rank)
    return _by_range(operator, rank, preset, seed)


def sparse(batch: SparseBatch, rank: int, preset: Preset, seed: int) -> TruncatedSVD:
    """Of packed sparse matrices."""
    return _by_range(Sparse(batch), rank, preset, seed)


def factored(operand: FactoredSum, rank: int, preset: Preset, seed: int) -> TruncatedSVD:
    """Of sums of thin products; by the range finder where they aren't thin."""
    if operand.B.shape[2] > min(operand.shape[1:]):
        return _by_range(Factored(operand), rank, preset, seed)
    B, A, weights, scale, finite = widened(operand)
    if rank > B.shape[2]:  # columns of zeros: a sum of Q products has rank Q at most
        more = rank - B.shape[2]
        B, weights = (nn.functional.pad(t, (0, more)) for t in (B, weights))
        A = nn.functional.pad(A, (0, 0, 0, more))
    left, right = thin(B), thin(A.mT)
    core = left.R.mul_(weights[:, None, :]) @ right.R.mT
    length = torch.linalg.vector_norm(core, dim=(1, 2))
    size = power_of_two(length)
    P, S, Wh, failed = svd(core.div_(size[:, None, None]))
    U, V = left.times(P[:, :, :rank]), right.times(Wh[:, :rank].mT)
    norm2 = (length / size).square()
    return result(U, S[:, :rank], V.mT, norm2, scale * size, finite, failed)


def whole(A: Tensor, operator: Operator, rank: int) -> TruncatedSVD:
    """LAPACK's decomposition, cut off. A: the operator's matrices, float64 `[G, N, K]`."""
    U, S, Vh, failed = svd(A)
    parts = U[:, :, :rank], S[:, :rank], Vh[:, :rank], operator.norm2()
    return result(*parts, operator.scale, operator.finite, failed)


def _by_range(operator: Operator, rank: int, preset: Preset, seed: int) -> TruncatedSVD:
    found = range_of(operator, rank, preset, seed)
    right = thin(found.X.double())  # A is about Q Xᵀ = Q Rᵀ Vᵀ
    P, S, Wh, failed = svd(right.R.mT)
    U, V = found.Q.double() @ P[:, :, :rank], right.times(Wh[:, :rank].mT)
    parts = U, S[:, :rank], V.mT, operator.norm2()
    failed = failed | ~found.converged
    return result(*parts, operator.scale, operator.finite, failed)


def svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LAPACK's SVD of a finite batch, and which matrices it failed on (NaN there).

    Its divide and conquer fails on a matrix now and then; the triangle left by a QR of the
    transpose is another matrix with the same values, and is tried before giving up.
    """
    failed = torch.zeros(A.shape[0], dtype=torch.bool, device=A.device)
    try:
        return *torch.linalg.svd(A, full_matrices=False), failed
    except torch.linalg.LinAlgError:
        found = [_svd_of_one(one) for one in A]
        U, S, Vh = (torch.stack(part) for part in zip(*found, strict=True))
        return U, S, Vh, S.isnan().any(1)


def _svd_of_one(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        return torch.linalg.svd(A, full_matrices=False)
    except torch.linalg.LinAlgError:
        Q, R = torch.linalg.qr(A.mT)
        try:
            V, S, Uh = torch.linalg.svd(R, full_matrices=False)
            return Uh.mT, S, (Q @ V).mT
        except torch.linalg.LinAlgError:
            N, K = A.shape
            q = min(N, K)
            return tuple(A.new_full(shape, torch.nan) for shape in ((N, q), (q,), (q, K)))


def result(
    U: Tensor,
    S: Tensor,
    Vh: Tensor,
    norm2: Tensor,
    scale: Tensor,
    finite: Tensor,
    failed: Tensor,
) -> TruncatedSVD:
    """Signs, scales, energy and status of float64 factors of scaled matrices.

    Args:
        norm2: ‖A‖_F² of the scaled matrices, float64 `[G]`.
        scale: what they were divided by.
        failed: where the core or the range finder did not converge, bool `[G]`.
    """
    sign = _signs(U)
    energy = torch.where(norm2 > 0, S.square().sum(1) / norm2.clamp_min(1e-300), 1.0)
    nan = torch.where(finite, 0.0, torch.nan).double()[:, None]
    status = (~finite).int() * NONFINITE + (failed & finite).int() * NOT_CONVERGED
    return TruncatedSVD(
        U=U * sign + nan[:, :, None],
        S=S * scale[:, None] + nan,
        Vh=Vh * sign.mT + nan[:, :, None],
        energy=energy.clamp(max=1.0) + nan[:, 0],
        status=status,
    )


def _signs(U: Tensor) -> Tensor:
    """The sign of each column's largest entry, the first on ties: `[G, 1, r]`, 1 or -1."""
    low, high = torch.aminmax(U, dim=1, keepdim=True)
    sign = torch.where(high > -low, 1.0, -1.0).to(U.dtype)
    if (high == -low).any():
        first = U.gather(1, U.abs().argmax(dim=1, keepdim=True))
        sign = torch.where(high == -low, torch.where(first < 0, -1.0, 1.0).to(U.dtype), sign)
    return sign


def joined(parts: list[TruncatedSVD]) -> TruncatedSVD:
    """Batches behind each other."""
    return TruncatedSVD(*(torch.cat(part) for part in zip(*parts, strict=True)))
