"""sparse_linear: y = x (W + S)ᵀ + bias, trained through the values of S at a mask's positions.

    y = x (W + S)ᵀ + b      dx = dY (W + S)      dvalues = (dYᵀ x)[kept]      db = Σ_m dY

S enters by overlaying W: its kept entries are added to in place, the products read W + S, and the
originals are put back (overlay.py). The other ways were measured or weighed, and lost:

- A sparse product beside the dense one (torch.sparse, CSR) grows with the rows of x, the overlay
  doesn't. At 1 %, fp32, one core of an AMD Zen 5: 768², 512 rows: overlay 0.17 ms, sparse product
  1.0 ms, dense product 4.3 ms; 4096², 512 rows: 2.8, 13.5 and 107 ms. At 64 rows of 4096² the
  sparse product is ahead, 2.1 against 3.6 of 32 ms. It has no 16-bit version that is as fast.
- W + S folded into the weight from one optimizer step to the next would make the forward free, but
  then everybody who reads the weight (checkpoints, tied layers, another client on one base) reads
  W + S, and nothing tells reliably that values have changed: fused optimizers, like writes through
  `.data`, leave their version as it was. SparseLinear.fold() offers half of it.
- A copy of W is what this op exists to avoid.

Under autocast the weight is cast as F.linear casts it (a copy in 16 bits, as there). Over a 16-bit
weight, cast or stored, W + S is rounded to 16 bits: a value shows in y once it moves its entry by
half a unit in the last place, while the fp32 masters go on adding up. Gradients pass the rounding.

Eager calls go through an autograd.Function, compiled and dispatch-mode calls (selective
checkpointing, fake tensors) through the registered op at the end.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastrank.kernels.common import choose_backend, products
from fastrank.kernels.packing import draws
from fastrank.kernels.packing.mask import SparseMask
from fastrank.kernels.packing.overlay import Places, overlaid, places_of, why_not_overlaid
from fastrank.kernels.packing.weight_grad import FLOATS, no_autocast, packed_gradient, wide


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    mask: SparseMask,
    *,
    backend: str = "auto",
) -> Tensor:
    """x (W + S)ᵀ + bias with S zero outside the mask, differentiable once.

        >>> from fastrank.kernels.packing import SparseMask, sparse_linear
        >>> x, weight = torch.randn(8, 128), torch.randn(64, 128)
        >>> mask = SparseMask((64, 128), density=0.01, seed=7, tensor_id="fc.weight")
        >>> values = torch.zeros(mask.nnz, requires_grad=True)
        >>> sparse_linear(x, weight, None, values, mask).sum().backward()
        >>> values.grad.shape  # one number for each kept entry, and no [64, 128] gradient
        torch.Size([82])

    Gradients flow to values, x and bias. The weight is frozen, and is written to for as long as a
    product takes: it comes out bit for bit as it was, also where the call raises. Threads that call
    this on one weight wait for each other; other readers of the weight must not run meanwhile.
    Autograd graphs, checkpointing and other layers that hold the weight are not disturbed, and
    torch.compile takes the call as an opaque op.

    Args:
        x: of shape `[..., K]`, any strides.
        weight: `[N, K]`, any strides without overlap, not requiring grad, in x's dtype unless
            autocast is on.
        bias: `[N]` or None.
        values: S at the mask's positions, `[nnz]`, fp32 (fp64 over an fp64 weight).
        mask: of shape (N, K), also where the weight is a transposed view.
        backend: of the gradient of values: "auto", "triton" or "reference".

    Returns:
        `[..., N]`, in the dtype of `F.linear(x, weight, bias)`.

    Raises:
        ValueError, TypeError: arguments that don't fit, with what was wanted.
    """
    if is_traced():
        return traced(x, weight, bias, values, None, mask, backend)
    check_operands(x, weight, bias, values, mask)
    return run(x, weight, bias, values, places_of(mask, x.device), backend, folded=False)


def is_traced() -> bool:
    """Whether a call is to go through the registered op."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    places: Places,
    backend: str,
    folded: bool,
) -> Tensor:
    """sparse_linear on checked operands. folded: the weight holds W + S already."""
    autocast = _autocast_dtype(x, weight, bias)
    # the gradient's, known now so that a backend that can't run is refused before the work
    chosen = choose_backend(backend, x.device, autocast or x.dtype)
    return _SparseLinear.apply(x, weight, bias, values, Call(places, chosen, autocast, folded))


def traced(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    originals: Tensor | None,
    mask: SparseMask,
    backend: str,
) -> Tensor:
    """sparse_linear by the registered op.

    Args:
        originals: the kept entries of W where the weight holds others, `[nnz]`, or None.
    """
    fields = mask.density, draws.signed_seed(mask.seed), mask.tensor_id, mask.round, mask.scheme
    autocast = _autocast_dtype(x, weight, bias)
    return torch.ops.fastrank.sparse_linear(
        x, weight, bias, values, originals, *fields, backend, autocast
    )


class Call(NamedTuple):
    """The plain part of a call."""

    places: Places
    backend: str  # as choose_backend names it
    autocast: torch.dtype | None  # what F.linear would cast x, weight and bias to
    folded: bool
    originals: Tensor | None = None  # what values are added to, if not what is in the weight


def _autocast_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """What autocast casts operands to; without it they need one dtype, as F.linear does."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(
                f"{name} has dtype {tensor.dtype} but x {x.dtype}; cast one or use torch.autocast"
            )
    return None


def check_operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, mask: SparseMask
) -> None:
    """Shapes, dtypes and devices; ValueError or TypeError."""
    if not isinstance(mask, SparseMask):
        raise TypeError(f"mask has type {type(mask).__name__}; pass a SparseMask")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("values", values)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} has type {type(tensor).__name__}; pass a torch.Tensor")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} has dtype {tensor.dtype}; cast it to a floating dtype")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x on {x.device}; move one of them")
    if weight.dim() != 2 or mask.shape != tuple(weight.shape):
        raise ValueError(
            f"weight has shape {list(weight.shape)} but the mask {list(mask.shape)}; "
            "pass weight [N, K] (transpose a Conv1D weight) and a mask of its shape"
        )
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {list(x.shape)} but weight {list(weight.shape)}; pass x [..., K]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}; pass [{weight.shape[0]}]")
    if values.shape != (mask.nnz,) or values.dtype != wide(weight.dtype):
        raise ValueError(
            f"values are {values.dtype} of shape {list(values.shape)}; pass {wide(weight.dtype)} "
            f"[{mask.nnz}], one for each kept entry"
        )
    if weight.requires_grad:
        raise ValueError("weight requires grad; freeze it: only its values at the mask are trained")
    reason = why_not_overlaid(weight)
    if reason is not None:
        raise ValueError(f"sparse_linear got {reason}; pass weight.contiguous()")


def _with_base(
    weight: Tensor, values: Tensor, call: Call, product: Callable[[Tensor], Tensor]
) -> Tensor:
    """product(W + S), the sum in W's own memory."""
    if call.folded:
        return product(_cast(weight, call.autocast))
    return overlaid(
        weight,
        values,
        call.places,
        lambda: product(_cast(weight, call.autocast)),
        call.originals,
    )


def _cast(tensor: Tensor | None, autocast: torch.dtype | None) -> Tensor | None:
    """As autocast casts an operand; it leaves float64 alone."""
    if autocast is None or tensor is None or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(autocast)


def _flat(x: Tensor, call: Call) -> Tensor:
    return _cast(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), call.autocast)


def forward(
    flat: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, call: Call
) -> Tensor:
    """y `[M, N]` for x `[M, K]` in the dtype of the products."""
    bias = _cast(bias, call.autocast)
    with no_autocast(flat):
        return _with_base(weight, values, call, lambda base: products.linear(flat, base, bias))


def backward(
    dy: Tensor,
    flat: Tensor | None,
    weight: Tensor | None,
    values: Tensor | None,
    call: Call,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx `[M, K]`, dbias and dvalues for dy `[..., N]`; None where not needed.

    Args:
        flat: x as forward had it; needed for dvalues.
        weight, values: needed for dx.
    """
    need_x, need_bias, need_values = needs
    dx = dbias = dvalues = None
    dy = dy.reshape(-1, dy.shape[-1])
    with no_autocast(dy):
        if need_values:
            dvalues = packed_gradient(dy, flat, call.places, call.backend)
        if need_x:
            if 0 in dy.stride() and dy.numel() > 1:
                dy = dy.contiguous()  # what .sum() sends back; products would copy it anyway
            dx = _with_base(weight, values, call, lambda base: products.mm(dy, base))
        if need_bias:
            dbias = dy.sum(0)
    return dx, dbias, dvalues


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, values, call: Call):
        flat = _flat(x, call)
        y = forward(flat, weight, bias, values, call)
        need_x, _, _, need_values, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            flat if need_values else None,
            weight if need_x else None,
            # also where W + S is folded: who changes them before the backward is told
            values if need_x else None,
        )
        ctx.plain = call, x.shape, x.dtype, None if bias is None else bias.dtype, values.dtype
        # what a Function returns as a view could not be modified in place by the caller
        return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        flat, weight, values = ctx.saved_tensors
        call, x_shape, x_dtype, bias_dtype, values_dtype = ctx.plain
        need_x, _, need_bias, need_values, _ = ctx.needs_input_grad
        needs = need_x, need_bias, need_values
        dx, dbias, dvalues = backward(dy, flat, weight, values, call, needs)
        dx = None if dx is None else dx.to(x_dtype).view(x_shape)
        dbias = None if dbias is None else dbias.to(bias_dtype)
        return dx, None, dbias, None if dvalues is None else dvalues.to(values_dtype), None


@torch.library.custom_op("fastrank::sparse_linear", mutates_args=())
def _linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    originals: Tensor | None,
    density: float,
    seed: int,
    tensor_id: str,
    round: int,
    scheme: str,
    backend: str,
    autocast: torch.dtype | None,
) -> Tensor:
    """What torch.compile sees: opaque, and to its eyes without effect on the weight."""
    mask = SparseMask(tuple(weight.shape), density, seed % 2**64, tensor_id, round, scheme)
    check_operands(x, weight, bias, values, mask)
    call = _call_of(x, originals, mask, backend, autocast)
    return forward(_flat(x, call), weight, bias, values, call).view(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("fastrank::sparse_linear_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    originals: Tensor | None,
    density: float,
    seed: int,
    tensor_id: str,
    round: int,
    scheme: str,
    backend: str,
    autocast: torch.dtype | None,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, bias and values; empty where not needed."""
    mask = SparseMask(tuple(weight.shape), density, seed % 2**64, tensor_id, round, scheme)
    call = _call_of(x, originals, mask, backend, autocast)
    grads = backward(dy, _flat(x, call), weight, values, call, tuple(needs))
    return [
        dy.new_empty(0) if grad is None else grad.to(like.dtype).view(like.shape)
        for grad, like in zip(grads, (x, bias, values), strict=True)
    ]


def _call_of(
    x: Tensor,
    originals: Tensor | None,
    mask: SparseMask,
    backend: str,
    autocast: torch.dtype | None,
) -> Call:
    chosen = choose_backend(backend, x.device, autocast or x.dtype)
    return Call(places_of(mask, x.device), chosen, autocast, False, originals)


@_linear_op.register_fake
def _(x, weight, bias, values, *options):
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=options[-1] or x.dtype)


@_backward_op.register_fake
def _(dy, x, weight, bias, values, *options):
    return [
        like.new_empty(like.shape) if needed else dy.new_empty(0)
        for needed, like in zip(options[-1], (x, bias, values), strict=True)
    ]


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _op_backward(ctx, dy):
    need_x, _, need_bias, need_values = ctx.needs_input_grad[:4]
    needs = [need_x, need_bias, need_values]
    grads = _backward_op(dy, *ctx.saved_tensors, *ctx.options, needs)
    dx, dbias, dvalues = (g if needed else None for g, needed in zip(grads, needs, strict=True))
    return dx, None, dbias, dvalues, *[None] * 8


_linear_op.register_autograd(_op_backward, setup_context=_setup)
