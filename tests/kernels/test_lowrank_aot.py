"""The kernels compiled for GPUs that are not here: no spills, shared memory fits, Hopper's
instructions used.

The normal run compiles the heaviest variant of every kernel and kind of product for every target;
the slow one compiles everything that a launcher can select.
"""

import os
from concurrent.futures import ProcessPoolExecutor

import pytest

pytestmark = pytest.mark.aot

# the heaviest flags on the largest rank tile, for each kind of product
HEAVIEST = {
    "cuda": [
        "shrink-r64-bf16-fp32-dot-bf16-ieee-masked-dropout",
        "shrink-r32-bf16-fp32-dot-fp32-tf32x3-masked-dropout",
        "shrink-r32-fp32-fp32-dot-fp32-ieee-masked-dropout",
        "expand-r32-fp32-bf16-dot-bf16-ieee-masked-dropout-add",
        "expand-r16-fp32-bf16-dot-fp32-tf32x3-masked-dropout-add",
        "gram-r64-bf16-dot-bf16-ieee-dropout",
        "dual-r32-bf16-fp32-dot-bf16-ieee-masked-q-by-column",
        "finish-r64-fp32-fp32-masked-want_de-q-by-column",
    ],
    "hip": [
        "shrink-r64-bf16-fp32-dot-bf16-ieee-masked-dropout",
        "shrink-r32-bf16-fp32-dot-fp32-ieee-masked-dropout",
        "expand-r32-fp32-bf16-dot-bf16-ieee-masked-dropout-add",
        "expand-r16-fp32-bf16-dot-fp32-ieee-masked-dropout-add",
        "gram-r64-bf16-dot-bf16-ieee-dropout",
        "dual-r16-bf16-fp32-dot-bf16-ieee-masked-q-by-column",
        "finish-r64-fp32-fp32-masked-want_de-q-by-column",
    ],
}
TARGETS = ("sm_80", "sm_90", "gfx942")


def table(target: str) -> dict:
    from fastrank.kernels.lowrank.variants import variants

    return {v.name: v for v in variants(hip=target.startswith("gfx"))}


def complaints(target: str, name: str) -> list[str]:
    """What is wrong with a variant on a target; empty when nothing is."""
    from fastrank.kernels.common.aot import TARGETS as LIMITS
    from fastrank.kernels.common.aot import compile_kernel

    variant = table(target)[name]
    options = variant.tile.options(hip=target.startswith("gfx"))
    report = compile_kernel(variant.kernel, variant.types, variant.constants, target, options)
    print(f"{target} {name}: {report}")
    found = []
    if report.spills:
        found.append(f"{target} {name} spills: {report}")
    if report.shared > LIMITS[target][1]:
        found.append(f"{target} {name} needs too much shared memory: {report}")
    half = "dot-bf16" in name or "dot-fp16" in name
    if target == "sm_90" and half and report.wgmma == 0:
        found.append(f"{target} {name} doesn't use warp-group products: {report}")
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_heaviest_variants(target):
    names = HEAVIEST["hip" if target.startswith("gfx") else "cuda"]
    assert [c for name in names for c in complaints(target, name)] == []


def test_each_kernel_is_among_the_heaviest():
    for target in TARGETS:
        every = {name.split("-")[0] for name in table(target)}
        heaviest = HEAVIEST["hip" if target.startswith("gfx") else "cuda"]
        assert {name.split("-")[0] for name in heaviest} == every


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant(target):
    names = list(table(target))
    assert len(names) > 400
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(complaints, [target] * len(names), names, chunksize=8)
        assert [c for several in found for c in several] == []


@pytest.mark.parametrize(("target", "block_r"), [("sm_80", 64), ("gfx942", 128)])
def test_a_spill_is_seen(target, block_r):
    """The same kernel with a tile that can't fit the registers."""
    from fastrank.kernels.common.aot import compile_kernel

    variant = table(target)["gram-r64-bf16-dot-bf16-ieee"]
    constants = variant.constants | {"BLOCK_R": block_r}
    options = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}
    report = compile_kernel(variant.kernel, variant.types, constants, target, options)
    assert report.spills > 0


def test_arguments_are_named_once():
    from fastrank.kernels.common.aot import compile_kernel

    variant = table("sm_80")["gram-r64-bf16-dot-bf16-ieee"]
    types = {n: t for n, t in variant.types.items() if n != "M"}
    with pytest.raises(ValueError, match=r"wrong: \{'M'\}"):
        compile_kernel(variant.kernel, types, variant.constants, "sm_80", {"num_warps": 4})
