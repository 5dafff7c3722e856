"""What of the benchmarks only a GPU can run: events, graphs, the allocator's peak, the peers."""

import pytest
import torch

from fastrank.bench import grids, harness, timing
from fastrank.bench.cases import Case, Operands
from fastrank.bench.variants import frozen

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["autocast", "16-bit", "peft"])
@pytest.mark.parametrize("p", [0.0, 0.1], ids=["p0", "p0.1"])
def test_every_variant_runs_in_both_modes(device, precision, p):
    case = Case(512, 256, 384, 16, "bfloat16", p, bias=False, precision=precision)
    cell = harness.Cell(case, grids.builders(case, device), device)
    cell.prepare()
    for mode in harness.MODES:
        found = cell.measure(mode, timing.clock_for(device), 0.2)
        for name, entry in found.items():
            if name == "unsloth-schedule" and p:
                assert "no dropout" in entry.skipped
                continue
            assert entry.skipped is None, (mode, name, entry.skipped)
            assert entry.timing.median_s > 0
            assert entry.memory.peak_bytes > 0


def test_the_clock_sees_the_device(device):
    """Eight times the work takes several times as long."""
    clock = timing.clock_for(device)
    seconds = []
    for n in (2048, 4096):
        a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
        steps = {"matmul": lambda a=a: a @ a}
        seconds.append(timing.interleave(steps, clock, seconds=0.5)["matmul"].median_s)
    assert 3 < seconds[1] / seconds[0] < 20


def test_a_replayed_step_gives_the_eager_gradient(device):
    case = Case(256, 128, 192, 4, "bfloat16", bias=False)
    step = frozen(case, Operands.of(case, device))
    eager = step.outputs()["dx"].clone()
    replay = timing.captured(step, device)
    step.x.grad.zero_()
    replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(step.x.grad, eager, rtol=0, atol=0)
