"""What the low-rank benchmark compares: builders of one LayerStep each, on shared operands."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastrank.bench.cases import DTYPES, Case, LayerStep, Operands, Unavailable

# LoraConfig's default
LORA_ALPHA = 8
Builder = Callable[[Case, Operands], LayerStep]


def frozen(case: Case, operands: Operands) -> LayerStep:
    """The base alone: F.linear forward, dX backward."""
    return LayerStep(_base(operands), leaf(operands.x), operands.dy, autocast=autocast(case))


def has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None


def peft(case: Case, operands: Operands) -> LayerStep:
    """`peft.tuners.lora.Linear` as get_peft_model makes it from LoraConfig's defaults."""
    if not has_peft():
        raise Unavailable("PEFT is not installed")
    from peft import LoraConfig, get_peft_model

    holder = nn.Module()
    holder.linear = _base(operands)
    config = LoraConfig(r=case.R, lora_dropout=case.dropout, target_modules=["linear"])
    adapted = get_peft_model(holder, config, autocast_adapter_dtype=case.precision != "16-bit")
    layer = adapted.base_model.model.linear.train()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(operands.A)
        b.copy_(operands.B)
    return LayerStep(
        layer,
        leaf(operands.x),
        operands.dy,
        trained={"dA": a, "dB": b},
        scale=float(layer.scaling["default"]),
        autocast=autocast(case),
    )


def fastrank(case: Case, operands: Operands) -> LayerStep:
    """The same layer after `fastrank.patch`: what a user gets, its checks at each call included.

    On a machine without PEFT it is `fastrank.LowRankLinear`, the same kernel without those checks.
    """
    if not has_peft():
        return _without_peft(case, operands)
    from fastrank.patching import patch

    step = peft(case, operands)
    report = patch(step.layer)
    if report.delegated:
        raise RuntimeError(f"patch left the layer to PEFT: {report.delegated}")
    return step


def _without_peft(case: Case, operands: Operands) -> LayerStep:
    from fastrank.layers import LowRankLinear

    adapter_dtype = DTYPES[case.dtype] if case.precision == "16-bit" else torch.float32
    layer = LowRankLinear(
        case.K,
        case.N,
        case.R,
        lora_alpha=LORA_ALPHA,
        dropout_p=case.dropout,
        bias=case.bias,
        dtype=DTYPES[case.dtype],
        adapter_dtype=adapter_dtype,
        device=operands.x.device,
    )
    base = _base(operands)
    layer.weight, layer.bias = base.weight, base.bias
    with torch.no_grad():
        layer.A.copy_(operands.A)
        layer.B.copy_(operands.B)
    trained = {"dA": layer.A, "dB": layer.B}
    x, dy = leaf(operands.x), operands.dy
    return LayerStep(layer, x, dy, trained, layer.scale, autocast(case))


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
