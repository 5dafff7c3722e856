"""The error metric against hand-made numbers, and the oracle against autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrank.bench.accuracy import Oracle, drawn_dropout, largest, relative_error
from fastrank.bench.cases import Case, LayerStep, Operands
from fastrank.bench.peers import peft_schedule, unsloth_schedule
from fastrank.bench.variants import fastrank, frozen, peft

CPU = torch.device("cpu")


def test_relative_error_by_hand():
    exact = torch.tensor([3.0, 4.0])
    assert relative_error(exact, exact) == 0.0
    # Frobenius: 0.5 / 5; largest element: 0.5 / 4
    assert relative_error(torch.tensor([3.5, 4.0]), exact) == pytest.approx(0.125)
    # Frobenius: sqrt(9 + 16) / 5; largest element: 4 / 4
    assert relative_error(torch.zeros(2), exact) == pytest.approx(1.0)
    # many small errors show in the norm: sqrt(100 * 0.01) / sqrt(100 * 1 + 0) against 0.1 / 1
    assert relative_error(torch.full((100,), 1.1), torch.ones(100)) == pytest.approx(0.1, rel=1e-5)


def test_error_where_zeros_are_exact():
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0.0
    assert relative_error(torch.full((3,), 0.5), torch.zeros(3)) == pytest.approx(0.75**0.5)


def test_nan_is_not_hidden():
    assert math.isnan(relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)))
    assert math.isnan(largest([1.0, math.nan, 2.0]))
    assert largest([1.0, 3.0, 2.0]) == 3.0


CASES = [
    Case(24, 20, 28, 3, "float32"),
    Case(24, 20, 28, 3, "float32", dropout=0.25, bias=False),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_oracle_equals_float64_autograd(case):
    operands = Operands.of(case, CPU)
    step = peft(case, operands)
    factor = drawn_dropout(step, case.dropout) if case.dropout else torch.ones(case.M, case.K)
    x, A, B = (t.detach().double().requires_grad_() for t in (operands.x, operands.A, operands.B))
    bias = None if operands.bias is None else operands.bias.double()
    y = F.linear(x, operands.weight.double(), bias) + (x * factor) @ A.T @ B.T * step.scale
    y.backward(operands.dy.double())
    oracle = Oracle(operands.x, operands.dy, operands.weight, operands.bias)
    exact = oracle.exact(step, factor.double() if case.dropout else None)
    for name, wanted in {"y": y, "dx": x.grad, "dA": A.grad, "dB": B.grad}.items():
        torch.testing.assert_close(exact[name], wanted.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("build", [peft, fastrank, peft_schedule])
def test_drawn_dropout_is_the_one_that_the_layer_uses(build):
    case = Case(64, 48, 56, 4, "float32", dropout=0.25)
    operands = Operands.of(case, CPU)
    step = build(case, operands)
    before = {name: p.detach().clone() for name, p in step.trained.items()}
    factor = drawn_dropout(step, case.dropout)
    assert {name: p.equal(before[name]) for name, p in step.trained.items()} == {
        "dA": True,
        "dB": True,
    }
    values = factor.unique()
    assert values.tolist() == pytest.approx([0.0, 4 / 3], rel=1e-4)
    assert 0.15 < float((factor == 0).double().mean()) < 0.35
    oracle = Oracle(operands.x, operands.dy, operands.weight, operands.bias)
    assert oracle.worst(step, case.dropout) < 2e-6
    # another mask is a large error: the oracle does see dropout
    wrong = oracle.exact(step, factor.roll(1, 0))
    torch.manual_seed(20)
    assert relative_error(step.on(oracle.x, oracle.dy).outputs()["y"], wrong["y"]) > 1e-2


def test_every_variant_is_right_and_a_wrong_one_is_not():
    case = Case(600, 20, 28, 3, "float32")  # more rows than the oracle takes
    operands = Operands.of(case, CPU)
    oracle = Oracle(operands.x, operands.dy, operands.weight, operands.bias)
    for build in (frozen, peft, fastrank, unsloth_schedule, peft_schedule):
        assert oracle.worst(build(case, operands), 0.0) < 2e-6, build
    step = peft(case, operands)
    wrong = LayerStep(step.layer, step.x, step.dy, step.trained, step.scale * 1.01)
    assert oracle.worst(wrong, 0.0) > 1e-3


def test_ranks_that_are_off_have_no_part_in_the_truth():
    case = Case(24, 20, 28, 4, "float32")
    operands = Operands.of(case, CPU)
    oracle = Oracle(operands.x, operands.dy, operands.weight, operands.bias)
    trained = {"dA": nn.Parameter(operands.A), "dB": nn.Parameter(operands.B)}
    on = torch.tensor([True, False, True, False])
    step = LayerStep(nn.Identity(), operands.x, operands.dy, trained, active=on)
    exact = oracle.exact(step, None)
    assert not exact["dA"][~on].any()
    assert not exact["dB"][:, ~on].any()
    part = {"dA": nn.Parameter(operands.A[on]), "dB": nn.Parameter(operands.B[:, on])}
    alone = oracle.exact(LayerStep(nn.Identity(), operands.x, operands.dy, part), None)
    for name in ("y", "dx"):
        torch.testing.assert_close(exact[name], alone[name], rtol=1e-12, atol=1e-12)
