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
- A rotation's c² + s² is 1 to rounding, or a drift would add up over a thousand of them; angles
  are as quick roots and quotients give them.
"""

import triton
import triton.language as tl


@triton.jit
def _rotation(a, b, g):
    """(c, s) so that c p - s q and s p + c q are orthogonal, and |cos| between p and q.

    Of rows with products a, b, g; Rutishauser's formulas, the smaller of the two angles. Rows of
    (numerically) no length stay.
    """
    live = (a > 1e-36) & (b > 1e-36) & (g != 0.0)
    g = tl.where(live, g, 1.0)
    met = tl.abs(g) * tl.rsqrt(tl.where(live, a, 1.0)) * tl.rsqrt(tl.where(live, b, 1.0))
    zeta = (b - a) / (2.0 * g)
    size = tl.minimum(tl.abs(zeta), 1e18)  # its square stays finite
    t = tl.where(zeta < 0.0, -1.0, 1.0) / (size + tl.sqrt(1.0 + size * size))
    t = tl.where(live, t, 0.0)
    # an angle may be a little off, but c² + s² must be 1: a Newton step makes up for rsqrt
    square = 1.0 + t * t
    c = tl.rsqrt(square)
    c = c * (1.5 - 0.5 * square * c * c)
    return c, c * t, tl.where(live, met, 0.0)


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
            g = tl.sum(p * q_, axis=1)
            c, s, met = _rotation(tl.sum(p * p, axis=1), tl.sum(q_ * q_, axis=1), g)
            seen = tl.maximum(seen, met)
            turned = c[:, None] * p - s[:, None] * q_
            p = s[:, None] * p + c[:, None] * q_
            q_ = turned
            # column 2i + 1 with column 2i + 2; the line's two ends wait
            shifted = tl.gather(p, following, 0)
            g = tl.sum(q_ * shifted, axis=1)
            c, s, met = _rotation(tl.sum(q_ * q_, axis=1), tl.sum(shifted * shifted, axis=1), g)
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
    padded,
    r,
    most_sweeps,
    tolerance,
    not_converged,
    BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The same with the line in memory; BLOCK_H pairs at a time, BLOCK_L at least half of padded.

    Columns are worked on as two halves: up to 256 entries, a warp then holds whole ones.

    Args:
        line_ptr: fp32 (G, 2 ceil(q / 2), padded), memory; length_ptr: fp32 (G, 2 ceil(q / 2)).
        padded: q or more, a multiple of 16: every load is whole then.
    """
    i_g = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BLOCK_H)
    o_l = tl.arange(0, BLOCK_L)
    m_0 = (o_l < padded)[None, :]
    m_1 = (BLOCK_L + o_l < padded)[None, :]
    pairs = (q + 1) // 2
    columns = 2 * pairs
    x_ptr += i_g * q * q
    u_ptr += i_g * r * q
    line_ptr += i_g * columns * padded
    length_ptr += i_g * columns
    for first in range(0, columns, BLOCK_H):
        o_c = first + o_h
        m_c = (o_c < columns)[:, None]
        p_x = x_ptr + o_c[:, None] * q + o_l[None, :]
        p_line = line_ptr + o_c[:, None] * padded + o_l[None, :]
        for half in tl.static_range(2):
            inside = (o_c < q)[:, None] & (half * BLOCK_L + o_l < q)[None, :]
            rows = tl.load(p_x + half * BLOCK_L, mask=inside, other=0.0)
            tl.store(p_line + half * BLOCK_L, rows, mask=m_c & (m_1 if half else m_0))
    tl.debug_barrier()

    sweep = 0
    worst = tl.max(tl.full((BLOCK_H,), 1.0, dtype=tl.float32), axis=0)
    while (worst > tolerance) & (sweep < most_sweeps):
        seen = tl.zeros((BLOCK_H,), dtype=tl.float32)
        for step in range(0, columns):
            odd = step % 2
            for first in range(0, pairs - odd, BLOCK_H):
                o_p = first + o_h
                m_p = (o_p < pairs - odd)[:, None]
                p_p = line_ptr + (2 * o_p + odd)[:, None] * padded + o_l[None, :]
                p_q = p_p + padded
                p_0 = tl.load(p_p, mask=m_p & m_0, other=0.0)
                p_1 = tl.load(p_p + BLOCK_L, mask=m_p & m_1, other=0.0)
                q_0 = tl.load(p_q, mask=m_p & m_0, other=0.0)
                q_1 = tl.load(p_q + BLOCK_L, mask=m_p & m_1, other=0.0)
                a = tl.sum(p_0 * p_0 + p_1 * p_1, axis=1)
                b = tl.sum(q_0 * q_0 + q_1 * q_1, axis=1)
                g = tl.sum(p_0 * q_0 + p_1 * q_1, axis=1)
                c, s, met = _rotation(a, b, g)
                seen = tl.maximum(seen, met)
                c = c[:, None]
                s = s[:, None]
                tl.store(p_p, s * p_0 + c * q_0, mask=m_p & m_0)
                tl.store(p_p + BLOCK_L, s * p_1 + c * q_1, mask=m_p & m_1)
                tl.store(p_q, c * p_0 - s * q_0, mask=m_p & m_0)
                tl.store(p_q + BLOCK_L, c * p_1 - s * q_1, mask=m_p & m_1)
            tl.debug_barrier()
        worst = tl.max(seen, axis=0)
        sweep += 1
    tl.store(status_ptr + i_g, tl.where(worst > tolerance, not_converged, 0))

    for first in range(0, columns, BLOCK_H):
        o_c = first + o_h
        m_c = o_c < columns
        p_line = line_ptr + o_c[:, None] * padded + o_l[None, :]
        row_0 = tl.load(p_line, mask=m_c[:, None] & m_0, other=0.0)
        row_1 = tl.load(p_line + BLOCK_L, mask=m_c[:, None] & m_1, other=0.0)
        square = tl.sum(row_0 * row_0 + row_1 * row_1, axis=1)
        tl.store(length_ptr + o_c, tl.sqrt(square), mask=m_c)
    tl.debug_barrier()
    for first in range(0, columns, BLOCK_H):
        o_c = first + o_h
        m_c = o_c < columns
        own = tl.load(length_ptr + o_c, mask=m_c, other=-1.0)
        place = tl.zeros((BLOCK_H,), dtype=tl.int32)
        for other in range(0, columns, 32):
            o_o = other + tl.arange(0, 32)
            lengths = tl.load(length_ptr + o_o, mask=o_o < columns, other=-1.0)
            place += _before(lengths, o_o, own, o_c)
        p_line = line_ptr + o_c[:, None] * padded + o_l[None, :]
        row_0 = tl.load(p_line, mask=m_c[:, None] & m_0, other=0.0)
        row_1 = tl.load(p_line + BLOCK_L, mask=m_c[:, None] & m_1, other=0.0)
        _put(u_ptr, row_0, own, place, o_l, q, r, m_c)
        _put(u_ptr, row_1, own, place, BLOCK_L + o_l, q, r, m_c)
