"""The kernels of truncated_svd compiled for GPUs that are not here: no spills, shared memory fits,
Hopper's instructions used; and nothing that varies from call to call is compiled anew.

The normal run compiles the heaviest of each kind; the slow one everything.
"""

import functools
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from fastrank.kernels.common.launch import plan_launches, pretend

pytestmark = pytest.mark.aot

TARGETS = ("sm_80", "sm_90", "gfx942")
# what any of the targets has for a program
MOST_SHARED = 64 << 10
SAMPLE = (
    "factor-32x4-optional",
    "filter-8x256x4",
    "jacobi-64x128x8-fp32",
    "jacobi_memory-16x128x16-fp32",
    "sparse-4x128x4-fp32-gated-combine",
    "product-64x32x64x8-bf16-fp32-scaled-gated-combine-ak-xq",
    "apply-64x32x32x4-fp32-optional-xq",
    "gram-32x32x4-fp32-xm",
    "finish-64x8x256x4",
)


@functools.cache
def table(target: str) -> dict:
    from fastrank.kernels.svd.variants import variants

    return variants(target)


def complaints(target: str, name: str) -> list[str]:
    """What is wrong with a variant on a target; empty when nothing is."""
    from fastrank.kernels.common.aot import compile_kernel

    variant = table(target)[name]
    report = compile_kernel(*variant[:3], target, variant.options)
    print(f"{target} {name}: {report}")
    found = []
    if report.spills:
        found.append(f"{target} {name} spills: {report}")
    if report.shared > MOST_SHARED:
        found.append(f"{target} {name} takes more shared memory than {MOST_SHARED}: {report}")
    multiplies = name.startswith(("product", "apply"))
    if target == "sm_90" and multiplies and report.wgmma == 0:
        found.append(f"{target} {name} doesn't use warp-group products: {report}")
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_a_spread_of_variants(target):
    assert [c for name in SAMPLE for c in complaints(target, name)] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant(target):
    names = list(table(target))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(complaints, [target] * len(names), names, chunksize=8)
        assert [c for several in found for c in several] == []


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_and_tile_is_planned(target):
    """What is compiled leaves out nothing that the launchers could choose."""
    from fastrank.kernels.svd import fused, fused_factor, fused_jacobi, fused_products
    from fastrank.kernels.svd.launch_products import PRODUCT_TILES, SPARSE_TILES
    from fastrank.kernels.svd.launchers import JACOBI_TILES

    kernels, tiles = set(), set()
    for variant in table(target).values():
        name = variant.kernel.__name__
        kernels.add(name)
        blocks = {n: v for n, v in variant.constants.items() if n.startswith("BLOCK")}
        tiles.add((name, *blocks.values(), variant.options["num_warps"]))
    modules = (fused, fused_factor, fused_jacobi, fused_products)
    every = {n for module in modules for n in vars(module) if n.startswith("svd_")}
    assert kernels == every
    for pairs, length, warps in JACOBI_TILES:
        assert ("svd_jacobi_kernel", pairs, length, warps) in tiles
    for block_q, (block_m, block_k, warps, _) in PRODUCT_TILES.items():
        for kernel in ("svd_product_kernel", "svd_apply_kernel"):
            assert (kernel, block_m, block_k, block_q, warps) in tiles
    for block_q, (block_m, warps) in SPARSE_TILES.items():
        assert ("svd_sparse_kernel", block_m, block_q, warps) in tiles


def planned(calls) -> set:
    """What Triton would compile for these calls."""
    from fastrank.kernels.common.aot import TARGETS as KNOWN
    from fastrank.kernels.svd.variants import OPTIONS, _signature

    seen = set()

    def note(kernel, grid, arguments):
        assert all(n > 0 for n in grid)
        options = {n: arguments.pop(n) for n in OPTIONS}
        types, constants = _signature(kernel, arguments)
        parts = (tuple(d.items()) for d in (types, constants, options))
        seen.add((kernel.__name__, *parts))

    with plan_launches(note), pretend(KNOWN["sm_90"][1]):
        for call in calls:
            call()
    return seen


def test_nothing_that_varies_is_compiled_anew():
    """Matrices, entries, seeds, passes, and sizes that are multiples of 16."""
    from fastrank.kernels.svd import triton_path
    from fastrank.kernels.svd.presets import PRESETS
    from fastrank.kernels.svd.variants import sparse_batch

    def sparse(G, N, K, nnz, accuracy="default", seed=0):
        return lambda: triton_path.sparse(
            sparse_batch(G, N, K, nnz), 48, PRESETS[accuracy]._replace(extra=16), seed
        )

    first = planned([sparse(72, 768, 768, 400_000)])
    others = [
        sparse(3, 768, 768, 17_001, seed=2**64 - 1),
        sparse(1, 768, 768, 16, "fast"),
        sparse(2, 4096, 1024, 99_999, "tight"),
    ]
    assert planned(others) == first

    def factored(G, N, K, weights=None, seed=1):
        B, A = torch.zeros(G, N, 160), torch.zeros(G, 160, K)
        return lambda: triton_path.factored(B, A, weights, 16, PRESETS["default"], seed)

    first = planned([factored(2, 768, 768)])
    others = [factored(7, 768, 4096, torch.ones(160), 16), factored(1, 4096, 768)]
    assert planned(others) == first
