"""The packing kernels compiled for GPUs that are not here: no spills, and no fused multiply-adds
that would round otherwise than plain torch; nothing that varies from round to round recompiles.
"""

import os
import re
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from fastrank.kernels.common.launch import Gpu, plan_launches, pretend

pytestmark = pytest.mark.aot

TARGETS = ("sm_80", "sm_90", "gfx942")
# of each kernel the heaviest, and each format
SAMPLE = (
    r"positions",
    r"bernoulli-write",
    r"pack-bf16-format-fp32-.*-drawn",
    r"pack-fp32-format-bf16-.*-drawn",
    r"pack-fp32-format-fp16-block-256-drawn",
    r"pack-fp32-format-int8-block-256-stochastic-drawn",
    r"pack-fp16-format-int8-block-4096",
    r"unpack-bf16-u8-block-256-scaled-bytes-drawn",
    r"unpack-fp32-bf16-block-256",
    r"aggregate-type-uint8-block-256-scaled-bytes",
    r"aggregate-type-bf16-block-256",
    r"aggregate_masks-type-bf16-block-256-strata-16-width-128",
    r"aggregate_masks-type-uint8-block-16-strata-128-width-16-scaled-bytes",
)


def table(target: str) -> dict:
    from fastrank.kernels.common.aot import TARGETS as KNOWN
    from fastrank.kernels.packing.variants import variants

    return variants(KNOWN[target][1])


def complaints(target: str, name: str) -> list[str]:
    """What is wrong with a variant on a target; empty when nothing is."""
    from fastrank.kernels.common.aot import compile_kernel

    variant = table(target)[name]
    report = compile_kernel(*variant[:3], target, variant.options)
    print(f"{target} {name}: {report}")
    return [f"{target} {name} spills: {report}"] if report.spills else []


@pytest.mark.parametrize("target", TARGETS)
def test_a_spread_of_variants(target):
    known = table(target)
    names = [n for p in SAMPLE for n in known if re.fullmatch(p, n)]
    assert len(names) == len(SAMPLE), set(names)
    assert {n.split("-")[0] for n in names} == {n.split("-")[0] for n in known}
    assert [c for name in names for c in complaints(target, name)] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant(target):
    names = list(table(target))
    assert len(names) > 100
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(complaints, [target] * len(names), names, chunksize=8)
        assert [c for several in found for c in several] == []


def compiled_text(name: str) -> str:
    import triton
    from triton.compiler import ASTSource

    from fastrank.kernels.common.aot import TARGETS as KNOWN

    kernel, types, constants, options = table("sm_90")[name]
    signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=KNOWN["sm_90"][0], options=options).asm["ptx"]


def test_products_and_sums_are_rounded_one_by_one():
    names = (
        "aggregate-type-uint8-block-256-scaled-bytes",
        "unpack-fp32-u8-block-256-scaled-bytes-drawn",
    )
    for name in names:
        text = compiled_text(name)
        assert "mul.rn.f32" in text or "mul.f32" in text
        assert "fma" not in text
        assert "ftz" not in text  # subnormal numbers stay


@pytest.fixture
def compiled(monkeypatch):
    """(kernel, hash of what was compiled) of each distinct launch, bound by Triton for sm_90."""
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
    with plan_launches(compile_only), pretend(Gpu("sm_90", 4, 227 << 10)):
        yield seen


def test_nothing_that_varies_between_rounds_recompiles(compiled):
    """Seeds, rounds, tensors, shapes, weights, clients."""
    from fastrank.kernels.packing import Packed, SparseMask, draws, launchers

    def step(shape, density, seed, round, clients):
        mask = SparseMask(shape, density, seed, f"layer.{round}", round)
        dense = torch.zeros(shape)
        source = draws.stream(seed, mask.tensor_id, draws.ROUNDING, round)
        launchers.positions(mask, dense.device)
        parts = launchers.pack(dense, None, mask, torch.int8, 256, source)
        packed = Packed(*parts, mask)
        launchers.unpack_add_(dense, None, packed, 1.0 + round)
        launchers.aggregate([packed] * clients, [1.0] * clients)
        launchers.aggregate_dense([packed] * clients, [1.0] * clients, dense)

    step((64, 128), 0.01, 0, 0, 1)
    first = set(compiled)
    assert len({name for name, _ in first}) == len(first) == 5
    step((33, 77), 0.01, 2**64 - 1, 1, 2)
    step((48, 16), 0.012, 2**31, 2**24 - 1, 16)
    assert compiled == first
