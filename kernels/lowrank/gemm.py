"""A Triton matrix product with the low-rank term in its accumulator.

    out (M, W) = x (M, C) w (C, W) + bias + α D∘((P∘c) (M, R) Q (R, W))

    forward   y  = x Wᵀ + b + s (S∘e) Bᵀ       x, weight as (K, N), S, B as (R, N)
    backward  dX = dY W + s D∘((U∘e) A)        dY, weight as (N, K), U, A as (R, K)

Next to the vendor's product and lowrank_expand_kernel this saves one read and one write of out. It
pays only where it is nearly as fast as the vendor's product, so choices.json says where it runs.

Key decisions
- The low-rank dot comes first, is scaled (and dropped) in fp32 together with the bias, and starts
  the accumulator: the loop over C is that of a plain matrix product and nothing follows it but the
  store.
- The low-rank dot has its own operand type and precision: three tf32 products for fp32 adapters
  over a sixteen-bit base, whose own dot stays in sixteen bits.
- Ranks above BLOCK_R are looped over without pipelining, so the loop over C has the shared memory.
- Programs walk GROUP_M rows of tiles together, so that tiles of x and w are found in L2.
- Sixteen-bit bases only. Any strides and sizes; offsets are int64; R and p are runtime values.
"""

import triton
import triton.language as tl

from fastrank.kernels.common.jit import keep_tile, rank_masks, row_ids_tile, tile_dot


@triton.jit
def _tile_of_program(i, M, W, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of program i's tile: GROUP_M rows of tiles at a time, column by column."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    in_group = GROUP_M * tl.cdiv(W, BLOCK_W)
    first = (i // in_group) * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    inside = i % in_group
    return first + inside % rows, inside // rows


@triton.jit(do_not_specialize=["M", "R", "trained", "threshold", "id_rows", "e_ranks"])
def lowrank_gemm_kernel(
    out_ptr,
    x_ptr,
    w_ptr,
    bias_ptr,
    p_ptr,
    q_ptr,
    e_ptr,
    active_ptr,
    trainable_ptr,
    seed_ptr,
    row_ids_ptr,
    M,
    W,
    C,
    R,
    trained,
    stride_om,
    stride_xm,
    stride_xc,
    stride_wc,
    stride_ww,
    stride_qr,
    stride_qw,
    threshold,
    id_rows,
    e_ranks,
    inv_keep,
    alpha,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_C: tl.constexpr,
    BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out (M, W) = x w + bias + alpha D∘((p∘e) q); out has unit column stride.

    EVEN_C: C is a multiple of BLOCK_C, so the loop over C needs no masks along it.
    """
    i_m, i_w = _tile_of_program(tl.program_id(0), M, W, BLOCK_M, BLOCK_W, GROUP_M)
    # 64-bit starts and 32-bit places within the tile: offsets can't overflow, and what stays alive
    # through the loop over C takes half the registers
    row_0, column_0 = i_m.to(tl.int64) * BLOCK_M, i_w.to(tl.int64) * BLOCK_W
    o_m, o_w = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_W)
    m_m = o_m < (M - row_0).to(tl.int32)
    m_w = o_w < (W - column_0).to(tl.int32)
    rows, columns = o_m.to(tl.int64)[:, None], o_w.to(tl.int64)[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_W), dtype=tl.float32)
    # trained ranks first: what is dropped is dropped before the frozen ones are added
    for frozen in tl.static_range(2 if DROPOUT and MASKED else 1):
        for r in tl.range(0, R, BLOCK_R, num_stages=1):
            o_r = r + tl.arange(0, BLOCK_R)
            on, is_trained = rank_masks(active_ptr, trainable_ptr, o_r, R, trained, MASKED)
            if DROPOUT and MASKED:
                on = on & (is_trained != (frozen == 1))
            p_p = p_ptr + row_0 * R + rows * R + o_r[None, :]
            b_p = tl.load(p_p, mask=m_m[:, None] & on[None, :], other=0.0)
            b_p *= tl.load(e_ptr + o_r, mask=on & (o_r < e_ranks), other=1.0)[None, :]
            p_q = q_ptr + column_0 * stride_qw + columns * stride_qw
            p_q += o_r[:, None].to(tl.int64) * stride_qr
            b_q = tl.load(p_q, mask=on[:, None] & m_w[None, :], other=0.0)  # (BLOCK_R, BLOCK_W)
            acc = tile_dot(b_p, b_q, acc, DOT, PRECISION, INTERPRET)
        if DROPOUT and frozen == 0:
            row = row_ids_tile(row_ids_ptr, row_0 + o_m, id_rows)
            kept = keep_tile(seed_ptr, row, column_0, threshold, BLOCK_M, BLOCK_W)
            acc = tl.where(kept, acc * inv_keep, 0.0)
    acc *= alpha
    if BIAS:
        acc += tl.load(bias_ptr + column_0 + o_w, mask=m_w, other=0.0).to(tl.float32)[None, :]

    o_c = tl.arange(0, BLOCK_C).to(tl.int64)
    p_x = x_ptr + row_0 * stride_xm + (rows * stride_xm + o_c[None, :] * stride_xc)
    p_w = w_ptr + column_0 * stride_ww + (o_c[:, None] * stride_wc + columns * stride_ww)
    step = tl.full((), BLOCK_C, tl.int64)
    for c in range(0, C, BLOCK_C):
        m_x, m_b = m_m[:, None], m_w[None, :]
        if not EVEN_C:
            m_x = m_x & (o_c[None, :] < C - c)
            m_b = m_b & (o_c[:, None] < C - c)
        b_x = tl.load(p_x, mask=m_x, other=0.0)
        b_w = tl.load(p_w, mask=m_b, other=0.0)
        acc = tile_dot(b_x, b_w, acc, x_ptr.dtype.element_ty, "ieee", INTERPRET)
        p_x += step * stride_xc
        p_w += step * stride_wc

    p_out = out_ptr + row_0 * stride_om + column_0 + (rows * stride_om + columns)
    tl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=m_m[:, None] & m_w[None, :])
