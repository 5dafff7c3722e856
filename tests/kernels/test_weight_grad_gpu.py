"""masked_weight_grad and sparse_linear on a GPU: right, deterministic, without an N×K buffer."""

import pytest
import torch
from torch import Tensor

from fastrank.kernels.packing import SparseMask
from fastrank.kernels.packing.sparse_linear import sparse_linear
from fastrank.kernels.packing.weight_grad import masked_weight_grad

pytestmark = pytest.mark.gpu

F64, F32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, FP16, F64]


def operands(M: int, N: int, K: int, dtype: torch.dtype, device) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(M + N + K)
    return tuple(torch.randn(M, n, generator=g, dtype=F64).to(device, dtype) for n in (N, K))


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.to(F64) - exact).norm() / exact.norm())


@pytest.mark.parametrize("scheme", ["stratified", "bernoulli"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", [(512, 768, 768), (4096, 768, 3072), (431, 123, 63), (1, 7, 300)])
def test_equals_the_dense_gradient_at_the_mask(shape, dtype, scheme, device):
    M, N, K = shape
    mask = SparseMask((N, K), 0.01, seed=3, tensor_id="w", scheme=scheme)
    dy, x = operands(M, N, K, dtype, device)
    exact = (dy.to(F64).t() @ x.to(F64)).reshape(-1)[mask.positions(device)]
    got = masked_weight_grad(dy, x, mask)
    assert got.dtype == (F64 if dtype == F64 else F32)
    assert error(got, exact) < (1e-13 if dtype == F64 else 1e-5)
    assert torch.equal(got, masked_weight_grad(dy, x, mask))
    assert error(masked_weight_grad(dy, x, mask, backend="reference"), exact) < 1e-5


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "fp32"])
def test_no_buffer_of_the_weights_size(dtype, device):
    N = K = M = 4096
    mask = SparseMask((N, K), 0.01)
    dy, x = operands(M, N, K, dtype, device)
    masked_weight_grad(dy, x, mask)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = masked_weight_grad(dy, x, mask)
    peak = torch.cuda.max_memory_allocated() - before
    assert got.nbytes <= peak <= N * K * 4 / 8


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_sparse_linear(dtype, device):
    N, K, M = 320, 192, 130
    mask = SparseMask((N, K), 0.05, seed=1)
    dy, x = operands(M, N, K, dtype, device)
    weight = torch.randn(N, K, dtype=F64).to(device, dtype)
    before = weight.clone()
    values = torch.randn(mask.nnz, dtype=F64).to(device, F64 if dtype == F64 else F32)
    values.requires_grad_()
    x.requires_grad_()
    y = sparse_linear(x, weight, None, values, mask)
    y.backward(dy)
    total = weight.clone()
    kept = mask.positions(device)
    total.view(-1)[kept] = (weight.view(-1)[kept] + values.detach()).to(dtype)
    assert torch.equal(y, torch.nn.functional.linear(x, total))
    assert torch.equal(x.grad, dy @ total)
    exact = (dy.to(F64).t() @ x.detach().to(F64)).reshape(-1)[kept]
    assert error(values.grad, exact) < 1e-5
    assert torch.equal(weight, before)
