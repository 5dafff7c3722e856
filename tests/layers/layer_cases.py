"""One adapted layer, stock and patched, and what a call of it gives."""

import copy
import math

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastrank

# relative error allowed where both sides compute in float64: a few hundred roundings
FLOAT64 = 1e-12
# fused error against PEFT's own in 16 bit, both measured against float64
RATIO = 1.2


class Net(nn.Module):
    """One adapted linear layer of the given kind between nothing else."""

    def __init__(self, kind: str, bias: bool = True) -> None:
        super().__init__()
        self.fc = Conv1D(20, 12) if kind == "conv1d" else nn.Linear(12, 20, bias=bias)

    def forward(self, x, **kwargs):
        return self.fc(x, **kwargs)


class Tagged(torch.Tensor):
    """A tensor subclass, as quantised and distributed weights are."""


def pair(kind="linear", dtype=torch.float64, seed=0, bias=True, **options):
    """(stock, patched, report): the same PEFT model twice, B filled so that the branch counts."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["fc"]} | options
    options["fan_in_fan_out"] = kind == "conv1d"
    base = Net(kind, bias).to(dtype)
    stock = get_peft_model(base, LoraConfig(**options))
    fill(stock)
    fast = copy.deepcopy(stock)
    return stock, fast, fastrank.patch(fast)


def fill(model):
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)


def layer_of(model):
    return model.base_model.model.fc


def rows(dtype=torch.float64):
    return torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(3)).to(dtype)


def run(model, x, **kwargs):
    """Output, and every gradient by name (the input's as "x"), of one call."""
    x = x.clone().requires_grad_(x.is_floating_point())
    model.zero_grad()
    y = model(x, **kwargs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    (y.double() * weights).sum().backward()
    named = [(n.removeprefix("_orig_mod."), p) for n, p in model.named_parameters()]
    grads = {n: p.grad.clone() for n, p in named if p.grad is not None}
    return y.detach(), grads | {"x": x.grad}


def assert_close(fast, stock, tolerance=FLOAT64):
    (y, grads), (y_stock, grads_stock) = fast, stock
    assert grads.keys() == grads_stock.keys()
    for name, want in {"y": y_stock, **grads_stock}.items():
        got = y if name == "y" else grads[name]
        assert got.dtype == want.dtype
        assert (got - want).norm() <= tolerance * want.norm(), name


def errors(result, exact):
    """Relative Frobenius error of y and of every gradient against float64."""
    (y, grads), (y_exact, grads_exact) = result, exact
    pairs = {"y": (y, y_exact)} | {n: (grads[n], grads_exact[n]) for n in grads_exact}
    return {n: float((a.double() - b).norm() / b.norm()) for n, (a, b) in pairs.items()}


def typical(values):
    """Geometric mean: relative errors of sums that nearly cancel have a heavy tail."""
    return math.exp(sum(math.log(value + 1e-15) for value in values) / len(values))
