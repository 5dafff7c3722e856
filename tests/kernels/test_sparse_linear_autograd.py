"""sparse_linear in larger graphs: one weight twice, checkpointing, what is saved, compiled code."""

import functools

import pytest
import torch
import torch.nn.functional as F
from sparse_linear_cases import BF16, F32, F64, K, N, bits_equal, dense, inputs
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fastrank.kernels.common import products
from fastrank.kernels.packing import SparseMask
from fastrank.kernels.packing.sparse_linear import sparse_linear


def test_one_weight_in_several_calls_before_the_backward():
    """Twice with one mask, and once with another: graphs that saved the weight stay right."""
    given, mask = inputs()
    other = SparseMask((N, K), density=0.2, tensor_id="other")
    more = torch.randn(other.nnz, dtype=F64, requires_grad=True)
    back = torch.randn(N, K, dtype=F64)
    leaves = [given[n] for n in ("x", "bias", "values")] + [more]

    def loss(linear) -> Tensor:
        y = linear(given["x"], given["weight"], given["bias"], given["values"], mask)
        y = linear((y @ back).tanh(), given["weight"], given["bias"], given["values"], mask)
        y = F.linear((y @ back).tanh(), given["weight"])
        y = linear((y @ back).tanh(), given["weight"], None, more, other)
        return y.square().sum()

    def plain(x, weight, bias, values, mask):
        return F.linear(x, dense(weight, values, mask), bias)

    before = given["weight"].clone()
    found = torch.autograd.grad(loss(sparse_linear), leaves)
    exact = torch.autograd.grad(loss(plain), leaves)
    for ours, theirs in zip(found, exact, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    assert bits_equal(given["weight"], before)


@pytest.mark.parametrize("reentrant", [False, True], ids=["no reentrant", "reentrant"])
def test_activation_checkpointing(reentrant):
    given, mask = inputs()
    leaves = [given[n] for n in ("x", "bias", "values")]

    def layer(x):
        return sparse_linear(x, given["weight"], given["bias"], given["values"], mask).tanh()

    plain = torch.autograd.grad(layer(given["x"]).sum(), leaves)
    checkpoint(layer, given["x"], use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(a, leaf.grad) for a, leaf in zip(plain, leaves, strict=True))


def test_selective_checkpointing():
    """What a policy keeps is the call's result, not the weight in the middle of it."""
    given, mask = inputs()
    leaves = [given[n] for n in ("x", "bias", "values")]

    def layer(x):
        y = sparse_linear(x, given["weight"], given["bias"], given["values"], mask).tanh()
        return sparse_linear(y[:, :K], given["weight"], None, given["values"], mask)

    plain = torch.autograd.grad(layer(given["x"]).sum(), leaves)
    for policy in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE):
        contexts = functools.partial(
            create_selective_checkpoint_contexts, lambda *a, policy=policy, **k: policy
        )
        y = checkpoint(layer, given["x"], use_reentrant=False, context_fn=contexts)
        found = torch.autograd.grad(y.sum(), leaves)
        assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(plain, found, strict=True))


def test_values_that_change_before_the_backward_are_noticed():
    given, mask = inputs()
    y = sparse_linear(**given, mask=mask)
    with torch.no_grad():
        given["values"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_needs_no_gradient_is_not_saved_nor_computed(monkeypatch):
    given, mask = inputs()
    x, bias, values = (given[n].detach() for n in ("x", "bias", "values"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        y = sparse_linear(x, given["weight"], bias, values.requires_grad_(), mask)
        assert saved == [x.shape]
        saved.clear()
        other = sparse_linear(
            x.clone().requires_grad_(), given["weight"], bias, values.detach(), mask
        )
        assert sorted(saved) == sorted([given["weight"].shape, values.shape])
    monkeypatch.setattr(products, "mm", None)  # no dx is computed
    y.sum().backward()
    assert values.grad is not None
    assert other.requires_grad
    with torch.no_grad():
        assert not sparse_linear(**given, mask=mask).requires_grad
    with torch.inference_mode():
        assert torch.equal(sparse_linear(**given, mask=mask), y)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_compiled_code_takes_the_call_as_an_op(autocast):
    given, mask = inputs(F32)
    before = given["weight"].clone()
    leaves = [given[n] for n in ("x", "bias", "values")]

    def function(x):
        y = sparse_linear(x * 2, given["weight"], given["bias"], given["values"], mask)
        return y.tanh()

    with torch.autocast("cpu", BF16, enabled=autocast):
        expected = function(given["x"])
        y = torch.compile(function, backend="aot_eager", fullgraph=True)(given["x"])
    assert torch.equal(y, expected)
    found = [torch.autograd.grad(t.float().sum(), leaves) for t in (y, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert bits_equal(given["weight"], before)


def test_the_op_is_registered_rightly():
    given, mask = inputs()
    fields = (mask.density, mask.seed, mask.tensor_id, mask.round, mask.scheme)
    options = (None, *fields, "auto", None)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.fastrank.sparse_linear, (*given.values(), *options), test_utils=tests
    )
