"""PEFT's LoRA linear layer with its adapter fused into the base: y = x Wᵀ + b + s·drop(x) Aᵀ Bᵀ.

PEFT runs the base, the dropout, both factors, the scaling and the sum as separate operations, each
reading and writing a tensor of the activation's size. Here one `lowrank_linear` does all of it.
"""

from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from fastrank.layers import dispatch
from fastrank.layers.dispatch import parameter
from fastrank.layers.fused import Factors, FusedLayer
from fastrank.layers.memo import Part

_LINEAR_FORWARD = nn.Linear.forward


class LoraFactors:
    """Where a LoRA layer keeps its factors: the weights of two `nn.Linear`."""

    def _factors(self, name: str) -> Factors | str:
        in_a, in_b = self._modules["lora_A"]._modules, self._modules["lora_B"]._modules
        lora_a, lora_b = in_a[name], in_b[name]
        reason = dispatch.submodule_reason(
            "lora_A", lora_a, _LINEAR_FORWARD
        ) or dispatch.submodule_reason("lora_B", lora_b, _LINEAR_FORWARD)
        if reason is not None:
            return reason
        if parameter(lora_a, "bias") is not None or parameter(lora_b, "bias") is not None:
            return "lora_bias"
        a, b = parameter(lora_a, "weight"), parameter(lora_b, "weight")
        if a is None or b is None:
            return dispatch.NOT_MATRICES
        scale = self.scaling[name]
        return Factors(
            A=a,
            B=b,
            E=None,
            scale=float(scale) if isinstance(scale, int) else scale,
            parts=(Part(lora_a, _LINEAR_FORWARD, a), Part(lora_b, _LINEAR_FORWARD, b)),
            entries=((in_a, name, lora_a), (in_b, name, lora_b)),
        )


class FastLoraLinear(LoraFactors, FusedLayer, PeftLinear):
    """`peft.tuners.lora.Linear` whose plain calls run through `lowrank_linear`.

    `fastrank.patch` turns PEFT's layers into this class in place, so parameters, names, checkpoints
    and every PEFT method stay as they are. Anything `plan` declines runs PEFT's own forward, and
    the reason is counted. Shapes: x `[..., in_features]` -> `[..., out_features]`, x's dtype (the
    autocast dtype under autocast).

    Two differences from PEFT: dropout draws other elements for the same torch seed, and the fused
    call can't be differentiated twice.
    """

    stock = PeftLinear
