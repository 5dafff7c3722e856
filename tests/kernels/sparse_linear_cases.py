"""What the tests of sparse_linear share: inputs, and W + S as a tensor of its own."""

import torch
from torch import Tensor

from fastrank.kernels.packing import SparseMask

F64, F32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
N, K = 28, 20
SCHEMES = {"stratified": {"density": 0.1}, "bernoulli": {"density": 0.1, "scheme": "bernoulli"}}


def inputs(
    dtype: torch.dtype = F64, M: int = 12, fields: dict = SCHEMES["stratified"]
) -> tuple[dict[str, Tensor], SparseMask]:
    g = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    mask = SparseMask((N, K), seed=2, tensor_id="w", **fields)
    values = draw(mask.nnz).to(F64 if dtype == F64 else F32).requires_grad_()
    given = {
        "x": draw(M, K).to(dtype).requires_grad_(),
        "weight": draw(N, K).to(dtype),
        "bias": draw(N).to(dtype).requires_grad_(),
        "values": values,
    }
    return given, mask


def dense(weight: Tensor, values: Tensor, mask: SparseMask) -> Tensor:
    """W + S as a tensor of its own, differentiable in values."""
    S = torch.zeros(mask.numel, dtype=values.dtype).index_put((mask.positions(),), values)
    return (weight + S.view(mask.shape)).to(weight.dtype)


def bits_equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
