"""Cases of the low-rank benchmark, their operands, and one training step of a layer on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SHORT = {"float32": "fp32", "bfloat16": "bf16"}
# peft: adapters in float32, no autocast; autocast: the same under bf16 autocast; 16-bit: adapters
# in the base's dtype (autocast_adapter_dtype=False)
PRECISIONS = ("peft", "autocast", "16-bit")


class Unavailable(Exception):
    """A variant that can't run here or on this case; the message is the reason."""


@dataclass(frozen=True)
class Case:
    """One layer: x `[M, K]`, weight `[N, K]`, adapters of rank R.

    Args:
        M, K, N, R: rows, in_features, out_features, rank.
        dtype: "float32" or "bfloat16", of x and the base.
        dropout: probability on the branch's input.
        bias: whether the base has a bias (frozen).
        precision: one of PRECISIONS.
    """

    M: int
    K: int
    N: int
    R: int
    dtype: str
    dropout: float = 0.0
    bias: bool = True
    precision: str = "peft"

    @property
    def name(self) -> str:
        shape = f"M{self.M}-K{self.K}-N{self.N}-R{self.R}-{_SHORT[self.dtype]}-p{self.dropout:g}"
        return shape if self.precision == "peft" else f"{shape}-{self.precision}"

    @property
    def frozen_flops(self) -> float:
        """Of the frozen layer's forward and dX."""
        return 4.0 * self.M * self.K * self.N

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


@dataclass
class Operands:
    """What all variants of a case share.

    Args:
        x: `[M, K]`.
        dy: `[M, N]`, the incoming gradient.
        weight: `[N, K]`.
        bias: `[N]` or None.
        A: float32 `[R, K]`.
        B: float32 `[N, R]`, not zero, so that every gradient is at work.
    """

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor

    @staticmethod
    def of(case: Case, device: torch.device) -> Operands:
        """Normal draws, the same for every run of a case on a device; base and branch of size 1."""
        generator = torch.Generator(device).manual_seed(0)
        dtype = DTYPES[case.dtype]

        def draw(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, device=device) * std

        return Operands(
            x=draw(case.M, case.K).to(dtype),
            dy=draw(case.M, case.N).to(dtype),
            weight=draw(case.N, case.K, std=case.K**-0.5).to(dtype),
            bias=draw(case.N).to(dtype) if case.bias else None,
            A=draw(case.R, case.K, std=case.K**-0.5),
            B=draw(case.N, case.R, std=case.R**-0.5),
        )


@dataclass
class LayerStep:
    """One training step of a layer: forward and backward, every gradient made afresh.

    Args:
        layer: x `[M, K]` -> y `[M, N]`.
        x: leaf that requires grad.
        dy: `[M, N]`.
        trained: name of its gradient ("dA", "dB") -> parameter.
        scale: of the branch.
        autocast: dtype of the autocast region around the forward, or None.
        frozen: what else the layer holds, where it is no module: its weight.
        active: ranks that exist, bool `[R]` on x's device; None for all.
    """

    layer: Callable[[Tensor], Tensor]
    x: Tensor
    dy: Tensor
    trained: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0
    autocast: torch.dtype | None = None
    frozen: Sequence[Tensor] = ()
    active: Tensor | None = None

    def __call__(self) -> Tensor:
        self.clear()
        y = self.forward()
        y.backward(self.dy)
        return y

    def forward(self) -> Tensor:
        if self.autocast is None:
            return self.layer(self.x)
        with torch.autocast(self.x.device.type, self.autocast):
            return self.layer(self.x)

    def clear(self) -> None:
        """Forget the gradients."""
        self.x.grad = None
        for parameter in self.trained.values():
            parameter.grad = None

    def on(self, x: Tensor, dy: Tensor) -> LayerStep:
        """The same layer on other rows."""
        x = x.detach().clone().requires_grad_()
        return replace(self, x=x, dy=dy)

    def outputs(self) -> dict[str, Tensor]:
        """y and every gradient of one step."""
        y = self()
        found = {"y": y.detach(), "dx": self.x.grad}
        found |= {name: parameter.grad for name, parameter in self.trained.items()}
        self.clear()
        return found

    def held(self) -> list[Tensor]:
        """Tensors that exist before the step and that autograd may save."""
        own = list(self.layer.parameters()) if isinstance(self.layer, torch.nn.Module) else []
        return [self.x, self.dy, *self.trained.values(), *own, *self.frozen]
