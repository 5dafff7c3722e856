"""One layer at a time: which calls FastLoraLinear fuses, and that LowRankLinear is complete.

Every delegation test compares with stock PEFT bit for bit: delegated means PEFT's own forward ran.
"""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

import fastrank
from fastrank.errors import UsageError
from fastrank.layers import FastLoraLinear, LowRankLinear

# relative error allowed where both sides compute in float64: a few hundred roundings
FLOAT64 = 1e-12
# fused error against PEFT's own in 16 bit, both measured against float64
RATIO = 1.2


class Net(nn.Module):
    """One adapted linear layer of the given kind between nothing else."""

    def __init__(self, kind: str, bias: bool = True) -> None:
        super().__init__()
        self.fc = Conv1D(20, 12) if kind == "conv1d" else nn.Linear(12, 20, bias=bias)

    def forward(self, x, **kwargs):
        return self.fc(x, **kwargs)


def pair(kind="linear", dtype=torch.float64, seed=0, bias=True, **options):
    """(stock, patched, report): the same PEFT model twice, B filled so that the branch counts."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["fc"]} | options
    options["fan_in_fan_out"] = kind == "conv1d"
    base = Net(kind, bias).to(dtype)
    stock = get_peft_model(base, LoraConfig(**options))
    fill(stock)
    fast = copy.deepcopy(stock)
    return stock, fast, fastrank.patch(fast)


def fill(model):
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)


def layer_of(model):
    return model.base_model.model.fc


def rows(dtype=torch.float64):
    return torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(3)).to(dtype)


def run(model, x, **kwargs):
    """Output, and every gradient by name (the input's as "x"), of one call."""
    x = x.clone().requires_grad_(x.is_floating_point())
    model.zero_grad()
    y = model(x, **kwargs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    (y.double() * weights).sum().backward()
    named = [(n.removeprefix("_orig_mod."), p) for n, p in model.named_parameters()]
    grads = {n: p.grad.clone() for n, p in named if p.grad is not None}
    return y.detach(), grads | {"x": x.grad}


def assert_close(fast, stock, tolerance=FLOAT64):
    (y, grads), (y_stock, grads_stock) = fast, stock
    assert grads.keys() == grads_stock.keys()
    for name, want in {"y": y_stock, **grads_stock}.items():
        got = y if name == "y" else grads[name]
        assert got.dtype == want.dtype
        assert (got - want).norm() <= tolerance * want.norm(), name


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha", "rslora"])
def test_fused_call_equals_peft(kind, use_rslora):
    stock, fast, report = pair(kind, use_rslora=use_rslora)
    assert_close(run(fast, rows()), run(stock, rows()))
    assert report.fused_calls == 1
    assert report.delegated_calls == {}


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_trainable_base_weight_and_bias_get_gradients(kind):
    stock, fast, report = pair(kind)
    for model in (stock, fast):
        for parameter in layer_of(model).base_layer.parameters():
            parameter.requires_grad_(True)
    result = run(fast, rows())
    assert sum("base_layer" in name for name in result[1]) == 2
    assert_close(result, run(stock, rows()))
    assert report.fused_calls == 1


def test_no_bias_and_scaling_changed_at_run_time():
    stock, fast, report = pair(bias=False)
    for model in (stock, fast):
        layer_of(model).scale_layer(0.5)
    assert_close(run(fast, rows()), run(stock, rows()))
    assert report.fused_calls == 1


def test_dropout_runs_fused_and_only_while_training():
    stock, fast, report = pair(lora_dropout=0.5)
    x = rows()
    stock.eval(), fast.eval()
    assert_close(run(fast, x), run(stock, x))
    fast.train()
    torch.manual_seed(1)
    first, second = fast(x), fast(x)
    torch.manual_seed(1)
    again = fast(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    # dropout is unbiased: the mean over many draws approaches the output without it
    many = torch.stack([fast(x).detach() for _ in range(400)])
    spread = many.std(0) / 400**0.5
    assert ((many.mean(0) - fast.eval()(x)).abs() <= 5 * spread + 1e-9).all()
    assert report.delegated_calls == {}
    assert report.fused_calls == 1 + 3 + 400 + 1


# --- each reason to delegate -----------------------------------------------------------------


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


class Tagged(torch.Tensor):
    """A tensor subclass, as quantised and distributed weights are."""


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


@pytest.mark.parametrize(("setup", "reason"), REASONS.values(), ids=REASONS.keys())
def test_delegates_to_peft_and_counts_why(setup, reason):
    stock, fast, report = pair()
    for model in (stock, fast):
        setup(model)
    assert report.delegated == {"base_model.model.fc": reason}
    y, grads = run(fast, rows())
    y_stock, grads_stock = run(stock, rows())
    assert torch.equal(y, y_stock)
    assert all(torch.equal(grads[name], grads_stock[name]) for name in grads_stock)
    assert report.fused_calls == 0
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


def test_parameters_swapped_for_one_call_run_fused():
    stock, fast, report = pair()
    doubled = {n: 2 * p.detach() for n, p in layer_of(fast).named_parameters()}
    y = torch.func.functional_call(layer_of(fast), doubled, (rows(),))
    assert torch.allclose(y, torch.func.functional_call(layer_of(stock), doubled, (rows(),)))
    assert report.fused_calls == 1


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


# --- 16 bit ----------------------------------------------------------------------------------


def errors(result, exact):
    """Relative Frobenius error of y and of every gradient against float64."""
    (y, grads), (y_exact, grads_exact) = result, exact
    pairs = {"y": (y, y_exact)} | {n: (grads[n], grads_exact[n]) for n in grads_exact}
    return {n: float((a.double() - b).norm() / b.norm()) for n, (a, b) in pairs.items()}


@pytest.mark.parametrize("mode", ["autocast", "fp32-adapters", "bf16-adapters", "all-bf16"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_16_bit_is_as_accurate_as_peft(kind, mode):
    dtype = torch.bfloat16 if mode in ("fp32-adapters", "all-bf16") else torch.float32
    stock, fast, report = pair(kind, dtype=dtype)
    for model in (stock, fast):
        if mode == "all-bf16":
            model.bfloat16()
        elif mode == "bf16-adapters":
            layer_of(model).lora_A.bfloat16()
            layer_of(model).lora_B.bfloat16()
    wide = torch.Generator().manual_seed(5)
    x = torch.randn(600, 12, generator=wide).to(dtype)
    exact = run(copy.deepcopy(stock).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        ours, theirs = run(fast, x), run(stock, x)
    assert report.fused_calls == 1
    assert ours[0].dtype == theirs[0].dtype
    assert {n: g.dtype for n, g in ours[1].items()} == {n: g.dtype for n, g in theirs[1].items()}
    peft_errors = errors(theirs, exact)
    for name, error in errors(ours, exact).items():
        assert error <= RATIO * peft_errors[name] + 1e-7, (name, error, peft_errors[name])
        assert error < 0.05


# --- objects ---------------------------------------------------------------------------------


def test_deepcopy_and_pickle_keep_the_layer_and_part_the_counters():
    _, fast, report = pair()
    want = fast(rows())
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(layer_of(twin)) is FastLoraLinear
        assert torch.equal(twin(rows()), want)
        twin_report = fastrank.patch(twin)
        assert twin_report.fused_calls == 2  # one before the copy, one of its own
    assert report.fused_calls == 1


def test_compiled_layer_is_one_graph_that_agrees_and_is_counted_as_traced():
    stock, fast, report = pair()
    compiled = torch.compile(layer_of(fast), backend="aot_eager", fullgraph=True)
    for _ in range(3):
        assert_close(run(compiled, rows()), run(layer_of(stock), rows()))
        fast(rows())
    (row,) = report.rows()
    # a counter in the graph would have it traced again at every call
    assert row.traced == 1
    assert row.fused_calls == 3
    assert "compiled, traced 1 times" in str(report)


# --- LowRankLinear ---------------------------------------------------------------------------


def low_rank(**options):
    torch.manual_seed(0)
    base = nn.Linear(12, 20, dtype=torch.float64)
    layer = LowRankLinear.from_linear(base, 4, lora_alpha=6, **options)
    with torch.no_grad():
        layer.B.normal_()
        if layer.e is not None:
            layer.e.normal_()
    return base, layer


def test_low_rank_linear_equals_its_formula():
    base, layer = low_rank(use_diagonal=True)
    x = rows()
    branch = (x @ layer.A.T * layer.e) @ layer.B.T * 1.5
    assert torch.allclose(layer(x), base(x) + branch, rtol=FLOAT64)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"A", "B", "e"}
    assert layer.weight.data_ptr() == base.weight.data_ptr()
    assert base.weight.requires_grad
    assert LowRankLinear(12, 20, 4).weight.dtype == torch.float32
    fresh = LowRankLinear.from_linear(base, 3)
    assert torch.allclose(fresh(x), base(x), rtol=FLOAT64)


@pytest.mark.parametrize("mask", [2, [True, True, False, False]], ids=["prefix", "mask"])
def test_inactive_ranks_do_not_exist(mask):
    _, layer = low_rank(use_diagonal=True)
    small = copy.deepcopy(layer)
    layer.active = mask
    with torch.no_grad():
        layer.A[2:], layer.B[:, 2:], layer.e[2:] = torch.nan, torch.inf, torch.nan
        small.A, small.B = nn.Parameter(small.A[:2]), nn.Parameter(small.B[:, :2])
        small.e = nn.Parameter(small.e[:2])
    y, grads = run(layer, rows())
    y_small, grads_small = run(small, rows())
    assert torch.allclose(y, y_small, rtol=FLOAT64)
    assert torch.allclose(grads["A"][:2], grads_small["A"], rtol=FLOAT64)
    assert (grads["A"][2:] == 0).all()
    assert (grads["B"][:, 2:] == 0).all()
    assert (grads["e"][2:] == 0).all()
    merged = layer.merge()
    assert torch.allclose(merged(rows()), y, rtol=1e-10)


def test_mask_travels_in_the_state_dict_and_only_when_set():
    _, layer = low_rank()
    plain = copy.deepcopy(layer.state_dict())
    assert set(plain) == {"weight", "bias", "A", "B"}
    layer.active = 3
    masked = layer.state_dict()
    assert masked["active"].tolist() == [True, True, True, False]
    _, other = low_rank()
    other.load_state_dict(masked)
    assert other.active.tolist() == [True, True, True, False]
    other.load_state_dict(plain)
    assert other.active is None
    assert copy.deepcopy(layer).active.tolist() == layer.active.tolist()


def test_low_rank_linear_trains_with_dropout_and_in_16_bit():
    base = nn.Linear(12, 20, dtype=torch.bfloat16)
    layer = LowRankLinear.from_linear(base, 4, dropout_p=0.2)
    assert layer.A.dtype == torch.float32
    with torch.no_grad():
        layer.B.normal_()
    x = rows(torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert "r=4" in repr(layer)
    assert "dropout_p=0.2" in repr(layer)
    assert LowRankLinear(3, 2, 0)(torch.ones(1, 3)).shape == (1, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRankLinear(4, 4, -1), "r=-1.*r at least 0"),
        (lambda: LowRankLinear(0, 4, 1), "in_features=0"),
        (lambda: LowRankLinear(4, 4, 1, lora_alpha=0), "lora_alpha is 0; .*above 0"),
        (lambda: LowRankLinear(4, 4, 1, lora_alpha=float("nan")), "lora_alpha is nan"),
        (lambda: LowRankLinear(4, 4, 1, dropout_p=1.0), r"dropout_p is 1.0; .*\[0, 1\)"),
        (lambda: LowRankLinear.from_linear(nn.Conv2d(1, 1, 1), 1), "got Conv2d; pass a torch.nn"),
        (lambda: setattr(LowRankLinear(4, 4, 2), "active", 3), r"active is 3; .*\[0, 2\]"),
        (lambda: setattr(LowRankLinear(4, 4, 2), "active", [True]), r"shape \[1\]; pass .*\[2\]"),
        (lambda: setattr(LowRankLinear(4, 4, 2), "active", torch.ones(2)), "active is float32"),
    ],
)
def test_bad_arguments_say_what_came_and_what_was_wanted(make, message):
    with pytest.raises(UsageError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_low_rank_linear_imports_neither_peft_nor_transformers():
    code = (
        "import sys, fastrank; fastrank.LowRankLinear(3, 2, 1); "
        "print([m for m in ('peft', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "[]\n"
