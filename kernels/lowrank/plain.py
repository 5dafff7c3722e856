"""The commonest calls on a CPU in as few steps as they take: no mask, seed or autocast.

The same products as in addmm.py; what is left out is the choosing, and the row blocks, which a call
of this size would have one of. At 128 rows of 384 columns the general route's Python costs as much
as the base layer.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastrank.kernels.common import products
from fastrank.kernels.common.backend import Setting
from fastrank.kernels.lowrank.addmm import add_product, gram_dy, scaled_product
from fastrank.kernels.lowrank.cpu_dropout import draw_bits, mean_factor

_TYPES = (Tensor, torch.nn.Parameter)
# base dtype -> dtype of the branch
_WIDE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
# most elements of x and of y where something is cast whole, and of x where dropout is drawn whole
_WHOLE = 1 << 20
_WHOLE_DRAW = 1 << 18


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
    """Whether `linear` may be tried: a CPU, fp32 or wider adapters, a frozen base, nothing special.

    Shapes and dtypes that don't go together are left to the products to refuse; the caller
    then runs the checks that explain.
    """
    return (
        type(x) in _TYPES
        and type(weight) in _TYPES
        and type(A) in _TYPES
        and type(B) in _TYPES
        and x.is_cpu
        and weight.is_cpu
        and A.is_cpu
        and B.is_cpu
        and A.dtype is _WIDE.get(x.dtype)
        and not weight.requires_grad
        and weight.dim() == 2
        and weight.numel() > 0
        and (bias is None or _is_frozen(bias, weight))
        and (e is None or _is_diagonal(e, A))
        and type(scale) is float
        and -math.inf < scale < math.inf  # torch.compile may hold it as a symbol
        and type(dropout_p) is float
        and 0.0 <= dropout_p < 1.0
        and ((x.dtype is A.dtype and not dropout_p) or _is_small(x, weight, dropout_p))
        and not torch.is_autocast_enabled("cpu")
        and _get_current_dispatch_mode() is None
        and Setting.read() == "auto"
    )


def _is_frozen(bias: Tensor, weight: Tensor) -> bool:
    return bias.is_cpu and not bias.requires_grad and bias.shape == weight.shape[:1]


def _is_diagonal(e: Tensor, A: Tensor) -> bool:
    return type(e) in _TYPES and e.is_cpu and e.dtype is A.dtype and e.shape == A.shape[:1]


def _is_small(x: Tensor, weight: Tensor, dropout_p: float) -> bool:
    N, K = weight.shape
    size = x.numel()
    return size * max(N, K) <= _WHOLE * K and (not dropout_p or size <= _WHOLE_DRAW)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """x Wᵀ + bias + scale ((drop(x) Aᵀ) ⊙ e) Bᵀ, `[..., N]`, for arguments that fit.

    Dropout is drawn from torch's own generator.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad or A.requires_grad or B.requires_grad or (e is not None and e.requires_grad)
    ):
        return _Plain.apply(x, weight, bias, A, B, e, scale, dropout_p)
    return _forward(x, weight, bias, A, B, e, scale, dropout_p)[0]


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, float]:
    """y, xh, S, T, the bits of kept elements and the whole scale.

    xh `[M, K]` is in the branch's dtype; S = xh Aᵀ and T = S ⊙ e are `[M, R]`.
    """
    xh = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = products.linear(xh, weight, bias)
    keep = None
    if xh.dtype is not A.dtype:
        xh = xh.to(A.dtype)
    if dropout_p:
        keep = draw_bits(dropout_p, xh)
        xh = (xh.view(keep.dtype) & keep).view(A.dtype)
        scale *= mean_factor(dropout_p)
    S = products.mm(xh, A.t())
    T = S if e is None else S * e
    if y.dtype is A.dtype:
        products.add_mm_(y, T, B.t(), scale)
    else:
        add_product(y, T, B.t(), scale)
    if x.dim() != 2:
        # not view: what a Function returns as a view could not be modified in place
        y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[1]])
    return y, xh, S, T, keep, scale


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, A, B, e, scale, dropout_p):
        y, xh, S, T, keep, scale = _forward(x, weight, bias, A, B, e, scale, dropout_p)
        need_x, _, _, need_A, need_B, need_e, _, _ = ctx.needs_input_grad
        if not need_A:
            xh = None
        elif keep is None and xh.dtype is not x.dtype:
            xh = x.reshape(-1, x.shape[-1])  # shared with others, unlike a wider copy
        if need_A or not need_e:  # where dA is made, de comes with it
            S = T if need_B else None
        ctx.save_for_backward(
            xh,
            weight if need_x else None,
            A,
            B,
            e,
            S,
            keep if need_x else None,
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
    xh, weight, A, B, e, S, keep = ctx.saved_tensors
    scale, x_shape = ctx.plain
    need_x, _, _, need_A, need_B, need_e, _, _ = ctx.needs_input_grad
    need_e_alone = need_e and not need_A
    wide = A.dtype
    dx = dA = dB = de = None
    if dy.dim() != 2:
        dy = dy.reshape(-1, B.shape[0])
    if 0 in dy.stride():
        dy = dy.contiguous()  # what .sum() sends back; vendor products would copy it each time
    dy_wide = dy if dy.dtype is wide else dy.to(wide)
    if need_x or need_A or (need_e and not need_B):
        U = products.mm(dy_wide, B)
    if need_x:
        dx = products.mm(dy, weight)
        _add_branch(dx, U, A if e is None else A * e[:, None], keep, scale)
        dx = dx if len(x_shape) == 2 else dx.view(x_shape)
    if need_A:
        dA = scaled_product(U.t(), xh if xh.dtype is wide else xh.to(wide), scale)
        if need_e:
            de = (dA * A).sum(1)
        if e is not None:
            dA.mul_(e[:, None])
    if need_B:
        dB = gram_dy(dy_wide, S, scale)
        if need_e_alone:
            de = (dB * B).sum(0)
            dB.mul_(e)
    elif need_e_alone:
        de = (U * S).sum(0).mul_(scale)
    return dx, None, None, dA, dB, de, None, None


def _add_branch(dx: Tensor, U: Tensor, A: Tensor, keep: Tensor | None, scale: float) -> None:
    """dx += scale keep∘(U A) in place."""
    if keep is not None:
        share = products.mm(U, A)
        share.view(keep.dtype).bitwise_and_(keep)
        dx.add_(share, alpha=scale)
    elif dx.dtype is A.dtype:
        products.add_mm_(dx, U, A, scale)
    else:
        add_product(dx, U, A, scale)


_backward_once = once_differentiable(_backward)
