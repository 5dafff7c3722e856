"""Public functions, autograd and torch.library registration of the masked low-rank matmul.

Eager calls go through one autograd.Function, compiled and dispatch-mode calls (selective
checkpointing, fake tensors) through the registered ops `fastrank::lowrank_linear` and
`fastrank::lowrank_add`. Both run the same two functions, _forward and _backward.
"""

from contextlib import nullcontext
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastrank.kernels.common import choose_backend
from fastrank.kernels.lowrank import addmm, reference
from fastrank.kernels.lowrank.arguments import (
    Aux,
    Branch,
    check_base_dtypes,
    check_masks,
    check_options,
    check_tensors,
    resolve_masks,
)


def lowrank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    *,
    scale: float = 1.0,
    e: Tensor | None = None,
    active: Tensor | int | None = None,
    trainable: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    row_ids: Tensor | None = None,
    backend: str = "auto",
    precision: str = "peft",
) -> Tensor:
    """x Wᵀ + bias + scale * ((drop(x) Aᵀ) ⊙ e ⊙ active) Bᵀ, differentiable once.

        y = lowrank_linear(x, linear.weight, linear.bias, A, B, scale=2.0, active=mask)

    Args:
        x: of shape `[..., K]`, any strides.
        weight: `[N, K]`, any strides, in x's dtype unless autocast is on.
        bias: `[N]` or None.
        A: `[R, K]`, any R >= 0.
        B: `[N, R]`, in A's dtype.
        scale: a finite Python float.
        e: `[R]`; a zero scores a rank (no contribution, but its own gradient), or None for ones.
        active: ranks that exist: bool `[R]`, or an int or 0-d integer tensor for a prefix. The
            others add nothing and get exactly zero gradients, whatever they hold. A mask on the
            CPU is compacted; one on x's device costs no sync.
        trainable: ranks that get gradients, bool `[R]`. The others take part, read x without
            dropout and get zero gradients.
        dropout_p: in [0, 1), on the branch's input.
        seed: int or int64 tensor `[1]` on x's device; None draws one from torch's generator.
        row_ids: int64 `[M]`, the identity of each row of x in the draw; None for its index.
        backend: "auto", "triton" or "reference".
        precision: "peft" computes the branch in the adapters' dtype where no autocast is on,
            "compute" in x's.

    Returns:
        `[..., N]`, in the dtype of `F.linear(x, weight, bias)`.

    Raises:
        ValueError, TypeError: arguments that don't fit, with what was wanted.
    """
    check_tensors(x, A, B, e, weight=weight, bias=bias)
    check_options(scale, dropout_p, seed, row_ids, precision, x)
    check_masks(active, trainable, A.shape[0])
    if weight is None:
        raise TypeError("weight is None; pass weight [N, K], or use lowrank_add for the branch")
    autocast = _autocast_dtype(x)
    if autocast is None:
        check_base_dtypes(x, weight, bias)
    backend = choose_backend(backend, x.device, autocast or x.dtype)
    if backend == "reference":
        return reference.lowrank_linear(
            x,
            weight,
            bias,
            A,
            B,
            scale=scale,
            e=e,
            active=active,
            trainable=trainable,
            dropout_p=dropout_p,
            seed=seed,
            row_ids=row_ids,
        )
    options = (float(scale), float(dropout_p), backend, autocast, precision)
    seed = reference.seed_tensor(seed, x.device) if dropout_p > 0.0 else None
    if _wants_registered_op():
        mask, prefix = _split_active(active)
        return torch.ops.fastrank.lowrank_linear(
            x, weight, bias, A, B, e, mask, prefix, trainable, seed, row_ids, *options
        )[0]
    branch, aux = _prepare(A, active, trainable, seed, row_ids, *options)
    if torch.is_grad_enabled() and _any_requires_grad(x, weight, bias, A, B, e):
        return _LowRank.apply(x, weight, bias, A, B, e, None, branch, aux)
    return _forward(None, *_operands(x, weight, bias, branch), A, B, e, branch, aux)[0].view(
        *x.shape[:-1], B.shape[0]
    )


def lowrank_add(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    inplace: bool = False,
    scale: float = 1.0,
    e: Tensor | None = None,
    active: Tensor | int | None = None,
    trainable: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    row_ids: Tensor | None = None,
    backend: str = "auto",
    precision: str = "peft",
) -> Tensor:
    """y + scale * ((drop(x) Aᵀ) ⊙ e ⊙ active) Bᵀ, for a base that brings its own forward.

        y = lowrank_add(quantised_linear(x), x, A, B, scale=2.0)

    Args:
        y: of shape `[..., N]`; the result has its dtype.
        x: `[..., K]`, with y's leading dimensions.
        inplace: write into y and return it.
        others: as for lowrank_linear.

    Raises:
        ValueError: also for inplace=True on a leaf that requires grad, or on a view.
    """
    check_tensors(x, A, B, e, y=y)
    check_options(scale, dropout_p, seed, row_ids, precision, x)
    check_masks(active, trainable, A.shape[0])
    if inplace and y.is_leaf and y.requires_grad:
        raise ValueError("y is a leaf that requires grad; pass inplace=False")
    if inplace and y._is_view():
        raise ValueError("y is a view; pass inplace=False, or y.clone()")
    autocast = _autocast_dtype(x)
    backend = choose_backend(backend, x.device, autocast or x.dtype)
    if backend == "triton":
        backend = choose_backend(backend, y.device, y.dtype)
    if backend == "reference":
        out = reference.lowrank_add(
            y,
            x,
            A,
            B,
            scale=scale,
            e=e,
            active=active,
            trainable=trainable,
            dropout_p=dropout_p,
            seed=seed,
            row_ids=row_ids,
        )
        return y.copy_(out) if inplace else out
    options = (float(scale), float(dropout_p), backend, autocast, precision)
    seed = reference.seed_tensor(seed, x.device) if dropout_p > 0.0 else None
    if _wants_registered_op():
        mask, prefix = _split_active(active)
        out = torch.ops.fastrank.lowrank_add(
            y, x, A, B, e, mask, prefix, trainable, seed, row_ids, *options
        )[0]
        return y.copy_(out) if inplace else out
    branch, aux = _prepare(A, active, trainable, seed, row_ids, *options)
    y = y if inplace else y.clone(memory_format=torch.contiguous_format)
    if torch.is_grad_enabled() and _any_requires_grad(y, x, A, B, e):
        return _LowRank.apply(x, None, None, A, B, e, y, branch, aux)
    _forward(y, *_operands(x, None, None, branch), A, B, e, branch, aux)
    return y


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts the operands of a linear layer to; it leaves float64 alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _wants_registered_op() -> bool:
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _split_active(active: Tensor | int | None) -> tuple[Tensor | None, int | None]:
    return (None, active) if isinstance(active, int) else (active, None)


def _prepare(
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
    kept, trained, index, active, trainable = resolve_masks(active, trainable, A.shape[0], A.device)
    branch = Branch(scale, dropout_p, kept, trained, backend, autocast, precision)
    return branch, Aux(seed, row_ids, index, active, trainable)


def _implementation(backend: str) -> ModuleType:
    if backend == "torch":
        return addmm
    # imported on first use: nobody without a GPU pays for loading Triton
    from fastrank.kernels.lowrank import fused

    return fused


def _no_autocast(device: torch.device):
    """Casts are explicit in here; autocast would round fp32 intermediates."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _operands(
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


def _forward(
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
    with _no_autocast(x.device):
        out = F.linear(x, weight, bias) if y is None else y
        if x.shape[0] == 0 or branch.kept == 0:
            return out, None, None
        flat = out.reshape(-1, B.shape[0])  # a copy where y has odd strides
        S, keep = _implementation(branch.backend).forward_(flat, x, A, B, e, branch, aux)
        if y is not None and not y.is_contiguous():
            y.copy_(flat.view(y.shape))
    return out, S, keep


def _backward(
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

    dy has any strides; x and weight are as _operands made them, and x may be None where nothing
    needs it.
    """
    need_x, need_weight, need_bias, need_A, need_B, need_e = needs
    dy = dy.reshape(-1, B.shape[0])
    if 0 in dy.stride() and dy.numel() > 1:
        dy = dy.contiguous()  # what .sum() sends back; vendor products would copy it each time
    grads: list[Tensor | None] = [None] * 6
    with _no_autocast(dy.device):
        if need_x and weight is not None:
            grads[0] = dy @ weight
        elif need_x:
            grads[0] = torch.zeros(dy.shape[0], A.shape[1], dtype=dx_dtype, device=dy.device)
        if need_weight:
            grads[1] = dy.t() @ x
        if need_bias:
            grads[2] = dy.sum(0)
        if dy.shape[0] == 0 or branch.kept == 0:
            for place, needed, tensor in ((3, need_A, A), (4, need_B, B), (5, need_e, e)):
                if needed:
                    grads[place] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=dy.device)
        elif need_x or need_A or need_B or need_e:
            grads[3:] = _implementation(branch.backend).backward(
                dy, grads[0], x, A, B, e, S, keep, branch, aux, (need_x, need_A, need_B, need_e)
            )
        if need_x:
            grads[0] = grads[0].to(dx_dtype)
    return grads


class _LowRank(torch.autograd.Function):
    """lowrank_linear (y is None) and lowrank_add (weight is None; y is written in place)."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, e, y, branch: Branch, aux: Aux):
        x_flat, weight_cast, bias_cast = _operands(x, weight, bias, branch)
        out, S, keep = _forward(y, x_flat, weight_cast, bias_cast, A, B, e, branch, aux)

        need_x, need_weight, _, need_A, need_B, need_e, _ = ctx.needs_input_grad[:7]
        works = branch.kept > 0
        save_S = works and (need_B or (need_e and not need_A))
        ctx.save_for_backward(
            x_flat if need_weight or (works and need_A) else None,
            weight_cast if need_x else None,
            A,
            B,
            e,
            S if save_S else None,
            keep if need_x or need_A else None,
            *aux,
        )
        ctx.branch = branch
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.weight_dtype = None if weight is None else weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        if y is not None:
            ctx.mark_dirty(y)
            return y
        # _unsafe_view: a view made in here could not be modified in place by the caller
        return (
            out if x.dim() == 2 else torch.ops.aten._unsafe_view(out, [*x.shape[:-1], B.shape[0]])
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, A, B, e, S, keep, *aux = ctx.saved_tensors
        needs = ctx.needs_input_grad[:6]
        dx, dweight, dbias, dA, dB, de = _backward(
            dy, x, weight, A, B, e, S, keep, ctx.branch, Aux(*aux), needs, ctx.x_dtype
        )
        dx = None if dx is None else dx.view(ctx.x_shape)
        dweight = None if dweight is None else dweight.to(ctx.weight_dtype)
        dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
        dy = dy if ctx.needs_input_grad[6] else None
        return dx, dweight, dbias, dA, dB, de, dy, None, None
