"""Matrices that a decomposition gets wrong, and what is asked of it, as LAPACK's own tests ask.

Ratios are errors in units of n eps: a residual ‖A - U S Vh‖ / (‖A‖ n eps), an orthogonality
‖I - UᵀU‖ / (n eps), n the matrix's larger side and eps that of the result's dtype.
"""

import torch
from torch import Tensor

from fastrank.kernels.packing import SparseMask
from fastrank.kernels.svd import TruncatedSVD

MOST = 10.0  # of a ratio
MOST_SIGMA = 50.0  # eps of the largest singular value


def orthogonal(n: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=generator))[0]


def with_values(values: Tensor, n: int, k: int, seed: int = 0) -> Tensor:
    """A matrix (n, k) with these singular values."""
    q = len(values)
    return orthogonal(n, q, seed) * values.double() @ orthogonal(k, q, seed + 1).T


def hard(n: int, k: int) -> dict[str, Tensor]:
    """Name -> matrix (n, k), float64."""
    least = min(n, k)
    ones = torch.ones(least, dtype=torch.float64)
    steps = torch.arange(least, dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    random = torch.randn(n, k, dtype=torch.float64, generator=generator)
    kahan = torch.eye(least, dtype=torch.float64) - 0.6 * torch.ones(least, least).triu(1).double()
    kahan = 0.8 ** steps[:, None] * kahan
    i, j = torch.arange(n, dtype=torch.float64), torch.arange(k, dtype=torch.float64)
    near = with_values(ones[:2], n, k, 3) + 1e-6 * random / random.norm()
    sparse = torch.where(torch.rand(n, k, generator=generator) < 0.05, random, 0.0)
    sparse[: n // 4], sparse[:, : k // 4] = 0.0, 0.0
    return {
        "random": random,
        "zero": 0 * random,
        "identity": torch.eye(n, k, dtype=torch.float64),
        "rank 1": with_values(ones[:1], n, k),
        "rank 3": with_values(torch.tensor([4.0, 2.0, 1.0]), n, k),
        "graded to 1e-3": with_values(10 ** (-3 * steps / max(least - 1, 1)), n, k),
        "graded to 1e-7": with_values(10 ** (-7 * steps / max(least - 1, 1)), n, k),
        "two repeated values": with_values(torch.where(steps < least // 2, 2.0, 1.0), n, k),
        "orthogonal": with_values(ones, n, k),
        "half zero": with_values(torch.where(steps < least // 2, 1.0, 0.0), n, k),
        "nearly equal clients": near,
        "tiny": 1e-30 * random,
        "denormal": 1e-39 * random,
        "huge": 1e30 * random,
        "hilbert": 1 / (i[:, None] + j[None, :] + 1),
        "kahan": torch.nn.functional.pad(kahan, (0, k - least, 0, n - least)),
        "empty rows and columns": sparse,
    }


def ratios(A: Tensor, found: TruncatedSVD, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """How wrong a result is: worst over the batch.

    Args:
        A: float64 `[G, n, k]`, what was decomposed, as rounded to the operand's dtype.

    Returns:
        "residual" of U' A V = diag(S), "orthogonal" of U and V, "sigma" in eps of the largest,
        "excess": how much longer than (1 + 1e-3) x the best the remainder is, in n eps ‖A‖.
    """
    U, S, Vh = (part.double() for part in found[:3])
    n, eps, rank = max(A.shape[1:]), torch.finfo(dtype).eps, S.shape[1]
    scale = A.abs().amax((1, 2)).clamp_min(1e-300)
    A, S = A / scale[:, None, None], S / scale[:, None]
    values = torch.linalg.svdvals(A)
    norm = values.square().sum(1).sqrt().clamp_min(1e-300)
    eye = torch.eye(rank, dtype=torch.float64)
    best = values[:, rank:].square().sum(1).sqrt()
    remainder = (A - U * S[:, None, :] @ Vh).flatten(1).norm(dim=1)
    inner = U.mT @ A @ Vh.mT - torch.diag_embed(S)
    return {
        "residual": float((inner.flatten(1).norm(dim=1) / (norm * n * eps)).max()),
        "orthogonal": float(
            max((U.mT @ U - eye).flatten(1).norm(dim=1).max(),
                (Vh @ Vh.mT - eye).flatten(1).norm(dim=1).max()) / (n * eps)
        ),
        "sigma": float(
            ((S - values[:, :rank]).abs().amax(1) / values[:, 0].clamp_min(1e-300)).max() / eps
        ),
        "excess": float(((remainder - (1 + 1e-3) * best) / (norm * n * eps)).max()),
    }  # fmt: skip


def energy_ratio(A: Tensor, found: TruncatedSVD) -> Tensor:
    """ΣS² over that of the best approximation of the same rank, float64 `[G]`."""
    rank = found.S.shape[1]
    best = torch.linalg.svdvals(A)[:, :rank].square().sum(1)
    return found.S.double().square().sum(1) / best


def masked(G: int, n: int, k: int, density: float, seed: int = 0) -> tuple[list, list]:
    """(values, masks) of independent Gaussian matrices: the flat spectra of sparse updates."""
    generator = torch.Generator().manual_seed(seed)
    masks = [SparseMask((n, k), density, seed=seed, tensor_id=f"matrix {g}") for g in range(G)]
    return [torch.randn(mask.nnz, generator=generator) for mask in masks], masks
