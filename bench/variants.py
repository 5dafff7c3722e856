"""What the low-rank benchmark compares: builders of one LayerStep each, on shared operands."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastrank.bench.cases import DTYPES, Case, LayerStep, Operands, Unavailable

Builder = Callable[[Case, Operands], LayerStep]


def frozen(case: Case, operands: Operands) -> LayerStep:
    """The base alone: F.linear forward, dX backward."""
    return LayerStep(_base(operands), leaf(operands.x), operands.dy, autocast=autocast(case))


def peft(case: Case, operands: Operands) -> LayerStep:
    """`peft.tuners.lora.Linear` as get_peft_model makes it from LoraConfig's defaults."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise Unavailable(f"PEFT can't be imported: {error}") from error
    holder = nn.Module()
    holder.linear = _base(operands)
    config = LoraConfig(r=case.R, lora_dropout=case.dropout, target_modules=["linear"])
    adapted = get_peft_model(holder, config, autocast_adapter_dtype=case.precision != "16-bit")
    layer = adapted.base_model.model.linear.train()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(operands.A)
        b.copy_(operands.B)
    trained = {"dA": a, "dB": b}
    scale = float(layer.scaling["default"])
    return LayerStep(layer, leaf(operands.x), operands.dy, trained, scale, autocast(case))


def fastrank(case: Case, operands: Operands) -> LayerStep:
    """The same layer after `fastrank.patch`: what a user gets, its checks at each call included."""
    from fastrank.patching import patch

    step = peft(case, operands)
    report = patch(step.layer)
    if report.delegated:
        raise RuntimeError(f"patch left the layer to PEFT: {report.delegated}")
    return step


def autocast(case: Case) -> torch.dtype | None:
    return DTYPES[case.dtype] if case.precision == "autocast" else None


def _base(operands: Operands) -> nn.Linear:
    """A frozen linear layer on the shared weight itself, not on a copy."""
    n, k = operands.weight.shape
    base = nn.Linear(k, n, bias=operands.bias is not None, device="meta")
    base.weight = nn.Parameter(operands.weight, requires_grad=False)
    if operands.bias is not None:
        base.bias = nn.Parameter(operands.bias, requires_grad=False)
    return base


def leaf(x: Tensor) -> Tensor:
    """x's data as a leaf of its own: variants share the values, not the gradient."""
    return x.detach().requires_grad_()
