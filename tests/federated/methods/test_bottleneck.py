"""Houlsby and Pfeiffer adapters: identity at first, bytes, side by side, to disk and back."""

import json

import pytest
import torch
from side_by_side import F64, Exchange, compare, make_model
from staged_runs import (
    assert_equal,
    assert_resumes_everywhere,
    loaded_accuracy,
    prepared,
    run,
    values,
)

from fastrank.errors import UsageError
from fastrank.federated import Simulation, bottleneck
from fastrank.federated.local import LocalOptions
from fastrank.federated.methods.base import LocalPlan
from fastrank.federated.model import ResidentModel

HIDDEN, LABELS, BLOCKS = 32, 3, 2
H = HIDDEN * LABELS + LABELS


def tiny(kind):
    import transformers as t

    torch.manual_seed(0)
    shared = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_labels": 3}
    shared |= {"num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 40}
    config, cls = {
        "bert": (t.BertConfig, t.BertForSequenceClassification),
        "modernbert": (t.ModernBertConfig, t.ModernBertForSequenceClassification),
        "distilbert": (t.DistilBertConfig, t.DistilBertForSequenceClassification),
        "albert": (t.AlbertConfig, t.AlbertForSequenceClassification),
        "llama": (t.LlamaConfig, t.LlamaForCausalLM),
    }[kind]
    extra = {"embedding_size": 16} if kind == "albert" else {}
    if kind == "distilbert":
        extra = {"hidden_dim": 48}
    return cls(config(**shared, pad_token_id=0, **extra)).eval()


@torch.no_grad()
def outputs(model):
    ids = torch.randint(2, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert", "albert", "llama"])
def test_the_model_is_what_it_was_until_the_adapters_train(kind):
    model = tiny(kind)
    before, names = outputs(model), [n for n, _ in model.named_parameters()]
    blocks = 1 if kind == "albert" else 2  # one block's weights are used again and again
    added = bottleneck.attach(model, 4)
    assert len(added) == blocks * 2 * 4
    assert set(added) == {n for n, _ in model.named_parameters()} - set(names)
    assert torch.equal(outputs(model), before)
    known = dict(model.named_parameters())
    assert sum(known[n].numel() for n in added) == blocks * 2 * (2 * 32 * 4 + 4 + 32)
    drawn = [known[n] for n in added if n.endswith("adapter_down.weight")]
    assert len({float(value[0, 0]) for value in drawn}) == len(drawn)
    last = next(n for n in reversed(added) if n.endswith("adapter_up.bias"))
    with torch.no_grad():
        known[last].normal_()
    assert (outputs(model) - before).abs().max() > 1e-4


def test_an_adapter_is_its_formula():
    model = tiny("bert")
    plain = tiny("bert").bert.encoder.layer[0].output.dense
    bottleneck.attach(model, 4, activation="relu")
    layer = model.bert.encoder.layer[0].output.dense
    with torch.no_grad():
        for parameter in (*layer.adapter_down.parameters(), *layer.adapter_up.parameters()):
            parameter.normal_()
        x = torch.randn(5, 48)
        y = plain(x)
        inner = (y @ layer.adapter_down.weight.T + layer.adapter_down.bias).clamp_min(0)
        wanted = y + inner @ layer.adapter_up.weight.T + layer.adapter_up.bias
        torch.testing.assert_close(layer(x), wanted)


def test_models_without_known_blocks_are_refused():
    import transformers as t

    small = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 40}
    model = t.GPT2LMHeadModel(t.GPT2Config(**small))
    with pytest.raises(UsageError, match="GPT2LMHeadModel has no block with a pair of linear"):
        bottleneck.attach(model, 4)
    model = tiny("bert")
    bottleneck.attach(model, 4)
    with pytest.raises(UsageError, match=r"0\.attention\.output\.dense is a BottleneckLinear"):
        bottleneck.attach(model, 4)


def resident(kind):
    model = tiny(kind).to(F64)
    task, head = ("causal-lm", ()) if kind == "llama" else ("seq-cls", ("classifier",))
    if kind == "modernbert":
        head = ("head", "classifier")
    tokenizer = make_model().tokenizer
    return ResidentModel(model, tokenizer, task, head, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["bert", "modernbert", "llama"])
def test_side_by_side_equals_one_by_one(kind):
    model = resident(kind)
    names = bottleneck.attach(model.model, 4)
    torch.manual_seed(2)
    model.load({n: 0.2 * torch.randn_like(v) for n, v in model.read(names).items()})
    trained = (*names, *model.head_names())
    start = model.read(trained)
    plan = LocalPlan(trained, dict.fromkeys(trained, 1e-2))
    exchange = Exchange(lambda client: start, lambda client: plan)
    compare(model, exchange, LocalOptions(batch_size=3, epochs=2), 1e-6)


# -- whole runs -----------------------------------------------------------------------------------


@pytest.fixture
def small(options):
    return options | {"method": "houlsby", "bottleneck_size": 4, "local_steps": 2, "num_rounds": 2}


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("method", ["houlsby", "pfeiffer"])
def test_payload_bytes_equal_the_formula(small, method, dtype, width):
    """e 2(2 d q + q + d) a block, half of it for Pfeiffer, and the head."""
    result = run(small | {"method": method, "wire_dtype": dtype})
    each = (2 if method == "houlsby" else 1) * (2 * HIDDEN * 4 + 4 + HIDDEN)
    wanted = 3 * width * (BLOCKS * each + H)
    assert [row["payload_up"] for row in result.rows] == [wanted, wanted]
    assert [row["payload_down"] for row in result.rows] == [0, wanted]
    assert result.rows[0]["head_up"] == 3 * width * H


def test_norms_train_when_asked_to(small):
    result = run(small | {"train_norms": True})
    each = 2 * (2 * HIDDEN * 4 + 4 + HIDDEN) + 2 * 2 * HIDDEN
    assert result.rows[0]["payload_up"] == 3 * 4 * (BLOCKS * each + H)


def test_only_adapters_and_head_change(small):
    simulation, state = prepared(small)
    frozen = [n for n, _ in simulation.model.model.named_parameters() if n not in state.tensors]
    before = simulation.model.read(frozen)
    result = run(small)
    after = values(result)
    assert_equal(before, after, frozen)
    ups = [n for n in state.tensors if ".adapter_up." in n]
    assert len(ups) == 8
    assert all(after[n].any() for n in ups)


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer"])
def test_saved_model_loads_with_and_without_adapters(small, method):
    from transformers import AutoModelForSequenceClassification

    options = small | {"method": method, "local_steps": 8, "learning_rate": 1e-2}
    simulation = Simulation(**options)
    result = simulation.run()
    folder = result.output_dir / "model"
    model = bottleneck.load(folder)
    assert_equal(values(result), dict(model.named_parameters()))
    accuracy = loaded_accuracy(model, simulation.data, folder)
    assert accuracy == pytest.approx(result.summary["accuracy"], abs=1e-9)
    assert result.rows[1]["train_loss"] < result.rows[0]["train_loss"]
    settings = json.loads((folder / "config.json").read_text())["fastrank_bottleneck"]
    assert settings["width"] == 4
    bare = AutoModelForSequenceClassification.from_pretrained(folder)
    assert (outputs(bare.eval()) - outputs(model)).abs().max() > 1e-3
    without = loaded_accuracy(bare, simulation.data, folder)
    assert without == pytest.approx(result.summary["accuracy_without_adapters"], abs=1e-9)


def test_load_says_what_is_missing(tiny_bert, tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json"):
        bottleneck.load(tmp_path)
    with pytest.raises(UsageError, match="holds no bottleneck adapters"):
        bottleneck.load(tiny_bert)


def test_resumes_at_any_round(small, tmp_path):
    assert_resumes_everywhere(small, tmp_path)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"bottleneck_size": 0}, "bottleneck_size must be at least 1, got 0"),
        ({"activation": "tanh"}, "activation must be one of gelu, relu"),
    ],
)
def test_bad_options_are_refused(small, wrong, words):
    with pytest.raises(UsageError, match=words):
        Simulation(**{**small, **wrong})
