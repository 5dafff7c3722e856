"""SparseLinear on its own: folding, checkpoints, copies, casts, compiled."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from sparse_cases import (
    BF16,
    F32,
    F64,
    bits_equal,
    rows,
    train,
    twice,
)
from torch import nn

import fastrank
from fastrank.kernels.packing import SparseMask
from fastrank.layers.sparse import SparseLinear


def test_a_layer_of_its_own():
    base = nn.Linear(24, 40, dtype=F64)
    layer = SparseLinear.from_linear(base, density=0.1, seed=2, tensor_id="fc.weight")
    assert layer.weight.data_ptr() == base.weight.data_ptr()
    assert base.weight.requires_grad
    assert layer.mask == SparseMask((40, 24), 0.1, 2, "fc.weight")
    with torch.no_grad():
        layer.values.normal_()
    S = torch.zeros(960, dtype=F64).index_put((layer.mask.positions(),), layer.values).view(40, 24)
    assert torch.allclose(layer(rows()), F.linear(rows(), base.weight + S, base.bias), rtol=1e-12)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"values"}
    assert set(layer.state_dict()) == {"weight", "bias", "values"}
    assert "in_features=24" in repr(layer)
    assert "density=0.1, values=96, seed=2, round=0, scheme='stratified'" in repr(layer)
    fresh = SparseLinear(24, 40, bias=False, density=0.1, dtype=BF16)
    assert fresh.values.dtype == F32
    assert fresh.bias is None
    assert fresh(rows(BF16)).dtype == BF16
    layer.become_stock()
    assert type(layer) is nn.Linear


def test_fold_and_unfold():
    _, layer = trained_layer()
    before, y = layer.weight.clone(), layer(rows())
    layer.fold()
    assert layer.folded
    assert "folded=True" in repr(layer)
    assert not torch.equal(layer.weight, before)
    assert torch.equal(layer(rows()), y)
    assert torch.equal(F.linear(rows(), layer.weight, layer.bias), y)
    with torch.no_grad():
        layer.values.mul_(2)
    other = layer(rows())  # folds anew
    layer.unfold()
    assert bits_equal(layer.weight, before)
    assert torch.equal(layer(rows()), other)
    assert not torch.equal(other, y)
    layer.unfold()
    layer.fold()
    layer.values.data = torch.zeros_like(layer.values)
    assert torch.equal(layer(rows()), F.linear(rows(), before, layer.bias))


def trained_layer(dtype: torch.dtype = F64) -> tuple[nn.Linear, SparseLinear]:
    torch.manual_seed(0)
    base = nn.Linear(24, 40, dtype=dtype)
    layer = SparseLinear.from_linear(copy.deepcopy(base), density=0.1)
    with torch.no_grad():
        layer.values.normal_()
    return base, layer


def test_folding_between_forward_and_backward_is_noticed():
    """The graph has W; with W + S in its place the backward would add S twice."""
    _, layer = trained_layer()
    y = layer(rows().requires_grad_())
    layer.fold()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = layer(rows().requires_grad_())
    layer.unfold()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("folded", [False, True], ids=["unfolded", "folded"])
def test_checkpoints_hold_the_base_and_the_values_apart(folded):
    base, layer = trained_layer()
    y = layer(rows())
    if folded:
        layer.fold()
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    assert bits_equal(state["weight"], base.weight.detach())
    assert layer.folded == folded
    other = SparseLinear(24, 40, density=0.1, dtype=F64)
    if folded:
        other.fold()
    other.load_state_dict(state)
    assert other.folded == folded
    assert torch.equal(other(rows()), y)
    other.unfold()
    assert bits_equal(other.weight, base.weight)
    # a checkpoint of the base has no values
    missing = other.load_state_dict(base.state_dict(), strict=False)
    assert missing.missing_keys == ["values"]
    assert missing.unexpected_keys == []


@pytest.mark.parametrize("folded", [False, True], ids=["unfolded", "folded"])
def test_copies_and_pickles(folded):
    _, layer = trained_layer()
    y = layer(rows())
    if folded:
        layer.fold()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.weight.data_ptr() != layer.weight.data_ptr()
        assert torch.equal(other(rows()), y)
        assert other.mask == layer.mask
        with torch.no_grad():
            other.values.zero_()
        other(rows())
        assert torch.equal(layer(rows()), y)
        other.become_stock()
        assert bits_equal(other.weight, layer.state_dict()["weight"])


@pytest.mark.parametrize("folded", [False, True], ids=["unfolded", "folded"])
def test_a_cast_of_the_model_keeps_the_masters(folded):
    base, layer = trained_layer(F32)
    layer(rows(F32)).sum().backward()
    values, grad = layer.values.detach().clone(), layer.values.grad.clone()
    if folded:
        layer.fold()
    layer.to(BF16)
    assert layer.values.dtype == F32
    assert torch.equal(layer.values, values)
    assert torch.equal(layer.values.grad, grad)
    assert layer.bias.dtype == BF16
    assert layer.folded == folded
    layer.unfold()
    assert bits_equal(layer.weight, base.weight.detach().bfloat16())
    assert layer(rows(BF16)).dtype == BF16
    layer.double()
    assert layer.values.dtype == F64
    assert layer(rows()).dtype == F64
    layer.to("meta")
    assert layer.values.device.type == "meta"


@pytest.mark.parametrize("folded", [False, True], ids=["unfolded", "folded"])
def test_compiled_models_run_and_train(folded):
    """In one graph; a folded layer sees that its values have changed."""
    model, eager = twice(), twice()
    for m in (model, eager):
        fastrank.sparsify(m, 0.1)
        if folded:
            m.middle.fold()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    kept = model.middle.weight.clone()
    assert train(compiled, 3) == pytest.approx(train(eager, 3), rel=1e-11)
    assert bits_equal(model.middle.weight, kept)
    assert model.middle.folded == folded
    assert torch.allclose(model.middle.values, eager.middle.values, rtol=1e-10)
