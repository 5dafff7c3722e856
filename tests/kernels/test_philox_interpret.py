"""The Triton Philox helper against plain torch, in the interpreter."""

import pytest
import torch
import triton
import triton.language as tl

from fastrank.kernels.common import dropout_keep, dropout_threshold, philox4x32, row_words
from fastrank.kernels.common.jit import keep_tile, row_words_tile

pytestmark = pytest.mark.interpret


@triton.jit
def tile_kernel(
    seed_ptr,
    row_ids_ptr,
    words_ptr,
    keep_ptr,
    column,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    o_m = tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, BLOCK_K)
    row = tl.load(row_ids_ptr + o_m)
    here = o_m[:, None] * BLOCK_K + o_k[None, :]
    words = row_words_tile(seed_ptr, row, column, BLOCK_M, BLOCK_K)
    tl.store(words_ptr + here, words.to(tl.int64))
    keep = keep_tile(seed_ptr, row, column, threshold, BLOCK_M, BLOCK_K)
    tl.store(keep_ptr + here, keep.to(tl.int8))


@pytest.mark.parametrize("seed", [0, 12345, -1, 2**62 + 3, -(2**63)])
@pytest.mark.parametrize(("column", "shape"), [(0, (4, 8)), (64, (16, 32)), (2**31, (2, 4))])
def test_same_bits_as_plain_torch(seed, column, shape):
    rows, columns = shape
    row_ids = torch.arange(rows) * (2**40 + 17) + 5
    seed, p = torch.tensor([seed]), 0.37
    words, keep = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.int8)
    tile_kernel[(1,)](
        seed, row_ids, words, keep, column, dropout_threshold(p) - 2**31, rows, columns
    )
    # row_words would draw every column before a far tile
    expected = far_words(seed, row_ids, column, columns)
    assert torch.equal(words, expected)
    assert torch.equal(keep.bool(), expected >= dropout_threshold(p))
    if column == 0:
        assert torch.equal(words, row_words(seed, row_ids, columns))
        assert torch.equal(keep.bool(), dropout_keep(seed, rows, columns, p, row_ids))


def far_words(seed, row_ids, column, columns):
    out = torch.empty(row_ids.numel(), columns, dtype=torch.int64)
    for j in range(columns):
        block = torch.tensor([(column + j) >> 2])
        counter = (block, torch.zeros(1, dtype=torch.int64), row_ids & 0xFFFFFFFF, row_ids >> 32)
        out[:, j] = philox4x32(counter, seed)[j & 3]
    return out
