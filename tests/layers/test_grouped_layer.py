"""GroupedLowRankLinear: each adapter answers its own rows as a layer of its own would."""

import copy

import pytest
import torch
from layer_cases import FLOAT64
from torch import nn

from fastrank.errors import UsageError
from fastrank.layers import GroupedLowRankLinear, Groups, LowRankLinear

RANKS, SCALE = (4, 0, 2, 3), (0.5, 1.0, 2.0, -1.5)


def grouped(**options):
    torch.manual_seed(0)
    base = nn.Linear(12, 20, dtype=torch.float64)
    layer = GroupedLowRankLinear.from_linear(base, RANKS, scale=SCALE, **options)
    with torch.no_grad():
        for parameter in (layer.B, *([] if layer.e is None else [layer.e])):
            parameter.normal_()
    return base, layer


def alone(base, layer, index):
    """The same adapter in a layer of its own."""
    r, diagonal = RANKS[index], layer.e is not None
    single = LowRankLinear.from_linear(base, r, use_diagonal=diagonal)
    single.scale = SCALE[index]
    A, B, e = layer.adapter(index)
    with torch.no_grad():
        single.A.copy_(A)
        single.B.copy_(B)
        if diagonal:
            single.e.copy_(e)
    return single


@pytest.mark.parametrize("use_diagonal", [False, True])
@pytest.mark.parametrize("examples", [(2, 1, 3, 1), (0, 2, 0, 5)], ids=str)
def test_each_adapter_answers_as_alone(examples, use_diagonal):
    base, layer = grouped(use_diagonal=use_diagonal)
    layer.groups.examples = examples
    x = torch.randn(7, 3, 12, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], dy)
    dx, dA, dB = found[:3]
    start = rank = 0
    for index, count in enumerate(examples):
        rows, own = slice(start, start + count), slice(rank, rank + RANKS[index])
        start, rank = rows.stop, own.stop
        if not count:
            assert not dA[own].any()
            assert not dB[own].any()
            continue
        single, xs = alone(base, layer, index), x.detach()[rows].clone().requires_grad_()
        ys = single(xs)
        assert torch.allclose(y[rows], ys, rtol=FLOAT64)
        ys.backward(dy[rows])
        assert torch.allclose(dx[rows], xs.grad, rtol=FLOAT64)
        assert torch.allclose(dA[own], single.A.grad, rtol=FLOAT64)
        assert torch.allclose(dB[own].T, single.B.grad, rtol=FLOAT64)
        if use_diagonal:
            assert torch.allclose(found[3][own], single.e.grad, rtol=FLOAT64)


def test_a_new_layer_is_its_base_and_shares_it():
    base = nn.Linear(12, 20)
    layer = GroupedLowRankLinear.from_linear(base, [3, 1])
    layer.groups.examples = [2, 2]
    x = torch.randn(4, 12)
    assert torch.equal(layer(x), base(x))
    assert layer.weight.data_ptr() == base.weight.data_ptr()
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"A", "B"}
    assert GroupedLowRankLinear(4, 5, [2], dtype=torch.bfloat16).A.dtype is torch.float32


def test_layers_of_a_model_share_their_groups():
    groups = Groups()
    first, second = (GroupedLowRankLinear(6, 6, [2, 1], groups=groups) for _ in range(2))
    model = nn.Sequential(first, nn.Tanh(), second)
    groups.examples = [1, 2]
    assert model(torch.randn(3, 5, 6)).shape == (3, 5, 6)
    groups.examples = [3, 0]
    assert model(torch.randn(3, 6)).shape == (3, 6)


def test_dropout_acts_in_training_alone():
    _, layer = grouped(dropout_p=0.5)
    layer.groups.examples = [2, 2, 2, 2]
    x = torch.randn(8, 12, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_adapters_and_state_go_out_and_in():
    _, layer = grouped(use_diagonal=True)
    other = GroupedLowRankLinear(12, 20, RANKS, scale=SCALE, use_diagonal=True).double()
    other.load_state_dict(layer.state_dict())
    for index in range(len(RANKS)):
        A, B, e = layer.adapter(index)
        assert A.shape == (RANKS[index], 12)
        assert B.shape == (20, RANKS[index])
        assert torch.equal(other.adapter(index)[1], B)
        other.load_adapter(index, A + 1, B + 1, e + 1)
    assert torch.equal(other.A, layer.A + 1)
    assert torch.equal(other.B, layer.B + 1)
    assert torch.equal(other.e, layer.e + 1)
    assert "ranks=[4, 0, 2, 3]" in repr(copy.deepcopy(other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": []}, "every adapter's rank"),
        ({"ranks": [2, -1]}, "every adapter's rank"),
        ({"scale": [1.0]}, "for 2 adapters"),
        ({"scale": float("nan")}, "a finite number"),
        ({"dropout_p": 1.0}, "in \\[0, 1\\)"),
        ({"in_features": 0}, "sizes must be positive"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    with pytest.raises(UsageError, match=message):
        GroupedLowRankLinear(**({"in_features": 4, "out_features": 5, "ranks": [2, 1]} | options))


def test_wrong_batches_and_adapters():
    _, layer = grouped()
    with pytest.raises(UsageError, match=r"examples are \[\]; assign"):
        layer(torch.zeros(4, 12, dtype=torch.float64))
    layer.groups.examples = [1, 1, 0, 1]
    with pytest.raises(UsageError, match="has 4 rows"):
        layer(torch.zeros(4, 12, dtype=torch.float64))
    layer.groups.examples = [2, 2]  # of four adapters
    with pytest.raises(ValueError, match="rows"):
        layer(torch.zeros(4, 12, dtype=torch.float64))
    for wrong in ([1.5], [-1], [True]):
        with pytest.raises(UsageError, match="a whole number"):
            layer.groups.examples = wrong
    with pytest.raises(UsageError, match="adapter 4 of 4"):
        layer.adapter(4)
    A, B, _ = layer.adapter(0)
    with pytest.raises(UsageError, match="takes A, B, e of shapes"):
        layer.load_adapter(2, A, B)
    with pytest.raises(UsageError, match="takes A, B, e of shapes"):
        layer.load_adapter(0, A, B, torch.ones(4))
    with pytest.raises(UsageError, match=r"pass a torch\.nn\.Linear"):
        GroupedLowRankLinear.from_linear(nn.Identity(), [1])
