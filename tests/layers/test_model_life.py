"""Whole models through what happens to them: training tricks, checkpoints, merging, switching."""

import copy
import gc
import io
import pickle
import statistics

import pytest
import torch
from family_cases import batch, bert, fill_b, fused_calls, pair, step
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as PeftLinear

import fastrank

# float64 against float64 through a whole model
CLOSE = 1e-9


def logits(model, family, **kwargs):
    with torch.no_grad():
        return model(**batch(family), **kwargs).logits


def fused_names(family):
    return list(fused_calls(family))


def assert_equal_steps(ours, theirs, tolerance=CLOSE):
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        assert (ours[name] - want).norm() <= tolerance * (want.norm() + 1e-6), name


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_equal_peft(bias):
    stock, fast, report = pair("bert", bias=bias)
    ours = step(fast, "bert")
    assert any(name.endswith("base_layer.bias") for name in ours)
    assert_equal_steps(ours, step(stock, "bert"))
    assert report.delegated_calls == {}


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_replays_the_same_step(use_reentrant, dropout):
    _, fast, report = pair("llama", lora_dropout=dropout)
    fast.train()
    torch.manual_seed(5)
    want = step(fast, "llama")
    fast.enable_input_require_grads()
    fast.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    torch.manual_seed(5)
    assert_equal_steps(step(fast, "llama"), want)
    # twice in the checkpointed step: once forward, once recomputed
    assert report.fused_calls == 3 * len(fused_names("llama"))
    assert report.delegated_calls == {}


def test_fp32_adapters_over_a_16_bit_model_run_fused():
    ratios = []
    for seed in range(6):
        stock, fast, report = pair("llama", seed, torch.bfloat16)
        adapter = fused_names("llama")[0] + ".lora_A.default.weight"
        assert fast.get_parameter(adapter).dtype == torch.float32
        exact = logits(copy.deepcopy(stock).double(), "llama")
        ours, theirs = logits(fast, "llama"), logits(stock, "llama")
        assert ours.dtype == theirs.dtype == torch.bfloat16
        ratios.append(float((ours - exact).norm() / (theirs - exact).norm()))
        assert report.fused_calls == len(fused_names("llama"))
        assert report.delegated_calls == {}
    assert statistics.median(ratios) <= 1.2


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
    # a copy doesn't share inputs between layers, and some CPUs then add in another order
    assert torch.allclose(logits(again, "bert"), logits(fast, "bert"), rtol=CLOSE)


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
    assert_equal_steps(step(fast, "llama"), step(stock, "llama"))
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


def test_compiled_model_is_one_graph_with_every_layer_in_it():
    stock, fast, report = pair("bert")
    torch.compiler.reset()
    inputs = {name: tensor for name, tensor in batch("bert").items() if name != "labels"}
    compiled = torch.compile(fast.base_model.model, backend="aot_eager", fullgraph=True)
    for model in (stock, fast):
        model.zero_grad()
    ours, theirs = compiled(**inputs).logits, stock(**inputs).logits
    assert torch.allclose(ours, theirs, rtol=CLOSE)
    ours.square().sum().backward(), theirs.square().sum().backward()
    for name, parameter in stock.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(fast.get_parameter(name).grad, parameter.grad, rtol=1e-6), name
    assert [row.name for row in report.rows() if row.traced] == fused_names("bert")
    assert report.delegated_calls == {}
