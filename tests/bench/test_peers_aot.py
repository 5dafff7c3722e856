"""The published schedule's kernels compile for the GPUs they are measured on, and don't spill."""

import pytest

pytestmark = pytest.mark.aot

POINTER = "*bf16"


def compiled(kernel, types, constants, options, target):
    from fastrank.kernels.common.aot import compile_kernel

    return compile_kernel(kernel, types, constants, target, options)


@pytest.mark.parametrize("target", ["sm_90"])
def test_kernels_compile(target):
    from fastrank.bench import lorafusion

    sizes = dict.fromkeys(("M", "N", "K", "R"), "i32:16")
    gemm = {f"p_{name}": POINTER for name in ("x", "w", "l", "r", "out")} | sizes
    gemm |= {"p_mask": "*i8", "w_n": "i32:16", "r_r": "i32:16", "scale": "fp32"}
    fixed = lorafusion._GEMM | {"BLOCK_R": 16, "MASKED": True, "PRECISION": "tf32"}
    options = {"num_warps": 8, "num_stages": 3}
    report = compiled(lorafusion._gemm_kernel, gemm, fixed | {"w_k": 1, "r_n": 1}, options, target)
    assert report.spills == 0
    assert report.shared <= 227 << 10
    assert report.wgmma > 0

    types = {f"p_{name}": POINTER for name in ("dy", "b", "s")}
    types |= {"p_ds": "*fp32", "p_db": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(("M", "N", "R"), "i32:16")
    fixed = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_R": 16, "PRECISION": "tf32"}
    report = compiled(lorafusion._ds_db_kernel, types, fixed, {"num_warps": 8}, target)
    assert report.spills == 0

    types = {"p_x": POINTER, "p_out": POINTER, "p_mask": "*i8", "p_seed": "*i32"}
    types |= {"p": "fp32", "size": "i32:16"}
    compiled(lorafusion._dropout_kernel, types, {"BLOCK": 1024}, {"num_warps": 4}, target)
