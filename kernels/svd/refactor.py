"""What servers do with the decomposition, for all modules of a model at once.

A sum of clients' products at a new rank (FlexLoRA, arXiv:2402.11505; SA-FedLoRA's shrinking ranks),
a packed sparse update as a LoRA (SLoRA, arXiv:2308.06522), a trained B diag(e) A with orthonormal
factors again (FedARA's SVD form).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastrank.kernels.svd.op import truncated_svd_many
from fastrank.kernels.svd.operands import FactoredSum, Operand, TruncatedSVD

SPLITS = ("B", "balanced")


class LowRank(NamedTuple):
    """Factors of one module, fp32: its update is about scaling B A."""

    B: Tensor  # [N, r]
    A: Tensor  # [r, K]
    energy: Tensor  # ‖scaling B A‖² / ‖update‖², 0-dimensional


class Orthogonal(NamedTuple):
    """U diag(e) V of one module, fp32, with e >= 0 non-increasing."""

    B: Tensor  # [N, r], orthonormal columns
    e: Tensor  # [r]
    A: Tensor  # [r, K], orthonormal rows


def refactor(
    updates: Mapping[str, Operand],
    rank: int | Mapping[str, int],
    *,
    scaling: float = 1.0,
    split: str = "B",
    keep: Mapping[str, Tensor] | None = None,
    accuracy: str = "default",
    seed: int = 0,
    backend: str = "auto",
) -> dict[str, LowRank]:
    """Low-rank factors of every module's update, the best of their rank.

        new = refactor({name: FactoredSum.of(pairs[name], weights) for name in pairs}, rank=4)
        new = refactor({name: PackedSparse([values], [mask])}, rank=8, scaling=2.0)

    Args:
        updates: module -> one matrix: a tensor `[N, K]` or `[1, N, K]`, a FactoredSum or a
            PackedSparse of one matrix.
        rank: of all modules, or of each.
        scaling: what the layer multiplies B A by; the factors are divided by it.
        split: "B" puts the singular values into B (A has orthonormal rows), "balanced" their roots
            into both.
        keep: module -> A `[r, K]` whose rows stay where the update has no direction left: a rank
            whose singular value is zero but for rounding. B is zero there, so the product is the
            same; without it the row is orthonormal to the others, which also trains.
        accuracy, seed, backend: as for truncated_svd.

    Raises:
        ValueError, TypeError: as truncated_svd, naming the module.
        ArithmeticError: an update holds NaN or Inf, or did not converge; names the module.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if not scaling or scaling != scaling or abs(scaling) == float("inf"):
        raise ValueError(f"scaling is {scaling}; wanted a finite number that is not 0")
    found = _decomposed(updates, rank, accuracy=accuracy, seed=seed, backend=backend)
    return {
        name: _factors(each, scaling, split, None if keep is None else keep.get(name))
        for name, each in found.items()
    }


def reorthogonalise(
    modules: Mapping[str, tuple[Tensor, Tensor, Tensor]], *, seed: int = 0, backend: str = "auto"
) -> dict[str, Orthogonal]:
    """B diag(e) A of every module with orthonormal factors, the product unchanged.

    Training by gradients lets the factors of an SVD-shaped adapter drift from orthonormal; then e
    no longer tells what a rank contributes. Costs one QR a side and a small core.

    Args:
        modules: module -> (B `[N, r]`, e `[r]`, A `[r, K]`), r <= min(N, K).

    Raises:
        ValueError, TypeError, ArithmeticError: as refactor.
    """
    sums = {}
    for name, (B, e, A) in modules.items():
        if B.ndim != 2 or A.ndim != 2 or tuple(e.shape) != (B.shape[1],):
            raise ValueError(
                f"{name}: B {list(B.shape)}, e {list(e.shape)}, A {list(A.shape)};"
                " wanted [N, r], [r] and [r, K]"
            )
        sums[name] = FactoredSum(B[None].detach(), A[None].detach(), e.detach())
    ranks = {name: one.B.shape[2] for name, one in sums.items()}
    found = _decomposed(sums, ranks, accuracy="default", seed=seed, backend=backend)
    return {name: Orthogonal(each.U[0], each.S[0], each.Vh[0]) for name, each in found.items()}


def _decomposed(
    updates: Mapping[str, Operand], rank: int | Mapping[str, int], **options
) -> dict[str, TruncatedSVD]:
    names = list(updates)
    if not isinstance(rank, int) and (missing := [name for name in names if name not in rank]):
        raise ValueError(f"rank has no entry for {missing[0]}")
    ranks = [rank if isinstance(rank, int) else rank[name] for name in names]
    for name in names:
        if (G := _count(updates[name])) != 1:
            raise ValueError(f"{name} is a batch of {G} matrices; give one matrix a module")
    try:
        found = truncated_svd_many([updates[name] for name in names], ranks, **options)
    except (ValueError, TypeError) as error:
        raise type(error)(_named(str(error), names)) from None
    bad = [n for n, each in zip(names, found, strict=True) if int(each.status)]
    if bad:
        raise ArithmeticError(f"{bad[0]}: the update holds NaN or Inf, or did not converge")
    return dict(zip(names, found, strict=True))


def _count(update: Operand) -> int:
    return 1 if isinstance(update, Tensor) and update.ndim == 2 else update.shape[0]


def _named(message: str, names: list[str]) -> str:
    """ "operand 3: ..." with the module's name."""
    head, _, rest = message.partition(": ")
    number = head.removeprefix("operand ")
    return f"{names[int(number)]}: {rest}" if number.isdecimal() else message


def _factors(found: TruncatedSVD, scaling: float, split: str, keep: Tensor | None) -> LowRank:
    U, S, Vh = found.U[0], found.S[0] / abs(scaling), found.Vh[0]
    U = U if scaling > 0 else -U
    if keep is not None and tuple(keep.shape) != tuple(Vh.shape):
        raise ValueError(f"keep has shape {list(keep.shape)}, wanted A's, {list(Vh.shape)}")
    # zero but for rounding: such a rank adds nothing
    least = max(len(U), Vh.shape[1]) * torch.finfo(torch.float32).eps * S.max()
    lost = least >= S
    S = torch.where(lost, 0.0, S)
    root = S.sqrt()
    left, right = (S, torch.ones_like(S)) if split == "B" else (root, root)
    # a rank whose A and B are both zero would never train again
    right = torch.where(lost, 1.0, right)
    A = right[:, None] * Vh
    if keep is not None:
        A = torch.where(lost[:, None], keep.detach().to(A), A)
    return LowRank(U * left, A, found.energy[0])
