"""The kernels compiled for GPUs that are not here: no spills, shared memory fits, Hopper's
instructions used.

The normal run compiles a spread of variants for every target; the slow one compiles everything that
the shipped tables can select, each device's own and the default, on each target.
"""

import functools
import os
import re
from concurrent.futures import ProcessPoolExecutor

import pytest

pytestmark = pytest.mark.aot

# a spread of what the tables select: of each kernel and each kind of product, with heavy flags
SAMPLE = {
    "cuda": [
        r"shrink-r64-.*-bf16-fp32-dot-bf16-ieee-masked-dropout",
        r"shrink-r32-.*-bf16-fp32-dot-fp32-tf32x3-masked-dropout",
        r"shrink-r32-.*-fp32-fp32-dot-fp32-ieee-masked-dropout",
        r"expand-r32-.*-fp32-bf16-dot-bf16-ieee-masked-dropout-add",
        r"expand-r16-.*-fp32-bf16-dot-fp32-tf32x3-masked-dropout-add",
        r"gram-r64-32x128x8x3-bf16-dot-bf16-ieee-masked-dropout",
        r"dual-r32-.*-bf16-fp32-dot-bf16-ieee-masked-q-by-column",
        r"finish-r64-.*-fp32-fp32-masked-want_de-q-by-column",
        r"gemm-r16-128x256x.*-bf16-fp32-bf16-dot-bf16-ieee-even_c-bias-q-by-column-w-by-column",
        r"gemm-r16-128x128x.*-bf16-fp32-bf16-dot-fp32-tf32x3-even_c-masked",
        r"gemm-r16-(128|64)x128x.*-bf16-fp32-bf16-dot-fp32-tf32x3-masked-dropout",
    ],
    "hip": [
        r"shrink-r64-.*-bf16-fp32-dot-bf16-ieee-masked-dropout",
        r"shrink-r32-.*-bf16-fp32-dot-fp32-ieee-masked-dropout",
        r"expand-r32-.*-fp32-bf16-dot-bf16-ieee-masked-dropout-add",
        r"expand-r16-.*-fp32-bf16-dot-fp32-ieee-masked-dropout-add",
        r"gram-r64-.*-bf16-dot-bf16-ieee-masked-dropout",
        r"dual-r16-.*-bf16-fp32-dot-bf16-ieee-masked-q-by-column",
        r"finish-r64-.*-fp32-fp32-masked-want_de-q-by-column",
        r"gemm-r16-256x256x.*-bf16-fp32-bf16-dot-bf16-ieee-even_c-bias-q-by-column",
        r"gemm-r16-128x128x.*-bf16-fp32-bf16-dot-fp32-ieee-masked-dropout",
    ],
}
TARGETS = ("sm_80", "sm_90", "gfx942")


@functools.cache
def table(target: str) -> dict:
    """name -> variant, of a target's own choices and of the default ones."""
    from fastrank.kernels.common.aot import TARGETS as KNOWN
    from fastrank.kernels.lowrank.choices import known_devices, table_named
    from fastrank.kernels.lowrank.tiles import shared_bytes
    from fastrank.kernels.lowrank.variants import variants

    assert set(known_devices()) == {"default", *TARGETS}
    gpu, found = KNOWN[target][1], {}
    hip = gpu.hip
    for name in ("default", target):
        choices = table_named(name, gpu)
        assert all(shared_bytes(*chosen, hip) <= gpu.shared for chosen in choices.tiles())
        found |= {v.name: v for v in variants(choices, hip)}
    return found


def complaints(target: str, name: str) -> list[str]:
    """What is wrong with a variant on a target; empty when nothing is."""
    from fastrank.kernels.common.aot import compile_kernel
    from fastrank.kernels.lowrank.tiles import shared_bytes

    variant = table(target)[name]
    hip = target.startswith("gfx")
    options = variant.tile.options(hip)
    report = compile_kernel(variant.kernel, variant.types, variant.constants, target, options)
    print(f"{target} {name}: {report}")
    found = []
    if report.spills:
        found.append(f"{target} {name} spills: {report}")
    kernel = name.split("-")[0]
    bound = shared_bytes(kernel, operands(kernel, name), variant.block_r, variant.tile, hip)
    if report.shared > bound:
        found.append(f"{target} {name} takes more shared memory than the {bound} said: {report}")
    half = "dot-bf16" in name or "dot-fp16" in name
    if target == "sm_90" and half and report.wgmma == 0:
        found.append(f"{target} {name} doesn't use warp-group products: {report}")
    return found


def operands(kernel: str, name: str) -> str:
    if kernel == "finish":
        return "any"
    if "dot-fp32" not in name:
        return "half"
    if kernel == "gemm":
        return "mixed"
    return "tf32" if "-tf32" in name else "ieee"


def sampled(target: str) -> list[str]:
    """One variant for each pattern of SAMPLE that the target's tables have."""
    found = []
    for pattern in SAMPLE["hip" if target.startswith("gfx") else "cuda"]:
        found += [name for name in table(target) if re.fullmatch(pattern, name)][-1:]
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_a_spread_of_variants(target):
    assert [c for name in sampled(target) for c in complaints(target, name)] == []


def test_each_kernel_is_in_the_sample():
    for target in TARGETS:
        every = {name.split("-")[0] for name in table(target)}
        names = sampled(target)
        assert {name.split("-")[0] for name in names} == every
        assert len(names) >= len(every) + 2


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant(target):
    names = list(table(target))
    assert len(names) > 400
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(complaints, [target] * len(names), names, chunksize=8)
        assert [c for several in found for c in several] == []


def a_gram(target: str):
    return next(v for n, v in table(target).items() if re.match("gram-r64.*dot-bf16-ieee$", n))


@pytest.mark.parametrize(("target", "block_r"), [("sm_80", 64), ("gfx942", 128)])
def test_a_spill_is_seen(target, block_r):
    """The same kernel with a tile that can't fit the registers."""
    from fastrank.kernels.common.aot import compile_kernel

    variant = a_gram(target)
    constants = variant.constants | {"BLOCK_R": block_r}
    options = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}
    report = compile_kernel(variant.kernel, variant.types, constants, target, options)
    assert report.spills > 0


def test_arguments_are_named_once():
    from fastrank.kernels.common.aot import compile_kernel

    variant = a_gram("sm_80")
    types = {n: t for n, t in variant.types.items() if n != "M"}
    with pytest.raises(ValueError, match=r"wrong: \{'M'\}"):
        compile_kernel(variant.kernel, types, variant.constants, "sm_80", {"num_warps": 4})
