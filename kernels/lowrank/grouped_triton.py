"""grouped_lowrank_linear on a GPU: the vendor's base products, and one kernel for all branches.

    S = xh Aᵀ     y += s (S∘e) B         U = dY Bᵀ     dx = dY W + s D∘((U∘e) A)
    dB = s e∘(Sᵀ dY)     dA = s e∘(Uᵀ xh)     de = s Σ_N B∘(Sᵀ dY) = s Σ_K A∘(Uᵀ xh)

Each group with its own rows and ranks; same functions as grouped_torch.py, which serve CPUs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrank.kernels.lowrank.grouped_arguments import GroupedAux, GroupedBranch, Layout
from fastrank.kernels.lowrank.grouped_launchers import expand_, gradient, shrink, start


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    layout: Layout,
    branch: GroupedBranch,
    aux: GroupedAux,
) -> tuple[Tensor, Tensor, None]:
    """y `[M, N]` and S `[M, most ranks]` in fp32, of which a row has as many as its group.

    Args:
        x: `[M, K]`, any strides; as weight and bias in the dtype that F.linear would compute in.
        A, B, e: all groups' ranks, `[ΣR, K]`, `[ΣR, N]`, `[ΣR]`, any strides.
    """
    call, A, B, e = start(x.shape[0], x.dtype, A, B, e, layout, branch, aux)
    S = shrink(call, x, A, call.dropout)
    y = F.linear(x, weight, bias)
    expand_(call, y, S, B, e, dropout=False)
    return y, S, None


def backward(
    dy: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    S: Tensor | None,
    keep: None,
    layout: Layout,
    branch: GroupedBranch,
    aux: GroupedAux,
    needs: tuple[bool, bool, bool, bool],
    dx_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA, dB and de; None where not needed.

    Args:
        dy: `[M, N]`, any strides.
        weight: `[N, K]`, needed for dx.
        x: `[M, K]`, needed for dA, and for de without dB.
        S: from forward, needed for dB.
        keep: what forward returned: dropout is drawn again.
        needs: which of dx, dA, dB, de are wanted.
        dx_dtype: of x before any cast.
    """
    need_dx, need_dA, need_dB, need_de = needs
    like_A, like_B, like_e = A, B, e
    x_dtype = (branch.autocast or dx_dtype) if x is None else x.dtype
    call, A, B, e = start(dy.shape[0], x_dtype, A, B, e, layout, branch, aux)
    dx = dA = dB = de = None
    need_H = need_dA or (need_de and not need_dB)
    if need_dB:
        dB, de = gradient(call, dy, S, B, e, like_B.dtype, dropout=False, want_de=need_de)
    if need_dx or need_H:
        U = shrink(call, dy, B, dropout=False)
    if need_H:
        want_de = need_de and not need_dB
        dA, found = gradient(call, x, U, A, e, like_A.dtype, call.dropout, want_de)
        de = found if want_de else de
    if need_dx:
        dx = dy @ weight
        expand_(call, dx, U, A, e, call.dropout)
    de = None if de is None else de.to(like_e.dtype)
    return dx, dA if need_dA else None, dB, de
