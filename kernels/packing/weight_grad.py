"""masked_weight_grad: the gradient of a weight at a mask's positions, and nowhere else.

    g[j] = Σ_m dY[m, n_j] X[m, k_j]      (n_j, k_j) the j-th kept position

On a CPU a block of rows of dW is multiplied into scratch memory, and what the mask keeps of it is
copied out before the next block comes into the same memory. The whole product is computed, because
vendor products make that the cheapest way from about 0.3 % on (one product of a pair of columns
costs what hundreds inside a dense tile do), but never more of it held than a block.

Key decisions
- A block is a sixteenth of dW, within 1 MiB and 2**20 elements, and at least 128 rows.
- Where fp32 products go to oneDNN (common/products.py), M is cut into chunks that it adds up in one
  chain each, and the packed parts are added: a hundredth of the additions between chains that the
  dense product needs, so this is the faster of the two.
- bf16 operands go through the CPU's bf16 matrix units where it has them: the sums are fp32 inside,
  and an entry is rounded to bf16 once, as the dense gradient of a bf16 weight is. Elsewhere 16-bit
  operands are widened chunk by chunk, and nothing is rounded.
"""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastrank.kernels.common import choose_backend, products
from fastrank.kernels.common.scratch import scratch
from fastrank.kernels.packing.mask import SparseMask
from fastrank.kernels.packing.overlay import Places, places_of

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
# a block of dW has at least this many bytes, at most this many elements, and at least this many
# rows, below which vendor products are slow
_LEAST_BYTES, _MOST_BLOCK, _LEAST_ROWS = 1 << 20, 1 << 20, 128
# rows of x and dY that oneDNN adds up in one chain, those that are widened or copied at a time, and
# the work from which oneDNN is worth chunks
_CHUNK, _COPIED, _LEAST_WORK = 192, 96, 1 << 23


def masked_weight_grad(dy: Tensor, x: Tensor, mask: SparseMask, *, backend: str = "auto") -> Tensor:
    """(dyᵀ x) at the mask's positions, without an N×K buffer.

        values.grad = masked_weight_grad(dy, x, SparseMask((N, K), density=0.01, seed=7))

    Args:
        dy: gradient of the layer's output, of shape `[..., N]`, any strides.
        x: the layer's input, `[..., K]`, with dy's leading dimensions, dtype and device.
        mask: of shape (N, K).
        backend: "auto", "triton" or "reference".

    Returns:
        `[nnz]` in packed order, fp32 (fp64 for fp64 operands). Sums are fp32; on CPUs with bf16
        matrix units the entries of 16-bit operands are rounded to bf16 after it.

    Raises:
        ValueError, TypeError: arguments that don't fit, with what was wanted.
    """
    check_gradient_operands(dy, x, mask)
    chosen = choose_backend(backend, x.device, x.dtype)
    with torch.no_grad():
        flat = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        return packed_gradient(*flat, places_of(mask, x.device), chosen)


def check_gradient_operands(dy: Tensor, x: Tensor, mask: SparseMask) -> None:
    """Shapes, dtypes and devices; ValueError or TypeError."""
    if not isinstance(mask, SparseMask):
        raise TypeError(f"mask has type {type(mask).__name__}; pass a SparseMask")
    for name, tensor in (("dy", dy), ("x", x)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} has type {type(tensor).__name__}; pass a torch.Tensor")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} has dtype {tensor.dtype}; cast it to a floating dtype")
        if tensor.dim() == 0:
            raise ValueError(f"{name} is 0-d; pass at least one dimension")
    if dy.dtype != x.dtype or dy.device != x.device:
        raise ValueError(
            f"dy is {dy.dtype} on {dy.device} but x {x.dtype} on {x.device}; cast or move one"
        )
    if dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"dy has shape {list(dy.shape)} but x {list(x.shape)}; all but the last must agree"
        )
    if mask.shape != (dy.shape[-1], x.shape[-1]):
        raise ValueError(
            f"the mask's shape is {mask.shape} but dy and x make "
            f"({dy.shape[-1]}, {x.shape[-1]}); pass a mask of shape (N, K)"
        )


def packed_gradient(dy: Tensor, x: Tensor, places: Places, backend: str) -> Tensor:
    """(dyᵀ x) at the mask's positions for checked dy `[M, N]` and x `[M, K]`.

    Args:
        backend: as choose_backend names it.
    """
    with no_autocast(x):
        if x.shape[0] == 0 or places.mask.nnz == 0:
            return torch.zeros(places.mask.nnz, dtype=wide(x.dtype), device=x.device)
        if backend == "triton":
            # imported on first use: nobody without a GPU pays for loading Triton
            from fastrank.kernels.packing import launch_grad

            return launch_grad.masked_gradient(dy, x, places)
        if backend == "torch":
            return _blockwise(dy, x, places)
        return reference(dy, x, places)


def reference(dy: Tensor, x: Tensor, places: Places) -> Tensor:
    """The definition: rows of dW as they are, one block at a time, in fp32 (fp64)."""
    dtype, K = wide(x.dtype), x.shape[1]
    x, found = x.to(dtype), []
    for rows, kept in places.blocks(_block_rows(*places.mask.shape, dtype.itemsize)):
        block = dy[:, rows].t().to(dtype) @ x
        found.append(block.reshape(-1)[places.positions[kept] - rows.start * K])
    return torch.cat(found)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What gradients of 16-bit and fp32 operands are; fp64 stays."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(tensor: Tensor) -> AbstractContextManager:
    """Autocast would round fp32 operands of the products in here."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


@functools.cache
def _bf16_units() -> bool:
    """Whether this CPU multiplies bf16 matrices faster than fp32 ones (x86 AMX or AVX512-BF16)."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _block_rows(N: int, K: int, itemsize: int) -> int:
    """Rows of dW in a block, so that all blocks are about alike."""
    elements = min(_MOST_BLOCK, max(_LEAST_BYTES // itemsize, N * K // 16))
    blocks = -(-N // max(_LEAST_ROWS, elements // K))
    return -(-N // blocks)


def _blockwise(dy: Tensor, x: Tensor, places: Places) -> Tensor:
    """The CPU path."""
    (M, K), N = x.shape, dy.shape[1]
    halves = x.dtype == torch.bfloat16 and _bf16_units()
    dtype = x.dtype if halves else wide(x.dtype)
    rows = _block_rows(N, K, dtype.itemsize)
    step = M
    if x.dtype != dtype or not (_plain(x) and _plain(dy)):
        step = _COPIED
    elif dtype == torch.float32 and products.prefers_onednn():
        step = _CHUNK if min(M, _CHUNK) * rows * K >= _LEAST_WORK else M
    if step >= M and rows >= N:
        whole = _operand(dy, dtype, "masked_grad_dy"), _operand(x, dtype, "masked_grad_x")
        return _kept_of_product(*whole, places.positions).to(wide(x.dtype))
    blocks = places.blocks(rows)
    # within a block; of 32 bits, because they stand beside a block at the peak
    local = torch.remainder(places.positions, rows * K).to(torch.int32)
    total = torch.empty(local.shape[0], dtype=wide(x.dtype))
    for start in range(0, M, step):
        chunk = slice(start, start + step)
        x_chunk = _operand(x[chunk], dtype, "masked_grad_x")
        for columns, kept in blocks:
            dy_block = _operand(dy[chunk, columns], dtype, "masked_grad_dy")
            part = _kept_of_product(dy_block, x_chunk, local[kept])
            if start == 0:
                total[kept] = part
            else:
                total[kept] += part
    return total


def _kept_of_product(dy: Tensor, x: Tensor, local: Tensor) -> Tensor:
    """The entries of dyᵀ x `[n, K]` at these flat positions; the product lives in here alone."""
    if x.dtype == torch.float32 and products.prefers_onednn():
        product = products.mm(dy.t(), x)
    else:
        n, K = dy.shape[1], x.shape[1]
        memory = scratch(x[:1].expand(n, K), x.dtype, "masked_grad")
        product = torch.mm(dy.t(), x, out=memory)
    return product.view(-1).index_select(0, local)


def _plain(tensor: Tensor) -> bool:
    """Whether vendor products read it as it is."""
    return tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]


def _operand(tensor: Tensor, dtype: torch.dtype, slot: str) -> Tensor:
    if tensor.dtype == dtype and _plain(tensor):
        return tensor
    return scratch(tensor, dtype, slot).copy_(tensor)
