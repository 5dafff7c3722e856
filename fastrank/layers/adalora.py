"""PEFT's AdaLoRA layer fused: y = x Wᵀ + b + s·((drop(x) Aᵀ) ⊙ e) Bᵀ, s = scaling/(ranknum + 1e-5).

AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) prunes a rank by setting its e to zero and ranks them
by |parameter · gradient|, so a zeroed e still gets its true gradient here, while its column of B
and its row of A get zeros, as in PEFT.
"""

from typing import Any

import torch
from peft.tuners.adalora import SVDLinear
from torch import Tensor

from fastrank.layers import dispatch
from fastrank.layers.dispatch import parameter
from fastrank.layers.fused import Factors, FusedLayer
from fastrank.layers.memo import Number

_OFFSET = 1e-5  # PEFT's, in get_delta_weight and forward alike


class AdaLoraFactors:
    """Where an AdaLoRA layer keeps its factors: entries of parameter dictionaries."""

    _labels = ("lora_A", "lora_B", "lora_E", "ranknum", "lora_dropout")

    def _factors(self, name: str) -> Factors | str:
        modules = self._modules
        a, b, e, ranknum = (parameter(modules[label], name) for label in self._labels[:4])
        if a is None or b is None or e is None or ranknum is None:
            return dispatch.NOT_MATRICES
        if ranknum.requires_grad:
            return "ranknum is trainable: call patch again to freeze it"
        if ranknum.device != a.device or ranknum.is_meta:
            return f"ranknum on {ranknum.device}, not with lora_A on {a.device}"
        scaling = self.scaling[name]
        reason = dispatch.scale_reason(scaling)
        if reason is not None:
            return reason
        if torch.compiler.is_compiling():
            # a tensor in the graph: its value would be a constant, or a wait for the device
            scale, numbers = scaling / (ranknum + _OFFSET), ()
        else:
            number = self._known(ranknum)
            scale, numbers = scaling / (number.value + _OFFSET), (number,)
        return Factors(
            A=a,
            B=b,
            E=e,
            scale=scale,
            parts=(),
            entries=tuple(
                (modules[label]._parameters, name, tensor)
                for label, tensor in zip(self._labels, (a, b, e, ranknum), strict=False)
            ),
            numbers=numbers,
        )

    def _known(self, ranknum: Tensor) -> Number:
        """The value of ranknum; a device is asked again only after a change."""
        state = self._fastrank
        number = state.number
        if number is None or number.tensor is not ranknum or not number.holds():
            number = state.number = Number.read(ranknum)
        return number

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, **kwargs)
        self.adopt()

    def adopt(self) -> None:
        """Freeze every ranknum: PEFT leaves it trainable unless the base is float32."""
        for name, ranknum in self.ranknum.items():
            if ranknum.requires_grad:
                ranknum.requires_grad_(False)
                self._fastrank.frozen.append(name)

    def release(self) -> None:
        for name in self._fastrank.frozen:
            if name in self.ranknum:
                self.ranknum[name].requires_grad_(True)

    def notes(self) -> list[str]:
        return ["ranknum frozen"] if self._fastrank.frozen else []


class FastAdaLoraLinear(AdaLoraFactors, FusedLayer, SVDLinear):
    """`peft.tuners.adalora.SVDLinear` whose plain calls run through `lowrank_linear`.

    Everything said of `FastLoraLinear` holds: made in place by `fastrank.patch`, same parameters
    and checkpoints, PEFT's own forward for whatever `plan` declines. Rank allocation, masking,
    resizing by a rank pattern and the orthogonality loss are PEFT's own code and read the same
    parameters and gradients. Shapes: x `[..., in_features]` -> `[..., out_features]`.
    """

    stock = SVDLinear
