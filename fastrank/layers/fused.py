"""What every fused PEFT layer shares: one call decided, counted, and run through the kernel.

A subclass names PEFT's class and says where that class keeps its factors; merging, saving and
switching adapters stay PEFT's own code, inherited.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastrank.kernels.lowrank import Projection, lowrank_linear
from fastrank.layers import dispatch
from fastrank.layers.dispatch import LayerState, parameter
from fastrank.layers.memo import Facts, Memo, Number, Part

# plain base layers by their forward -> whether they keep the weight as [in_features, out_features]
_BASE_FORWARDS = {nn.Linear.forward: False, Conv1D.forward: True}


class Factors(NamedTuple):
    """One adapter's share of a layer: A `[R, K]`, B `[N, R]`, E `[R, 1]` or None, and its scale.

    Args:
        A, B, E: the parameters.
        scale: what the branch is multiplied by: a float, or a tensor `[1]` while a graph is traced.
        parts: submodules whose calls are replaced.
        entries: where the adapter dictionaries hold them, see `Facts`.
        numbers: parameters that the scale was computed from.
    """

    A: Tensor
    B: Tensor
    E: Tensor | None
    scale: float | Tensor
    parts: tuple[Part, ...]
    entries: tuple[tuple[dict[str, Any], str, Any], ...]
    numbers: tuple[Number, ...] = ()


class Base(NamedTuple):
    """The base layer's operands: weight `[N, K]` (`[K, N]` if transposed) and bias `[N]`.

    A base that runs its own forward has no weight and no part here.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    transposed: bool = False
    parts: tuple[Part, ...] = ()


class Operands(NamedTuple):
    """What one fused call hands to the kernel, as the parameters are: see `Base` and `Factors`."""

    weight: Tensor | None
    bias: Tensor | None
    transposed: bool
    A: Tensor
    B: Tensor
    E: Tensor | None
    scale: float | Tensor
    dropout_p: float


class Plan(NamedTuple):
    """An approved call: its operands, and what the approval rests on."""

    operands: Operands
    base: Base
    factors: Factors


class FusedLayer:
    """Mixin in front of a PEFT linear layer: plain calls run fused, all others PEFT's forward."""

    stock: ClassVar[type]  # PEFT's class
    reads_base: ClassVar[bool] = True  # whether the base's weight goes into the fused call
    _labels: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_dropout")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # before PEFT's: it calls methods that are ours, and nn.Module's drops no plain attribute
        object.__setattr__(self, "_fastrank", LayerState())
        super().__init__(*args, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own = self.__dict__
        state: LayerState | None = own.get("_fastrank")
        if state is None:
            # a wrapper that kept this bound method still calls it after `unpatch`
            return type(self).forward(self, x, *args, **kwargs)
        if not (args or kwargs or torch.compiler.is_compiling()):
            memo = state.memo
            if memo is not None and memo.holds(own, x):
                state.calls.fused += 1
                try:
                    return self._approved(x, memo.operands, state)
                except (TypeError, ValueError):
                    # the kernel refuses its operands: `plan` says why
                    state.calls.fused -= 1
                    state.memo = None
        plan = self.plan(x, args, kwargs)
        if isinstance(plan, str):
            state.calls.count(plan)
            return self.stock.forward(self, x, *args, **kwargs)
        state.calls.count(None)
        if not torch.compiler.is_compiling():
            state.memo = self._remember(plan, x)
            if state.memo is not None:
                return self._approved(x, plan.operands, state)
        return self._run(x, plan.operands, state)

    def _approved(self, x: Tensor, operands: Operands, state: LayerState) -> Tensor:
        """A call that the memo approves: by what siblings have computed, or on its own."""
        if state.siblings is not None and state.trainable is None:
            result = state.siblings.take(self, x)
            if result is not None:
                return result
        return self._run(x, operands, state)

    def plan(
        self, x: Tensor | None = None, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Plan | str:
        """The operands of a fused call, or the reason why PEFT's own forward has to run.

        Args:
            x: input `[..., in_features]`; None asks about the layer's present state alone, as for a
                plain call with an input of the base weight's dtype and device.
            args: further positional arguments of the call.
            kwargs: further keyword arguments of the call.
        """
        reason = dispatch.context_reason()
        if reason is None and x is not None:
            reason = dispatch.call_reason(x, args, kwargs or {})
        if reason is None:
            reason = self._adapter_reason()
        if reason is not None:
            return reason
        (name,) = self._active_here()
        dropout = self._modules["lora_dropout"]._modules[name]
        base = self._base()
        if isinstance(base, str):
            return base
        factors = self._factors(name)
        if isinstance(factors, str):
            return factors
        reason = (
            dispatch.dropout_reason(dropout)
            or dispatch.scale_reason(factors.scale)
            or self._operand_reason(x, base, factors)
        )
        if reason is not None:
            return reason
        operands = Operands(*base[:3], *factors[:4], dispatch.dropout_probability(dropout))
        return Plan(operands, base, factors)

    def projection(self, x: Tensor) -> Projection | None:
        """The operands of a plain call on `x`, if the last approval still holds for it."""
        state: LayerState | None = self.__dict__.get("_fastrank")
        memo = None if state is None else state.memo
        if memo is None or not memo.holds(self.__dict__, x):
            return None
        weight, bias, transposed, a, b, e, scale, dropout_p = memo.operands
        e, scale = diagonal(e, scale)
        weight = weight.T if transposed else weight
        return Projection(weight, bias, a, b, scale, e, dropout_p=dropout_p)

    def _run(self, x: Tensor, operands: Operands, state: LayerState) -> Tensor:
        """The fused call itself: x `[..., K]` -> `[..., N]`."""
        weight, bias, transposed, a, b, e, scale, dropout_p = operands
        if e is not None:
            e, scale = diagonal(e, scale)
        return lowrank_linear(
            x,
            weight.T if transposed else weight,
            bias,
            a,
            b,
            scale=scale,
            e=e,
            trainable=state.trainable,
            dropout_p=dropout_p,
            precision=state.precision,
            backend=state.backend,
        )

    def adopt(self) -> None:
        """What `patch` changes besides the class."""

    def release(self) -> None:
        """Undo `adopt`."""

    def notes(self) -> list[str]:
        """What a report should say of the layer besides fused or not."""
        return []

    def _factors(self, name: str) -> Factors | str:
        """The adapter's operands, or why they can't be handed to a kernel."""
        raise NotImplementedError

    def _base(self) -> Base | str:
        """The base layer's operands, or why its call can't be replaced."""
        base = self._modules["base_layer"]
        forward = type(base).forward
        transposed = _BASE_FORWARDS.get(forward)
        if transposed is None:
            return f"base layer is a {type(base).__name__}"
        reason = dispatch.submodule_reason("base_layer", base, forward)
        if reason is not None:
            return reason
        weight, bias = parameter(base, "weight"), parameter(base, "bias")
        if weight is None:
            return dispatch.NOT_MATRICES
        return Base(weight, bias, transposed, (Part(base, forward, weight, bias),))

    def _remember(self, plan: Plan, x: Tensor) -> Memo | None:
        """The memo of an approved call, or None where it would not be sound."""
        if not getattr(self, "cast_input_dtype_enabled", True):
            return None
        tensors = tuple(t for t in plan.operands if isinstance(t, Tensor))
        if any(type(tensor) is not nn.Parameter for tensor in tensors):
            return None  # lent for one call (torch.func.functional_call): not ours to keep alive
        dtypes = {tensor.dtype for tensor in (x, *tensors)}
        if torch.float64 in dtypes and len(dtypes) > 1:
            return None  # allowed without autocast, refused with it
        active = self._active_adapter
        if not isinstance(active, str):
            if len(active) != 1:
                return None  # of several names a second one could come to this layer unseen
            active = list(active)
        (name,) = self._active_here()
        modules = self._modules
        base, factors = plan.base, plan.factors
        drops = modules["lora_dropout"]._modules
        facts = Facts(
            active=active,
            name=name,
            scaling=self.scaling[name],
            entries=(
                *((modules, label, modules[label]) for label in ("base_layer", *self._labels)),
                *factors.entries,
                (drops, name, drops[name]),
            ),
            parts=(*base.parts, *factors.parts, Part(drops[name], type(drops[name]).forward)),
            dropout=drops[name],
            tensors=tensors,
            numbers=factors.numbers,
        )
        return Memo(plan.operands, facts, x)

    def _active_here(self) -> list[str]:
        """Names of the active adapters that this layer has, as often as PEFT would apply them."""
        here = self._modules["lora_A"]
        return [name for name in self.active_adapters if name in here]

    def _adapter_reason(self) -> str | None:
        """Why the layer's adapters ask for PEFT's own forward, or None."""
        if self._disable_adapters:
            return "adapters disabled"
        if self.merged_adapters:
            return "adapters merged"
        names = self._active_here()
        if len(names) != 1:
            return "several active adapters" if names else "no active adapter in this layer"
        variant = self.lora_variant.get(names[0])
        if variant is not None:
            return f"LoRA variant {type(variant).__name__}"
        return None

    def _operand_reason(self, x: Tensor | None, base: Base, factors: Factors) -> str | None:
        """Why these tensors can't go through the kernel together, or None."""
        weight, bias, a, b = base.weight, base.bias, factors.A, factors.B
        device = weight.device if x is None else x.device
        reason = dispatch.tensor_reason({"base weight": weight, "base bias": bias}, device)
        reason = reason or self._factor_reason(factors, device)
        if reason is not None:
            return reason
        if weight.dim() != 2:
            return dispatch.NOT_MATRICES
        x_dtype = weight.dtype if x is None else x.dtype
        if torch.is_autocast_enabled(device.type):
            # autocast casts everything but float64, so a mixture fails: in PEFT's own words
            dtypes = {x_dtype, weight.dtype, a.dtype}
            mixed = torch.float64 in dtypes and len(dtypes) > 1
            return "float64 mixed in under autocast" if mixed else None
        if x_dtype != weight.dtype:
            return "input and base weight have different dtypes"
        return self._casting_reason(x_dtype, b.dtype)

    def _factor_reason(self, factors: Factors, device: torch.device) -> str | None:
        a, b, e = factors.A, factors.B, factors.E
        reason = dispatch.tensor_reason({"lora_A": a, "lora_B": b, "lora_E": e}, device)
        if reason is not None:
            return reason
        # fully sharded wrappers flatten or empty a parameter outside its own module's call
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            return dispatch.NOT_MATRICES
        if e is not None and e.shape != (a.shape[0], 1):
            return dispatch.NOT_MATRICES
        for label, other in (("B", b), ("E", e)):
            if other is not None and a.dtype != other.dtype:
                ours, theirs = dispatch.dtype_name(a.dtype), dispatch.dtype_name(other.dtype)
                return f"lora_A in {ours}, {label} in {theirs}"
        return None

    def _casting_reason(self, x_dtype: torch.dtype, adapter_dtype: torch.dtype) -> str | None:
        if x_dtype != adapter_dtype and not getattr(self, "cast_input_dtype_enabled", True):
            return "input dtype casting is disabled"
        return None


def diagonal(e: Tensor | None, scale: float | Tensor) -> tuple[Tensor | None, float]:
    """e `[R]` of E `[R, 1]`, and the scale as a float: one that is a tensor goes into e."""
    if e is None:
        return None, scale
    e = e.reshape(-1)
    return (e * scale, 1.0) if isinstance(scale, Tensor) else (e, scale)
