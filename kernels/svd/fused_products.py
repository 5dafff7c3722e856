"""Triton kernels of truncated_svd that multiply: A X and Aᵀ X, Gram matrices, X R⁻¹.

    sparse   out = A X, or α A X + β Y + γ Z          A by rows (Aᵀ: by columns), one pass over both
    product  the same for A of any strides            also Q U and B U at the end
    gram     G = Xᵀ X in float64                      upper tiles, rows split over programs
    apply    out = X R⁻¹                              columns that were dropped drawn anew

Key decisions
- α, β, γ are of a matrix and a step, on the device: where α is 0 nothing of A is read, so matrices
  whose filter has a lower degree stand still while others go on. `out` may be Z's memory.
- A row of the sparse product is one running sum in its own order: no atomics, same bits always.
- A is multiplied by its matrix's power of two as it is loaded; a multiplier of 0 stands for a
  matrix that isn't finite, whose entries count as zeros.
- Gram matrices are summed in float64: in fp32 their Cholesky factors lose all orthogonality from
  condition 1e4 on (Yamazaki, Tomov, Dongarra, SIAM J. Sci. Comput. 37, 2015).
- Blocks of vectors are (G, rows, width), fp32, row-major; offsets are int64.
"""

import triton
import triton.language as tl


@triton.jit
def place(tiles):
    """(matrix, tile) of this program, int64, where each matrix has that many tiles."""
    i = tl.program_id(0).to(tl.int64)
    return i // tiles, i % tiles


@triton.jit
def uniform_tile(seed_ptr, row, column, purpose, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr):
    """word 2**-31 - 1 in fp32 for rows (BLOCK_M) and BLOCK_Q columns from `column`, as sketch.py.

    row: int (BLOCK_M). column: a multiple of 4. purpose: the counter's last word.
    """
    block = (column // 4 + tl.arange(0, BLOCK_Q // 4)).to(tl.uint32)[None, :]
    zero = tl.zeros((BLOCK_M, BLOCK_Q // 4), dtype=tl.uint32)
    low = zero + row.to(tl.uint32)[:, None]
    last = zero + purpose.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), low, zero + block, zero, last)
    # join adds a fastest axis, so this order flattens to w0, w1, w2, w3
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_M, BLOCK_Q))
    return (words.to(tl.float64) * 4.656612873077393e-10 - 1.0).to(tl.float32)


@triton.jit
def _combined(acc, alpha, coefficients_ptr, y_ptr, z_ptr, offsets, mask):
    """α acc + β Y + γ Z."""
    beta = tl.load(coefficients_ptr + 1)
    gamma = tl.load(coefficients_ptr + 2)
    b_y = tl.load(y_ptr + offsets, mask=mask, other=0.0)
    b_z = tl.load(z_ptr + offsets, mask=mask, other=0.0)
    return alpha * acc + beta * b_y + gamma * b_z


@triton.jit
def svd_sparse_kernel(
    out_ptr,
    x_ptr,
    y_ptr,
    z_ptr,
    starts_ptr,
    indices_ptr,
    values_ptr,
    coefficients_ptr,
    rows,
    q,
    stride_xg,
    stride_c,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    UNROLL: tl.constexpr,
    GATED: tl.constexpr,
    COMBINE: tl.constexpr,
):
    """out (G, rows, q) = A X, A's rows being values at indices between two of starts.

    GATED: nothing is done where α is 0. COMBINE: out = α A X + β Y + γ Z instead.
    """
    i_g, i_m = place(tl.cdiv(rows, BLOCK_M))
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_m = o_m < rows
    m_q = o_q < q
    p_starts = starts_ptr + i_g * rows + o_m
    start = tl.load(p_starts, mask=m_m, other=0)
    end = tl.load(p_starts + 1, mask=m_m, other=0)
    longest = tl.max(end - start, axis=0)
    if GATED:
        coefficients_ptr += i_g * stride_c
        alpha = tl.load(coefficients_ptr)
        longest = tl.where(alpha == 0.0, 0, longest)
    x_ptr += i_g * stride_xg
    acc = tl.zeros((BLOCK_M, BLOCK_Q), dtype=tl.float32)
    for first in range(0, longest, UNROLL):
        for u in tl.static_range(UNROLL):
            here = start + first + u
            inside = here < end
            index = tl.load(indices_ptr + here, mask=inside, other=0).to(tl.int64)
            value = tl.load(values_ptr + here, mask=inside, other=0.0)
            p_x = x_ptr + index[:, None] * q + o_q[None, :]
            b_x = tl.load(p_x, mask=inside[:, None] & m_q[None, :], other=0.0)
            acc += value[:, None] * b_x
    offsets = (i_g * rows + o_m[:, None]) * q + o_q[None, :]
    mask = m_m[:, None] & m_q[None, :]
    if COMBINE:
        acc = _combined(acc, alpha, coefficients_ptr, y_ptr, z_ptr, offsets, mask)
    tl.store(out_ptr + offsets, acc, mask=mask)


@triton.jit
def svd_product_kernel(
    out_ptr,
    a_ptr,
    x_ptr,
    y_ptr,
    z_ptr,
    multiplier_ptr,
    coefficients_ptr,
    M,
    K,
    q,
    stride_ag,
    stride_am,
    stride_ak,
    stride_xg,
    stride_xk,
    stride_xq,
    stride_c,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    SCALED: tl.constexpr,
    GATED: tl.constexpr,
    COMBINE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out (G, M, q) = A (M, K) X (K, q) in fp32; the flags as in svd_sparse_kernel.

    SCALED: A counts with its matrix's multiplier.
    """
    i_g, i_m = place(tl.cdiv(M, BLOCK_M))
    i_q = tl.program_id(1).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_m = o_m < M
    m_q = o_q < q
    a_ptr += i_g * stride_ag
    x_ptr += i_g * stride_xg
    length = K
    if GATED:
        coefficients_ptr += i_g * stride_c
        alpha = tl.load(coefficients_ptr)
        length = tl.where(alpha == 0.0, 0, length)
    if SCALED:
        multiplier = tl.load(multiplier_ptr + i_g)
    acc = tl.zeros((BLOCK_M, BLOCK_Q), dtype=tl.float32)
    for k in range(0, length, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        m_k = o_k < K
        p_a = a_ptr + o_m[:, None] * stride_am + o_k[None, :] * stride_ak
        b_a = tl.load(p_a, mask=m_m[:, None] & m_k[None, :], other=0.0).to(tl.float32)
        if SCALED:
            b_a = tl.where(multiplier == 0.0, 0.0, b_a * multiplier)
        p_x = x_ptr + o_k[:, None] * stride_xk + o_q[None, :] * stride_xq
        b_x = tl.load(p_x, mask=m_k[:, None] & m_q[None, :], other=0.0)
        acc = tl.dot(b_a, b_x, acc, input_precision=PRECISION)
    offsets = (i_g * M + o_m[:, None]) * q + o_q[None, :]
    mask = m_m[:, None] & m_q[None, :]
    if COMBINE:
        acc = _combined(acc, alpha, coefficients_ptr, y_ptr, z_ptr, offsets, mask)
    tl.store(out_ptr + offsets, acc, mask=mask)


@triton.jit(do_not_specialize=["chunk_tiles", "splits"])
def svd_gram_kernel(
    part_ptr,
    x_ptr,
    wanted_ptr,
    M,
    q,
    stride_xg,
    stride_xm,
    stride_xq,
    chunk_tiles,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    OPTIONAL: tl.constexpr,
):
    """part (G, splits, q, q) = Xᵀ X in float64 over one share of the rows; upper tiles alone.

    OPTIONAL: only of matrices where `wanted` isn't 0.
    """
    tiles = tl.cdiv(q, BLOCK_Q)
    i_g, i_t = place(tiles * tiles)
    i_s = tl.program_id(1).to(tl.int64)
    i_i = i_t // tiles
    i_j = i_t % tiles
    o_i = i_i * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_j = i_j * BLOCK_Q + tl.arange(0, BLOCK_Q)
    wanted = i_i <= i_j
    if OPTIONAL:
        wanted = wanted & (tl.load(wanted_ptr + i_g) != 0)
    if wanted:
        x_ptr += i_g * stride_xg
        acc = tl.zeros((BLOCK_Q, BLOCK_Q), dtype=tl.float64)
        first = i_s * chunk_tiles * BLOCK_M
        for m in range(0, chunk_tiles):
            o_m = first + m * BLOCK_M + tl.arange(0, BLOCK_M)
            m_m = o_m < M
            p_i = x_ptr + o_i[:, None].to(tl.int64) * stride_xq + o_m[None, :] * stride_xm
            b_i = tl.load(p_i, mask=(o_i < q)[:, None] & m_m[None, :], other=0.0).to(tl.float64)
            p_j = x_ptr + o_m[:, None] * stride_xm + o_j[None, :].to(tl.int64) * stride_xq
            b_j = tl.load(p_j, mask=m_m[:, None] & (o_j < q)[None, :], other=0.0).to(tl.float64)
            acc = tl.dot(b_i, b_j, acc, input_precision="ieee", out_dtype=tl.float64)
        p_part = part_ptr + ((i_g * splits + i_s) * q + o_i[:, None]) * q + o_j[None, :]
        tl.store(p_part, acc, mask=(o_i < q)[:, None] & (o_j < q)[None, :])


@triton.jit
def _apply_block(
    out_ptr,
    x_ptr,
    inverse_ptr,
    dropped_ptr,
    seed_ptr,
    o_m,
    i_q,
    M,
    q,
    stride_xm,
    stride_xq,
    purpose,
    size,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Column block i_q of rows o_m of X R⁻¹, one matrix."""
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_m = o_m < M
    m_q = o_q < q
    acc = tl.zeros((o_m.shape[0], BLOCK_Q), dtype=tl.float32)
    for k in range(0, tl.minimum(q, (i_q + 1) * BLOCK_Q), BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < q
        p_x = x_ptr + o_m[:, None] * stride_xm + o_k[None, :].to(tl.int64) * stride_xq
        b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0).to(tl.float32)
        p_inverse = inverse_ptr + o_k[:, None] * q + o_q[None, :]
        b_inverse = tl.load(p_inverse, mask=m_k[:, None] & m_q[None, :], other=0.0)
        acc = tl.dot(b_x, b_inverse, acc, input_precision=PRECISION)
    dropped = tl.load(dropped_ptr + o_q, mask=m_q, other=0) != 0
    if tl.max(dropped.to(tl.int32), axis=0) > 0:
        drawn = uniform_tile(seed_ptr, o_m, i_q * BLOCK_Q, purpose, o_m.shape[0], BLOCK_Q) * size
        acc = tl.where(dropped[None, :], drawn, acc)
    tl.store(out_ptr + o_m[:, None] * q + o_q[None, :], acc, mask=m_m[:, None] & m_q[None, :])


@triton.jit(do_not_specialize=["purpose"])
def svd_apply_kernel(
    out_ptr,
    x_ptr,
    inverse_ptr,
    dropped_ptr,
    wanted_ptr,
    seed_ptr,
    M,
    q,
    stride_xg,
    stride_xm,
    stride_xq,
    purpose,
    size,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    OPTIONAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out (G, M, q) = X R⁻¹ with R⁻¹ upper triangular; dropped columns are drawn in ±size.

    OPTIONAL: nothing is done where `wanted` is 0, and out may be X: a program has whole rows, of
    which it replaces the last columns first, on which no others depend.
    """
    i_g, i_m = place(tl.cdiv(M, BLOCK_M))
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    out_ptr += i_g * M * q
    x_ptr += i_g * stride_xg
    inverse_ptr += i_g * q * q
    dropped_ptr += i_g * q
    if OPTIONAL:
        blocks = tl.cdiv(q, BLOCK_Q)
        blocks = tl.where(tl.load(wanted_ptr + i_g) == 0, 0, blocks)
        for i in range(0, blocks):
            _apply_block(
                out_ptr, x_ptr, inverse_ptr, dropped_ptr, seed_ptr, o_m, blocks - 1 - i, M, q,
                stride_xm, stride_xq, purpose, size, BLOCK_K, BLOCK_Q, PRECISION,
            )  # fmt: skip
    else:
        _apply_block(
            out_ptr, x_ptr, inverse_ptr, dropped_ptr, seed_ptr, o_m, tl.program_id(1), M, q,
            stride_xm, stride_xq, purpose, size, BLOCK_K, BLOCK_Q, PRECISION,
        )  # fmt: skip
