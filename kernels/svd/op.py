"""Public functions of the batched truncated SVD: checks, backend choice, buckets."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrank.kernels.common import choose_backend
from fastrank.kernels.svd import plain, reference
from fastrank.kernels.svd.operands import (
    NONFINITE,
    NOT_CONVERGED,
    FactoredSum,
    Operand,
    PackedSparse,
    TruncatedSVD,
    check_floats,
)
from fastrank.kernels.svd.presets import Preset, preset_of
from fastrank.kernels.svd.sparse import SparseBatch


def truncated_svd(
    operand: Operand,
    rank: int,
    *,
    accuracy: str = "default",
    seed: int = 0,
    check: bool = False,
    backend: str = "auto",
) -> TruncatedSVD:
    """The best rank-`rank` approximations U diag(S) Vh of G matrices (N, K), without gradients.

        >>> from fastrank.kernels.svd import FactoredSum, truncated_svd
        >>> B, A = torch.randn(3, 96, 20), torch.randn(3, 20, 64)  # three sums of 20 products b aᵀ
        >>> U, S, Vh, energy, status = truncated_svd(FactoredSum(B, A), rank=20)
        >>> torch.allclose(U * S[:, None] @ Vh, B @ A, atol=1e-2)
        True
        >>> status.tolist()
        [0, 0, 0]

    Dense matrices of any spectrum, sums of thin products and packed sparse matrices; of the latter
    two no matrix is ever formed. Halko, Martinsson, Tropp (SIAM Rev. 53, 2011) for the scheme; the
    filter is Chebyshev's, see filtered.py.

    Args:
        operand: a tensor `[G, N, K]`, a FactoredSum or a PackedSparse; fp32, bf16, fp16 or float64.
        rank: 1 to min(N, K). What lies beyond a matrix's own rank has S zero and orthonormal U, Vh.
        accuracy: "fast", "default" or "tight": at least 0.98, 0.999 or 0.99999 of the energy that
            the best approximation holds, on the flattest spectra (1 % masked updates); spectra that
            fall are resolved to rounding.
        seed: of the sketch; 64 bits.
        check: raise where a status isn't 0. The only host sync.
        backend: "auto", "triton" or "reference" (LAPACK in float64 on the formed matrices).

    Returns:
        U `[G, N, r]`, S `[G, r]` non-increasing, Vh `[G, r, K]`, energy `[G]` = ΣS² / ‖A‖_F² and
        status int32 `[G]`, in fp32 (float64 for float64). A matrix with NaN or Inf has NaN factors
        and status NONFINITE; the others are as if it weren't there.

    Raises:
        ValueError, TypeError: operands that don't fit, with their shapes; a rank out of range; an
            operand that requires grad.
        ArithmeticError: with check=True, naming the matrices.
    """
    shape = _check(operand, rank, seed)
    preset = preset_of(accuracy)
    chosen = choose_backend(backend, operand.device, operand.dtype)
    with torch.no_grad():
        if 0 in shape:
            found = _empty(operand, rank)
        elif chosen == "reference":
            found = reference.truncated_svd(operand, rank)
        else:
            found = _run(operand, rank, preset, seed, chosen)
        if operand.dtype != torch.float64:
            found = TruncatedSVD(*(part.float() for part in found[:4]), found.status)
    if check:
        raise_bad(found.status)
    return found


def truncated_svd_many(
    operands: Sequence[Operand],
    rank: int | Sequence[int],
    *,
    accuracy: str = "default",
    seed: int = 0,
    check: bool = False,
    backend: str = "auto",
) -> list[TruncatedSVD]:
    """truncated_svd of matrices of many shapes, those alike in one batch: a whole model at once.

        >>> from fastrank.kernels.svd import truncated_svd_many
        >>> found = truncated_svd_many([torch.randn(96, 64), torch.randn(2, 40, 80)], rank=8)
        >>> [list(each.U.shape) for each in found]
        [[1, 96, 8], [2, 40, 8]]

    Args:
        operands: tensors `[N, K]` or `[G, N, K]`, FactoredSums, PackedSparses, of any shapes.
        rank: of all, or one each.
        others: as for truncated_svd.

    Returns:
        A result for each operand, in order, with its own G (1 for `[N, K]`). Each is what
        truncated_svd would give for it.

    Raises:
        ValueError, TypeError, ArithmeticError: as truncated_svd, naming the operand.
    """
    operands = [o[None] if isinstance(o, Tensor) and o.ndim == 2 else o for o in operands]
    ranks = [rank] * len(operands) if isinstance(rank, int) else list(rank)
    if len(ranks) != len(operands):
        raise ValueError(f"{len(ranks)} ranks for {len(operands)} operands")
    buckets: dict[tuple, list[int]] = {}
    for i, (operand, r) in enumerate(zip(operands, ranks, strict=True)):
        try:
            _check(operand, r, seed)
        except (ValueError, TypeError) as error:
            raise type(error)(f"operand {i}: {error}") from None
        buckets.setdefault(_alike(operand, r), []).append(i)
    found: list[TruncatedSVD | None] = [None] * len(operands)
    for members in buckets.values():
        batch = _together([operands[i] for i in members])
        options = {"accuracy": accuracy, "seed": seed, "backend": backend}
        result = truncated_svd(batch, ranks[members[0]], **options)
        sizes = [operands[i].shape[0] for i in members]
        parts = zip(*(part.split(sizes) for part in result), strict=True)
        for i, part in zip(members, parts, strict=True):
            found[i] = TruncatedSVD(*part)
    if check:
        for i, each in enumerate(found):
            raise_bad(each.status, f"operand {i}, ")
    return found


def raise_bad(status: Tensor, where: str = "") -> None:
    """Raises ArithmeticError where a status isn't 0, naming the matrices."""
    bad = status.tolist()
    if not any(bad):
        return
    said = {NONFINITE: "holds NaN or Inf", NOT_CONVERGED: "did not converge"}
    each = [
        f"{where}matrix {g} " + " and ".join(text for bit, text in said.items() if code & bit)
        for g, code in enumerate(bad)
        if code
    ]
    more = f" and {len(each) - 8} more" if len(each) > 8 else ""
    raise ArithmeticError("truncated_svd: " + "; ".join(each[:8]) + more)


def _check(operand: Operand, rank: int, seed: int) -> tuple[int, int, int]:
    if not isinstance(operand, Tensor | FactoredSum | PackedSparse):
        raise TypeError(
            f"operand is a {type(operand).__name__}; wanted a tensor [G, N, K], a FactoredSum or a"
            " PackedSparse"
        )
    if isinstance(operand, Tensor):
        check_floats(operand=operand)
        if operand.ndim != 3:
            raise ValueError(
                f"operand has shape {list(operand.shape)}, wanted [G, N, K];"
                " add the first dimension with operand[None]"
            )
    tensors = (operand,) if isinstance(operand, Tensor) else operand.tensors()
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ValueError(
            "truncated_svd has no gradient but its operand requires one; pass operand.detach(), or"
            " call it under torch.no_grad()"
        )
    G, N, K = operand.shape
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank is {rank!r}, wanted an int")
    if not 1 <= rank <= min(N, K) and G * N * K:
        raise ValueError(
            f"rank {rank} of matrices {[G, N, K]}; wanted 1 to min(N, K) = {min(N, K)}"
        )
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed!r}, wanted an int of 64 bits")
    return G, N, K


def _run(operand: Operand, rank: int, preset: Preset, seed: int, chosen: str) -> TruncatedSVD:
    if chosen == "torch":
        if isinstance(operand, Tensor):
            return plain.dense(operand, rank, preset, seed)
        if isinstance(operand, FactoredSum):
            return plain.factored(operand, rank, preset, seed)
        return plain.sparse(SparseBatch.of(operand), rank, preset, seed)
    from fastrank.kernels.svd import triton_path  # loads Triton

    if isinstance(operand, Tensor):
        return triton_path.dense(operand, rank, preset, seed)
    if isinstance(operand, FactoredSum):
        parts = operand.B, operand.A, operand.weights
        return triton_path.factored(*parts, rank, preset, seed)
    return triton_path.sparse(SparseBatch.of(operand), rank, preset, seed)


def _empty(operand: Operand, rank: int) -> TruncatedSVD:
    """Of no matrices, or of matrices without entries, whose rank is 0."""
    G, N, K = operand.shape
    rank = min(rank, N, K)
    dtype = torch.float64 if operand.dtype == torch.float64 else torch.float32
    where = {"dtype": dtype, "device": operand.device}
    U, S, Vh = (torch.zeros(s, **where) for s in ((G, N, rank), (G, rank), (G, rank, K)))
    status = torch.zeros(G, dtype=torch.int32, device=operand.device)
    return TruncatedSVD(U, S, Vh, torch.ones(G, **where), status)


def _alike(operand: Operand, rank: int) -> tuple:
    """What operands of one batch share."""
    key = (type(operand), operand.shape[1:], operand.dtype, operand.device, rank)
    if isinstance(operand, FactoredSum):
        return *key, operand.B.shape[2], operand.weights is None
    return key


def _together(operands: list[Operand]) -> Operand:
    first = operands[0]
    if len(operands) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(operands)
    if isinstance(first, PackedSparse):
        return PackedSparse(
            [v for o in operands for v in o.values], [m for o in operands for m in o.masks]
        )
    weights = None
    if first.weights is not None:
        weights = torch.cat([o.weights.expand(o.B.shape[0], -1) for o in operands])
    return FactoredSum(
        torch.cat([o.B for o in operands]), torch.cat([o.A for o in operands]), weights
    )
