"""The commonest call on a CPU, in as few steps as it takes: no mask, diagonal, dropout or autocast.

Same products in the same order as addmm.py, and so the same bits; what is left out is the choosing.
At 128 rows of 384 columns the general route's Python costs a third of the whole layer.
"""

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

_FLOATS = (torch.float32, torch.float64)
_TYPES = (Tensor, torch.nn.Parameter)


def fits(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> bool:
    """Whether `linear` may run: right arguments, one dtype, a frozen base, something to do."""
    if not (type(x) in _TYPES and type(A) in _TYPES and type(B) in _TYPES and x.is_cpu):
        return False
    dtype = x.dtype
    if not (
        type(weight) in _TYPES
        and dtype in _FLOATS
        and dtype is A.dtype is B.dtype is weight.dtype
        and A.is_cpu
        and B.is_cpu
        and weight.is_cpu
        and weight.dim() == 2
        and not weight.requires_grad
        and type(scale) is float
        and math.isfinite(scale)
    ):
        return False
    (N, K), R = weight.shape, A.shape[0] if A.dim() == 2 else 0
    if not (R and x.dim() and x.shape[-1] == K and A.shape == (R, K) and B.shape == (N, R)):
        return False
    if bias is not None and not (
        type(bias) in _TYPES
        and bias.dtype is dtype
        and bias.is_cpu
        and bias.shape == (N,)
        and not bias.requires_grad
    ):
        return False
    return (
        x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and "FASTRANK_BACKEND" not in os.environ
    )


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """x Wᵀ + bias + scale (x Aᵀ) Bᵀ, `[..., N]`, for arguments that fit."""
    if torch.is_grad_enabled() and (x.requires_grad or A.requires_grad or B.requires_grad):
        return _Plain.apply(x, weight, bias, A, B, scale)
    return _forward(x, weight, bias, A, B, scale)[0]


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, x as `[M, K]`, S `[M, R]`."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = F.linear(flat, weight, bias)
    S = torch.mm(flat, A.t())
    y.addmm_(S, B.t(), alpha=scale)
    if flat is not x:
        # not view: what a Function returns as a view could not be modified in place
        y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[1]])
    return y, flat, S


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        y, flat, S = _forward(x, weight, bias, A, B, scale)
        need_x, _, _, need_A, need_B, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            flat if need_A else None, weight if need_x else None, A, B, S if need_B else None
        )
        ctx.plain = scale, x.shape
        return y

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():  # only under create_graph
            return _backward_once(ctx, dy)
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return _backward(ctx, dy)
        return _backward(ctx, dy)


def _backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, A, B, S = ctx.saved_tensors
    scale, x_shape = ctx.plain
    dx = dA = dB = U = None
    if dy.dim() != 2:
        dy = dy.reshape(-1, B.shape[0])
    if 0 in dy.stride():
        dy = dy.contiguous()  # what .sum() sends back; vendor products would copy it each time
    if weight is not None or x is not None:
        U = torch.mm(dy, B)
    if weight is not None:
        dx = torch.mm(dy, weight).addmm_(U, A, alpha=scale)
        dx = dx if len(x_shape) == 2 else dx.view(x_shape)
    if x is not None:
        dA = torch.mm(U.t(), x).mul_(scale)
    if S is not None:
        dB = torch.empty(B.shape, dtype=B.dtype)
        torch.mul(torch.mm(S.t(), dy).t(), scale, out=dB)
    return dx, None, None, dA, dB, None


_backward_once = once_differentiable(_backward)
