"""Layers over bitsandbytes' 4-bit and 8-bit bases: base untouched, branch equal to PEFT's.

The base computes the same on both sides; accuracy is that of the branch, against a branch in
float64 on top of what the base gave.
"""

import copy

import pytest
import torch
from layer_cases import RATIO, errors, layer_of, typical
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn

import fastrank
from fastrank.layers.fused import FusedLayer

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

K, N = 64, 48
KINDS = {"4bit-lora": 4, "8bit-lora": 8, "4bit-adalora": 4, "8bit-adalora": 8}


class Net(nn.Module):
    """One quantised linear layer."""

    def __init__(self, bits, dtype):
        super().__init__()
        full = nn.Linear(K, N)
        if bits == 4:
            self.fc = bnb.nn.Linear4bit(K, N, compute_dtype=dtype, quant_type="nf4")
            weight = bnb.nn.Params4bit(
                full.weight.data.to(dtype), requires_grad=False, quant_type="nf4", module=self.fc
            )
        else:
            self.fc = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False, threshold=6.0)
            weight = bnb.nn.Int8Params(
                full.weight.data.to(dtype), requires_grad=False, has_fp16_weights=False
            )
        self.fc.weight, self.fc.bias = weight, nn.Parameter(full.bias.data.to(dtype))
        setattr(self, f"is_loaded_in_{bits}bit", True)

    def forward(self, x, **kwargs):
        return self.fc(x, **kwargs)


def pair(kind, dtype=torch.float32, seed=0, **options):
    """(stock, patched, report) over the same quantised base; both share nothing else."""
    models = []
    for _ in range(2):
        torch.manual_seed(seed)
        base = Net(KINDS[kind], dtype).to("cpu")  # quantised on the way to a device
        if kind.endswith("adalora"):
            config = AdaLoraConfig(
                target_modules=["fc"], init_r=4, total_step=10, lora_alpha=5, **options
            )
        else:
            config = LoraConfig(target_modules=["fc"], r=4, lora_alpha=5, **options)
        model = get_peft_model(base, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3)
        models.append(model)
    return *models, fastrank.patch(models[1])


def rows(dtype, seed=3, count=(3, 5)):
    return torch.randn(*count, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(model, x, autocast=False):
    """y, and the gradients by name (the input's as "x")."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    (y.double() * weights).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return y.detach(), grads | {"x": x.grad}


def assert_close(ours, theirs, tolerance):
    assert ours[1].keys() == theirs[1].keys()
    for name, want in {"y": theirs[0], **theirs[1]}.items():
        got = ours[0] if name == "y" else ours[1][name]
        assert got.dtype == want.dtype, name
        assert (got.double() - want.double()).norm() <= tolerance * want.double().norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_branch_runs_fused_and_equals_peft(kind):
    stock, fast, report = pair(kind)
    assert report.fused == ["base_model.model.fc"]
    before = layer_of(fast).base_layer.weight.data.clone()
    for _ in range(2):
        assert_close(run(fast, rows(torch.float32)), run(stock, rows(torch.float32)), 1e-5)
    assert report.fused_calls == 2
    assert report.delegated_calls == {}
    assert torch.equal(layer_of(fast).base_layer.weight.data, before)
    with torch.no_grad():
        x = rows(torch.float32)
        assert torch.allclose(fast(x), stock(x), atol=1e-5)


def exact_run(model, x, base):
    """y and the adapter's gradients in float64, on top of the base's own result."""
    model = copy.deepcopy(model)
    layer = layer_of(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.double()
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    scale = layer.scaling["default"]
    if isinstance(a, nn.Linear):
        share = x.double() @ a.weight.T @ b.weight.T * scale
    else:
        e, ranknum = layer.lora_E["default"].T, layer.ranknum["default"].double()
        share = (x.double() @ a.T * e) @ b.T * scale / (ranknum + 1e-5)
    y = base.double() + share
    (y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)).sum().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bit_branch_is_as_accurate_as_peft(kind, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    ours, theirs = {}, {}
    for seed in range(8):
        stock, fast, report = pair(kind, dtype, seed)
        if kind.endswith("adalora"):
            layer_of(stock).ranknum["default"].requires_grad_(False)
        x = rows(dtype, seed, (100,))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            base = layer_of(stock).base_layer(x)
        exact = exact_run(stock, x, base)
        got, want = run(fast, x, autocast), run(stock, x, autocast)
        assert report.fused_calls == 1
        assert got[0].dtype == want[0].dtype
        assert {n: g.dtype for n, g in got[1].items()} == {n: g.dtype for n, g in want[1].items()}
        assert (got[1]["x"] - want[1]["x"]).norm() <= 0.02 * want[1]["x"].norm()
        for name, error in errors(got, exact).items():
            ours.setdefault(name, []).append(error)
            theirs.setdefault(name, []).append(errors(want, exact)[name])
    for name in theirs:
        assert typical(ours[name]) <= RATIO * typical(theirs[name]) + 1e-7, name


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_fused_goes_to_peft(kind):
    stock, fast, report = pair(kind)
    x = rows(torch.float32)
    with fast.disable_adapter(), stock.disable_adapter():
        assert torch.equal(fast(x), stock(x))
    for model in (stock, fast):
        layer_of(model).lora_dropout["default"] = nn.AlphaDropout(0.0)
    assert torch.equal(fast(x), stock(x))
    other = type("Other", (type(layer_of(fast).base_layer),), {})
    for model in (stock, fast):
        layer_of(model).base_layer.__class__ = other
    assert torch.equal(fast(x), stock(x))
    assert report.delegated_calls == {
        "adapters disabled": 1,
        "lora_dropout is a AlphaDropout": 1,
        "base layer is a Other": 1,
    }
    assert report.fused_calls == 0


def test_hooks_and_replaced_forward_of_the_base_still_act():
    stock, fast, report = pair("4bit-lora")
    x = rows(torch.float32)
    fast(x)
    for model in (stock, fast):
        base = layer_of(model).base_layer
        base.register_forward_hook(lambda module, args, y: y * 2)
    assert torch.allclose(fast(x), stock(x), atol=1e-5)
    assert report.fused_calls == 2


def test_dropout_and_checkpointing():
    _, fast, report = pair("4bit-lora", lora_dropout=0.4)
    x = rows(torch.float32).requires_grad_()
    assert not torch.equal(fast(x), fast(x))
    torch.manual_seed(4)
    want = torch.autograd.grad(fast(x).sum(), x)[0]
    torch.manual_seed(4)
    y = torch.utils.checkpoint.checkpoint(fast, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], want)
    assert report.delegated_calls == {}
    fast.eval()
    assert torch.equal(fast(x), fast(x))


def test_unpatch_and_state_dict():
    stock, fast, _ = pair("8bit-lora")
    assert fast.state_dict().keys() == stock.state_dict().keys()
    assert isinstance(layer_of(fast), FusedLayer)
    assert fastrank.unpatch(fast) == 1
    assert type(layer_of(fast)) is type(layer_of(stock))
    assert vars(layer_of(fast)).keys() == vars(layer_of(stock)).keys()
    x = rows(torch.float32)
    assert torch.equal(fast(x), stock(x))
