"""PEFT's LoRA linear layer with its adapter fused into the base: y = x Wᵀ + b + s·drop(x) Aᵀ Bᵀ.

PEFT runs the base, the dropout, both factors, the scaling and the sum as separate operations, each
reading and writing a tensor of the activation's size. Here one `lowrank_linear` does all of it; all
the rest (merging, saving, switching adapters) stays PEFT's own code, inherited.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastrank.kernels.lowrank import lowrank_linear
from fastrank.layers import dispatch
from fastrank.layers.dispatch import LayerState, parameter

# plain base layers by their forward -> whether they keep the weight as [in_features, out_features]
_BASE_FORWARDS = {nn.Linear.forward: False, Conv1D.forward: True}
_LINEAR_FORWARD = nn.Linear.forward


class LoraPlan(NamedTuple):
    """The operands of one fused call: weight `[N, K]`, bias `[N]`, A `[R, K]`, B `[N, R]`."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float
    dropout_p: float


class FastLoraLinear(PeftLinear):
    """`peft.tuners.lora.Linear` whose plain calls run through `lowrank_linear`.

    `fastrank.patch` turns PEFT's layers into this class in place, so parameters, names, checkpoints
    and every PEFT method stay as they are. Anything `plan` declines runs PEFT's own forward, and
    the reason is counted. Shapes: x `[..., in_features]` -> `[..., out_features]`, x's dtype (the
    autocast dtype under autocast).

    Two differences from PEFT: dropout draws other elements for the same torch seed, and the fused
    call can't be differentiated twice.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fastrank = LayerState()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state: LayerState | None = self.__dict__.get("_fastrank")
        if state is None:
            # a wrapper that kept this bound method still calls it after `unpatch`
            return PeftLinear.forward(self, x, *args, **kwargs)
        plan = self.plan(x, args, kwargs)
        if isinstance(plan, str):
            state.count(plan)
            return PeftLinear.forward(self, x, *args, **kwargs)
        state.count(None)
        return lowrank_linear(
            x,
            plan.weight,
            plan.bias,
            plan.A,
            plan.B,
            scale=plan.scale,
            dropout_p=plan.dropout_p,
            precision=state.precision,
            backend=state.backend,
        )

    def plan(
        self, x: Tensor | None = None, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> LoraPlan | str:
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
        modules = self._modules
        (name,) = self._active_here()
        base = modules["base_layer"]
        lora_a = modules["lora_A"]._modules[name]
        lora_b = modules["lora_B"]._modules[name]
        dropout = modules["lora_dropout"]._modules[name]
        fan_in_first = _BASE_FORWARDS.get(type(base).forward)
        if fan_in_first is None:
            return f"base layer is a {type(base).__name__}"
        reason = (
            dispatch.submodule_reason("base_layer", base, type(base).forward)
            or dispatch.submodule_reason("lora_A", lora_a, _LINEAR_FORWARD)
            or dispatch.submodule_reason("lora_B", lora_b, _LINEAR_FORWARD)
            or dispatch.dropout_reason(dropout)
        )
        if reason is not None:
            return reason
        if parameter(lora_a, "bias") is not None or parameter(lora_b, "bias") is not None:
            return "lora_bias"
        weight, bias = parameter(base, "weight"), parameter(base, "bias")
        a, b = parameter(lora_a, "weight"), parameter(lora_b, "weight")
        if weight is None or a is None or b is None:
            return "weights are sharded or not matrices"
        reason = self._operand_reason(x, weight, bias, a, b)
        if reason is not None:
            return reason
        return LoraPlan(
            weight.T if fan_in_first else weight,
            bias,
            a,
            b,
            float(self.scaling[name]),
            dispatch.dropout_probability(dropout),
        )

    def _active_here(self) -> list[str]:
        """Names of the active adapters that this layer has, as often as PEFT would apply them."""
        here = self._modules["lora_A"]._modules
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
        scale = self.scaling[names[0]]
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            return f"scaling is {scale!r}" if isinstance(scale, float) else "scaling is no number"
        return None

    def _operand_reason(
        self, x: Tensor | None, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
    ) -> str | None:
        """Why these tensors can't go through the kernel together, or None."""
        device = weight.device if x is None else x.device
        reason = dispatch.tensor_reason(
            {"base weight": weight, "base bias": bias, "lora_A": a, "lora_B": b}, device
        )
        if reason is not None:
            return reason
        # fully sharded wrappers flatten or empty a parameter outside its own module's call
        if weight.dim() != 2 or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            return "weights are sharded or not matrices"
        if a.dtype != b.dtype:
            return f"lora_A in {dispatch.dtype_name(a.dtype)}, B in {dispatch.dtype_name(b.dtype)}"
        x_dtype = weight.dtype if x is None else x.dtype
        if torch.is_autocast_enabled(device.type):
            # autocast casts everything but float64, so a mixture fails: in PEFT's own words
            dtypes = {x_dtype, weight.dtype, a.dtype}
            mixed = torch.float64 in dtypes and len(dtypes) > 1
            return "float64 mixed in under autocast" if mixed else None
        if x_dtype != weight.dtype:
            return "input and base weight have different dtypes"
        if not self.cast_input_dtype_enabled and x_dtype != a.dtype:
            return "input dtype casting is disabled"
        return None
