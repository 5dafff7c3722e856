"""Patched layers on a GPU: families against float64, no waiting for the device, real quantisation.

The same questions as on the CPU, where the kernels that answer are others.
"""

import copy
import statistics

import pytest
import torch
from family_cases import FAMILIES, fused_calls, pair, step
from layer_cases import Net, fill, layer_of
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn

import fastrank

pytestmark = pytest.mark.gpu
RATIO = 1.2


def on(device, *models):
    for model in models:
        model.to(device)


@pytest.mark.parametrize("mode", ["float32", "autocast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_run_fused_and_as_accurate_as_peft(family, mode, device):
    ratios = []
    for seed in range(4):
        stock, fast, report = pair(family, seed, torch.float32)
        exact = step(copy.deepcopy(stock).double(), family, seed)
        on(device, stock, fast)
        with torch.autocast(device.type, torch.bfloat16, enabled=mode == "autocast"):
            ours, theirs = step(fast, family, seed), step(stock, family, seed)
        assert {row.name: row.fused_calls for row in report.rows()} == fused_calls(family)
        assert report.delegated_calls == {}
        for name, want in exact.items():
            assert ours[name].dtype == theirs[name].dtype
            if name != "loss":
                error, peft = (
                    float((r[name].double().cpu() - want).norm()) for r in (ours, theirs)
                )
                ratios.append(error / peft)
    assert statistics.median(ratios) <= RATIO


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_calls_never_wait_for_the_device(kind, dtype, device):
    options = {"target_modules": ["fc"], "lora_dropout": 0.1}
    if kind == "lora":
        config = LoraConfig(r=4, **options)
    else:
        config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, **options)
    model = get_peft_model(Net("linear").to(dtype), config)
    report = fastrank.patch(model.to(device))
    x = torch.randn(64, 12, device=device, dtype=dtype, requires_grad=True)
    model(x).sum().backward()  # AdaLoRA's ranknum is read, kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert report.fused_calls == 2


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base_and_fused_branch(bits, device):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    base = Net("linear")
    kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    options = {"compute_dtype": torch.float16} if bits == 4 else {"has_fp16_weights": False}
    base.fc = nn.Linear(64, 48)
    quantised = kind(64, 48, **options)
    quantised.load_state_dict(base.fc.state_dict())
    base.fc = quantised
    setattr(base, f"is_loaded_in_{bits}bit", True)
    model = get_peft_model(base.to(device), LoraConfig(r=4, target_modules=["fc"]))
    fill(model)
    model.to(device)
    x = torch.randn(32, 64, device=device, dtype=torch.float16, requires_grad=True)
    results = []
    for patched in (False, True):
        report = fastrank.patch(model) if patched else None
        y = model(x)
        grads = torch.autograd.grad(
            y.float().square().sum(), [x, *layer_of(model).lora_A.parameters()]
        )
        results.append((y, *grads))
    for theirs, ours in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.float() - theirs.float()).norm() <= 0.01 * theirs.float().norm()
    assert report.fused_calls == 1
