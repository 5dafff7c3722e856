"""merge_adapters against PEFT's add_weighted_adapter, in a model and from folders."""

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import fastrank
from fastrank.errors import UsageError


def bert():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=48, max_position_embeddings=32)  # fmt: skip
    return BertForSequenceClassification(config)


def lora(r=4, **options):
    return LoraConfig(**({"r": r, "lora_alpha": 8, "target_modules": ["query", "value"]} | options))


def adapted(base, configs):
    """A model with adapters a0, a1, ... whose factors are all drawn anew."""
    model = get_peft_model(base, configs[0], adapter_name="a0")
    for i, config in enumerate(configs[1:], 1):
        model.add_adapter(f"a{i}", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


def deltas(model, adapter):
    return {
        name: module.get_delta_weight(adapter).detach()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    }


def agree(model, weights, rank, tolerance=1e-5):
    """Both merges of a0, a1, ... give the same updates."""
    names = [f"a{i}" for i in range(len(weights))]
    report = fastrank.merge_adapters(names, weights, rank, model=model, name="ours")
    model.add_weighted_adapter(names, weights, "theirs", combination_type="svd", svd_rank=rank)
    ours, theirs = deltas(model, "ours"), deltas(model, "theirs")
    assert ours.keys() == theirs.keys()
    for name, delta in ours.items():
        error = (delta - theirs[name]).norm() / theirs[name].norm()
        assert error < tolerance, name
    return report


@pytest.mark.parametrize("rank", [3, 8])
def test_same_update_as_peft(rank):
    """Unequal ranks and scalings, rsLoRA among them, weights of both signs."""
    model = adapted(bert(), [lora(), lora(2, lora_alpha=3, use_rslora=True), lora(6)])
    report = agree(model, [0.7, -0.4, 0.2], rank)
    for module in report.modules:
        sums = sum(w * deltas(model, f"a{i}")[module.name].double()
                   for i, w in enumerate((0.7, -0.4, 0.2)))  # fmt: skip
        kept = deltas(model, "ours")[module.name].double().square().sum() / sums.square().sum()
        assert module.energy == pytest.approx(float(kept), rel=1e-4)
    assert report.energy == min(m.energy for m in report.modules)
    assert report.energy < 0.99


def test_nothing_is_lost_at_the_sum_of_ranks():
    model = adapted(bert(), [lora(2), lora(3)])
    report = agree(model, [1.0, 1.0], 5)
    assert report.energy == pytest.approx(1.0, abs=1e-6)


def test_gpt2_whose_weights_are_transposed():
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=1, n_head=2)
    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    agree(adapted(GPT2LMHeadModel(config), [lora(**options), lora(3, **options)]), [0.5, 0.5], 4)


def test_embeddings_and_convolutions():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.conv = nn.Embedding(20, 12), nn.Conv2d(3, 8, 3)

    torch.manual_seed(0)
    options = {"target_modules": ["emb", "conv"]}
    model = adapted(Small(), [lora(2, **options), lora(3, **options)])
    report = agree(model, [0.3, 0.7], 4)
    assert [m.shape for m in report.modules] == [(12, 20), (8, 27)]


def test_adapters_on_different_modules():
    model = adapted(bert(), [lora(), lora(target_modules=["value", "key"])])
    report = agree(model, [1.0, 2.0], 4)
    assert sorted({m.adapters for m in report.modules}) == [1, 2]
    assert len(report.modules) == 6


def test_rank_larger_than_a_module():
    model = adapted(bert(), [lora(20, target_modules=["classifier"]),
                             lora(20, target_modules=["classifier"])])  # fmt: skip
    report = fastrank.merge_adapters(["a0", "a1"], None, 40, model=model)
    assert report.energy == pytest.approx(1.0, abs=1e-6)
    wanted = (
        deltas(model, "a0")[report.modules[0].name] + deltas(model, "a1")[report.modules[0].name]
    ) / 2
    torch.testing.assert_close(deltas(model, "merged")[report.modules[0].name], wanted)


def test_the_model_is_as_before_but_for_the_new_adapter():
    model = adapted(bert(), [lora(), lora()])
    model.set_adapter("a1")
    before = {n: p.clone() for n, p in model.named_parameters()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    fastrank.merge_adapters(["a0", "a1"], model=model)
    assert list(model.active_adapters) == ["a1"]
    for name, parameter in model.named_parameters():
        if ".merged." in name:
            assert not parameter.requires_grad
        else:
            assert torch.equal(parameter, before[name])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_folders_without_a_base_model(tmp_path):
    patterns = {"alpha_pattern": {"query": 5}, "rank_pattern": {"value": 3}}
    model = adapted(bert(), [lora(4), lora(6, use_rslora=True, **patterns)])
    model.save_pretrained(tmp_path / "saved")
    folders = [tmp_path / "saved" / name for name in ("a0", "a1")]
    here = fastrank.merge_adapters(["a0", "a1"], [0.6, 0.4], 5, model=model)
    there = fastrank.merge_adapters(folders, [0.6, 0.4], 5, out=tmp_path / "merged")
    assert sorted(m.energy for m in there.modules) == pytest.approx(
        sorted(m.energy for m in here.modules)
    )
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "merged")
    wanted, found = deltas(model, "merged"), deltas(loaded, "default")
    assert found.keys() == wanted.keys()
    for name, delta in found.items():
        torch.testing.assert_close(delta, wanted[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match="is there already"):
        fastrank.merge_adapters(folders, out=tmp_path / "merged")


def test_report_prints_a_line_a_module(capsys):
    model = adapted(bert(), [lora(), lora()])
    fastrank.merge_adapters(["a0", "a1"], model=model).print()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert "32x32" in lines[1]


def spoiled():
    model = adapted(bert(), [lora(), lora()])
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B.a1" in n)[0, 0] = torch.nan
    return model


BAD = [
    (lambda m, p: fastrank.merge_adapters([], model=m), "no adapter"),
    (lambda m, p: fastrank.merge_adapters(["a0", "b"], model=m), "'b'; it has a0, a1"),
    (lambda m, p: fastrank.merge_adapters(["a0"], [1, 2], model=m), "2 weights for 1"),
    (lambda m, p: fastrank.merge_adapters(["a0"], [torch.inf], model=m), "weight 0 is inf"),
    (lambda m, p: fastrank.merge_adapters(["a0"], rank=0, model=m), "rank is 0"),
    (lambda m, p: fastrank.merge_adapters(["a0"], model=m, name="a1"), "'a1' already"),
    (lambda m, p: fastrank.merge_adapters(["a0"], model=m, out=p), "not both"),
    (lambda m, p: fastrank.merge_adapters(["a0"]), "needs a model"),
    (lambda m, p: fastrank.merge_adapters(["a0"], model=nn.Linear(2, 2)), "Linear"),
    (lambda m, p: fastrank.merge_adapters([p], out=p / "x"), "no adapter_config.json"),
    (lambda m, p: fastrank.merge_adapters(["a0"], model=m, accuracy="best"), "'best'.*fast"),
    (lambda m, p: fastrank.merge_adapters(["a0", "a1"], model=spoiled()), "NaN or Inf"),
    (lambda m, p: fastrank.merge_adapters(["a0"], model=adapted(bert(), [lora(use_dora=True)])),
     "DoRA"),
    (lambda m, p: fastrank.merge_adapters(["a0"], model=get_peft_model(
        bert(), AdaLoraConfig(target_modules=["query"], total_step=9), adapter_name="a0")),
     "AdaLoraConfig"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_changes_nothing(call, message, tmp_path):
    model = adapted(bert(), [lora(), lora()])
    with pytest.raises(UsageError, match=message):
        call(model, tmp_path)
    assert sorted(model.peft_config) == ["a0", "a1"]
    assert list(tmp_path.iterdir()) == []


def test_heads_saved_by_both_are_refused():
    model = adapted(bert(), [lora(task_type="SEQ_CLS"), lora(task_type="SEQ_CLS")])
    with pytest.raises(UsageError, match=r"classifier.*modules_to_save"):
        fastrank.merge_adapters(["a0", "a1"], model=model)
