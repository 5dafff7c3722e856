"""lowrank_linears: several adapted layers of one input (q, k and v; gate and up) in one call.

Where it applies one autograd.Function reads x once for all of them (shared_input.py on GPUs,
addmm_shared.py on CPUs); everything else is a loop of lowrank_linear, with the same results but for
the order in which dx is added up.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastrank.kernels.common import choose_backend
from fastrank.kernels.lowrank import addmm_shared
from fastrank.kernels.lowrank.arguments import (
    Aux,
    check_base_dtypes,
    check_masks,
    check_options,
    check_tensors,
    plainly_right,
)
from fastrank.kernels.lowrank.core import no_autocast, operands, prepare
from fastrank.kernels.lowrank.op import autocast_dtype, lowrank_linear
from fastrank.kernels.lowrank.reference import seed_tensor
from fastrank.kernels.lowrank.shared_layer import Layer


class Projection(NamedTuple):
    """One of the layers: the arguments of lowrank_linear that are its own."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float = 1.0
    e: Tensor | None = None
    active: Tensor | int | None = None
    trainable: Tensor | None = None
    dropout_p: float = 0.0
    seed: int | Tensor | None = None


def lowrank_linears(
    x: Tensor,
    projections: Sequence[Projection],
    *,
    backend: str = "auto",
    precision: str = "peft",
) -> list[Tensor]:
    """[lowrank_linear(x, *projection) for projection in projections], from one read of x.

        q, k, v = lowrank_linears(x, [Projection(Wq, bq, Aq, Bq, 2.0), ...])

    Args:
        x: `[..., K]`.
        projections: layers of K columns; N, ranks, masks, dropout and seeds may all differ.
        backend, precision: as for lowrank_linear.

    Returns:
        `[..., N_i]` for each. One that the caller doesn't use has no gradients in the backward.

    Raises:
        ValueError, TypeError: arguments that don't fit, with what was wanted.
    """
    if not projections:
        raise ValueError("projections is empty; pass at least one Projection")
    for i, p in enumerate(projections):
        if not isinstance(p, Projection):
            raise TypeError(f"projections[{i}] has type {type(p).__name__}; pass a Projection")
    autocast = autocast_dtype(x)
    chosen = choose_backend(backend, x.device, autocast or x.dtype)
    layers = None
    if chosen != "reference" and x.numel() > 0 and not _is_traced():
        layers = _layers(x, projections, chosen, autocast, precision)
    if layers is None:
        return [
            lowrank_linear(x, *p[:4], **_keywords(p), backend=backend, precision=precision)
            for p in projections
        ]
    tensors = [t for layer in layers for t in layer[:5]]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        plain = [layer[5:] for layer in layers]
        return list(_Shared.apply(x, plain, *tensors))
    return _forward(x, layers)[0]


def _keywords(p: Projection) -> dict:
    return dict(zip(p._fields[4:], p[4:], strict=True))


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def _layers(
    x: Tensor,
    projections: Sequence[Projection],
    backend: str,
    autocast: torch.dtype | None,
    precision: str,
) -> list[Layer] | None:
    """The layers, checked; None where one call can't serve them all."""
    layers = []
    for p in projections:
        if not plainly_right(x, p.weight, p.bias, p.A, p.B, p.e):
            check_tensors(x, p.A, p.B, p.e, weight=p.weight, bias=p.bias)
        check_options(p.scale, p.dropout_p, p.seed, None, precision, x)
        check_masks(p.active, p.trainable, p.A.shape[0])
        if autocast is None:
            check_base_dtypes(x, p.weight, p.bias)
        if p.weight.requires_grad or (p.bias is not None and p.bias.requires_grad):
            return None
        seed = seed_tensor(p.seed, x.device) if p.dropout_p > 0.0 and backend == "triton" else None
        options = (float(p.scale), float(p.dropout_p), backend, autocast, precision)
        branch, aux = prepare(p.A, p.active, p.trainable, seed, None, *options)
        if branch.kept == 0:
            return None
        layers.append(Layer(p.weight, p.bias, p.A, p.B, p.e, branch, aux))
    return layers if backend == "triton" or addmm_shared.fits(layers) else None


def _implementation(backend: str) -> ModuleType:
    if backend == "torch":
        return addmm_shared
    # imported on first use: nobody without a GPU pays for loading Triton
    from fastrank.kernels.lowrank import shared_input

    return shared_input


def _forward(
    x: Tensor, layers: Sequence[Layer]
) -> tuple[list[Tensor], Tensor, list[Layer], list[Tensor]]:
    """Every y in x's shape; x as `[M, K]`, the layers and each S, as the products take them."""
    with no_autocast(x):
        cast = [operands(x, layer.weight, layer.bias, layer.branch) for layer in layers]
        flat = cast[0][0]
        layers = [
            layer._replace(weight=weight, bias=bias)
            for layer, (_, weight, bias) in zip(layers, cast, strict=True)
        ]
        ys, Ss = _implementation(layers[0].branch.backend).linears(flat, layers)
    if x.dim() != 2:
        # not view: what a Function returns as a view could not be modified in place
        ys = [torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[1]]) for y in ys]
    return ys, flat, layers, Ss


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, plain, *tensors):
        layers = [Layer(*tensors[5 * i : 5 * i + 5], *rest) for i, rest in enumerate(plain)]
        ys, flat, layers, Ss = _forward(x, layers)
        need_x = ctx.needs_input_grad[0]
        need_A = any(ctx.needs_input_grad[2 + 5 * i + 2] for i in range(len(layers)))
        saved = [flat if need_A else None]
        for layer, S in zip(layers, Ss, strict=True):
            saved += [layer.weight if need_x else None, layer.A, layer.B, layer.e, S, *layer.aux]
        ctx.save_for_backward(*saved)
        ctx.plain = [layer.branch for layer in layers], x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        branches, x_shape, x_dtype = ctx.plain
        x, *saved = ctx.saved_tensors
        needs, layers, Ss, flat_dys = [], [], [], []
        for i, branch in enumerate(branches):
            weight, A, B, e, S, *aux = saved[10 * i : 10 * i + 10]
            _, _, need_A, need_B, need_e = ctx.needs_input_grad[2 + 5 * i : 7 + 5 * i]
            needs.append((ctx.needs_input_grad[0], need_A, need_B, need_e))
            layers.append(Layer(weight, None, A, B, e, branch, Aux(*aux)))
            Ss.append(S)
            flat_dys.append(None if dys[i] is None else _flat(dys[i]))
        if all(dy is None for dy in flat_dys):
            return (None,) * len(ctx.needs_input_grad)
        with no_autocast(layers[0].A):
            path = _implementation(branches[0].backend)
            dx, grads = path.backward(flat_dys, x, layers, Ss, needs, x_dtype)
        dx = None if dx is None else dx.to(x_dtype).view(x_shape)
        return dx, None, *(g for grad in grads for g in (None, None, *grad))


def _flat(dy: Tensor) -> Tensor:
    dy = dy.reshape(-1, dy.shape[-1])
    return dy.contiguous() if 0 in dy.stride() else dy
