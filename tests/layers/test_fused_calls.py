"""FastLoraLinear where it fuses: equal to PEFT in outputs and gradients, copied and compiled."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from layer_cases import RATIO, assert_close, errors, layer_of, pair, rows, run, typical

import fastrank
from fastrank.layers import FastLoraLinear


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


def test_parameters_swapped_for_one_call_run_fused():
    stock, fast, report = pair()
    doubled = {n: 2 * p.detach() for n, p in layer_of(fast).named_parameters()}
    fast(rows())
    y = torch.func.functional_call(layer_of(fast), doubled, (rows(),))
    assert torch.allclose(y, torch.func.functional_call(layer_of(stock), doubled, (rows(),)))
    assert report.fused_calls == 2
    # what was lent for the call is not kept
    lent = weakref.ref(next(iter(doubled.values())))
    del doubled, y
    gc.collect()
    assert lent() is None
    assert torch.allclose(fast(rows()), stock(rows()))


@pytest.mark.parametrize("mode", ["autocast", "fp32-adapters", "bf16-adapters", "all-bf16"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_16_bit_is_as_accurate_as_peft(kind, mode):
    dtype = torch.bfloat16 if mode in ("fp32-adapters", "all-bf16") else torch.float32
    ours, theirs = {}, {}
    # one weight gradient has so few elements that where its largest one lies between two powers of
    # two decides its error; over twelve draws and scales that evens out
    for seed in range(12):
        stock, fast, report = pair(kind, dtype=dtype, seed=seed, lora_alpha=5 + seed)
        for model in (stock, fast):
            if mode == "all-bf16":
                model.bfloat16()
            elif mode == "bf16-adapters":
                layer_of(model).lora_A.bfloat16()
                layer_of(model).lora_B.bfloat16()
        wide = torch.Generator().manual_seed(seed)
        x = torch.randn(200, 12, generator=wide).to(dtype)
        exact = run(copy.deepcopy(stock).double(), x.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            got, want = run(fast, x), run(stock, x)
        assert report.fused_calls == 1
        assert got[0].dtype == want[0].dtype
        assert {n: g.dtype for n, g in got[1].items()} == {n: g.dtype for n, g in want[1].items()}
        for name, error in errors(got, exact).items():
            ours.setdefault(name, []).append(error)
            theirs.setdefault(name, []).append(errors(want, exact)[name])
    for name in theirs:
        assert typical(ours[name]) <= RATIO * typical(theirs[name]) + 1e-7, name
        assert max(ours[name]) < 0.05


def test_deepcopy_and_pickle_keep_the_layer_and_part_the_counters():
    _, fast, report = pair()
    want = fast(rows())
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(layer_of(twin)) is FastLoraLinear
        assert torch.equal(twin(rows()), want)
        twin_report = fastrank.patch(twin)
        assert twin_report.fused_calls == 2  # one before the copy, one of its own
    assert report.fused_calls == 1


@pytest.fixture
def fresh_dynamo():
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_layers_of_different_scale_share_one_symbolic_graph():
    for alpha in (3, 5, 8):
        stock, fast, report = pair(lora_alpha=alpha)
        compiled = torch.compile(layer_of(fast), backend="aot_eager", fullgraph=True)
        assert_close(run(compiled, rows()), run(layer_of(stock), rows()))
        assert report.rows()[0].traced > 0


@pytest.mark.usefixtures("fresh_dynamo")
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
