"""PEFT's layers over bitsandbytes' 4-bit and 8-bit bases: the base runs its own forward, the branch
is added by `lowrank_add`. Imported only where bitsandbytes is in use.

PEFT casts x to the adapter's dtype (a copy of the activation) and materialises dropout, both
products, the scaled product and the sum; here the branch is one call on x as it is.
"""

from typing import Any

import bitsandbytes
import torch
from peft.tuners.adalora.bnb import SVDLinear4bit, SVDLinear8bitLt
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import Tensor

from fastrank.kernels.lowrank import lowrank_add
from fastrank.layers import dispatch
from fastrank.layers.adalora import AdaLoraFactors
from fastrank.layers.dispatch import LayerState
from fastrank.layers.fused import Base, Factors, FusedLayer, Operands, diagonal
from fastrank.layers.lora import LoraFactors

_BASES = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)


class OwnForwardBase:
    """A base layer that is called as the module it is, hooks and all."""

    reads_base = False

    def _base(self) -> Base | str:
        base = self._modules["base_layer"]
        return Base() if type(base) in _BASES else f"base layer is a {type(base).__name__}"

    def _operand_reason(self, x: Tensor | None, base: Base, factors: Factors) -> str | None:
        device = factors.A.device if x is None else x.device
        reason = self._factor_reason(factors, device)
        if reason is not None or x is None:
            return reason
        if torch.is_autocast_enabled(device.type):
            mixed = {x.dtype, factors.A.dtype} > {torch.float64}
            return "float64 mixed in under autocast" if mixed else None
        return self._casting_reason(x.dtype, factors.A.dtype)

    def _run(self, x: Tensor, operands: Operands, state: LayerState) -> Tensor:
        e, scale = diagonal(operands.E, operands.scale)
        y = self._modules["base_layer"](x)
        return lowrank_add(
            y.to(self._sum_dtype(y)),
            x,
            operands.A,
            operands.B,
            scale=scale,
            e=e,
            trainable=state.trainable,
            dropout_p=operands.dropout_p,
            precision=state.precision,
            backend=state.backend,
        )

    def _sum_dtype(self, y: Tensor) -> torch.dtype:
        """What PEFT's sum of base and branch has as dtype."""
        # PEFT casts the branch back to the base's dtype, except under CUDA's autocast
        if y.is_cuda and torch.is_autocast_enabled("cuda"):
            return torch.promote_types(y.dtype, torch.get_autocast_dtype("cuda"))
        return y.dtype


class FastLoraLinear4bit(LoraFactors, OwnForwardBase, FusedLayer, Linear4bit):
    """`peft.tuners.lora.Linear4bit` with its branch through `lowrank_add`."""

    stock = Linear4bit


class FastLoraLinear8bitLt(LoraFactors, OwnForwardBase, FusedLayer, Linear8bitLt):
    """`peft.tuners.lora.Linear8bitLt` with its branch through `lowrank_add`."""

    stock = Linear8bitLt


class FastAdaLoraLinear4bit(AdaLoraFactors, OwnForwardBase, FusedLayer, SVDLinear4bit):
    """`peft.tuners.adalora.SVDLinear4bit` with its branch through `lowrank_add`."""

    stock = SVDLinear4bit

    def _sum_dtype(self, y: Tensor) -> torch.dtype:
        return y.dtype  # PEFT adds in place


class FastAdaLoraLinear8bitLt(AdaLoraFactors, OwnForwardBase, FusedLayer, SVDLinear8bitLt):
    """`peft.tuners.adalora.SVDLinear8bitLt` with its branch through `lowrank_add`."""

    stock = SVDLinear8bitLt

    def _casting_reason(self, x_dtype: torch.dtype, adapter_dtype: torch.dtype) -> str | None:
        # PEFT computes in float32 here, whatever the adapter's dtype and settings
        if adapter_dtype != torch.float32:
            return f"lora_A in {dispatch.dtype_name(adapter_dtype)}, not float32"
        return None

    def _sum_dtype(self, y: Tensor) -> torch.dtype:
        # PEFT divides by ranknum, which has a dimension and so takes part in promotion
        name = self._active_here()[0]
        return torch.promote_types(super()._sum_dtype(y), self.ranknum[name].dtype)


CLASSES: dict[type, type[Any]] = {
    fast.stock: fast
    for fast in (
        FastLoraLinear4bit,
        FastLoraLinear8bitLt,
        FastAdaLoraLinear4bit,
        FastAdaLoraLinear8bitLt,
    )
}
