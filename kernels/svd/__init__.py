"""Batched truncated SVD: of dense matrices, of sums of thin products, of packed sparse updates."""

from fastrank.kernels.svd.op import truncated_svd, truncated_svd_many
from fastrank.kernels.svd.operands import (
    NONFINITE,
    NOT_CONVERGED,
    FactoredSum,
    PackedSparse,
    TruncatedSVD,
)
from fastrank.kernels.svd.presets import PRESETS
from fastrank.kernels.svd.refactor import LowRank, Orthogonal, refactor, reorthogonalise

__all__ = [
    "NONFINITE",
    "NOT_CONVERGED",
    "PRESETS",
    "FactoredSum",
    "LowRank",
    "Orthogonal",
    "PackedSparse",
    "TruncatedSVD",
    "refactor",
    "reorthogonalise",
    "truncated_svd",
    "truncated_svd_many",
]
