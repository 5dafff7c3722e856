"""What a remembered approval must notice at the next call, and what it may ignore."""

import copy
import gc
import weakref

import pytest
import torch
from layer_cases import Tagged, assert_close, fill, layer_of, pair, rows, run
from peft import LoraConfig
from torch import nn


def shrunk_a(model):
    weight = layer_of(model).lora_A["default"].weight
    weight.data = weight.data[:2]


def flattened_base(model):
    weight = layer_of(model).base_layer.weight
    weight.data = weight.data.flatten()


def narrowed_b(model):
    weight = layer_of(model).lora_B["default"].weight
    weight.data = weight.data.float()


def narrowed_base(model):
    base = layer_of(model).base_layer
    base.weight.data, base.bias.data = base.weight.data.float(), base.bias.data.float()


def swapped_class(model):
    weight = layer_of(model).base_layer.weight
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach().as_subclass(Tagged)))


def biased_b(model):
    layer_of(model).lora_B["default"].bias = nn.Parameter(torch.ones(20, dtype=torch.float64))


def infinite_scale(model):
    layer_of(model).scaling["default"] = float("inf")


def in_place_dropout(model):
    layer_of(model).lora_dropout["default"] = nn.Dropout(0.3, inplace=True)


CHANGES = {
    "shape": (shrunk_a, "weights are sharded or not matrices"),
    "flat": (flattened_base, "weights are sharded or not matrices"),
    "dtype-B": (narrowed_b, "lora_A in float64, B in float32"),
    "dtype-base": (narrowed_base, "input and base weight have different dtypes"),
    "swap": (swapped_class, "base weight is a Tagged"),
    "bias": (biased_b, "lora_bias"),
    "scale": (infinite_scale, "scaling is inf"),
    "dropout": (in_place_dropout, "lora_dropout is in place"),
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES.keys())
def test_changes_under_the_same_objects_are_noticed_at_the_next_call(change, reason):
    stock, fast, report = pair()
    fast(rows())
    outcomes = []
    for model in (stock, fast):
        change(model)
        torch.manual_seed(1)
        try:
            outcomes.append(model(rows()))
        except RuntimeError as error:
            outcomes.append(str(error))
    theirs, ours = outcomes
    assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert report.delegated_calls == {reason: 1}
    assert report.fused_calls == 1


def replaced_parameters(model):
    layer = layer_of(model)
    layer.lora_A["default"].weight = nn.Parameter(layer.lora_A["default"].weight * 2)
    layer.base_layer.bias = None


def replaced_module(model):
    layer_of(model).lora_B["default"] = nn.Linear(4, 20, bias=False, dtype=torch.float64)
    fill(model)


def rescaled(model):
    layer_of(model).scale_layer(3.0)


def other_adapter(model):
    torch.manual_seed(2)
    model.add_adapter("other", LoraConfig(r=7, target_modules=["fc"]))
    fill(model)
    model.set_adapter("other")


def moved_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5


def hooked_elsewhere(model):
    layer_of(model).register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.parametrize(
    "change",
    [replaced_parameters, replaced_module, rescaled, other_adapter, moved_data, hooked_elsewhere],
)
def test_allowed_changes_take_effect_and_stay_fused(change):
    stock, fast, report = pair()
    fast(rows())
    for model in (stock, fast):
        change(model)
    for _ in range(2):
        assert_close(run(fast, rows()), run(stock, rows()))
    assert report.fused_calls == 3
    assert report.delegated_calls == {}


def test_dropout_settings_take_effect_after_fused_calls():
    _, fast, report = pair(lora_dropout=0.5)
    layer, x = layer_of(fast), rows()
    assert not torch.equal(layer(x), layer(x))
    fast.eval()
    assert torch.equal(layer(x), layer(x))
    fast.train()
    assert not torch.equal(layer(x), layer(x))
    layer.lora_dropout["default"].p = 0.0
    assert torch.equal(layer(x), layer(x))
    assert report.fused_calls == 8


def test_states_that_come_and_go_are_followed():
    _, fast, report = pair()
    layer = layer_of(fast)
    fused = layer(rows())
    layer.enable_adapters(False)
    layer(rows())
    layer.enable_adapters(True)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    layer(rows())
    handle.remove()
    inner = layer.lora_A["default"].register_forward_hook(lambda *_: None)
    layer(rows())
    inner.remove()
    assert torch.equal(layer(rows()), fused)
    assert report.fused_calls == 2
    assert report.delegated_calls == {
        "adapters disabled": 1,
        "global module hooks": 1,
        "hooks on lora_A": 1,
    }


def test_float64_mixed_in_is_noticed_when_autocast_comes():
    stock, fast, report = pair()
    for model in (stock, fast):
        layer_of(model).lora_A.float()
        layer_of(model).lora_B.float()
    fast(rows()), fast(rows())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(rows()), stock(rows()))
    assert report.fused_calls == 2
    assert report.delegated_calls == {"float64 mixed in under autocast": 1}


def test_an_approved_call_is_not_examined_again(monkeypatch):
    _, fast, _ = pair()
    want = fast(rows())
    monkeypatch.setattr(type(layer_of(fast)), "plan", lambda *_: pytest.fail("examined again"))
    assert torch.equal(fast(rows()), want)
    assert layer_of(fast)._fastrank.calls.fused == 2


def test_copies_use_their_own_parameters_and_nothing_outlives_the_model():
    _, fast, report = pair()
    want = fast(rows())
    twin = copy.deepcopy(fast)
    moved_data(twin)
    assert not torch.allclose(twin(rows()), want)
    assert torch.equal(fast(rows()), want)
    weight = weakref.ref(layer_of(fast).base_layer.weight)
    del fast
    gc.collect()
    assert weight() is None
    assert report.fused_calls == 2
