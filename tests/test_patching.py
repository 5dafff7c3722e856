"""Whole models: patched equals stock PEFT in outputs and gradients, and unpatch leaves no trace.

The call counters, not the outputs, say that the modules expected to run fused did.
"""

import copy
import gc
import io
import pickle

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import fastrank
from fastrank.errors import UsageError
from fastrank.layers import FastLoraLinear

LAYERS = 2
# float64 against float64 through a whole model
CLOSE = 1e-9


def bert():
    config = BertConfig(
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=32,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def gpt2():
    config = GPT2Config(
        vocab_size=60,
        n_embd=24,
        n_layer=LAYERS,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def llama():
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


# family -> (base model, adapter options, names of the modules that must run fused)
_BERT_PARTS = ("attention.self.query", "attention.self.value", "attention.output.dense",
               "intermediate.dense", "output.dense")  # fmt: skip
_LLAMA_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
FAMILIES = {
    "bert": (
        bert,
        {"task_type": "SEQ_CLS", "target_modules": ["query", "value", "dense"]},
        [f"bert.encoder.layer.{i}.{part}" for i in range(LAYERS) for part in _BERT_PARTS]
        + ["bert.pooler.dense"],
    ),
    "gpt2": (
        gpt2,
        {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_proj", "c_fc"],
         "fan_in_fan_out": True, "use_rslora": True},
        [f"transformer.h.{i}.{part}" for i in range(LAYERS)
         for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")],
    ),
    "llama": (
        llama,
        {"task_type": "CAUSAL_LM", "target_modules": "all-linear"},
        [f"model.layers.{i}.{part}" for i in range(LAYERS) for part in _LLAMA_PARTS],
    ),
}  # fmt: skip


def fill_b(model):
    """PEFT starts B at zero, where half of the gradients vanish and nothing is tested."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    return model


def adapted(family, **options):
    make, config, _ = FAMILIES[family]
    torch.manual_seed(0)
    base = make().double()
    return fill_b(
        get_peft_model(base, LoraConfig(**({"r": 3, "lora_alpha": 5} | config | options)))
    )


def pair(family, **options):
    stock = adapted(family, **options)
    fast = copy.deepcopy(stock)
    return stock, fast, fastrank.patch(fast)


def fused_names(family):
    return [f"base_model.model.{name}" for name in FAMILIES[family][2]]


def batch(family):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(60, (3, 9), generator=generator)
    labels = ids if family != "bert" else torch.tensor([0, 2, 1])
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits(model, family, **kwargs):
    with torch.no_grad():
        return model(**batch(family), **kwargs).logits


def train_step(model, family):
    """Loss, logits and every gradient by name of one training step without the update."""
    model.zero_grad()
    out = model(**batch(family))
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **grads}


def assert_equal_steps(ours, theirs, tolerance=CLOSE):
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        assert (ours[name] - want).norm() <= tolerance * (want.norm() + 1e-6), name


# --- same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_equal_peft(family):
    stock, fast, report = pair(family)
    ours = train_step(fast, family)
    assert_equal_steps(ours, train_step(stock, family))
    adapters = [name for name in ours if "lora_" in name]
    assert len(adapters) == 2 * len(fused_names(family))
    assert all(ours[name].norm() > 0 for name in adapters)
    assert report.fused == fused_names(family)
    assert report.delegated == {}
    assert [row.fused_calls for row in report.rows()] == [1] * len(adapters[::2])
    assert report.delegated_calls == {}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_equal_peft(bias):
    stock, fast, report = pair("bert", bias=bias)
    ours = train_step(fast, "bert")
    assert any(name.endswith("base_layer.bias") for name in ours)
    assert_equal_steps(ours, train_step(stock, "bert"))
    assert report.delegated_calls == {}


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_replays_the_same_step(use_reentrant, dropout):
    _, fast, report = pair("llama", lora_dropout=dropout)
    fast.train()
    torch.manual_seed(5)
    want = train_step(fast, "llama")
    fast.enable_input_require_grads()
    fast.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    torch.manual_seed(5)
    assert_equal_steps(train_step(fast, "llama"), want)
    # twice in the checkpointed step: once forward, once recomputed
    assert report.fused_calls == 3 * len(fused_names("llama"))
    assert report.delegated_calls == {}


def test_autocast_and_16_bit_models_run_fused():
    stock, fast, report = pair("llama")
    stock.float(), fast.float()
    exact = logits(copy.deepcopy(stock).double(), "llama")
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = logits(fast, "llama"), logits(stock, "llama")
    assert ours.dtype == theirs.dtype
    # PEFT's distance from float64, and half as much again for rounding at other places
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()
    fast.bfloat16()
    for name, parameter in fast.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    assert logits(fast, "llama").dtype == torch.bfloat16
    assert report.fused_calls == 2 * len(fused_names("llama"))
    assert report.delegated_calls == {}


# --- same life -------------------------------------------------------------------------------


def test_checkpoints_load_both_ways(tmp_path):
    stock, fast, _ = pair("bert", modules_to_save=["classifier"])
    assert fast.state_dict().keys() == stock.state_dict().keys()
    with torch.no_grad():
        for parameter in fast.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    want = logits(fast, "bert")
    fast.save_pretrained(tmp_path / "patched")
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(bert().double(), tmp_path / "patched")
    assert torch.allclose(logits(loaded, "bert"), want, rtol=CLOSE)

    stock.save_pretrained(tmp_path / "stock")
    fast.load_adapter(tmp_path / "stock", "loaded")
    fast.set_adapter("loaded")
    assert torch.allclose(logits(fast, "bert"), logits(stock, "bert"), rtol=CLOSE)
    torch.manual_seed(0)
    later = PeftModel.from_pretrained(bert().double(), tmp_path / "stock")
    report = fastrank.patch(later)
    assert torch.allclose(logits(later, "bert"), logits(stock, "bert"), rtol=CLOSE)
    assert report.fused == fused_names("bert")

    buffer = io.BytesIO()
    torch.save(fast.state_dict(), buffer)
    buffer.seek(0)
    again = copy.deepcopy(fast)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(logits(again, "bert"), logits(fast, "bert"))


def test_merging_disabling_and_unloading():
    stock, fast, report = pair("gpt2")
    count = len(fused_names("gpt2"))
    want = logits(stock, "gpt2")
    for model in (stock, fast):
        model.merge_adapter()
    assert torch.equal(logits(fast, "gpt2"), logits(stock, "gpt2"))
    assert set(report.delegated.values()) == {"adapters merged"}
    for model in (stock, fast):
        model.unmerge_adapter()
    assert torch.allclose(logits(fast, "gpt2"), want, rtol=CLOSE)
    with fast.disable_adapter(), stock.disable_adapter():
        assert torch.equal(logits(fast, "gpt2"), logits(stock, "gpt2"))
    assert report.delegated_calls == {"adapters merged": count, "adapters disabled": count}
    assert report.fused_calls == count
    assert fast.get_nb_trainable_parameters() == stock.get_nb_trainable_parameters()
    merged = fast.merge_and_unload()
    assert torch.allclose(logits(merged, "gpt2"), want, rtol=CLOSE)
    assert not any(isinstance(m, PeftLinear) for m in merged.modules())
    gc.collect()
    assert report.fused == []


def test_adapters_added_and_switched_at_run_time():
    stock, fast, report = pair("llama")
    second = LoraConfig(r=5, lora_alpha=3, lora_dropout=0.5, target_modules=["q_proj", "down_proj"])
    for model in (stock, fast):
        torch.manual_seed(2)
        model.add_adapter("second", second)
        fill_b(model)
        model.set_adapter("second")
        model.eval()
    assert torch.allclose(logits(fast, "llama"), logits(stock, "llama"), rtol=CLOSE)
    with_second = [n for n in fused_names("llama") if n.endswith(("q_proj", "down_proj"))]
    assert report.fused == with_second
    for model in (stock, fast):
        model.base_model.set_adapter(["default", "second"])
    assert torch.allclose(logits(fast, "llama"), logits(stock, "llama"), rtol=CLOSE)
    # where only one of the two exists it still runs fused
    assert report.fused == [n for n in fused_names("llama") if n not in with_second]
    assert report.delegated_calls == {
        "no active adapter in this layer": len(fused_names("llama")) - len(with_second),
        "several active adapters": len(with_second),
    }
    for model in (stock, fast):
        model.delete_adapter("second")
        model.set_adapter("default")
    assert_equal_steps(train_step(fast, "llama"), train_step(stock, "llama"))
    assert report.fused == fused_names("llama")


def test_mixed_adapter_batches_delegate():
    stock, fast, report = pair("bert")
    names = ["default", "__base__", "default"]
    fast.eval(), stock.eval()
    ours = logits(fast, "bert", adapter_names=names)
    assert torch.equal(ours, logits(stock, "bert", adapter_names=names))
    assert report.delegated_calls == {"extra arguments: adapter_names": len(fused_names("bert"))}


def test_generation_runs_fused():
    stock, fast, report = pair("llama")
    ids = batch("llama")["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fast.generate(ids, **options), stock.generate(ids, **options))
    assert report.fused_calls == 4 * len(fused_names("llama"))


# --- patch, unpatch, report ------------------------------------------------------------------


def test_unpatch_restores_exactly_what_was():
    stock, fast, report = pair("bert")
    classes = [type(module) for module in stock.modules()]
    attributes = [set(vars(module)) for module in stock.modules()]
    parameters = {name: id(p) for name, p in fast.named_parameters()}
    assert [type(module) for module in fast.modules()] != classes
    assert all(isinstance(m, PeftLinear) for m in fast.modules() if type(m) is FastLoraLinear)
    assert fastrank.unpatch(fast) == len(fused_names("bert"))
    assert [type(module) for module in fast.modules()] == classes
    assert [set(vars(module)) for module in fast.modules()] == attributes
    assert {name: id(p) for name, p in fast.named_parameters()} == parameters
    assert torch.equal(logits(fast, "bert"), logits(stock, "bert"))
    assert fastrank.unpatch(fast) == 0
    assert fastrank.unpatch(nn.Linear(2, 2)) == 0
    assert set(report.delegated.values()) == {"not patched: call patch again"}
    assert report.fused_calls == 0


def test_patching_twice_is_patching_once():
    _, fast, report = pair("gpt2")
    logits(fast, "gpt2")
    again = fastrank.patch(fast)
    logits(fast, "gpt2")
    assert report.fused_calls == again.fused_calls == 2 * len(fused_names("gpt2"))
    assert report.rows() == again.rows()
    assert fastrank.unpatch(fast) == len(fused_names("gpt2"))


def test_layers_added_after_patch_are_named_until_patched():
    _, fast, report = pair("llama", target_modules=["q_proj"])
    fast.add_adapter("wide", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    fast.set_adapter("wide")
    assert set(report.delegated.values()) == {"not patched: call patch again"}
    assert len(report.fused) == len(report.delegated) == LAYERS
    fastrank.patch(fast)
    assert len(report.fused) == 2 * LAYERS


def test_every_kind_of_adapted_module_is_listed():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.conv = nn.Conv1d(8, 8, 1)
            self.fc = nn.Linear(8, 8)

        def forward(self, ids):
            return self.fc(self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2))

    def make(targets):
        torch.manual_seed(0)
        return fill_b(get_peft_model(Mixed(), LoraConfig(r=2, target_modules=targets)))

    stock, fast = make(["embed", "conv", "fc"]), make(["embed", "conv", "fc"])
    report = fastrank.patch(fast)
    ids = torch.arange(6).view(2, 3)
    assert torch.allclose(fast(ids), stock(ids), atol=1e-6)
    found = {row.name.rsplit(".", 1)[1]: (row.layer, row.reason) for row in report.rows()}
    assert found == {
        "embed": ("lora.Embedding", "only linear layers of LoRA and AdaLoRA are fused"),
        "conv": ("lora.Conv1d", "only linear layers of LoRA and AdaLoRA are fused"),
        "fc": ("lora.Linear", None),
    }
    # nothing but delegated modules is reported, not refused
    only_embedding = fastrank.patch(make(["embed"]))
    assert list(only_embedding.delegated) == ["base_model.model.embed"]
    assert only_embedding.fused == []


def test_models_without_peft_model_around_them():
    torch.manual_seed(0)
    model = inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    )
    report = fastrank.patch(model)
    model(torch.ones(1, 4))
    assert report.fused == ["0"]
    assert report.fused_calls == 1


def test_report_as_text_and_after_the_model_is_gone():
    _, fast, report = pair("bert")
    logits(fast, "bert")
    with fast.disable_adapter():
        logits(fast, "bert")
    text = str(report)
    assert f"{len(fused_names('bert'))} of {len(fused_names('bert'))} adapted modules" in text
    assert "modules of base_model.model.bert" in text
    for name in fused_names("bert"):
        assert f" {name.removeprefix('base_model.model.bert.')} " in text
    assert "24->40 r3" in text
    assert "1 adapters disabled" in text
    assert repr(report).startswith("<PatchReport: 11 of 11 adapted modules fused; calls so far: 11")
    del fast
    gc.collect()
    assert set(report.delegated.values()) == {"no longer exists"}
    assert report.fused_calls == len(fused_names("bert"))
    assert "24->40 r3" in str(report)


def test_report_prints_to_the_terminal(capsys):
    _, _fast, report = pair("gpt2")
    report.print()
    assert "8 of 8 adapted modules fused" in capsys.readouterr().out


def test_copies_and_pickles_of_a_patched_model_are_their_own():
    _, fast, report = pair("gpt2")
    want = logits(fast, "gpt2")
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        twin_report = fastrank.patch(twin)
        assert torch.equal(logits(twin, "gpt2"), want)
        assert twin_report.fused_calls == 2 * len(fused_names("gpt2"))
        assert fastrank.unpatch(twin) == len(fused_names("gpt2"))
    assert report.fused_calls == len(fused_names("gpt2"))
    assert report.fused == fused_names("gpt2")


def test_forward_replaced_on_the_layer_is_reported():
    _, fast, report = pair("bert")
    layer = fast.get_submodule(fused_names("bert")[0])
    kept = layer.forward
    layer.forward = lambda x: kept(x)
    assert report.delegated == {fused_names("bert")[0]: "its forward was replaced on the instance"}
    want = logits(fast, "bert")
    fastrank.unpatch(fast)
    # the wrapper still holds our bound method; it must have become PEFT's
    assert torch.allclose(logits(fast, "bert"), want, rtol=CLOSE)


def test_class_changed_after_patch_is_not_unpatched_halfway():
    _, fast, _ = pair("bert")
    layer = fast.get_submodule(fused_names("bert")[-1])
    layer.__class__ = type("Wrapped", (FastLoraLinear,), {})
    with pytest.raises(UsageError, match=r"pooler\.dense became a Wrapped after patch"):
        fastrank.unpatch(fast)
    assert sum(isinstance(m, FastLoraLinear) for m in fast.modules()) == len(fused_names("bert"))


def test_backend_and_precision_reach_the_kernel():
    _, fast, _ = pair("bert")
    fastrank.patch(fast, backend="triton")
    with pytest.raises(ValueError, match="triton"):
        logits(fast, "bert")
    fastrank.patch(fast, backend="reference", precision="compute")
    ours = logits(fast, "bert")
    fastrank.unpatch(fast)
    assert torch.allclose(ours, logits(fast, "bert"), rtol=CLOSE)


def test_models_without_lora_are_refused_by_what_they_hold():
    def message(model, **options):
        with pytest.raises(UsageError) as error:
            fastrank.patch(model, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    plain = message(bert())
    assert "peft.tuners.lora.Linear" in plain
    assert "14 torch Linear" in plain
    assert "get_peft_model" in plain
    config = IA3Config(target_modules=["query"], feedforward_modules=[])
    assert f"found {LAYERS} ia3.Linear" in message(get_peft_model(bert(), config))
    assert "no parameters" in message(nn.ReLU())
    assert "pass a PEFT model" in message("bert")
    assert "backend is 'cuda'; choose one of auto, triton" in message(bert(), backend="cuda")
    assert "precision is 'fast'; choose one of peft" in message(bert(), precision="fast")
