"""masked_weight_grad: the gradient of a weight at a mask's positions, and nowhere else.

    g[j] = Σ_m dY[m, n_j] X[m, k_j]      (n_j, k_j) the j-th kept position

On a CPU there are two ways. By entries: a dot product of a row of dYᵀ and one of Xᵀ for each kept
one (torch.sparse.sampled_addmm), over chunks of rows that are turned into scratch memory. Or by
blocks: rows of dW as a dense product, of which the kept entries are copied out before the next
block comes into the same memory. The first does a hundredth of the work at 1 %, at a twentieth of
the speed; the second wins at high densities, and for bf16 sooner. One core of an AMD Zen 5, 1 %,
in ms (dense: the whole product and a gather, in plain torch):

    M, N, K                   by entries    by blocks    dense
    4096, 4096, 4096  fp32           235         1740     3130
    512, 768, 768     fp32           1.3          9.9     11.3
    512, 768, 768     bf16           0.7          2.0      1.6

Key decisions
- Turned chunks of x and dY together, or a block of dW, have at most a sixteenth of dW's elements
  (or 1 MiB): all that is held at a time is less than an eighth of dW.
- By entries, 16-bit operands are widened chunk by chunk and nothing is rounded. By blocks, bf16
  goes through the CPU's bf16 matrix units where it has them: the sums are fp32 inside, and an entry
  is rounded to bf16 once, as the dense gradient of a bf16 weight is.
- Where fp32 products go to oneDNN (common/products.py), blocks are multiplied in chunks of M that
  it adds up in one chain each, and packed parts are added: a hundredth of the additions between
  chains that the dense product needs.
"""

import functools
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastrank.kernels.common import choose_backend, products
from fastrank.kernels.common.products import bf16_units
from fastrank.kernels.common.scratch import scratch, widened
from fastrank.kernels.packing.mask import SparseMask
from fastrank.kernels.packing.overlay import Places, places_of

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
# densities up to which entries are computed by themselves, and the work below which they aren't:
# dense products are faster on bf16 units (measured on AVX512-BF16; AMX is taken for 4 times that)
_MOST_DENSITY, _MOST_DENSITY_BF16, _MOST_DENSITY_AMX = 1 / 16, 1 / 64, 1 / 256
_LEAST_ENTRIES_WORK = 1 << 21
# rows of x and dY that are turned at a time
_FEWEST_TURNED, _MOST_TURNED = 32, 256
# a block of dW has at least this many bytes, at most this many elements, and at least this many
# rows, below which vendor products are slow
_LEAST_BYTES, _MOST_BLOCK, _LEAST_ROWS = 1 << 20, 1 << 20, 128
# rows of x and dY that oneDNN adds up in one chain, those that are widened or copied at a time, and
# the work from which oneDNN is worth chunks
_CHUNK, _COPIED, _LEAST_WORK = 192, 96, 1 << 23


def masked_weight_grad(dy: Tensor, x: Tensor, mask: SparseMask, *, backend: str = "auto") -> Tensor:
    """(dyᵀ x) at the mask's positions, without an N×K buffer.

        >>> from fastrank.kernels.packing import SparseMask, masked_weight_grad
        >>> dy, x, mask = torch.randn(50, 64), torch.randn(50, 128), SparseMask((64, 128), 0.01)
        >>> values_grad = masked_weight_grad(dy, x, mask)
        >>> torch.allclose(values_grad, (dy.T @ x).flatten()[mask.positions()], atol=1e-3)
        True

    Args:
        dy: gradient of the layer's output, of shape `[..., N]`, any strides.
        x: the layer's input, `[..., K]`, with dy's leading dimensions, dtype and device.
        mask: of shape (N, K).
        backend: "auto", "triton" or "reference".

    Returns:
        `[nnz]` in packed order, fp32 (fp64 for fp64 operands). Sums are fp32; at densities above
        1 in 64 on CPUs with bf16 matrix units, entries of bf16 operands are rounded to bf16.

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
            return (_by_entries if _few(x, places) else _by_blocks)(dy, x, places)
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


def _block_rows(N: int, K: int, itemsize: int) -> int:
    """Rows of dW in a block, so that all blocks are about alike."""
    elements = min(_MOST_BLOCK, max(_LEAST_BYTES // itemsize, N * K // 16))
    blocks = -(-N // max(_LEAST_ROWS, elements // K))
    return -(-N // blocks)


def _few(x: Tensor, places: Places) -> bool:
    """Whether so few entries are kept that each is best computed by itself."""
    if x.shape[0] * places.mask.numel < _LEAST_ENTRIES_WORK:
        return False
    most = _MOST_DENSITY
    if x.dtype == torch.bfloat16 and bf16_units():
        most = _MOST_DENSITY_AMX if torch.cpu._is_amx_tile_supported() else _MOST_DENSITY_BF16
    return places.mask.nnz <= most * places.mask.numel


@functools.cache
def _quiet_csr() -> None:
    """Make the first CSR tensor of the process, at which torch warns that these are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()


def _by_entries(dy: Tensor, x: Tensor, places: Places) -> Tensor:
    """Dot products of kept pairs of columns, a chunk of rows at a time."""
    _quiet_csr()
    (M, K), N, dtype = x.shape, dy.shape[1], wide(x.dtype)
    most = max(_LEAST_BYTES // 4, N * K // 16) // (N + K)
    step = min(M, max(_FEWEST_TURNED, min(_MOST_TURNED, most)))
    total = torch.zeros(places.mask.nnz, dtype=dtype)
    found = torch.sparse_csr_tensor(*places.csr(), total, (N, K), check_invariants=False)
    for start in range(0, M, step):
        chunk = slice(start, start + step)
        dy_turned = _turned(dy[chunk], dtype, "masked_grad_dy")
        x_turned = _turned(x[chunk], dtype, "masked_grad_x")
        torch.sparse.sampled_addmm(found, dy_turned, x_turned.t(), out=found)
    return found.values()


def _turned(tensor: Tensor, dtype: torch.dtype, slot: str) -> Tensor:
    """The transpose, contiguous, in scratch memory.

    Turned, then widened: one copy that does both takes four times as long.
    """
    first = slot if tensor.dtype == dtype else "masked_grad_turned"
    turned = scratch(tensor.t(), tensor.dtype, first).copy_(tensor.t())
    return widened(turned, dtype, slot)


def _by_blocks(dy: Tensor, x: Tensor, places: Places) -> Tensor:
    """Dense products of blocks of rows of dW."""
    (M, K), N = x.shape, dy.shape[1]
    halves = x.dtype == torch.bfloat16 and bf16_units()
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
