"""The GPU path: the low-rank kernels around, or with, the base's products.

Same functions as addmm.py, which serve the same calls; see there for the maths. Whether the
vendor's product or the kernel of gemm.py makes y and dx is a matter of data: choices.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrank.kernels.lowrank.arguments import Aux, Branch
from fastrank.kernels.lowrank.calls import Call, start
from fastrank.kernels.lowrank.compaction import scatter
from fastrank.kernels.lowrank.launchers import (
    dual,
    expand_,
    finish,
    gemm,
    gram,
    reads_once,
    shrink,
    takes_gemm,
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    branch: Branch,
    aux: Aux,
) -> tuple[Tensor, Tensor, None]:
    """Base and branch: y `[M, N]`, then what add_ returns."""
    call, A, B, e = start(x.dtype, A, B, e, branch, aux)
    B_strides = B.stride()[::-1]
    S = shrink(call, x, A, A.stride(), call.dropout)
    if takes_gemm(call, "forward", x, weight.t(), dropout=False):
        return gemm(call, x, weight.t(), bias, S, B, B_strides, e, dropout=False), S, None
    y = F.linear(x, weight, bias)
    expand_(call, y, S, B, B_strides, e, branch.scale, dropout=False, add=True)
    return y, S, None


def add_(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    branch: Branch,
    aux: Aux,
) -> tuple[Tensor, None]:
    """Add the branch to y `[M, N]` in place; return S `[M, kept]`. Arguments as addmm.add_."""
    call, A, B, e = start(x.dtype, A, B, e, branch, aux)
    S = shrink(call, x, A, A.stride(), call.dropout)
    expand_(call, y, S, B, B.stride()[::-1], e, branch.scale, dropout=False, add=True)
    return S, None


def backward(
    dy: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    S: Tensor | None,
    keep: None,
    branch: Branch,
    aux: Aux,
    needs: tuple[bool, bool, bool, bool],
    dx_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA, dB and de, None where not needed. Arguments as addmm.backward."""
    need_dx, need_dA, need_dB, need_de = needs
    like = (A, B, e)
    x_dtype = (branch.autocast or dx_dtype) if x is None else x.dtype
    call, A, B, e = start(x_dtype, A, B, e, branch, aux)
    if call.dot != torch.float32:
        dy = dy.to(call.dot)  # lowrank_add under autocast to an fp32 y; otherwise nothing
    need_dA, need_dB, need_de = (
        need and branch.trained > 0 for need in (need_dA, need_dB, need_de)
    )
    from_rows = need_de and not (need_dA or need_dB)
    need_U = need_dx or need_dA or from_rows
    B_strides = B.stride()[::-1]

    fused = need_dx and weight is not None and takes_gemm(call, "dx", dy, weight, call.dropout)
    dx = dy @ weight if need_dx and weight is not None and not fused else None
    U = G = dA = dB = de = None
    if need_U and need_dB and reads_once(call, *dy.shape):
        U, G = dual(call, dy, S, B, B_strides)
    else:
        if need_U:
            U = shrink(call, dy, B, B_strides, dropout=False)
        if need_dB:
            G = gram(call, dy, S, dropout=False)
    if need_dB:
        dB, written = _room_for(like[1], 1, B.shape[1], aux)
        de = finish(call, G, written, written.stride()[::-1], B, B_strides, e, need_de)
    if need_dA:
        H = gram(call, x, U, call.dropout)
        dA, written = _room_for(like[0], 0, A.shape[0], aux)
        from_H = need_de and not need_dB
        share = finish(call, H, written, written.stride(), A, A.stride(), e, from_H)
        de = share if from_H else de
    if from_rows:
        de = _masked_row_sum(call, U, S)
    if fused:
        dx = gemm(call, dy, weight, None, U, A, A.stride(), e, call.dropout)
    elif need_dx:
        add = weight is not None
        if not add:
            dx = torch.empty(dy.shape[0], A.shape[1], dtype=dx_dtype, device=dy.device)
        expand_(call, dx, U, A, A.stride(), e, branch.scale, call.dropout, add)
    grads = (
        scatter(grad, dim, of, aux) if wanted else None
        for wanted, grad, dim, of in zip(needs[1:], (dA, dB, de), (0, 1, 0), like, strict=True)
    )
    return dx, *grads


def _room_for(like: Tensor, dim: int, kept: int, aux: Aux) -> tuple[Tensor, Tensor]:
    """Where a gradient goes: what scatter() takes, and its part for the ranks that are kept.

    Of a prefix that part is a view, so that nothing is copied and its strides don't follow kept.
    """
    shape = list(like.shape)
    if aux.index is not None:
        shape[dim] = kept
    make = torch.empty if kept == shape[dim] else torch.zeros
    whole = make(shape, dtype=like.dtype, device=like.device)
    return whole, whole.narrow(dim, 0, kept)


def _masked_row_sum(call: Call, U: Tensor, S: Tensor) -> Tensor:
    """de = scale Σ_M U∘S where neither dA nor dB is asked for."""
    de = (U * S).sum(0) * call.branch.scale
    ranks = torch.arange(de.shape[0], device=de.device)
    trained = ranks < call.branch.trained
    if call.masked:
        trained &= (call.masks[0] != 0) & (call.masks[1] != 0)
    return torch.where(trained, de, 0.0)
