"""Public functions of the masked low-rank matmul: validation, backend choice, autograd.

Eager calls go through one autograd.Function, compiled and dispatch-mode calls (selective
checkpointing, fake tensors) through the ops of registered.py. Both run core.forward and
core.backward.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastrank.kernels.common import choose_backend
from fastrank.kernels.lowrank import plain, plain_half, reference
from fastrank.kernels.lowrank import registered as _registered  # noqa: F401  (registers ops)
from fastrank.kernels.lowrank.arguments import (
    Aux,
    Branch,
    check_base_dtypes,
    check_masks,
    check_options,
    check_tensors,
    plainly_right,
)
from fastrank.kernels.lowrank.core import backward, forward, operands, prepare


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

        >>> from fastrank.kernels.lowrank import lowrank_linear
        >>> x, weight, bias = torch.randn(64, 256), torch.randn(128, 256), torch.randn(128)
        >>> A, B = torch.randn(16, 256), torch.randn(128, 16, requires_grad=True)
        >>> y = lowrank_linear(x, weight, bias, A, B, scale=2.0, active=8)  # the first 8 ranks
        >>> y.sum().backward()
        >>> B.grad.abs().amax(0).nonzero().flatten().tolist()  # only they get a gradient
        [0, 1, 2, 3, 4, 5, 6, 7]

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
    if (
        not torch.compiler.is_compiling()
        and active is None is trainable
        and seed is None is row_ids
        and backend == "auto"
        and precision == "peft"
    ):
        try:
            if plain.fits(x, weight, bias, A, B, e, scale, dropout_p):
                return plain.linear(x, weight, bias, A, B, e, scale, dropout_p)
            if plain_half.fits(x, weight, bias, A, B, e, scale, dropout_p):
                return plain_half.linear(x, weight, bias, A, B, scale, dropout_p)
        except (IndexError, RuntimeError):
            # arguments that don't go together: say which
            check_tensors(x, A, B, e, weight=weight, bias=bias)
            check_base_dtypes(x, weight, bias)
            raise
    if not plainly_right(x, weight, bias, A, B, e):
        check_tensors(x, A, B, e, weight=weight, bias=bias)
        if weight is None:
            raise TypeError("weight is None; pass weight [N, K], or use lowrank_add for the branch")
    check_options(scale, dropout_p, seed, row_ids, precision, x)
    check_masks(active, trainable, A.shape[0])
    autocast = autocast_dtype(x)
    if autocast is None:
        check_base_dtypes(x, weight, bias)
    backend = choose_backend(backend, x.device, autocast or x.dtype)
    options = (float(scale), float(dropout_p), backend, autocast, precision)
    return _run(None, x, weight, bias, A, B, e, active, trainable, seed, row_ids, *options)


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

        >>> from fastrank.kernels.lowrank import lowrank_add
        >>> base = torch.nn.Linear(32, 16)  # or anything callable, a quantised layer for one
        >>> x, A, B = torch.randn(5, 32), torch.randn(4, 32), torch.randn(16, 4)
        >>> y = lowrank_add(base(x), x, A, B, scale=2.0)
        >>> torch.allclose(y, base(x) + 2.0 * (x @ A.T @ B.T), atol=1e-3)
        True

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
    # under compile the op is functional and y.copy_ follows, which is right for views too
    if inplace and not torch.compiler.is_compiling() and y._is_view():
        raise ValueError("y is a view; pass inplace=False, or y.clone()")
    autocast = autocast_dtype(x)
    compute = autocast or x.dtype
    named = backend
    backend = choose_backend(named, x.device, compute)
    if backend == "triton" and not _triton_adds(compute, y.dtype):
        if named == "triton":
            raise ValueError(
                f"backend 'triton' can't add a branch of {compute} to y of {y.dtype}; "
                "cast y, or pass backend='auto'"
            )
        backend = "reference"
    options = (float(scale), float(dropout_p), backend, autocast, precision)
    return _run(y, x, None, None, A, B, e, active, trainable, seed, row_ids, *options, inplace)


def _run(
    y: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    active: Tensor | int | None,
    trainable: Tensor | None,
    seed: int | Tensor | None,
    row_ids: Tensor | None,
    scale: float,
    dropout_p: float,
    backend: str,
    autocast: torch.dtype | None,
    precision: str,
    inplace: bool = False,
) -> Tensor:
    """Checked arguments, one of three ways: plain torch, the registered op, the Function.

    y is the base of lowrank_add, or None.
    """
    if dropout_p > 0.0:
        seed = reference.seed_tensor(seed, x.device)
    if backend == "reference":
        keywords = {"scale": scale, "e": e, "active": active, "trainable": trainable}
        keywords |= {"dropout_p": dropout_p, "seed": seed, "row_ids": row_ids}
        if y is None:
            return reference.lowrank_linear(x, weight, bias, A, B, **keywords)
        out = reference.lowrank_add(y, x, A, B, **keywords)
        return y.copy_(out) if inplace else out

    seed = seed if dropout_p > 0.0 else None
    options = (scale, dropout_p, backend, autocast, precision)
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        mask, prefix = (None, active) if isinstance(active, int) else (active, None)
        tail = (A, B, e, mask, prefix, trainable, seed, row_ids, *options)
        if y is None:
            return torch.ops.fastrank.lowrank_linear(x, weight, bias, *tail)[0]
        out = torch.ops.fastrank.lowrank_add(y, x, *tail)[0]
        return y.copy_(out) if inplace else out

    branch, aux = prepare(A, active, trainable, seed, row_ids, *options)
    if y is not None and not inplace:
        y = y.clone(memory_format=torch.contiguous_format)
    if torch.is_grad_enabled() and _any_requires_grad(x, weight, bias, A, B, e, y):
        return _LowRank.apply(x, weight, bias, A, B, e, y, branch, aux)
    out = forward(y, *operands(x, weight, bias, branch), A, B, e, branch, aux)[0]
    return _shaped(out, x) if y is None else y


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts the operands of a linear layer to; it leaves float64 alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _triton_adds(x: torch.dtype, y: torch.dtype) -> bool:
    """One of the two is fp32, or they are the same."""
    return y in (x, torch.float32) or (x == torch.float32 and y != torch.float64)


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _shaped(out: Tensor, x: Tensor) -> Tensor:
    """out (M, N) with x's leading dimensions.

    _unsafe_view: what a Function returns as a view could not be modified in place by the caller.
    """
    if x.dim() == 2:
        return out
    return torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[-1]])


class _LowRank(torch.autograd.Function):
    """lowrank_linear (y is None) and lowrank_add (weight is None; y is written in place)."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, e, y, branch: Branch, aux: Aux):
        x_flat, weight_cast, bias_cast = operands(x, weight, bias, branch)
        out, S, keep = forward(y, x_flat, weight_cast, bias_cast, A, B, e, branch, aux)

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
        dtypes = tuple(None if t is None else t.dtype for t in (weight, bias))
        ctx.plain = branch, x.shape, x.dtype, dtypes
        if y is not None:
            ctx.mark_dirty(y)
            return y
        return _shaped(out, x)

    @staticmethod
    def backward(ctx, dy):
        # grad mode is on only under create_graph; the wrapper that then refuses costs as much as
        # a small product
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, A, B, e, S, keep, *aux = ctx.saved_tensors
    branch, x_shape, x_dtype, (weight_dtype, bias_dtype) = ctx.plain
    needs = ctx.needs_input_grad
    dx, dweight, dbias, dA, dB, de = backward(
        dy, x, weight, A, B, e, S, keep, branch, Aux(*aux), needs[:6], x_dtype
    )
    if dx is not None and len(x_shape) != 2:
        dx = dx.view(x_shape)
    dweight = None if dweight is None else dweight.to(weight_dtype)
    dbias = None if dbias is None else dbias.to(bias_dtype)
    return dx, dweight, dbias, dA, dB, de, dy if needs[6] else None, None, None


_backward_once = once_differentiable(_backward)
