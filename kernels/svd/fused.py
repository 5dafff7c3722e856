"""Triton kernels of truncated_svd at its two ends: scales and the sketch, signs and the results.

    measure  max |A| and ΣA² of shares of a matrix
    scale    from these: a power of two for each matrix, ‖A‖_F², and whether it is finite
    entries  sparse values times that power, by rows and by columns
    draw     the sketch Ω
    finish   values in order, signs, energy, NaN where the matrix held one

Key decisions
- A matrix times its power of two has its largest entry in [1, 2), so that 1e-30 and 1e30 are like
  1. One that holds NaN or Inf gets the multiplier 0 and is worked on as zero; NaN is put into its
  results at the end, and no other matrix sees it.
- ΣA² and S² are float64: no square of an fp32 number leaves its range.
- Ω is one for the whole batch: what comes of a matrix doesn't depend on its place in it.
"""

import triton
import triton.language as tl

from fastrank.kernels.svd.fused_products import place, uniform_tile


@triton.jit(do_not_specialize=["chunks"])
def svd_measure_kernel(
    a_ptr,
    starts_ptr,
    largest_ptr,
    square_ptr,
    rows,
    columns,
    stride_g,
    stride_n,
    stride_k,
    chunks,
    BLOCK: tl.constexpr,
    SPARSE: tl.constexpr,
):
    """largest (G, chunks) fp32, infinite where an entry isn't finite; square (G, chunks) float64.

    SPARSE: matrix g is a[starts[g rows] : starts[(g + 1) rows]]; else A has any strides.
    """
    i_g, i_c = place(chunks)
    if SPARSE:
        begin = tl.load(starts_ptr + i_g * rows)
        total = tl.load(starts_ptr + (i_g + 1) * rows) - begin
    else:
        total = (i_c * 0 + rows) * columns
        a_ptr += i_g * stride_g
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    square = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(i_c * BLOCK, total, chunks * BLOCK):
        o = first + tl.arange(0, BLOCK)
        if SPARSE:
            p_a = a_ptr + begin + o
        else:
            n = o // columns
            p_a = a_ptr + n * stride_n + (o - n * columns) * stride_k
        value = tl.load(p_a, mask=o < total, other=0.0).to(tl.float32)
        size = tl.abs(value)
        # NaN compares false
        largest = tl.maximum(largest, tl.where(size <= 3.4028234663852886e38, size, float("inf")))
        square += value.to(tl.float64) * value.to(tl.float64)
    tl.store(largest_ptr + i_g * chunks + i_c, tl.max(largest, axis=0))
    tl.store(square_ptr + i_g * chunks + i_c, tl.sum(square, axis=0))


@triton.jit(do_not_specialize=["chunks", "nonfinite"])
def svd_scale_kernel(
    largest_ptr,
    square_ptr,
    multiplier_ptr,
    norm2_ptr,
    status_ptr,
    chunks,
    nonfinite,
    BLOCK: tl.constexpr,
):
    """multiplier (G) fp32, norm2 (G) float64, status (G) int32: 0 or nonfinite."""
    i_g = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    largest = tl.max(tl.load(largest_ptr + i_g * chunks + o, mask=o < chunks, other=0.0), axis=0)
    square = tl.sum(tl.load(square_ptr + i_g * chunks + o, mask=o < chunks, other=0.0), axis=0)
    finite = largest <= 3.4028234663852886e38
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
    # 2**126 has a normal reciprocal, and lifts the smallest denormals far enough
    exponent = tl.minimum(tl.maximum(exponent, -126), 126)
    found = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    found = tl.where(largest > 0.0, found, 1.0)
    tl.store(multiplier_ptr + i_g, tl.where(finite, found, 0.0))
    tl.store(norm2_ptr + i_g, square)
    tl.store(status_ptr + i_g, tl.where(finite, 0, nonfinite))


@triton.jit(do_not_specialize=["chunks"])
def svd_entries_kernel(
    values_ptr,
    order_ptr,
    starts_ptr,
    multiplier_ptr,
    by_row_ptr,
    by_column_ptr,
    rows,
    chunks,
    BLOCK: tl.constexpr,
):
    """by_row (nnz) = values times their matrix's multiplier; by_column (nnz) = by_row[order]."""
    i_g, i_c = place(chunks)
    begin = tl.load(starts_ptr + i_g * rows)
    end = tl.load(starts_ptr + (i_g + 1) * rows)
    multiplier = tl.load(multiplier_ptr + i_g)
    for first in range(begin + i_c * BLOCK, end, chunks * BLOCK):
        o = first + tl.arange(0, BLOCK)
        inside = o < end
        value = tl.load(values_ptr + o, mask=inside, other=0.0)
        value = tl.where(multiplier == 0.0, 0.0, value * multiplier)
        tl.store(by_row_ptr + o, value, mask=inside)
        source = tl.load(order_ptr + o, mask=inside, other=0)
        value = tl.load(values_ptr + source, mask=inside, other=0.0)
        value = tl.where(multiplier == 0.0, 0.0, value * multiplier)
        tl.store(by_column_ptr + o, value, mask=inside)


@triton.jit(do_not_specialize=["purpose"])
def svd_draw_kernel(
    out_ptr, seed_ptr, rows, q, purpose, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """out (rows, q) = the sketch of sketch.py."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_Q
    o_q = column + tl.arange(0, BLOCK_Q)
    drawn = uniform_tile(seed_ptr, o_m, column, purpose, BLOCK_M, BLOCK_Q)
    mask = (o_m < rows)[:, None] & (o_q < q)[None, :]
    tl.store(out_ptr + o_m[:, None] * q + o_q[None, :], drawn, mask=mask)


@triton.jit
def svd_finish_kernel(
    u_ptr,
    v_ptr,
    length_ptr,
    multiplier_ptr,
    norm2_ptr,
    finite_ptr,
    core_ptr,
    out_u_ptr,
    out_s_ptr,
    out_vh_ptr,
    energy_ptr,
    status_ptr,
    N,
    K,
    r,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Columns of u (G, N, r) and v (G, K, r) with canonical signs, in the order of their lengths.

    Writes U (G, N, r), S (G, r), Vh (G, r, K), energy (G) in fp32, and status (G) int32.

    Args:
        length_ptr: float64 (G, r), values of the matrix times its multiplier.
        norm2_ptr: float64 (G), of the matrix itself.
        finite_ptr, core_ptr: int32 (G), the bits of status.
        BLOCK_C: columns of a program. BLOCK_R: at least r.
    """
    i_g, i_c = place(tl.cdiv(r, BLOCK_C))
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    o_r = tl.arange(0, BLOCK_R)
    m_c = o_c < r
    nonfinite = tl.load(finite_ptr + i_g)
    finite = nonfinite == 0
    multiplier = tl.load(multiplier_ptr + i_g).to(tl.float64)
    multiplier = tl.where(finite, multiplier, 1.0)
    lengths = tl.load(length_ptr + i_g * r + o_r, mask=o_r < r, other=-1.0)
    own = tl.load(length_ptr + i_g * r + o_c, mask=m_c, other=-1.0)
    before = (lengths[None, :] > own[:, None]) | (
        (lengths[None, :] == own[:, None]) & (o_r[None, :] < o_c[:, None])
    )
    to = tl.sum(before.to(tl.int32), axis=1).to(tl.int64)
    s = tl.where(finite, (own / multiplier).to(tl.float32), float("nan"))
    tl.store(out_s_ptr + i_g * r + to, s, mask=m_c)

    most = tl.full((BLOCK_C,), -1.0, dtype=tl.float32)
    sign = tl.full((BLOCK_C,), 1.0, dtype=tl.float32)
    for first in range(0, N, BLOCK_M):
        o_m = first + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (o_m < N)[:, None] & m_c[None, :]
        b_u = tl.load(u_ptr + (i_g * N + o_m[:, None]) * r + o_c[None, :], mask=mask, other=0.0)
        size = tl.abs(b_u)
        here = tl.max(size, axis=0)
        lowest = tl.min(tl.where(size == here[None, :], o_m[:, None], first + BLOCK_M), axis=0)
        value = tl.sum(tl.where(o_m[:, None] == lowest[None, :], b_u, 0.0), axis=0)
        # an equal one further down doesn't count
        sign = tl.where(here > most, tl.where(value < 0.0, -1.0, 1.0), sign)
        most = tl.maximum(most, here)
    sign = tl.where(finite, sign, float("nan"))
    for first in range(0, N, BLOCK_M):
        o_m = first + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (o_m < N)[:, None] & m_c[None, :]
        b_u = tl.load(u_ptr + (i_g * N + o_m[:, None]) * r + o_c[None, :], mask=mask, other=0.0)
        p_out = out_u_ptr + (i_g * N + o_m[:, None]) * r + to[None, :]
        tl.store(p_out, b_u * sign[None, :], mask=mask)
    for first in range(0, K, BLOCK_M):
        o_m = first + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (o_m < K)[:, None] & m_c[None, :]
        b_v = tl.load(v_ptr + (i_g * K + o_m[:, None]) * r + o_c[None, :], mask=mask, other=0.0)
        p_out = out_vh_ptr + (i_g * r + to[None, :]) * K + o_m[:, None]
        tl.store(p_out, b_v * sign[None, :], mask=mask)

    if i_c == 0:
        values = tl.where(o_r < r, lengths, 0.0) / multiplier
        norm2 = tl.load(norm2_ptr + i_g)
        share = tl.sum(values * values, axis=0) / tl.where(norm2 > 0.0, norm2, 1.0)
        share = tl.where(norm2 > 0.0, tl.minimum(share, 1.0), 1.0)
        tl.store(energy_ptr + i_g, tl.where(finite, share, float("nan")).to(tl.float32))
        core = tl.where(finite, tl.load(core_ptr + i_g), 0)
        tl.store(status_ptr + i_g, nonfinite | core)
