"""torch.library registration: fastrank::lowrank_linear, lowrank_add and their lowrank_backward.

What torch.compile, selective checkpointing and fake tensors see. Opaque to tracing: the bodies run
eagerly, so they may look at host-side masks. Outputs have shapes that don't depend on masks.
Through here a call costs about twice the Python of the autograd.Function in op.py (measured on a
CPU), which is why eager calls don't take it. Imported by op.py alone.
"""

import torch
from torch import Tensor

from fastrank.kernels.lowrank.arguments import Branch
from fastrank.kernels.lowrank.core import backward, forward, operands, prepare


@torch.library.custom_op("fastrank::lowrank_linear", mutates_args=())
def _linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    active: Tensor | None,
    prefix: int | None,
    trainable: Tensor | None,
    seed: Tensor | None,
    row_ids: Tensor | None,
    scale: float,
    dropout_p: float,
    backend: str,
    autocast: torch.dtype | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, S, kept elements); the last two only serve the backward."""
    active = active if prefix is None else prefix
    branch, aux = prepare(
        A, active, trainable, seed, row_ids, scale, dropout_p, backend, autocast, precision
    )
    y, S, keep = forward(None, *operands(x, weight, bias, branch), A, B, e, branch, aux)
    return y.view(*x.shape[:-1], B.shape[0]), *_fixed_shapes(S, keep, x, A, branch)


@torch.library.custom_op("fastrank::lowrank_add", mutates_args=())
def _add_op(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    active: Tensor | None,
    prefix: int | None,
    trainable: Tensor | None,
    seed: Tensor | None,
    row_ids: Tensor | None,
    scale: float,
    dropout_p: float,
    backend: str,
    autocast: torch.dtype | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y + branch, S, kept elements); the last two only serve the backward."""
    active = active if prefix is None else prefix
    branch, aux = prepare(
        A, active, trainable, seed, row_ids, scale, dropout_p, backend, autocast, precision
    )
    y = y.clone(memory_format=torch.contiguous_format)
    y, S, keep = forward(y, *operands(x, None, None, branch), A, B, e, branch, aux)
    return y, *_fixed_shapes(S, keep, x, A, branch)


@torch.library.custom_op("fastrank::lowrank_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    S: Tensor,
    keep: Tensor,
    active: Tensor | None,
    prefix: int | None,
    trainable: Tensor | None,
    seed: Tensor | None,
    row_ids: Tensor | None,
    scale: float,
    dropout_p: float,
    backend: str,
    autocast: torch.dtype | None,
    precision: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, weight, bias, A, B and e; empty where not needed."""
    active = active if prefix is None else prefix
    branch, aux = prepare(
        A, active, trainable, seed, row_ids, scale, dropout_p, backend, autocast, precision
    )
    x_flat, weight_cast, _ = operands(x, weight, None, branch)
    masked = backend == "torch" and dropout_p > 0.0 and branch.trained > 0
    grads = backward(
        dy,
        x_flat,
        weight_cast,
        A,
        B,
        e,
        S[:, : branch.kept].contiguous(),
        keep if masked else None,
        branch,
        aux,
        tuple(needs),
        x.dtype,
    )
    return [
        dy.new_empty(0) if grad is None else grad.to(like.dtype).view(like.shape)
        for grad, like in zip(grads, (x, weight, bias, A, B, e), strict=True)
    ]


def _keeps_mask(backend: str, dropout_p: float) -> bool:
    return backend == "torch" and dropout_p > 0.0


def _fixed_shapes(
    S: Tensor | None, keep: Tensor | None, x: Tensor, A: Tensor, branch: Branch
) -> tuple[Tensor, Tensor]:
    """S as (M, R) and the mask as (M, K) or (0,): shapes that a trace knows without the masks."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.numel() // x.shape[-1]
    if S is None or S.shape[1] < A.shape[0]:
        padded = x.new_zeros(rows, A.shape[0], dtype=wide)
        if S is not None:
            padded[:, : S.shape[1]] = S
        S = padded
    if keep is None:
        shape = (rows, x.shape[-1]) if _keeps_mask(branch.backend, branch.dropout_p) else (0,)
        keep = x.new_empty(shape, dtype=torch.int8)
    return S, keep


@_linear_op.register_fake
def _(x, weight, bias, A, B, e, *options):
    dropout_p, backend, autocast = options[6], options[7], options[8]
    y = x.new_empty((*x.shape[:-1], B.shape[0]), dtype=autocast or x.dtype)
    return y, *_fake_saved(x, A, dropout_p, backend)


@_add_op.register_fake
def _(y, x, A, B, e, *options):
    return y.new_empty(y.shape), *_fake_saved(x, A, options[6], options[7])


@_backward_op.register_fake
def _(dy, x, weight, bias, A, B, e, *options):
    needs = options[-1]
    return [
        like.new_empty(like.shape) if needed else dy.new_empty(0)
        for needed, like in zip(needs, (x, weight, bias, A, B, e), strict=True)
    ]


def _fake_saved(x, A, dropout_p, backend):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.numel() // x.shape[-1]
    shape = (rows, x.shape[-1]) if _keeps_mask(backend, dropout_p) else (0,)
    return x.new_empty((rows, A.shape[0]), dtype=wide), x.new_empty(shape, dtype=torch.int8)


def _setup_linear(ctx, inputs, output):
    x, weight, bias, A, B, e, active, prefix, trainable, seed, row_ids, *plain = inputs
    _, S, keep = output
    ctx.save_for_backward(x, weight, bias, A, B, e, S, keep, active, trainable, seed, row_ids)
    ctx.prefix, ctx.plain = prefix, plain
    ctx.set_materialize_grads(False)


def _setup_add(ctx, inputs, output):
    _, x, A, B, e, active, prefix, trainable, seed, row_ids, *plain = inputs
    _, S, keep = output
    ctx.save_for_backward(x, None, None, A, B, e, S, keep, active, trainable, seed, row_ids)
    ctx.prefix, ctx.plain = prefix, plain
    ctx.set_materialize_grads(False)


def _op_grads(ctx, dy, needs):
    """Gradients of x, weight, bias, A, B, e through the registered backward."""
    if dy is None:
        return [None] * 6
    x, weight, bias, A, B, e, S, keep, active, trainable, seed, row_ids = ctx.saved_tensors
    grads = _backward_op(
        dy, x, weight, bias, A, B, e, S, keep,
        active, ctx.prefix, trainable, seed, row_ids, *ctx.plain, list(needs),
    )  # fmt: skip
    return [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]


def _linear_op_backward(ctx, dy, dS, dkeep):
    return (*_op_grads(ctx, dy, ctx.needs_input_grad[:6]), *[None] * 10)


def _add_op_backward(ctx, dy, dS, dkeep):
    _, need_x, need_A, need_B, need_e = ctx.needs_input_grad[:5]
    dx, _, _, dA, dB, de = _op_grads(ctx, dy, (need_x, False, False, need_A, need_B, need_e))
    return (dy if ctx.needs_input_grad[0] else None, dx, dA, dB, de, *[None] * 10)


_linear_op.register_autograd(_linear_op_backward, setup_context=_setup_linear)
_add_op.register_autograd(_add_op_backward, setup_context=_setup_add)
