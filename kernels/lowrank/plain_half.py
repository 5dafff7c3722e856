"""As plain.py, where bf16 products are what is asked for: autocast to bf16, or bf16 all through.

For CPUs that multiply bf16 matrices faster than fp32 ones; products and roundings are those of the
"half" class in addmm.py. Small layers spend most of a step in Python: the general route took 1.1 to
1.7 times PEFT's time there.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastrank.kernels.common.backend import Setting
from fastrank.kernels.common.products import bf16_units
from fastrank.kernels.lowrank.cpu_dropout import draw_bits, mean_factor

_TYPES = (Tensor, torch.nn.Parameter)
_HALF = torch.bfloat16
_CAST = (torch.float32, torch.bfloat16)  # what autocast takes; others are the general route's
_WHOLE_DRAW = 1 << 18  # most elements of x where dropout is drawn whole


def fits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    scale: float,
    dropout_p: float,
) -> bool:
    """Whether `linear` may be tried: a CPU, products in bf16, a frozen base, no diagonal."""
    return (
        e is None
        and type(x) in _TYPES
        and type(weight) in _TYPES
        and type(A) in _TYPES
        and type(B) in _TYPES
        and x.is_cpu
        and weight.is_cpu
        and A.is_cpu
        and B.is_cpu
        and A.dtype is B.dtype
        and _is_half(x, weight, A)
        and not weight.requires_grad
        and weight.dim() == 2
        and weight.numel() > 0
        and (bias is None or _is_frozen(bias, weight))
        and type(scale) is float
        and -math.inf < scale < math.inf  # torch.compile may hold it as a symbol
        and type(dropout_p) is float
        and 0.0 <= dropout_p < 1.0
        and (not dropout_p or x.numel() <= _WHOLE_DRAW)
        and bf16_units()
        and _get_current_dispatch_mode() is None
        and Setting.read() == "auto"
    )


def _is_half(x: Tensor, weight: Tensor, A: Tensor) -> bool:
    if torch.is_autocast_enabled("cpu"):
        return (
            torch.get_autocast_dtype("cpu") is _HALF
            and x.dtype in _CAST
            and weight.dtype in _CAST
            and A.dtype in _CAST
        )
    return x.dtype is _HALF and weight.dtype is _HALF and A.dtype is _HALF


def _is_frozen(bias: Tensor, weight: Tensor) -> bool:
    return (
        bias.is_cpu
        and bias.dtype is weight.dtype
        and not bias.requires_grad
        and bias.shape == weight.shape[:1]
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """x Wᵀ + bias + scale (drop(x) Aᵀ) Bᵀ, bf16 `[..., N]`, for arguments that fit.

    Dropout is drawn from torch's own generator.
    """
    if torch.is_grad_enabled() and (x.requires_grad or A.requires_grad or B.requires_grad):
        return _PlainHalf.apply(x, weight, bias, A, B, scale, dropout_p)
    return _forward(x, weight, bias, A, B, scale, dropout_p)[0]


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, float]:
    """y, then in bf16: xh `[M, K]`, W, B and S = xh Aᵀ `[M, R]`; the kept bits, the whole scale."""
    xh = (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).to(_HALF)
    weight, B = weight.to(_HALF), B.to(_HALF)
    y = F.linear(xh, weight, bias if bias is None else bias.to(_HALF))
    keep = None
    if dropout_p:
        keep = draw_bits(dropout_p, xh)
        xh = (xh.view(keep.dtype) & keep).view(_HALF)
        scale *= mean_factor(dropout_p)
    S = torch.mm(xh, A.to(_HALF).t())
    y.addmm_(S, B.t(), alpha=scale)
    if x.dim() != 2:
        # not view: what a Function returns as a view could not be modified in place
        y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[1]])
    return y, xh, weight, B, S, keep, scale


class _PlainHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale, dropout_p):
        y, xh, half_weight, half_B, S, keep, scale = _forward(
            x, weight, bias, A, B, scale, dropout_p
        )
        need_x, _, _, need_A, need_B, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            xh if need_A else None,
            half_weight if need_x else None,
            A,
            half_B,
            S if need_B else None,
            keep if need_x else None,
        )
        ctx.plain = scale, x.shape, x.dtype
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
    xh, weight, A, B, S, keep = ctx.saved_tensors
    scale, x_shape, x_dtype = ctx.plain
    need_x, _, _, need_A, need_B, _, _ = ctx.needs_input_grad
    dx = dA = dB = None
    if dy.dim() != 2:
        dy = dy.reshape(-1, B.shape[0])
    if 0 in dy.stride():
        dy = dy.contiguous()  # what .sum() sends back; vendor products would copy it each time
    if need_x or need_A:
        U = torch.mm(dy, B)
    if need_x:
        dx = torch.mm(dy, weight)
        if keep is None:
            dx.addmm_(U, A.to(_HALF), alpha=scale)
        else:
            # the scale goes into A: a 16-bit add would round its alpha times the product once more
            share = torch.mm(U, (A.float() * scale).to(_HALF))
            share.view(keep.dtype).bitwise_and_(keep)
            dx.add_(share)
        dx = dx.view(x_shape).to(x_dtype)
    if need_A:
        dA = torch.mm(U.t(), xh).float().mul_(scale).to(A.dtype)
    if need_B:
        dB = torch.empty(B.shape, dtype=A.dtype)
        torch.mul(torch.mm(S.t(), dy).float().t(), scale, out=dB)
    return dx, None, None, dA, dB, None, None


_backward_once = once_differentiable(_backward)
