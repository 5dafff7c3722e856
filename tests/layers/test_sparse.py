"""sparsify: training at the mask alone, exact bits back, and what it refuses."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from sparse_cases import (
    BF16,
    F32,
    FP16,
    bits_equal,
    bits_of,
    rows,
    same_bits,
    train,
    twice,
)
from torch import Tensor, nn

import fastrank
from fastrank.errors import UsageError
from fastrank.kernels.packing import SparseMask
from fastrank.layers.sparse import SparseLayer, SparseLinear


def train_densely(model: nn.Module, masks: dict[str, SparseMask], steps: int = 6) -> list[float]:
    """The definition: dense deltas from the weights, gradients zeroed outside the mask, AdamW."""
    deltas, kept = {}, {}
    for name, mask in masks.items():
        module = model.get_submodule(name)
        deltas[name] = torch.zeros_like(module.weight).requires_grad_()
        kept[name] = torch.zeros(mask.numel, dtype=torch.bool)
        kept[name][mask.positions()] = True
        kept[name] = kept[name].view(mask.shape)
    optimizer = torch.optim.AdamW(deltas.values(), lr=1e-2, weight_decay=0.1)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        weights = {f"{n}.weight": model.get_submodule(n).weight + d for n, d in deltas.items()}
        loss = torch.func.functional_call(model, weights, (rows(seed=step),)).square().mean()
        loss.backward()
        for name, delta in deltas.items():
            delta.grad.mul_(kept[name])
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("scheme", ["stratified", "bernoulli"])
@pytest.mark.parametrize("folded", [False, True], ids=["overlaid", "folded"])
def test_training_curve_is_that_of_masked_dense_gradients(folded, scheme):
    model, plain = twice(), twice()
    fastrank.sparsify(model, 0.1, seed=3, scheme=scheme)
    masks = {n: m.mask for n, m in model.named_modules() if isinstance(m, SparseLayer)}
    assert set(masks) == {"first", "middle"}
    if folded:
        for name in masks:
            model.get_submodule(name).fold()
    losses = train(model)
    assert losses == pytest.approx(train_densely(plain, masks), rel=1e-11)
    assert losses[-1] != losses[0]


@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_a_folded_layer_notices_every_kind_of_step(how):
    model, other = twice(F32), twice(F32)
    for m in (model, other):
        fastrank.sparsify(m, 0.1)
    model.first.fold()
    model.middle.fold()
    assert train(model, **{how: True}) == train(other, **{how: True})
    with torch.no_grad():
        assert torch.equal(model(rows(F32)), other(rows(F32)))
    before = [layer.weight._version for layer in (model.first, model.middle)]
    model(rows(F32))
    assert [layer.weight._version for layer in (model.first, model.middle)] == before


@pytest.mark.parametrize("dtype", [F32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("folded", [False, True], ids=["overlaid", "folded"])
def test_no_entry_outside_the_mask_changes_a_bit(folded, dtype):
    """AdamW with weight decay. Inside, an entry changes where its value doesn't round away."""
    model = twice(dtype)
    before = bits_of(model)
    fastrank.sparsify(model, 0.05, seed=3)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SparseLayer)}
    if folded:
        for layer in layers.values():
            layer.fold()
    train(model)
    masks = {n: m.mask for n, m in layers.items()}
    values = {n: m.values.detach().clone() for n, m in layers.items()}
    assert same_bits(model, before)
    assert fastrank.unsparsify(model, fold=True) == 2
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, old in before.items():
        layer = name.removesuffix(".weight")
        if layer not in masks:
            assert bits_equal(after[name], old)
            continue
        kept = torch.zeros(old.numel(), dtype=torch.bool)
        kept[masks[layer].positions()] = True
        new, old = after[name].view(-1), old.view(-1)
        assert bits_equal(new[~kept], old[~kept])
        wanted = (old[kept] + values[layer]).to(dtype)
        assert bits_equal(new[kept], wanted)
        assert (values[layer] != 0).all()
        changed = new[kept] != old[kept]
        assert torch.equal(changed, wanted != old[kept])
        assert changed.float().mean() > 0.95


def test_sparsify_starts_as_the_base_and_unsparsify_leaves_no_trace():
    model = twice()
    model.first.bias.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before, y = bits_of(model), model(rows())
    hook = model.first.register_forward_hook(lambda *_: None)
    first = model.first
    report = fastrank.sparsify(model, 0.1)
    assert torch.equal(model(rows()), y)
    assert model.first is first
    assert type(first) is SparseLinear
    assert first._forward_hooks
    assert type(model.classifier) is nn.Linear
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {"first.values", "middle.values"}
    assert [p.shape[0] for p in trained.values()] == [96, 160]
    assert report.sparse == ["first", "middle"]
    assert report.skipped == {"classifier": "task head; name it in targets to sparsify it"}
    assert report.values == 256
    assert report.parameters == sum(t.numel() for t in before.values())
    train(model)
    assert not torch.equal(model(rows()), y)
    assert fastrank.unsparsify(model) == 2
    hook.remove()
    assert same_bits(model, before)
    assert torch.equal(model(rows()), y)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert [type(m) for m in model.children()] == [nn.Linear] * 3
    assert vars(model.middle).keys() == vars(twice().middle).keys()
    assert vars(model).keys() == vars(twice()).keys()
    assert fastrank.unsparsify(model) == 0


def test_masks_follow_from_the_fields():
    def masks(**fields) -> list[SparseMask]:
        model = twice()
        fastrank.sparsify(model, 0.1, **fields)
        return [m.mask for m in model.modules() if isinstance(m, SparseLayer)]

    first, middle = masks(seed=4, round=2)
    assert first == SparseMask((40, 24), 0.1, 4, "first.weight", 2)
    assert middle.tensor_id == "middle.weight"
    assert masks(seed=5)[0] != first
    assert masks(seed=4, round=2) == [first, middle]
    assert masks(scheme="bernoulli")[0].scheme == "bernoulli"
    lone = nn.Linear(24, 40)
    fastrank.sparsify(lone, 0.1)
    assert type(lone) is SparseLinear
    assert lone.mask.tensor_id == "weight"


def test_targets():
    def sparse(targets) -> list[str]:
        model = nn.ModuleDict({"a": twice(), "b": twice()})
        return fastrank.sparsify(model, 0.1, targets=targets).sparse

    assert sparse(["classifier"]) == ["a.classifier", "b.classifier"]
    assert sparse(["a.first", "middle"]) == ["a.first", "a.middle", "b.middle"]
    assert sparse(r"b\..*") == ["b.first", "b.middle", "b.classifier"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.hidden = nn.Linear(8, 8)
        self.out = nn.Linear(8, 10, bias=False)
        self.out.weight = self.embedding.weight


def replaced() -> nn.Module:
    model = twice()
    model.first.forward = model.first.forward
    return model


SKIPPED = {
    "tied": (Tied, "out", "its weight is another module's too"),
    "fast path": (
        lambda: nn.ModuleList([nn.Linear(4, 4), nn.TransformerEncoderLayer(8, 2, 16)]),
        "1.linear1",
        "torch.nn.TransformerEncoderLayer reads its weight without calling it",
    ),
    "subclass": (
        lambda: nn.ModuleList([nn.Linear(4, 4), nn.MultiheadAttention(8, 2)]),
        "1.out_proj",
        "NonDynamicallyQuantizableLinear is a subclass of Linear",
    ),
    "replaced": (replaced, "first", "its forward was replaced on the instance"),
    "parametrized": (
        lambda: nn.ModuleList(
            [nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))]
        ),
        "1",
        "ParametrizedLinear is a subclass of Linear",
    ),
}


@pytest.mark.parametrize(("make", "name", "reason"), SKIPPED.values(), ids=SKIPPED)
def test_layers_that_cannot_be_sparse_are_told(make, name, reason):
    model = make()
    report = fastrank.sparsify(model, 0.1)
    assert report.skipped[name] == reason
    assert not isinstance(model.get_submodule(name), SparseLayer)
    assert report.sparse
    text = str(report)
    assert reason.split()[-1] in text
    assert f"of {len(report.rows)} linear layers train {report.values}" in text
    with pytest.raises(UsageError, match=f"{name} can't be sparsified: {reason}"):
        fastrank.sparsify(make(), 0.1, targets=[name])


def once() -> nn.Module:
    model = twice()
    fastrank.sparsify(model)
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fastrank.sparsify([1]), "sparsify got list; pass a torch.nn.Module"),
        (lambda: fastrank.sparsify(nn.Conv2d(1, 1, 1)), "no torch.nn.Linear .* found 1 Conv2d"),
        (lambda: fastrank.sparsify(nn.ReLU()), "found no parameters"),
        (lambda: fastrank.sparsify(once()), "sparsified already; call fastrank.unsparsify"),
        (lambda: fastrank.sparsify(twice(), 0.0), "density is 0"),
        (lambda: fastrank.sparsify(twice(), 0.7), "density is 0.7; .*bernoulli"),
        (lambda: fastrank.sparsify(twice(), seed=-1), "seed is -1"),
        (lambda: fastrank.sparsify(twice(), scheme="even"), "unknown scheme 'even'"),
        (lambda: fastrank.sparsify(twice(), backend="cuda"), "backend is 'cuda'; choose one of"),
        (lambda: fastrank.sparsify(twice(), targets=["q"]), r"\['q'\] match none of the 3"),
        (lambda: fastrank.sparsify(twice(), targets=["first", "q"]), "target 'q' matches no"),
        (
            lambda: fastrank.sparsify(nn.Linear(3, 3).to(torch.float8_e4m3fn)),
            "1: its weight is a 2-d Parameter of float8",
        ),
        (lambda: SparseLinear(0, 3), "in_features=0"),
        (lambda: SparseLinear(3, 3, density=2.0), "density is 2.0"),
        (lambda: SparseLinear.from_linear(nn.ReLU()), "got ReLU; pass a torch.nn.Linear"),
    ],
)
def test_errors_say_what_came_and_what_was_wanted(call, message):
    with pytest.raises(UsageError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_refused_call_changes_nothing():
    model = twice()
    for bad in ({"density": 0.0}, {"targets": ["first", "nowhere"]}, {"round": -1}):
        with pytest.raises(UsageError):
            fastrank.sparsify(model, **bad)
    assert all(p.requires_grad for p in model.parameters())
    assert vars(model).keys() == vars(twice()).keys()


def test_gradients_and_optimizer_state_are_a_hundredth():
    """At 1 % density at most 2 % of full fine-tuning's, tensors counted."""

    def held(model: nn.Module) -> int:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        model(torch.randn(4, 64)).sum().backward()
        optimizer.step()
        tensors = [p.grad for p in model.parameters() if p.grad is not None]
        for state in optimizer.state.values():
            tensors += [t for t in state.values() if isinstance(t, Tensor)]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    def tiny() -> nn.Module:
        return nn.Sequential(
            nn.Linear(64, 256), nn.LayerNorm(256), nn.Linear(256, 256), nn.Linear(256, 8)
        )

    model = tiny()
    full = held(copy.deepcopy(model))
    fastrank.sparsify(model, 0.01)
    assert 0 < held(model) <= 0.02 * full


def test_sparsify_imports_neither_peft_nor_transformers():
    code = (
        "import sys, torch, fastrank; m = torch.nn.Linear(8, 8); fastrank.sparsify(m); "
        "m(torch.ones(1, 8)); assert callable(fastrank.sparsify); "
        "print([n for n in ('peft', 'transformers', 'triton') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "[]\n"


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=50, intermediate_size=64, **sizes)
    return BertForSequenceClassification(config).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2)).eval()


@pytest.mark.parametrize(("make", "count"), [(bert, 13), (gpt2, 8)], ids=["bert", "gpt2"])
def test_transformers_models(make, count):
    """Also Conv1D, whose weight is transposed; language-model heads and classifiers are left."""
    model, plain = make(), make()
    before, tokens = bits_of(model), torch.arange(24).view(2, 12)
    labels = torch.tensor([0, 1]) if make is bert else tokens
    y = model(tokens).logits.detach()
    report = fastrank.sparsify(model, 0.05, seed=1)
    assert len(report.sparse) == count
    assert set(report.skipped) == {"classifier" if make is bert else "lm_head"}
    assert torch.allclose(model(tokens).logits, y, atol=1e-6)
    loss = model(tokens, labels=labels).loss
    loss.backward()
    plain(tokens, labels=labels).loss.backward()
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLayer):
            dense = plain.get_submodule(name).weight.grad
            dense = dense if layer.mask.shape == dense.shape and make is bert else dense.t()
            exact = dense.reshape(-1)[layer.mask.positions()]
            assert layer.mask.tensor_id == f"{name}.weight"
            assert (layer.values.grad - exact).norm() <= 1e-5 * exact.norm() + 1e-9
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    optimizer.step()
    assert same_bits(model, before)
    moved = model(tokens).logits.detach()
    assert model(tokens, labels=labels).loss < loss
    assert "values=" in repr(model)
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(tokens).logits, moved)
    fastrank.unsparsify(model, fold=True)
    assert torch.allclose(model(tokens).logits, moved, atol=1e-6)
    assert not torch.allclose(moved, y, atol=1e-6)
    fastrank.unsparsify(copied)
    assert same_bits(copied, before)
    assert all(p.requires_grad for p in copied.parameters())
