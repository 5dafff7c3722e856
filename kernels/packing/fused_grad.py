"""Triton kernel of masked_weight_grad: a dense tile of dW, of which only kept entries are stored.

    part[split, j] = Σ_{m in split} dY[m, n_j] X[m, k_j]

Key decisions
- A tile of dW is an ordinary matrix product with an fp32 accumulator; nothing but its epilogue
  knows the mask. From about 0.3 % of kept entries on this beats products of single columns, which
  would read each of them as often as it is needed.
- A row of a tile meets only a few strata: the epilogue walks them, draws the word of each (or loads
  the positions of a Bernoulli mask), and stores the entry if it lies in the tile. Every entry lies
  in exactly one tile, so packed buffers are written once, without atomics, index maps or scans.
- The entry is picked by a masked sum over the tile's columns: in registers, exact, and NaN in
  another column can't reach it.
- Few tiles share the rows of X and dY out: each split writes a packed part, and the parts are added
  up in order.
- Programs walk GROUP_N rows of tiles together, so that columns of dY and X are found in L2.
- Offsets are int64; M, the mask's words and the number of strata are runtime values.
"""

import triton
import triton.language as tl

from fastrank.kernels.common.jit import tile_dot
from fastrank.kernels.packing.fused import join_seed

_RUNTIME = ["M", "nnz", "slots", "tiles", "stratum", "last", "key_low", "key_high", "c2", "c3"]


@triton.jit
def _tile_of_program(i, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_N: tl.constexpr):
    """(row, column) of program i's tile: GROUP_N rows of tiles at a time, column by column."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    in_group = GROUP_N * tl.cdiv(K, BLOCK_K)
    first = (i // in_group) * GROUP_N
    rows = tl.minimum(tiles_n - first, GROUP_N)
    inside = i % in_group
    return first + inside % rows, inside // rows


@triton.jit
def _word_of(seed, c2, c3, j):
    """The word of each item j (int64, any): uint32, as draws.words_at gives it."""
    block = j >> 2
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = ((block >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero + c2.to(tl.uint32), zero + c3.to(tl.uint32))
    odd = (j & 1) == 1
    return tl.where((j & 2) == 2, tl.where(odd, w3, w2), tl.where(odd, w1, w0))


@triton.jit(do_not_specialize=_RUNTIME)
def masked_gradient_kernel(
    dy_ptr,
    x_ptr,
    part_ptr,
    positions_ptr,
    cuts_ptr,
    M,
    N,
    K,
    nnz,
    slots,
    tiles,
    stratum,
    last,
    key_low,
    key_high,
    c2,
    c3,
    stride_dm,
    stride_dn,
    stride_xm,
    stride_xk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    DRAWN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """part[split] (nnz) = the kept entries of dyᵀ x over `tiles` tiles of rows.

    DRAWN: a stratified mask, of which a row of a tile meets at most `slots` strata. Otherwise
    positions (nnz) are loaded, and cuts (N * column tiles + 1) say which are in each row of each
    tile.
    """
    i_n, i_k = _tile_of_program(tl.program_id(0), N, K, BLOCK_N, BLOCK_K, GROUP_N)
    i_s = tl.program_id(1).to(tl.int64)
    # 64-bit starts and 32-bit places within the tile: offsets can't overflow, and what stays alive
    # through the loop takes half the registers
    row_0, column_0 = i_n.to(tl.int64) * BLOCK_N, i_k.to(tl.int64) * BLOCK_K
    o_m, o_n, o_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    m_n = o_n < (N - row_0).to(tl.int32)
    m_k = o_k < (K - column_0).to(tl.int32)

    start = i_s * tiles * BLOCK_M
    rows = o_m.to(tl.int64)
    p_dy = dy_ptr + start * stride_dm + row_0 * stride_dn
    p_dy += o_n.to(tl.int64)[:, None] * stride_dn + rows[None, :] * stride_dm
    p_x = x_ptr + start * stride_xm + column_0 * stride_xk
    p_x += rows[:, None] * stride_xm + o_k.to(tl.int64)[None, :] * stride_xk
    left = tl.maximum(tl.minimum(M - start, tiles * BLOCK_M), 0).to(tl.int32)
    step = tl.full((), BLOCK_M, tl.int64)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for m in range(0, left, BLOCK_M):
        m_m = o_m < left - m
        b_dy = tl.load(p_dy, mask=m_n[:, None] & m_m[None, :], other=0.0)
        b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0)
        acc = tile_dot(b_dy, b_x, acc, DOT, PRECISION, INTERPRET)
        p_dy += step * stride_dm
        p_x += step * stride_xm

    base = (row_0 + o_n) * K + column_0  # flat position of each row's first entry in the tile
    width = tl.minimum(K - column_0, BLOCK_K)
    p_part = part_ptr + i_s * nnz
    if DRAWN:
        S = stratum.to(tl.uint32).to(tl.int64)
        seed = join_seed(key_low, key_high)
        first = base // S
        for t in range(0, slots):
            j = first + t
            length = tl.where(j == nnz.to(tl.int64) - 1, last.to(tl.uint32), stratum.to(tl.uint32))
            chosen = tl.umulhi(_word_of(seed, c2, c3, j), length).to(tl.int64)
            place = j * S + chosen - base
            kept = m_n & (place >= 0) & (place < width) & (j < nnz)
            picked = o_k[None, :] == place.to(tl.int32)[:, None]
            tl.store(p_part + j, tl.sum(tl.where(picked, acc, 0.0), axis=1), mask=kept)
    else:
        p_cut = cuts_ptr + (row_0 + o_n) * tl.cdiv(K, BLOCK_K) + i_k
        begin = tl.load(p_cut, mask=m_n, other=0)
        end = tl.load(p_cut + 1, mask=m_n, other=0)
        for t in range(0, tl.max(end - begin, axis=0).to(tl.int32)):
            j = begin + t
            kept = j < end
            place = tl.load(positions_ptr + j, mask=kept, other=0) - base
            picked = o_k[None, :] == place.to(tl.int32)[:, None]
            tl.store(p_part + j, tl.sum(tl.where(picked, acc, 0.0), axis=1), mask=kept)
