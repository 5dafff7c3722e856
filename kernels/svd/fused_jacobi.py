"""Triton kernels of truncated_svd: one-sided Jacobi, a whole small matrix in one program.

The columns of X are rotated in pairs until all are orthogonal: X J = U Σ. Only U and Σ are kept: V
comes from the product Aᵀ Q U outside, so no rotation is accumulated. X is Rᵀ of a QR
factorisation, on which Jacobi needs half the sweeps (Drmač and Veselić, SIAM J. Matrix Anal. 29,
2008).

Pairs meet by odd-even exchange (Luk and Park, SIAM J. Sci. Stat. Comput. 10, 1989): columns stand
in a line, neighbours rotate and swap places, at even and odd positions in turn; after as many
steps as columns every pair has met once, and the line is reversed.

    registers   columns 2i are the rows of tile P, columns 2i + 1 those of Q: even steps are
                elementwise, odd ones shift P by one row (tl.gather) and back
    memory      for what registers don't hold: the line in global memory, which a barrier between
                steps makes one program's threads see

Key decisions
- A column of X is a row of a tile: sums run inside a warp.
- Both sweep while the largest |cos| that a sweep met is above `tolerance`, on the device, to a cap.
- cos is relative to both columns' lengths, so small directions are as orthogonal as large ones.
- Square roots and quotients are rounded right: a rotation's drift would add up over a thousand.
"""

import triton
import triton.language as tl


@triton.jit
def _rotation(p, q):
    """(cos, sin) that make rows of p and q orthogonal as c p - s q, s p + c q; and |cos| of them.

    Rutishauser's formulas, the smaller of the two angles. Rows of (numerically) no length stay.
    """
    a = tl.sum(p * p, axis=1)
    b = tl.sum(q * q, axis=1)
    g = tl.sum(p * q, axis=1)
    live = (a > 1e-36) & (b > 1e-36) & (g != 0.0)
    lengths = tl.sqrt_rn(tl.where(live, a, 1.0)) * tl.sqrt_rn(tl.where(live, b, 1.0))
    met = tl.where(live, tl.abs(g) / lengths, 0.0)
    zeta = tl.div_rn(b - a, 2.0 * tl.where(live, g, 1.0))
    size = tl.minimum(tl.abs(zeta), 1e18)  # its square stays finite
    t = tl.div_rn(tl.where(zeta < 0.0, -1.0, 1.0), size + tl.sqrt_rn(1.0 + size * size))
    t = tl.where(live, t, 0.0)
    c = tl.div_rn(1.0, tl.sqrt_rn(1.0 + t * t))
    return c, c * t, met


@triton.jit
def _before(a, i_a, b, i_b):
    """How many of a (with indices i_a) stand before each of b in descending order."""
    larger = a[None, :] > b[:, None]
    tied = (a[None, :] == b[:, None]) & (i_a[None, :] < i_b[:, None])
    return tl.sum((larger | tied).to(tl.int32), axis=1)


@triton.jit
def _put(u_ptr, rows, lengths, places, o_l, q, r, real):
    """Rows divided by their lengths to their places among the first r."""
    unit = rows * tl.where(lengths > 0.0, 1.0 / tl.where(lengths > 0.0, lengths, 1.0), 0.0)[:, None]
    p_u = u_ptr + places[:, None] * q + o_l[None, :]
    tl.store(p_u, unit, mask=((places < r) & real)[:, None] & (o_l < q)[None, :])


@triton.jit(do_not_specialize=["most_sweeps", "not_converged"])
def svd_jacobi_kernel(
    u_ptr,
    x_ptr,
    status_ptr,
    q,
    r,
    most_sweeps,
    tolerance,
    not_converged,
    BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """u (G, r, q): rows are the leading r left singular vectors of X, whose columns are x's rows.

    Args:
        x_ptr: fp32 (G, q, q).
        status_ptr: int32 (G), not_converged where the cap ended it, or 0.
        BLOCK_H: at least ceil(q / 2). BLOCK_L: at least q.
    """
    i_g = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BLOCK_H)
    o_l = tl.arange(0, BLOCK_L)
    pairs = (q + 1) // 2
    x_ptr += i_g * q * q
    u_ptr += i_g * r * q
    p_p = x_ptr + (2 * o_h)[:, None] * q + o_l[None, :]
    p = tl.load(p_p, mask=(2 * o_h < q)[:, None] & (o_l < q)[None, :], other=0.0)
    p_q = x_ptr + (2 * o_h + 1)[:, None] * q + o_l[None, :]
    q_ = tl.load(p_q, mask=(2 * o_h + 1 < q)[:, None] & (o_l < q)[None, :], other=0.0)

    real = o_h < pairs
    inner = o_h < pairs - 1
    index = tl.zeros((BLOCK_H, BLOCK_L), dtype=tl.int32)
    following = tl.where(inner, o_h + 1, tl.where(real, 0, o_h))[:, None] + index
    previous = tl.where(o_h == 0, pairs - 1, tl.where(real, o_h - 1, o_h))[:, None] + index
    sweep = 0
    worst = tl.max(tl.full((BLOCK_H,), 1.0, dtype=tl.float32), axis=0)
    while (worst > tolerance) & (sweep < most_sweeps):
        seen = tl.zeros((BLOCK_H,), dtype=tl.float32)
        for _ in range(0, pairs):
            c, s, met = _rotation(p, q_)
            seen = tl.maximum(seen, met)
            turned = c[:, None] * p - s[:, None] * q_
            p = s[:, None] * p + c[:, None] * q_
            q_ = turned
            # column 2i + 1 with column 2i + 2; the line's two ends wait
            shifted = tl.gather(p, following, 0)
            c, s, met = _rotation(q_, shifted)
            seen = tl.maximum(seen, tl.where(inner, met, 0.0))
            turned = c[:, None] * q_ - s[:, None] * shifted
            other = s[:, None] * q_ + c[:, None] * shifted
            q_ = tl.where(inner[:, None], other, q_)
            shifted = tl.where(inner[:, None], turned, shifted)
            p = tl.gather(shifted, previous, 0)
        worst = tl.max(seen, axis=0)
        sweep += 1
    tl.store(status_ptr + i_g, tl.where(worst > tolerance, not_converged, 0))

    a = tl.sqrt(tl.sum(p * p, axis=1))
    b = tl.sqrt(tl.sum(q_ * q_, axis=1))
    # memory that no column fills stands behind all
    sort_a = tl.where(real, a, -1.0)
    sort_b = tl.where(real, b, -1.0)
    i_a = 2 * o_h
    i_b = 2 * o_h + 1
    place_a = _before(sort_a, i_a, sort_a, i_a) + _before(sort_b, i_b, sort_a, i_a)
    place_b = _before(sort_a, i_a, sort_b, i_b) + _before(sort_b, i_b, sort_b, i_b)
    _put(u_ptr, p, a, place_a, o_l, q, r, real)
    _put(u_ptr, q_, b, place_b, o_l, q, r, real)


@triton.jit(do_not_specialize=["most_sweeps", "not_converged"])
def svd_jacobi_memory_kernel(
    u_ptr,
    x_ptr,
    line_ptr,
    length_ptr,
    status_ptr,
    q,
    r,
    most_sweeps,
    tolerance,
    not_converged,
    BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The same with the line in memory; BLOCK_H pairs at a time, BLOCK_L at least q.

    Args:
        line_ptr: fp32 (G, 2 ceil(q / 2), q), memory; length_ptr: fp32 (G, 2 ceil(q / 2)).
    """
    i_g = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BLOCK_H)
    o_l = tl.arange(0, BLOCK_L)
    m_l = o_l < q
    pairs = (q + 1) // 2
    columns = 2 * pairs
    x_ptr += i_g * q * q
    u_ptr += i_g * r * q
    line_ptr += i_g * columns * q
    length_ptr += i_g * columns
    for first in range(0, columns, BLOCK_H):
        o_c = first + o_h
        source = tl.load(
            x_ptr + o_c[:, None] * q + o_l[None, :],
            mask=(o_c < q)[:, None] & m_l[None, :],
            other=0.0,
        )
        p_line = line_ptr + o_c[:, None] * q + o_l[None, :]
        tl.store(p_line, source, mask=(o_c < columns)[:, None] & m_l[None, :])
    tl.debug_barrier()

    sweep = 0
    worst = tl.max(tl.full((BLOCK_H,), 1.0, dtype=tl.float32), axis=0)
    while (worst > tolerance) & (sweep < most_sweeps):
        seen = tl.zeros((BLOCK_H,), dtype=tl.float32)
        for step in range(0, columns):
            odd = step % 2
            for first in range(0, pairs - odd, BLOCK_H):
                o_p = first + o_h
                mask = (o_p < pairs - odd)[:, None] & m_l[None, :]
                p_p = line_ptr + (2 * o_p + odd)[:, None] * q + o_l[None, :]
                p = tl.load(p_p, mask=mask, other=0.0)
                q_ = tl.load(p_p + q, mask=mask, other=0.0)
                c, s, met = _rotation(p, q_)
                seen = tl.maximum(seen, met)
                tl.store(p_p, s[:, None] * p + c[:, None] * q_, mask=mask)
                tl.store(p_p + q, c[:, None] * p - s[:, None] * q_, mask=mask)
            tl.debug_barrier()
        worst = tl.max(seen, axis=0)
        sweep += 1
    tl.store(status_ptr + i_g, tl.where(worst > tolerance, not_converged, 0))

    for first in range(0, columns, BLOCK_H):
        o_c = first + o_h
        m_c = o_c < columns
        p_line = line_ptr + o_c[:, None] * q + o_l[None, :]
        rows = tl.load(p_line, mask=m_c[:, None] & m_l[None, :], other=0.0)
        tl.store(length_ptr + o_c, tl.sqrt(tl.sum(rows * rows, axis=1)), mask=m_c)
    tl.debug_barrier()
    for first in range(0, columns, BLOCK_H):
        o_c = first + o_h
        m_c = o_c < columns
        own = tl.load(length_ptr + o_c, mask=m_c, other=-1.0)
        place = tl.zeros((BLOCK_H,), dtype=tl.int32)
        for other in range(0, columns, BLOCK_L):
            o_o = other + o_l
            lengths = tl.load(length_ptr + o_o, mask=o_o < columns, other=-1.0)
            place += _before(lengths, o_o, own, o_c)
        p_line = line_ptr + o_c[:, None] * q + o_l[None, :]
        rows = tl.load(p_line, mask=m_c[:, None] & m_l[None, :], other=0.0)
        _put(u_ptr, rows, own, place, o_l, q, r, m_c)
