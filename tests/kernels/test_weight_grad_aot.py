"""masked_weight_grad's kernel compiled for GPUs that are not here: no spills, shared memory fits,
Hopper's instructions used; and bound by Triton for one, where nothing that varies recompiles.

What is compiled is what the launcher asks for with every dtype, scheme and tile of its table.
"""

import functools
import re
from typing import NamedTuple

import pytest
import torch

from fastrank.bench.static_steps import weight_grad_step as step
from fastrank.kernels.common.launch import Gpu, plan_launches, pretend

pytestmark = pytest.mark.aot

TARGETS = ("sm_80", "sm_90", "gfx942")
F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
# what the normal run compiles; the slow one compiles everything
SAMPLE = (
    r"bf16-.*-64x128x(128|256)x.*-drawn|bf16-.*-32x128x128x.*-loaded"
    r"|fp32-ieee-.*-drawn|fp32-tf32-32x128x.*-drawn"
)


class Variant(NamedTuple):
    kernel: object
    types: dict
    constants: dict
    options: dict

    @property
    def name(self) -> str:
        blocks = [self.constants[f"BLOCK_{b}"] for b in "MNK"]
        tile = "x".join(str(n) for n in [*blocks, *list(self.options.values())[:2]])
        how = "drawn" if self.constants["DRAWN"] else "loaded"
        return f"{self.types['x_ptr'][1:]}-{self.constants['PRECISION']}-{tile}-{how}"


@functools.cache
def table(target: str) -> dict[str, Variant]:
    """name -> variant, of all that is launched on GPUs of a target with any shared memory."""
    from fastrank.kernels.common.aot import TARGETS as KNOWN
    from fastrank.kernels.common.aot import signature_of

    found: dict[str, Variant] = {}

    def note(kernel, grid, arguments):
        options = {n: arguments.pop(n) for n in OPTIONS if n in arguments}
        variant = Variant(kernel, *signature_of(kernel, arguments), options)
        found[variant.name] = variant

    gpu = KNOWN[target][1]
    before = torch.get_float32_matmul_precision()
    try:
        for dtype in (F32, BF16, FP16):
            for precision in ("highest", "high"):
                torch.set_float32_matmul_precision(precision)
                for scheme in ("stratified", "bernoulli"):
                    # what the target has, and what smaller members of its family have
                    for shared in {
                        gpu.shared,
                        min(gpu.shared, 99 << 10),
                        min(gpu.shared, 48 << 10),
                    }:
                        with plan_launches(note), pretend(gpu._replace(shared=shared)):
                            step(dtype, scheme=scheme)
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def complaints(target: str, name: str) -> list[str]:
    """What is wrong with a variant on a target; empty when nothing is."""
    from fastrank.kernels.common.aot import TARGETS as KNOWN
    from fastrank.kernels.common.aot import compile_kernel

    variant = table(target)[name]
    report = compile_kernel(*variant[:3], target, variant.options)
    print(f"{target} {name}: {report}")
    found = []
    if report.spills:
        found.append(f"{target} {name} spills: {report}")
    if report.shared > KNOWN[target][1].shared:
        found.append(f"{target} {name} takes too much shared memory: {report}")
    if target == "sm_90" and not name.startswith("fp32") and report.wgmma == 0:
        found.append(f"{target} {name} doesn't use warp-group products: {report}")
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_a_spread_of_variants(target):
    names = [name for name in table(target) if re.fullmatch(SAMPLE, name)]
    assert {name.split("-")[0] for name in names} == {"bf16", "fp32"}
    assert [c for name in names for c in complaints(target, name)] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant(target):
    names = list(table(target))
    assert len(names) >= 8
    assert [c for name in names for c in complaints(target, name)] == []


def test_every_tile_is_launched():
    """What is compiled leaves out nothing that the launcher could choose."""
    from fastrank.kernels.packing.launch_grad import TILES

    found = set()
    for target in TARGETS:
        for variant in table(target).values():
            blocks = tuple(variant.constants[f"BLOCK_{b}"] for b in "MNK")
            found.add((*blocks, variant.options["num_warps"], variant.options["num_stages"]))
    wanted = {(*t[:3], t.num_warps, t.num_stages) for several in TILES.values() for t in several}
    assert found == wanted


def test_nothing_that_varies_in_training_recompiles(monkeypatch):
    """Rows, seeds, rounds, names, densities and shapes of the same alignment."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    monkeypatch.setattr(driver, "_active", Driver())
    seen = set()

    def compile_only(kernel, grid, arguments):
        seen.add(kernel.run(grid=grid, warmup=True, **arguments).hash)

    with plan_launches(compile_only), pretend(Gpu("sm_90", 132, 227 << 10)):
        step()
        assert len(seen) == 1
        step(M=1)
        step(M=4097)
        step(seed=1)
        step(seed=(1 << 64) - 1, round=3, tensor_id="other")
        step(density=1 / 3)
        step(density=1.0)
        step(N=1024, K=4096)
        assert len(seen) == 1
