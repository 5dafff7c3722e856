"""Pieces of Triton kernels that several ops use. Imported by fused.py files only."""

import triton
import triton.language as tl


@triton.jit
def tile_dot(
    a,
    b,
    acc,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """acc + a b with both operands rounded to DOT and an fp32 accumulator.

    The interpreter keeps bf16 as integers and multiplies those: there the tiles are widened after
    rounding, which changes nothing else.
    """
    a = a.to(DOT)
    b = b.to(DOT)
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def row_words_tile(seed_ptr, row, column, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Philox words of a (BLOCK_M, BLOCK_K) tile, as common.philox.row_words defines them.

    row: int64 (BLOCK_M) row ids. column: the tile's first column, a multiple of 4.
    """
    block = (column // 4 + tl.arange(0, BLOCK_K // 4)).to(tl.uint32)[None, :]
    zero = tl.zeros((BLOCK_M, BLOCK_K // 4), dtype=tl.uint32)
    low = (row & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = ((row >> 32) & 0xFFFFFFFF).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), zero + block, zero, zero + low, zero + high)
    # join adds a fastest axis, so this order flattens to w0, w1, w2, w3
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_M, BLOCK_K))


@triton.jit
def keep_tile(seed_ptr, row, column, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Kept elements of a dropout tile, bool. threshold: dropout_threshold(p) - 2**31, an int32."""
    words = row_words_tile(seed_ptr, row, column, BLOCK_M, BLOCK_K)
    return words >= (threshold.to(tl.int64) + 2147483648).to(tl.uint32)


@triton.jit
def row_ids_tile(row_ids_ptr, o_m, id_rows):
    """Row ids of rows o_m (int64): what row_ids_ptr holds for the first id_rows, else the index."""
    given = o_m < id_rows
    return tl.where(given, tl.load(row_ids_ptr + o_m, mask=given, other=0), o_m)


@triton.jit
def rank_masks(active_ptr, trainable_ptr, o_r, R, trained, MASKED: tl.constexpr):
    """(takes part, is trained) for ranks o_r; the pointers hold one byte a rank."""
    on = o_r < R
    is_trained = on & (o_r < trained)
    if MASKED:
        inside = on
        on = inside & (tl.load(active_ptr + o_r, mask=inside, other=0) != 0)
        is_trained = is_trained & on & (tl.load(trainable_ptr + o_r, mask=inside, other=0) != 0)
    return on, is_trained
