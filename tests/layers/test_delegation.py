"""Which calls FastLoraLinear leaves to PEFT, at first and after calls that were fused.

Every test compares with stock PEFT bit for bit: delegated means PEFT's own forward ran.
"""

import pytest
import torch
from layer_cases import Tagged, fill, layer_of, pair, rows, run
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.nn.utils import parametrize


def disable(model):
    layer_of(model).enable_adapters(False)


def merge(model):
    layer_of(model).merge()


def two_adapters(model):
    torch.manual_seed(2)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["fc"]))
    fill(model)
    layer_of(model).set_adapter(["default", "other"])


def delete_only_adapter(model):
    layer_of(model).set_adapter(["elsewhere"])


def hook(path, register):
    def setup(model):
        getattr(layer_of(model).get_submodule(path), register)(lambda *_: None)

    return setup


def odd_dropout(model):
    layer_of(model).lora_dropout["default"] = nn.AlphaDropout(0.0)


def all_dropped(model):
    layer_of(model).lora_dropout["default"] = nn.Dropout(1.0)


def custom_factor(model):
    class Halved(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    layer_of(model).lora_A["default"].__class__ = Halved


def replaced_forward(model):
    base = layer_of(model).base_layer
    base.forward = lambda x: nn.Linear.forward(base, x) + 1


def replaced_base_class(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    layer_of(model).base_layer.__class__ = Doubled


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


def parametrized(model):
    parametrize.register_parametrization(layer_of(model).base_layer, "weight", Negated())


def subclassed_weight(model):
    base = layer_of(model).base_layer
    base.weight = nn.Parameter(base.weight.detach().as_subclass(Tagged), requires_grad=False)


REASONS = {
    "disabled": (disable, "adapters disabled"),
    "merged": (merge, "adapters merged"),
    "several": (two_adapters, "several active adapters"),
    "none": (delete_only_adapter, "no active adapter in this layer"),
    "hook-A": (hook("lora_A.default", "register_forward_hook"), "hooks on lora_A"),
    "hook-B": (hook("lora_B.default", "register_forward_pre_hook"), "hooks on lora_B"),
    "hook-drop": (hook("lora_dropout.default", "register_forward_hook"), "hooks on lora_dropout"),
    "hook-base": (hook("base_layer", "register_full_backward_hook"), "hooks on base_layer"),
    "dropout-class": (odd_dropout, "lora_dropout is a AlphaDropout"),
    "dropout-one": (all_dropped, "lora_dropout with p = 1"),
    "factor-class": (custom_factor, "lora_A is a Halved"),
    "base-forward": (replaced_forward, "forward of base_layer replaced on the instance"),
    "base-class": (replaced_base_class, "base layer is a Doubled"),
    "parametrized": (parametrized, "base_layer is parametrized"),
    "subclass": (subclassed_weight, "base weight is a Tagged"),
}


@pytest.mark.parametrize("primed", [False, True], ids=["at-once", "after-fused-calls"])
@pytest.mark.parametrize(("setup", "reason"), REASONS.values(), ids=REASONS.keys())
def test_delegates_to_peft_and_counts_why(setup, reason, primed):
    stock, fast, report = pair()
    if primed:
        run(fast, rows()), run(fast, rows())
    for model in (stock, fast):
        setup(model)
    assert report.delegated == {"base_model.model.fc": reason}
    y, grads = run(fast, rows())
    y_stock, grads_stock = run(stock, rows())
    assert torch.equal(y, y_stock)
    assert all(torch.equal(grads[name], grads_stock[name]) for name in grads_stock)
    assert report.fused_calls == 2 * primed
    assert report.delegated_calls == {reason: 1}


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"use_dora": True}, "LoRA variant DoraLinearVariant"), ({"lora_bias": True}, "lora_bias")],
    ids=["dora", "lora_bias"],
)
def test_options_of_the_adapter_that_delegate(options, reason):
    stock, fast, report = pair(**options)
    assert torch.equal(fast(rows()), stock(rows()))
    assert report.delegated_calls == {reason: 1}


def test_extra_arguments_delegate():
    stock, fast, report = pair()
    fast.eval(), stock.eval()
    names = ["default", "__base__", "default"]
    assert torch.equal(fast(rows(), adapter_names=names), stock(rows(), adapter_names=names))
    assert report.delegated_calls == {"extra arguments: adapter_names": 1}
    with pytest.raises(TypeError, match="unexpected keyword"):
        fast(rows(), nonsense=1)


def test_global_hooks_and_function_transforms_delegate():
    stock, fast, report = pair()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert torch.equal(fast(rows()), stock(rows()))
    finally:
        handle.remove()
    vmapped = torch.func.vmap(layer_of(fast))(rows())
    assert torch.allclose(vmapped, stock(rows()))
    assert report.delegated_calls == {"global module hooks": 1, "inside a torch.func transform": 1}


def test_jit_tracing_and_export_see_stock_operations():
    stock, fast, report = pair()
    want = stock(rows())
    traced = torch.jit.trace(layer_of(fast), (rows(),), check_trace=False)
    assert torch.allclose(traced(rows()), want)
    assert report.delegated_calls == {"torch.jit tracing or torch.export": 1}
    exported = torch.export.export(layer_of(fast), (rows(),))
    assert "fastrank" not in str(exported.graph)
    assert torch.allclose(exported.module()(rows()), want)


def test_tensor_subclass_and_wrong_dtype_fail_or_run_as_in_peft():
    stock, fast, report = pair()
    y = fast(rows().as_subclass(Tagged))
    assert type(y) is Tagged
    assert torch.equal(y, stock(rows().as_subclass(Tagged)))
    for bad in (torch.ones(2, 12, dtype=torch.int64), rows(torch.float32)):
        messages = []
        for model in (stock, fast):
            with pytest.raises(RuntimeError) as error:
                model(bad)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
    assert report.delegated_calls == {
        "input is a Tagged": 1,
        "input dtype int64": 1,
        "input and base weight have different dtypes": 1,
    }


def test_input_dtype_casting_can_be_disabled():
    _, fast, report = pair(dtype=torch.bfloat16)
    assert layer_of(fast).lora_A["default"].weight.dtype == torch.float32
    x = rows(torch.bfloat16)
    with disable_input_dtype_casting(fast), pytest.raises(RuntimeError, match="dtype"):
        fast(x)
    assert report.delegated_calls == {"input dtype casting is disabled": 1}
    fast(x)
    with disable_input_dtype_casting(fast), torch.autocast("cpu", torch.bfloat16):
        fast(x)  # autocast casts every operand, so nothing is left to disable
    assert report.fused_calls == 2


def test_mixed_factor_dtypes_delegate_without_autocast():
    _, fast, report = pair(dtype=torch.float32)
    layer_of(fast).lora_B["default"].to(torch.bfloat16)
    assert report.delegated == {"base_model.model.fc": "lora_A in float32, B in bfloat16"}


def test_factors_on_another_device_delegate():
    _, fast, report = pair()
    layer_of(fast).lora_A["default"].to("meta")
    reason = "lora_A on meta, not with the rest on cpu"
    assert report.delegated == {"base_model.model.fc": reason}
    fast.to("meta")
    assert report.delegated == {"base_model.model.fc": "meta tensors"}
