"""Ranks that take part, gathered before the work; gradients, scattered back after it."""

import torch
from torch import Tensor

from fastrank.kernels.lowrank.arguments import Aux, Branch


def select(
    A: Tensor, B: Tensor, e: Tensor | None, branch: Branch, aux: Aux
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A (kept, K), B (N, kept), e (kept): trained ranks first; views where that is enough."""
    if aux.index is not None:
        e = None if e is None else e.index_select(0, aux.index)
        return A.index_select(0, aux.index), B.index_select(1, aux.index), e
    if branch.kept < A.shape[0]:
        e = None if e is None else e[: branch.kept]
        return A[: branch.kept], B[:, : branch.kept], e
    return A, B, e


def scatter(grad: Tensor | None, dim: int, like: Tensor, aux: Aux) -> Tensor:
    """The gradient of the first ranks that select() gives as one of all: exactly zero elsewhere.

    grad is None where no rank has a gradient; it has like's shape but for `dim`.
    """
    if grad is not None and aux.index is None and grad.shape[dim] == like.shape[dim]:
        return grad.to(like.dtype)
    full = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    if grad is not None and aux.index is None:
        full.narrow(dim, 0, grad.shape[dim]).copy_(grad)
    elif grad is not None:
        full.index_copy_(dim, aux.index[: grad.shape[dim]], grad.to(like.dtype))
    return full
