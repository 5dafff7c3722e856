"""patch, unpatch and the live report: what is listed, what is refused, what is left behind."""

import gc

import pytest
import torch
from family_cases import LAYERS, batch, bert, fill_b, fused_calls, pair
from peft import IA3Config, LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

import fastrank
from fastrank.errors import UsageError
from fastrank.layers import FastLoraLinear

# float64 against float64 through a whole model
CLOSE = 1e-9


def logits(model, family, **kwargs):
    with torch.no_grad():
        return model(**batch(family), **kwargs).logits


def fused_names(family):
    return list(fused_calls(family))


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
        "embed": ("lora.Embedding", "lora.Embedding has no fused layer"),
        "conv": ("lora.Conv1d", "lora.Conv1d has no fused layer"),
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
    assert repr(report).startswith("<PatchReport: 13 of 13 adapted modules fused; calls so far: 13")
    del fast
    gc.collect()
    assert set(report.delegated.values()) == {"no longer exists"}
    assert report.fused_calls == len(fused_names("bert"))
    assert "24->40 r3" in str(report)


def test_report_prints_to_the_terminal(capsys):
    _, _fast, report = pair("gpt2")
    report.print()
    assert "8 of 8 adapted modules fused" in capsys.readouterr().out


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
