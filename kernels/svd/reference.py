"""The definition: the leading part of LAPACK's SVD of the whole matrix, in float64."""

import torch
from torch import Tensor

from fastrank.kernels.svd.operands import FactoredSum, Operand, PackedSparse, TruncatedSVD
from fastrank.kernels.svd.operators import Dense
from fastrank.kernels.svd.plain import whole


def truncated_svd(operand: Operand, rank: int) -> TruncatedSVD:
    """U S Vh of the best rank-`rank` approximation, in float64; every matrix is formed."""
    operator = Dense(materialise(operand))
    return whole(operator.A, operator, rank)


def materialise(operand: Operand) -> Tensor:
    """The matrices themselves, float64 `[G, N, K]`."""
    if isinstance(operand, FactoredSum):
        A = operand.A.double()
        if operand.weights is not None:
            w = operand.weights.double()
            A = A * (w[None, :, None] if w.ndim == 1 else w[:, :, None])
        return operand.B.double() @ A
    if isinstance(operand, PackedSparse):
        G, N, K = operand.shape
        found = torch.zeros(G, N * K, dtype=torch.float64, device=operand.device)
        for row, values, mask in zip(found, operand.values, operand.masks, strict=True):
            row[mask.positions(operand.device)] = values.double()
        return found.view(G, N, K)
    return operand.double()
