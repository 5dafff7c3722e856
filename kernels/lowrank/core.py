"""The two functions that every way into the op runs: base and branch forward, all gradients back.

Nothing here is differentiable or validated; op.py does both.
"""

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from fastrank.kernels.common import products
from fastrank.kernels.lowrank import addmm
from fastrank.kernels.lowrank.arguments import NO_AUX, Aux, Branch, resolve_masks


def prepare(
    A: Tensor,
    active: Tensor | int | None,
    trainable: Tensor | None,
    seed: Tensor | None,
    row_ids: Tensor | None,
    scale: float,
    dropout_p: float,
    backend: str,
    autocast: torch.dtype | None,
    precision: str,
) -> tuple[Branch, Aux]:
    if active is None is trainable is seed is row_ids:
        ranks = A.shape[0]
        return Branch(scale, dropout_p, ranks, ranks, backend, autocast, precision), NO_AUX
    kept, trained, index, active, trainable = resolve_masks(active, trainable, A.shape[0], A.device)
    branch = Branch(scale, dropout_p, kept, trained, backend, autocast, precision)
    return branch, Aux(seed, row_ids, index, active, trainable)


def _implementation(backend: str) -> ModuleType:
    if backend == "torch":
        return addmm
    # imported on first use: nobody without a GPU pays for loading Triton
    from fastrank.kernels.lowrank import triton_path

    return triton_path


_AS_IT_IS = nullcontext()


def no_autocast(tensor: Tensor) -> AbstractContextManager:
    """Casts are explicit in here; autocast would round fp32 intermediates."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _AS_IT_IS


def operands(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, branch: Branch
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x as (M, K), and all three in the dtype that F.linear would compute in."""
    x = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    if branch.autocast is None:
        return x, weight, bias
    cast = [
        t if t is None or t.dtype == torch.float64 else t.to(branch.autocast)
        for t in (x, weight, bias)
    ]
    return cast[0], cast[1], cast[2]


def forward(
    y: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    branch: Branch,
    aux: Aux,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Base and branch on 2-D operands: y (M, N), S (M, kept) fp32, kept elements of dropout.

    With y given the base is y, written in place (any number of dimensions).
    """
    with no_autocast(x):
        if x.shape[0] == 0 or branch.kept == 0:
            return products.linear(x, weight, bias) if y is None else y, None, None
        path = _implementation(branch.backend)
        if y is None:
            return path.linear(x, weight, bias, A, B, e, branch, aux)
        flat = y.reshape(-1, B.shape[0])  # a copy where y has odd strides
        S, keep = path.add_(flat, x, A, B, e, branch, aux)
        if not y.is_contiguous():
            y.copy_(flat.view(y.shape))
    return y, S, keep


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    S: Tensor | None,
    keep: Tensor | None,
    branch: Branch,
    aux: Aux,
    needs: tuple[bool, bool, bool, bool, bool, bool],
    dx_dtype: torch.dtype,
) -> list[Tensor | None]:
    """Gradients of x (M, K), weight, bias, A, B, e; None where not needed.

    dy has any strides; x and weight are as operands() made them, and x may be None where nothing
    needs it.
    """
    need_x, need_weight, need_bias, need_A, need_B, need_e = needs
    dy = dy.reshape(-1, B.shape[0])
    if 0 in dy.stride() and dy.numel() > 1:
        dy = dy.contiguous()  # what .sum() sends back; vendor products would copy it each time
    grads: list[Tensor | None] = [None] * 6
    with no_autocast(dy):
        if need_weight:
            grads[1] = products.mm(dy.t(), x)
        if need_bias:
            grads[2] = dy.sum(0)
        if dy.shape[0] == 0 or branch.kept == 0:
            if need_x and weight is not None:
                grads[0] = products.mm(dy, weight)
            elif need_x:
                grads[0] = torch.zeros(dy.shape[0], A.shape[1], dtype=dx_dtype, device=dy.device)
            for place, needed, tensor in ((3, need_A, A), (4, need_B, B), (5, need_e, e)):
                if needed:
                    grads[place] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=dy.device)
        elif need_x or need_A or need_B or need_e:
            needs = (need_x, need_A, need_B, need_e)
            grads[0], *grads[3:] = _implementation(branch.backend).backward(
                dy, weight, x, A, B, e, S, keep, branch, aux, needs, dx_dtype
            )
        if need_x:
            grads[0] = grads[0].to(dx_dtype)
    return grads
