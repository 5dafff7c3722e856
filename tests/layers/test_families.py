"""Eight model families: which modules run fused, that the numbers are PEFT's, exact unpatching.

The call counters say what ran fused; names and counts are written out in family_cases.
"""

import copy
import statistics

import pytest
import torch
from family_cases import FAMILIES, fused_calls, pair, step

import fastrank

# float64 against float64 through a whole model
CLOSE = 1e-9
# fused error against PEFT's own in 16 bit, both measured against float64
RATIO = 1.2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_runs_fused_and_unpatch_restores_all(family):
    stock, fast, report = pair(family)
    ours, theirs = step(fast, family), step(stock, family)
    assert {row.name: row.fused_calls for row in report.rows()} == fused_calls(family)
    assert report.fused == [row.name for row in report.rows()]
    assert report.delegated_calls == {}
    assert ours.keys() == theirs.keys()
    adapters = [name for name in theirs if "lora_" in name]
    assert len(adapters) == 2 * len(fused_calls(family))
    for name, want in theirs.items():
        assert want.norm() > 0, name
        assert (ours[name] - want).norm() <= CLOSE * want.norm(), name

    assert fastrank.unpatch(fast) == len(fused_calls(family))
    assert [type(module) for module in fast.modules()] == [type(m) for m in stock.modules()]
    state = stock.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in fast.state_dict().items())
    again = step(fast, family)
    assert all(torch.equal(again[name], want) for name, want in theirs.items())


def autocast_ratios(family, draws):
    """Output or gradient -> our error over PEFT's, for each draw of adapters and batch."""
    stock, fast, report = pair(family, dtype=torch.float32)
    exact_model = copy.deepcopy(stock).double()
    ratios = {}
    for draw in range(draws):
        redraw(draw, stock, fast, exact_model)
        exact = step(exact_model, family, draw)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = step(fast, family, draw), step(stock, family, draw)
        assert report.delegated_calls == {}
        for name, want in exact.items():
            assert ours[name].dtype == theirs[name].dtype
            error, peft = (float((r[name].double() - want).norm()) for r in (ours, theirs))
            if name != "loss":
                ratios.setdefault(name, []).append(error / peft)
    return ratios


def redraw(seed, *models):
    """The same new adapters in all models."""
    for model in models:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                values = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.data.copy_(values)


# Through a whole model the two round at different places, so that on one draw either may be the
# nearer one, by a factor of three for single gradients (and more behind a ReLU, which a rounding
# can switch). Only what many draws have in common says anything.


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_is_as_accurate_as_peft(family):
    ratios = autocast_ratios(family, draws=6)
    assert statistics.median(r for each in ratios.values() for r in each) <= RATIO


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_is_as_accurate_as_peft_in_each_gradient(family):
    for name, ratios in autocast_ratios(family, draws=64).items():
        assert statistics.median(ratios) <= RATIO, name
