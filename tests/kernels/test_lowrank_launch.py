"""The launchers through Triton's own argument binding, for a GPU that is not here.

A stand-in driver names the target; every launch is specialised and compiled but not run. This is
what shows that row counts, ranks, masks and p are runtime values.
"""

import pytest
import torch

from fastrank.kernels.common.launch import Gpu, plan_launches, pretend
from fastrank.kernels.lowrank import core
from fastrank.kernels.lowrank.choices import override

pytestmark = pytest.mark.aot

KERNELS = [f"lowrank_{n}_kernel" for n in ("shrink", "expand", "gram", "dual", "finish")]
H100 = Gpu("sm_90", 132, 227 << 10)


@pytest.fixture
def compiled(monkeypatch):
    """(kernel, hash of what was compiled) of each distinct launch since the fixture began."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    seen = set()

    def compile_only(kernel, grid, arguments):
        assert all(n > 0 for n in grid)
        found = kernel.run(grid=grid, warmup=True, **arguments)
        seen.add((kernel.__name__, found.hash))

    monkeypatch.setattr(driver, "_active", Driver())
    with plan_launches(compile_only), pretend(H100):
        yield seen


def step(M: int, p: float = 0.1, R: int = 8, active=None, row_ids=None) -> None:
    """Forward and backward of fp32 adapters over a bf16 x."""
    from fastrank.kernels.lowrank import triton_path

    K = N = 256
    x, y, dy = torch.zeros(M, K).bfloat16(), torch.zeros(M, N).bfloat16(), torch.zeros(M, N)
    A, B, e, seed = torch.zeros(R, K), torch.zeros(N, R), torch.zeros(R), torch.tensor([1])
    plain = (0.5, p, "triton", torch.bfloat16, "peft")
    branch, aux = core.prepare(A, active, None, seed, row_ids, *plain)
    triton_path.add_(y, x, A, B, e, branch, aux)
    S = torch.zeros(M, branch.kept)
    needs = (True, True, True, True)
    weight = torch.zeros(N, K).bfloat16()
    arguments = (dy.bfloat16(), weight, x, A, B, e, S, None, branch, aux, needs)
    triton_path.backward(*arguments, torch.bfloat16)


def test_nothing_that_varies_in_training_recompiles(compiled):
    step(128)
    first = set(compiled)
    assert {name for name, _ in first} == set(KERNELS)
    step(129)
    step(1)
    step(70_001)
    step(128, p=0.25)
    step(128, active=3)
    step(128, active=torch.arange(8) % 2 == 0)
    step(128, row_ids=torch.arange(128))
    assert compiled == first


def test_masks_on_the_device_recompile_nothing(compiled, monkeypatch):
    """A runtime prefix of any length, a mask, and what may be trained: values, not variants."""

    def resolve(active, trainable, ranks, device):
        active = torch.arange(ranks) < active if active.dim() == 0 else active
        return ranks, ranks, None, active, trainable

    monkeypatch.setattr(core, "resolve_masks", resolve)
    step(128, R=256, active=torch.tensor(256))
    first = set(compiled)
    for prefix in (192, 17, 16, 1, 0):
        step(128, R=256, active=torch.tensor(prefix))
    step(129, R=256, active=torch.arange(256) % 3 == 0)
    assert compiled == first


@pytest.mark.parametrize("route", ["vendor", "gemm"])
def test_a_prefix_on_the_host_recompiles_nothing(compiled, route):
    """Ranks that share a tile; the strides of A and B stay those of all ranks."""
    rules = {operands: [{"use": route}] for operands in ("half", "mixed")}
    with override({"routes": dict.fromkeys(("forward", "forward_any", "dx", "dx_any"), rules)}):
        layer(32)
        first = set(compiled)
        assert ("lowrank_gemm_kernel" in {name for name, _ in first}) == (route == "gemm")
        for prefix in (31, 24, 17):
            layer(32, active=prefix)
        assert compiled == first
        compiled.clear()
        layer(32, active=0)
        assert not compiled


def layer(R: int, active: int | None = None) -> None:
    """Forward and backward of the whole linear."""
    x, weight, dy = (torch.zeros(128, 128).bfloat16() for _ in range(3))
    A, B = torch.zeros(R, 128), torch.zeros(128, R)
    plain = (0.5, 0.0, "triton", torch.bfloat16, "peft")
    branch, aux = core.prepare(A, active, None, None, None, *plain)
    _, S, keep = core.forward(None, x, weight, None, A, B, None, branch, aux)
    needs = (True, False, False, True, True, False)
    core.backward(dy, x, weight, A, B, None, S, keep, branch, aux, needs, torch.bfloat16)


def test_ranks_share_a_tile(compiled):
    """Another rank of the same tile compiles again only where a stride becomes a multiple of 16."""
    step(128)
    first = set(compiled)
    step(128, R=12)
    step(128, R=5)
    assert compiled == first
    step(128, R=16)
    assert {name for name, _ in compiled - first} <= {
        "lowrank_expand_kernel",
        "lowrank_dual_kernel",
        "lowrank_finish_kernel",
    }
