"""Triton kernels of truncated_svd on small (q, q) matrices: Cholesky factors, filter coefficients.

One program a matrix. factor: R and R⁻¹ of a Gram matrix, blocked by 32 columns and in float64, with

    E  powers of two, so that the diagonal of E G E lies in [1, 4)       RᵀR = E G E
    a pivot below `guard` drops its column                    row j of R, column j of R⁻¹ are 0

so a column that depends on those before it (rank deficiency is normal here: a LoRA's B starts at
zero, clients may be identical) costs nothing but a column of X R⁻¹ to be drawn anew.

Key decisions
- A diagonal block is eliminated in registers, L⁻¹ growing where eliminated entries leave room: one
  pass gives both. Blocks meet in global memory, which one program's threads see after a barrier.
- Filter coefficients need the block's largest and smallest Ritz value to a few percent: power
  iterations with R and R⁻¹, each tile of which serves MᵀM x in one read.
"""

import triton
import triton.language as tl

from fastrank.kernels.svd.fused_products import uniform_tile


@triton.jit
def _equilibration(diagonal):
    """The power of two just above diagonal**-1/2 / 2, float64; 1 for 0."""
    bits = diagonal.to(tl.int64, bitcast=True)
    half = (((bits >> 52) & 0x7FF) - 1023) >> 1
    half = tl.minimum(tl.maximum(half, -100), 100)
    found = ((1023 - half) << 52).to(tl.float64, bitcast=True)
    return tl.where(diagonal > 0.0, found, 1.0)


@triton.jit
def _gram_tile(part_ptr, o_i, o_j, q, splits):
    """A tile of the symmetric Gram matrix, from the upper tiles of its parts, in order."""
    low = tl.minimum(o_i[:, None], o_j[None, :])
    high = tl.maximum(o_i[:, None], o_j[None, :])
    mask = (o_i < q)[:, None] & (o_j < q)[None, :]
    found = tl.zeros((o_i.shape[0], o_j.shape[0]), dtype=tl.float64)
    for s in range(0, splits):
        found += tl.load(part_ptr + (s * q + low) * q + high, mask=mask, other=0.0)
    return found


@triton.jit
def _eliminated(D, count, guard, BLOCK: tl.constexpr):
    """(L⁻¹, the least pivot in each place) of a symmetric positive (BLOCK, BLOCK) tile.

    Rows of L⁻¹ whose column was dropped are zero, its pivot counts for nothing.

    Gauss' elimination without pivoting: column j, once eliminated, holds L⁻¹'s column j.
    """
    o = tl.arange(0, BLOCK)
    pivots = tl.zeros((BLOCK,), dtype=tl.float64)
    least = tl.full((BLOCK,), 1.0, dtype=tl.float64)
    for j in range(0, count):
        at = o == j
        row = tl.sum(tl.where(at[:, None], D, 0.0), axis=0)
        pivot = tl.sum(tl.where(at, row, 0.0), axis=0)
        kept = pivot > guard
        # by symmetry the row beyond the pivot is the column below it
        factor = tl.where(o > j, row, 0.0) * tl.where(kept, 1.0 / tl.where(kept, pivot, 1.0), 0.0)
        D -= factor[:, None] * tl.where(at, 0.0, row)[None, :]
        D = tl.where(at[None, :] & (o > j)[:, None], -factor[:, None], D)
        pivots = tl.where(at, tl.where(kept, pivot, 0.0), pivots)
        least = tl.minimum(least, tl.where(kept, pivot, 1.0))
    unit = tl.where(o[:, None] > o[None, :], D, tl.where(o[:, None] == o[None, :], 1.0, 0.0))
    kept = pivots > 0.0
    roots = tl.where(kept, 1.0 / tl.sqrt(tl.where(kept, pivots, 1.0)), 0.0)
    return unit * roots[:, None], least


@triton.jit(do_not_specialize=["splits"])
def svd_factor_kernel(
    part_ptr,
    wanted_ptr,
    lower_ptr,
    inverse_ptr,
    r_ptr,
    r_inverse_ptr,
    scale_ptr,
    length_ptr,
    dropped_ptr,
    again_ptr,
    q,
    padded,
    splits,
    guard,
    weak,
    BLOCK: tl.constexpr,
    OPTIONAL: tl.constexpr,
):
    """R and R⁻¹ of Gram matrices, and which need another pass.

    Args:
        part_ptr: float64 (G, splits, q, q), see svd_gram_kernel.
        lower_ptr, inverse_ptr: float64 (G, padded, padded), memory for L = Rᵀ and L⁻¹.
        r_ptr, r_inverse_ptr: fp32 (G, q, q), R E⁻¹ and E R⁻¹ of R above: G's own.
        scale_ptr, length_ptr: float64 (G, q), the diagonal of E, and √diagonal of G.
        dropped_ptr: int32 (G, q), 1 where a column was dropped.
        again_ptr: int32 (G), 1 where one was, or a pivot is below `weak`.
        OPTIONAL: where `wanted` is 0, `again` becomes 0 and R and E the identity; the rest is
            not written.
    """
    i_g = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    lower_ptr += i_g * padded * padded
    inverse_ptr += i_g * padded * padded
    part_ptr += i_g * splits * q * q
    r_ptr += i_g * q * q
    r_inverse_ptr += i_g * q * q
    scale_ptr += i_g * q
    length_ptr += i_g * q
    dropped_ptr += i_g * q
    blocks = (q + BLOCK - 1) // BLOCK
    if OPTIONAL:  # noqa: SIM102 (the outer one is decided when compiling)
        if tl.load(wanted_ptr + i_g) == 0:
            for i in range(0, blocks):
                o_i = i * BLOCK + o
                m_i = o_i < q
                tl.store(scale_ptr + o_i, (o_i * 0 + 1).to(tl.float64), mask=m_i)
                for j in range(0, blocks):
                    o_j = j * BLOCK + o
                    one = (o_i[:, None] == o_j[None, :]).to(tl.float32)
                    p_r = r_ptr + o_i[:, None] * q + o_j[None, :]
                    tl.store(p_r, one, mask=m_i[:, None] & (o_j < q)[None, :])
            tl.store(again_ptr + i_g, 0)
            return

    for i in range(0, blocks):
        o_i = i * BLOCK + o
        m_i = o_i < q
        diagonal = tl.zeros((BLOCK,), dtype=tl.float64)
        for s in range(0, splits):
            diagonal += tl.load(part_ptr + (s * q + o_i) * q + o_i, mask=m_i, other=0.0)
        tl.store(scale_ptr + o_i, _equilibration(diagonal), mask=m_i)
        tl.store(length_ptr + o_i, tl.sqrt(diagonal), mask=m_i)
    tl.debug_barrier()
    for i in range(0, blocks):
        o_i = i * BLOCK + o
        e_i = tl.load(scale_ptr + o_i, mask=o_i < q, other=0.0)
        for j in range(0, i + 1):
            o_j = j * BLOCK + o
            e_j = tl.load(scale_ptr + o_j, mask=o_j < q, other=0.0)
            tile = _gram_tile(part_ptr, o_i, o_j, q, splits) * e_i[:, None] * e_j[None, :]
            tl.store(lower_ptr + o_i[:, None] * padded + o_j[None, :], tile)
            if i != j:
                zero = tl.zeros((BLOCK, BLOCK), dtype=tl.float64)
                tl.store(lower_ptr + o_j[:, None] * padded + o_i[None, :], zero)
                tl.store(inverse_ptr + o_j[:, None] * padded + o_i[None, :], zero)
    tl.debug_barrier()

    least = tl.full((BLOCK,), 1.0, dtype=tl.float64)
    lost = o * 0
    for j in range(0, blocks):
        o_j = j * BLOCK + o
        p_jj = lower_ptr + o_j[:, None] * padded + o_j[None, :]
        D = tl.load(p_jj)
        count = tl.minimum(BLOCK, q - j * BLOCK)
        L_inverse, pivot = _eliminated(D, count, guard, BLOCK)
        least = tl.minimum(least, pivot)
        own = tl.sum(tl.where(o[:, None] == o[None, :], L_inverse, 0.0), axis=1)
        dropped = ((own == 0.0) & (o_j < q)).to(tl.int32)
        lost += dropped
        tl.store(dropped_ptr + o_j, dropped, mask=o_j < q)
        tl.store(inverse_ptr + o_j[:, None] * padded + o_j[None, :], L_inverse)
        L_inverse = tl.trans(L_inverse)
        L = tl.dot(D, L_inverse, input_precision="ieee", out_dtype=tl.float64)
        tl.store(p_jj, tl.where(o[:, None] >= o[None, :], L, 0.0))
        for i in range(j + 1, blocks):
            p_ij = lower_ptr + (i * BLOCK + o)[:, None] * padded + o_j[None, :]
            D = tl.load(p_ij)
            L = tl.dot(D, L_inverse, input_precision="ieee", out_dtype=tl.float64)
            tl.store(p_ij, L)
        tl.debug_barrier()
        for i in range(j + 1, blocks):
            o_i = i * BLOCK + o
            left = tl.load(lower_ptr + o_i[:, None] * padded + o_j[None, :])
            for k in range(j + 1, i + 1):
                o_k = k * BLOCK + o
                right = tl.load(lower_ptr + o_k[None, :] * padded + o_j[:, None])
                p_ik = lower_ptr + o_i[:, None] * padded + o_k[None, :]
                D = tl.load(p_ik)
                D -= tl.dot(left, right, input_precision="ieee", out_dtype=tl.float64)
                tl.store(p_ik, D)
        tl.debug_barrier()

    for i in range(1, blocks):
        o_i = i * BLOCK + o
        own = tl.load(inverse_ptr + o_i[:, None] * padded + o_i[None, :])
        for j in range(0, i):
            o_j = j * BLOCK + o
            acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float64)
            for k in range(j, i):
                o_k = k * BLOCK + o
                left = tl.load(lower_ptr + o_i[:, None] * padded + o_k[None, :])
                right = tl.load(inverse_ptr + o_k[:, None] * padded + o_j[None, :])
                acc = tl.dot(left, right, acc, input_precision="ieee", out_dtype=tl.float64)
            found = tl.dot(own, -acc, input_precision="ieee", out_dtype=tl.float64)
            tl.store(inverse_ptr + o_i[:, None] * padded + o_j[None, :], found)
        tl.debug_barrier()

    for i in range(0, blocks):
        o_i = i * BLOCK + o
        e_i = tl.load(scale_ptr + o_i, mask=o_i < q, other=0.0)
        for j in range(0, blocks):
            o_j = j * BLOCK + o
            mask = (o_i < q)[:, None] & (o_j < q)[None, :]
            out = o_i[:, None] * q + o_j[None, :]
            transposed = o_j[None, :] * padded + o_i[:, None]
            e_j = tl.load(scale_ptr + o_j, mask=o_j < q, other=1.0)
            R = tl.load(lower_ptr + transposed) / e_j[None, :]
            tl.store(r_ptr + out, R.to(tl.float32), mask=mask)
            R_inverse = tl.load(inverse_ptr + transposed) * e_i[:, None]
            tl.store(r_inverse_ptr + out, R_inverse.to(tl.float32), mask=mask)
    tl.store(again_ptr + i_g, tl.max(((lost > 0) | (least < weak)).to(tl.int32), axis=0))


@triton.jit
def _largest(m_ptr, stride_r, stride_c, x, q, times, ROWS: tl.constexpr, BLOCK_Q: tl.constexpr):
    """About λ_max(MᵀM), from below, by power iteration on x (BLOCK_Q), float64.

    Of nearly dependent columns R⁻¹ is large enough for its fourth power to leave fp32.
    """
    o_q = tl.arange(0, BLOCK_Q)
    x = x / tl.sqrt(tl.sum(x * x, axis=0))
    found = tl.sum(x * 0.0, axis=0)
    for _ in range(0, times):
        z = tl.zeros((BLOCK_Q,), dtype=tl.float64)
        for first in range(0, q, ROWS):
            o_r = first + tl.arange(0, ROWS)
            mask = (o_r < q)[:, None] & (o_q < q)[None, :]
            p_m = m_ptr + o_r[:, None] * stride_r + o_q[None, :] * stride_c
            tile = tl.load(p_m, mask=mask, other=0.0).to(tl.float64)
            y = tl.sum(tile * x[None, :], axis=1)
            z += tl.sum(tile * y[:, None], axis=0)
        found = tl.sqrt(tl.sum(z * z, axis=0))
        x = z / tl.where(found > 0.0, found, 1.0)
    return found


@triton.jit(do_not_specialize=["purpose", "degree", "times"])
def svd_filter_kernel(
    coefficients_ptr,
    mode_ptr,
    r_ptr,
    r_inverse_ptr,
    dropped_ptr,
    seed_ptr,
    q,
    purpose,
    degree,
    times,
    most_growth,
    ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Coefficients (G, degree, 4) of one pass, Y₊ = α A Aᵀ Y + β Y + γ Y₋, and its mode (G).

    The fourth is not used: it keeps each step's aligned.

    With R of B = AᵀQ: s² the largest squared singular value, c the smallest, e = c / 2, the steps
    of T_d((A Aᵀ - e) / e) have α = 1/e, β = -1, and then 2/e, -2, -1. The degree d of a matrix
    keeps d acosh(2 s²/c - 1) below most_growth; where not even 2 does, mode is 1 and the pass is
    Y = A orth(B). Past its degree a block stays as it is: 0, 1, 0.
    """
    i_g = tl.program_id(0).to(tl.int64)
    o_q = tl.arange(0, BLOCK_Q)
    m_q = o_q < q
    drawn = uniform_tile(seed_ptr, tl.arange(0, 1), 0, purpose, 1, BLOCK_Q)
    x = tl.where(m_q, tl.sum(drawn, axis=0) + 1.25, 0.0).to(tl.float64)
    top = _largest(r_ptr + i_g * q * q, q, 1, x, q, times, ROWS, BLOCK_Q)
    # ends a little below, so c a little above the smallest value: 5 % more of it leave a tenth of
    # the energy missing, 30 % more leave a hundred times as much
    inverse = _largest(r_inverse_ptr + i_g * q * q, 1, q, x, q, 2 * times, ROWS, BLOCK_Q)
    lost = tl.sum(tl.load(dropped_ptr + i_g * q + o_q, mask=m_q, other=0), axis=0)
    whole = (lost == 0) & (inverse > 0.0)
    c = tl.where(whole, 1.0 / tl.where(whole, inverse, 1.0), 0.0)
    ratio = tl.where(whole, tl.maximum(2.0 * top * inverse - 1.0, 1.001), 1e30)
    growth = tl.log(ratio + tl.sqrt(ratio * ratio - 1.0)).to(tl.float32)
    steps = tl.minimum(tl.floor(most_growth / growth).to(tl.int32), degree)
    plain = steps < 2
    steps = tl.where(plain, 1, steps)
    tl.store(mode_ptr + i_g, plain.to(tl.int32))
    half = tl.where(plain, 1.0, 0.5 * c).to(tl.float32)
    coefficients_ptr += i_g * degree * 4
    for k in range(0, degree):
        first = k == 0
        stays = k >= steps
        alpha = tl.where(first, 1.0, 2.0) / half
        beta = tl.where(first, -1.0, -2.0)
        gamma = tl.where(first, 0.0, -1.0)
        beta = tl.where(plain, 0.0, beta)
        tl.store(coefficients_ptr + 4 * k, tl.where(stays, 0.0, alpha))
        tl.store(coefficients_ptr + 4 * k + 1, tl.where(stays, 1.0, beta))
        tl.store(coefficients_ptr + 4 * k + 2, tl.where(stays, 0.0, gamma))
