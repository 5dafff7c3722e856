"""Layers of one input computed together: found, right, and left alone where the pattern breaks."""

import copy

import pytest
import torch
from family_cases import pair
from family_cases import step as family_step
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastrank
from fastrank.layers import siblings


class Attention(nn.Module):
    """q, k and v of one input, or k and v of another one."""

    def __init__(self, width=24):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, n) for n in (width, width, width))
        self.o = nn.Linear(width, width)  # as many inputs as q, so that it is a sibling too
        self.spoil = False

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        q = self.q(x)
        if self.spoil:
            memory = memory.mul_(1.0) if memory is not x else memory.add_(0.0)
        k, v = self.k(memory), self.v(memory)
        return self.o(torch.tanh(k) * v) + q


def make(dropout=0.0, seed=0, **options):
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4, target_modules=["q", "k", "v", "o"], lora_dropout=dropout, init_lora_weights=False
    )
    return get_peft_model(Attention(), config, **options)


@pytest.fixture
def calls(monkeypatch):
    """How many layers each joint call computed."""
    seen = []
    whole = siblings.lowrank_linears

    def count(x, projections, **keywords):
        seen.append(len(projections))
        return whole(x, projections, **keywords)

    monkeypatch.setattr(siblings, "lowrank_linears", count)
    return seen


def step(model, *inputs, wrap=None):
    model.zero_grad()
    y = model(*inputs) if wrap is None else wrap(model, *inputs)
    y.square().sum().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, wanted):
    assert torch.allclose(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        assert torch.allclose(found[1][name], grad, rtol=1e-4, atol=1e-4), name


def test_found_in_the_first_forward_and_joined_from_the_second(calls):
    model = make()
    stock = copy.deepcopy(model)
    report = fastrank.patch(model)
    x = torch.randn(5, 7, 24)
    for joined in ([], [3], [3, 3]):
        assert_same(step(model, x), step(stock, x))
        assert calls == joined
        x = torch.randn(5, 7, 24)
    assert [row.fused_calls for row in report.rows()] == [3, 3, 3, 3]
    assert report.delegated_calls == {}


def test_two_inputs_join_what_shares_one(calls):
    model = make()
    stock = copy.deepcopy(model)
    fastrank.patch(model)
    for _ in range(3):
        x, memory = torch.randn(5, 24), torch.randn(5, 24)
        assert_same(step(model, x, memory), step(stock, x, memory))
    assert calls == [2, 2]


def test_a_broken_pattern_ends_it(calls):
    model = make()
    stock = copy.deepcopy(model)
    fastrank.patch(model)
    for _ in range(2):
        step(model, torch.randn(5, 24))
    assert calls == [3]
    for _ in range(3):
        x, memory = torch.randn(5, 24), torch.randn(5, 24)
        assert_same(step(model, x, memory), step(stock, x, memory))
    assert calls == [3, 3]
    assert_same(step(model, x), step(stock, x))
    assert calls == [3, 3]


def test_an_input_changed_in_between_is_read_anew(calls):
    model = make()
    stock = copy.deepcopy(model)
    fastrank.patch(model)
    x = torch.randn(5, 24)
    for _ in range(2):
        model(x)
    for m in (model, stock):
        m.base_model.model.spoil = True
    with torch.no_grad():
        assert torch.allclose(model(x.clone()), stock(x.clone()), atol=1e-5)
    assert len(calls) >= 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_way(reentrant, calls):
    model = make()
    stock = copy.deepcopy(model)
    fastrank.patch(model)

    def wrap(m, x):
        return checkpoint(m, x.requires_grad_(), use_reentrant=reentrant)

    for _ in range(3):
        x = torch.randn(5, 24)
        assert_same(step(model, x, wrap=wrap), step(stock, x, wrap=wrap))
    # the second and third forward, and their recomputations
    assert calls == [3, 3, 3, 3]


def test_grad_modes_are_kept_apart():
    model = make()
    fastrank.patch(model)
    x = torch.randn(5, 24)
    for _ in range(2):
        model(x)
    layers = model.base_model.model
    with torch.no_grad():
        layers.q(x)
    assert layers.k(x).requires_grad


def test_dropout_on_a_cpu_goes_alone(calls):
    model = make(dropout=0.5).train()
    fastrank.patch(model)
    for _ in range(3):
        step(model, torch.randn(5, 24))
    assert calls == []
    model.eval()
    for _ in range(2):  # in the first each layer approves its new mode
        step(model, torch.randn(5, 24))
    assert calls == [3]


def test_switching_adapters_and_disabling_them(calls):
    model = make()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q", "k"], init_lora_weights=False))
    stock = copy.deepcopy(model)
    fastrank.patch(model)
    for name in ("default", "default", "other", "default", "default"):
        for m in (model, stock):
            m.set_adapter(name)
        x = torch.randn(5, 24)
        assert_same(step(model, x), step(stock, x))
    with model.disable_adapter(), stock.disable_adapter():
        assert torch.allclose(model(x), stock(x), atol=1e-6)


def test_sharing_can_be_declined(calls):
    model = make()
    fastrank.patch(model, share_inputs=False)
    first = step(model, torch.randn(5, 24, generator=torch.Generator().manual_seed(1)))
    again = step(model, torch.randn(5, 24, generator=torch.Generator().manual_seed(1)))
    assert calls == []
    assert all(torch.equal(first[1][name], grad) for name, grad in again[1].items())


def test_unpatch_and_copies(calls):
    model = make()
    fastrank.patch(model)
    x = torch.randn(5, 24)
    for _ in range(2):
        model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), make()(x)) or torch.allclose(twin(x), model(x), atol=1e-5)
    before = len(calls)
    twin(x)
    assert len(calls) == before, "a copy knows no siblings until it is patched"
    fastrank.unpatch(model)
    model(x)
    assert len(calls) == before


@pytest.mark.parametrize(
    ("family", "expected"), [("bert", 3), ("llama", 3), ("qwen3", 3), ("t5", 3), ("vit", 3)]
)
def test_families_join_their_projections(family, expected, calls):
    stock, fast, _ = pair(family)
    for seed in range(2):
        found, wanted = family_step(fast, family, seed), family_step(stock, family, seed)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-11), name
    assert max(calls) == expected
