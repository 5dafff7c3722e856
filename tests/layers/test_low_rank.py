"""LowRankLinear, the same layer without PEFT: its formula, its masks, its life."""

import copy
import subprocess
import sys

import pytest
import torch
from layer_cases import FLOAT64, rows, run
from torch import nn

from fastrank.errors import UsageError
from fastrank.layers import LowRankLinear


def low_rank(**options):
    torch.manual_seed(0)
    base = nn.Linear(12, 20, dtype=torch.float64)
    layer = LowRankLinear.from_linear(base, 4, lora_alpha=6, **options)
    with torch.no_grad():
        layer.B.normal_()
        if layer.e is not None:
            layer.e.normal_()
    return base, layer


def test_low_rank_linear_equals_its_formula():
    base, layer = low_rank(use_diagonal=True)
    x = rows()
    branch = (x @ layer.A.T * layer.e) @ layer.B.T * 1.5
    assert torch.allclose(layer(x), base(x) + branch, rtol=FLOAT64)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"A", "B", "e"}
    assert layer.weight.data_ptr() == base.weight.data_ptr()
    assert base.weight.requires_grad
    assert LowRankLinear(12, 20, 4).weight.dtype == torch.float32
    fresh = LowRankLinear.from_linear(base, 3)
    assert torch.allclose(fresh(x), base(x), rtol=FLOAT64)


@pytest.mark.parametrize("mask", [2, [True, True, False, False]], ids=["prefix", "mask"])
def test_inactive_ranks_do_not_exist(mask):
    _, layer = low_rank(use_diagonal=True)
    small = copy.deepcopy(layer)
    layer.active = mask
    with torch.no_grad():
        layer.A[2:], layer.B[:, 2:], layer.e[2:] = torch.nan, torch.inf, torch.nan
        small.A, small.B = nn.Parameter(small.A[:2]), nn.Parameter(small.B[:, :2])
        small.e = nn.Parameter(small.e[:2])
    y, grads = run(layer, rows())
    y_small, grads_small = run(small, rows())
    assert torch.allclose(y, y_small, rtol=FLOAT64)
    assert torch.allclose(grads["A"][:2], grads_small["A"], rtol=FLOAT64)
    assert (grads["A"][2:] == 0).all()
    assert (grads["B"][:, 2:] == 0).all()
    assert (grads["e"][2:] == 0).all()
    merged = layer.merge()
    assert torch.allclose(merged(rows()), y, rtol=1e-10)


def test_mask_travels_in_the_state_dict_and_only_when_set():
    _, layer = low_rank()
    plain = copy.deepcopy(layer.state_dict())
    assert set(plain) == {"weight", "bias", "A", "B"}
    layer.active = 3
    masked = layer.state_dict()
    assert masked["active"].tolist() == [True, True, True, False]
    _, other = low_rank()
    other.load_state_dict(masked)
    assert other.active.tolist() == [True, True, True, False]
    other.load_state_dict(plain)
    assert other.active is None
    assert copy.deepcopy(layer).active.tolist() == layer.active.tolist()


def test_low_rank_linear_trains_with_dropout_and_in_16_bit():
    base = nn.Linear(12, 20, dtype=torch.bfloat16)
    layer = LowRankLinear.from_linear(base, 4, dropout_p=0.2)
    assert layer.A.dtype == torch.float32
    with torch.no_grad():
        layer.B.normal_()
    x = rows(torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert "r=4" in repr(layer)
    assert "dropout_p=0.2" in repr(layer)
    assert LowRankLinear(3, 2, 0)(torch.ones(1, 3)).shape == (1, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRankLinear(4, 4, -1), "r=-1.*r at least 0"),
        (lambda: LowRankLinear(0, 4, 1), "in_features=0"),
        (lambda: LowRankLinear(4, 4, 1, lora_alpha=0), "lora_alpha is 0; .*above 0"),
        (lambda: LowRankLinear(4, 4, 1, lora_alpha=float("nan")), "lora_alpha is nan"),
        (lambda: LowRankLinear(4, 4, 1, dropout_p=1.0), r"dropout_p is 1.0; .*\[0, 1\)"),
        (lambda: LowRankLinear.from_linear(nn.Conv2d(1, 1, 1), 1), "got Conv2d; pass a torch.nn"),
        (lambda: setattr(LowRankLinear(4, 4, 2), "active", 3), r"active is 3; .*\[0, 2\]"),
        (lambda: setattr(LowRankLinear(4, 4, 2), "active", [True]), r"shape \[1\]; pass .*\[2\]"),
        (lambda: setattr(LowRankLinear(4, 4, 2), "active", torch.ones(2)), "active is float32"),
    ],
)
def test_bad_arguments_say_what_came_and_what_was_wanted(make, message):
    with pytest.raises(UsageError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_low_rank_linear_imports_neither_peft_nor_transformers():
    code = (
        "import sys, fastrank; fastrank.LowRankLinear(3, 2, 1); "
        "print([m for m in ('peft', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "[]\n"
