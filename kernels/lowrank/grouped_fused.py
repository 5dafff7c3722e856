"""Triton kernels of grouped_lowrank_linear: one launch serves every group.

    shrink  P_g = drop(X_g) Q_gᵀ             S = drop(x) Aᵀ, U = dY Bᵀ
    expand  O_g += s_g D∘((P_g∘e_g) Q_g)     y += s (S∘e) B, dx += s D∘((U∘e) A)
    gram    G_g = s_g (P_gᵀ drop(X_g))∘e_g   dA from U and x, dB from S and dY, and de = s Σ Q∘(PᵀX)
    finish  the end of gram as a kernel, where its rows were split over programs

Key decisions
- A tile belongs to one group: a table names the group and the tile's first row (or rank) in it.
  After that a kernel counts rows and ranks within the group, as those of the single op do.
- No load reaches another group's rows or ranks, so that a NaN stays in its own.
- Gradients are written once, by the program that looped over all rows of the group, zeros where a
  group has no rows; split reductions write parts, which are added in a fixed order. No atomics.
- P is (M, most ranks), fp32; a group writes and reads its own ranks of it. B is rank-major like A.
- Ranks that are off, trained and frozen ranks, and rounding before dots: as in fused.py.
- Row and column offsets are int64. Groups, rows, ranks and p are runtime values: no recompilation.
"""

import triton
import triton.language as tl

from fastrank.kernels.common.jit import keep_tile, rank_masks, row_ids_tile, tile_dot


@triton.jit
def _tile_of(table_ptr, i, row_starts_ptr, rank_starts_ptr):
    """Entry i of a table: (group, first row or rank in it, its first row, rows, first rank, ranks).

    An entry that isn't used begins behind the rows and ranks of any group.
    """
    group = tl.load(table_ptr + 2 * i)
    first = tl.load(table_ptr + 2 * i + 1)
    row = tl.load(row_starts_ptr + group)
    rows = tl.load(row_starts_ptr + group + 1) - row
    rank = tl.load(rank_starts_ptr + group)
    ranks = tl.load(rank_starts_ptr + group + 1) - rank
    return group, first, row, rows, rank, ranks.to(tl.int32)


@triton.jit(do_not_specialize=["M", "most_ranks", "chunk_tiles", "threshold", "id_rows"])
def grouped_shrink_kernel(
    x_ptr,
    q_ptr,
    part_ptr,
    active_ptr,
    trainable_ptr,
    seeds_ptr,
    row_ids_ptr,
    table_ptr,
    row_starts_ptr,
    rank_starts_ptr,
    M,
    W,
    most_ranks,
    stride_xm,
    stride_xw,
    stride_qr,
    stride_qw,
    chunk_tiles,
    threshold,
    id_rows,
    inv_keep,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """part[split] (M, most_ranks) = drop(x) (M, W) qᵀ for own ranks, over one chunk of columns."""
    i_t = tl.program_id(0).to(tl.int64)
    i_r = tl.program_id(1)
    i_s = tl.program_id(2).to(tl.int64)
    group, first, row, rows, rank, R = _tile_of(table_ptr, i_t, row_starts_ptr, rank_starts_ptr)
    if MASKED:
        active_ptr += rank
        trainable_ptr += rank
    o_m = first + tl.arange(0, BLOCK_M)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    on, is_trained = rank_masks(active_ptr, trainable_ptr, o_r, R, R, MASKED)
    m_m = o_m < rows
    if DROPOUT:
        seeds_ptr += group
        ids = row_ids_tile(row_ids_ptr + row, o_m, tl.minimum(id_rows, rows))
    x_ptr += row * stride_xm
    q_ptr += rank * stride_qr

    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if DROPOUT and MASKED:
        acc_frozen = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    start = i_s * chunk_tiles * BLOCK_W
    # no rows, or ranks that are all off or another group's: zeros, and nothing is read
    wanted = (first < rows) & (tl.max(on.to(tl.int32), axis=0) > 0)
    for i_w in range(0, tl.where(wanted, chunk_tiles, 0)):
        column = start + i_w * BLOCK_W
        o_w = column + tl.arange(0, BLOCK_W)
        m_w = o_w < W
        p_x = x_ptr + o_m[:, None] * stride_xm + o_w[None, :] * stride_xw
        b_x = tl.load(p_x, mask=m_m[:, None] & m_w[None, :], other=0.0)
        p_q = q_ptr + o_w[:, None] * stride_qw + o_r[None, :].to(tl.int64) * stride_qr
        b_q = tl.load(p_q, mask=m_w[:, None] & on[None, :], other=0.0)  # (BLOCK_W, BLOCK_R)
        if DROPOUT:
            kept = keep_tile(seeds_ptr, ids, column, threshold, BLOCK_M, BLOCK_W)
            b_dropped = tl.where(kept, b_x, 0.0)
            if MASKED:
                b_trained = tl.where(is_trained[None, :], b_q, 0.0)
                b_frozen = tl.where(is_trained[None, :], 0.0, b_q)
                acc = tile_dot(b_dropped, b_trained, acc, DOT, PRECISION, INTERPRET)
                acc_frozen = tile_dot(b_x, b_frozen, acc_frozen, DOT, PRECISION, INTERPRET)
            else:
                acc = tile_dot(b_dropped, b_q, acc, DOT, PRECISION, INTERPRET)
        else:
            acc = tile_dot(b_x, b_q, acc, DOT, PRECISION, INTERPRET)

    if DROPOUT:
        acc = acc * inv_keep
        if MASKED:
            acc = tl.where(is_trained[None, :], acc, acc_frozen)
    p_part = part_ptr + (i_s * M + row + o_m[:, None]) * most_ranks + o_r[None, :]
    tl.store(p_part, acc, mask=m_m[:, None] & (o_r < R)[None, :])


@triton.jit(do_not_specialize=["most_ranks", "threshold", "id_rows", "e_ranks"])
def grouped_expand_kernel(
    out_ptr,
    p_ptr,
    q_ptr,
    e_ptr,
    scale_ptr,
    active_ptr,
    trainable_ptr,
    seeds_ptr,
    row_ids_ptr,
    table_ptr,
    row_starts_ptr,
    rank_starts_ptr,
    W,
    most_ranks,
    stride_om,
    stride_qr,
    stride_qw,
    threshold,
    id_rows,
    e_ranks,
    inv_keep,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out (M, W) += scale D∘((p∘e) (M, R) q (R, W)), own ranks; out has unit column stride."""
    i_t = tl.program_id(0).to(tl.int64)
    i_w = tl.program_id(1).to(tl.int64)
    group, first, row, rows, rank, R = _tile_of(table_ptr, i_t, row_starts_ptr, rank_starts_ptr)
    if MASKED:
        active_ptr += rank
        trainable_ptr += rank
    o_m = first + tl.arange(0, BLOCK_M)
    o_w = i_w * BLOCK_W + tl.arange(0, BLOCK_W)
    m_m = o_m < tl.where(R > 0, rows, 0)
    m_w = o_w < W
    p_ptr += row * most_ranks
    q_ptr += rank * stride_qr
    e_ptr += rank

    acc = tl.zeros((BLOCK_M, BLOCK_W), dtype=tl.float32)
    if DROPOUT and MASKED:
        acc_frozen = tl.zeros((BLOCK_M, BLOCK_W), dtype=tl.float32)
    for r in range(0, tl.where(first < rows, R, 0), BLOCK_R):
        o_r = r + tl.arange(0, BLOCK_R)
        on, is_trained = rank_masks(active_ptr, trainable_ptr, o_r, R, R, MASKED)
        p_p = p_ptr + o_m[:, None] * most_ranks + o_r[None, :]
        b_p = tl.load(p_p, mask=m_m[:, None] & on[None, :], other=0.0)
        b_p *= tl.load(e_ptr + o_r, mask=on & (o_r < e_ranks), other=1.0)[None, :]
        p_q = q_ptr + o_r[:, None].to(tl.int64) * stride_qr + o_w[None, :] * stride_qw
        b_q = tl.load(p_q, mask=on[:, None] & m_w[None, :], other=0.0)  # (BLOCK_R, BLOCK_W)
        if DROPOUT and MASKED:
            b_trained = tl.where(is_trained[None, :], b_p, 0.0)
            b_frozen = tl.where(is_trained[None, :], 0.0, b_p)
            acc = tile_dot(b_trained, b_q, acc, DOT, PRECISION, INTERPRET)
            acc_frozen = tile_dot(b_frozen, b_q, acc_frozen, DOT, PRECISION, INTERPRET)
        else:
            acc = tile_dot(b_p, b_q, acc, DOT, PRECISION, INTERPRET)

    if DROPOUT:
        ids = row_ids_tile(row_ids_ptr + row, o_m, tl.minimum(id_rows, rows))
        kept = keep_tile(seeds_ptr + group, ids, i_w * BLOCK_W, threshold, BLOCK_M, BLOCK_W)
        acc = tl.where(kept, acc * inv_keep, 0.0)
        if MASKED:
            acc += acc_frozen
    acc *= tl.load(scale_ptr + group)
    p_out = out_ptr + (row + o_m[:, None]) * stride_om + o_w[None, :]
    m_out = m_m[:, None] & m_w[None, :]
    acc += tl.load(p_out, mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=m_out)


@triton.jit
def _write_gradient(
    acc,
    out_ptr,
    q_ptr,
    de_ptr,
    e_ptr,
    scale,
    is_trained,
    i_w,
    o_w,
    o_r,
    rank,
    R,
    W,
    total_ranks,
    stride_qr,
    stride_qw,
    e_ranks,
    WANT_DE: tl.constexpr,
):
    """out (ΣR, W) = scale acc (W, R)∘e for a group's trained ranks o_r, exact zeros for the others.

    de (programs, ΣR) = scale Σ q∘acc over these columns. rank: the group's first.
    """
    m_w = o_w < W
    m_r = o_r < R
    o_r = rank + o_r
    acc *= scale
    if WANT_DE:
        p_q = q_ptr + o_w[:, None] * stride_qw + o_r[None, :] * stride_qr
        b_q = tl.load(p_q, mask=m_w[:, None] & is_trained[None, :], other=0.0).to(tl.float32)
        b_de = tl.where(is_trained, tl.sum(acc * b_q, axis=0), 0.0)
        tl.store(de_ptr + i_w * total_ranks + o_r, b_de, mask=m_r)
    acc *= tl.load(e_ptr + o_r, mask=is_trained & (o_r < e_ranks), other=1.0)[None, :]
    acc = tl.where(is_trained[None, :], acc, 0.0)
    p_out = out_ptr + o_r[None, :] * W + o_w[:, None]
    tl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=m_w[:, None] & m_r[None, :])


@triton.jit(
    do_not_specialize=["total_ranks", "most_ranks", "splits", "threshold", "id_rows", "e_ranks"]
)
def grouped_gram_kernel(
    x_ptr,
    p_ptr,
    out_ptr,
    q_ptr,
    de_ptr,
    e_ptr,
    scale_ptr,
    active_ptr,
    trainable_ptr,
    seeds_ptr,
    row_ids_ptr,
    table_ptr,
    row_starts_ptr,
    rank_starts_ptr,
    W,
    total_ranks,
    most_ranks,
    stride_xm,
    stride_xw,
    stride_qr,
    stride_qw,
    splits,
    threshold,
    id_rows,
    e_ranks,
    inv_keep,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WHOLE: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    WANT_DE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """pᵀ (R, M) drop(x) (M, W) over the rows of a tile of ranks' group.

    WHOLE: out (ΣR, W) is the gradient, de (programs, ΣR) this program's share of the diagonal's.
    Otherwise out (splits, ΣR, W) holds parts in fp32, one for each split of the group's rows.
    """
    programs_w = tl.cdiv(W, BLOCK_W)
    i_0 = tl.program_id(0)
    i_s = tl.program_id(1).to(tl.int64)
    i_w = (i_0 % programs_w).to(tl.int64)  # neighbours read neighbouring columns of the same rows
    group, first, row, rows, rank, R = _tile_of(
        table_ptr, i_0 // programs_w, row_starts_ptr, rank_starts_ptr
    )
    if MASKED:
        active_ptr += rank
        trainable_ptr += rank
    if DROPOUT:
        seeds_ptr += group
        row_ids_ptr += row
    o_w = i_w * BLOCK_W + tl.arange(0, BLOCK_W)
    o_r = (first + tl.arange(0, BLOCK_R)).to(tl.int32)
    m_w = o_w < W
    _, is_trained = rank_masks(active_ptr, trainable_ptr, o_r, R, R, MASKED)
    x_ptr += row * stride_xm
    p_ptr += row * most_ranks

    acc = tl.zeros((BLOCK_W, BLOCK_R), dtype=tl.float32)
    tiles = tl.cdiv(rows, BLOCK_M)
    chunk = tl.cdiv(tiles, splits)
    start = i_s * chunk
    tiles = tl.minimum(chunk, tl.maximum(tiles - start, 0)).to(tl.int32)
    # only trained ranks have gradients
    for i_m in range(0, tl.where(tl.max(is_trained.to(tl.int32), axis=0) > 0, tiles, 0)):
        o_m = (start + i_m) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < rows
        p_x = x_ptr + o_m[:, None] * stride_xm + o_w[None, :] * stride_xw
        b_x = tl.load(p_x, mask=m_m[:, None] & m_w[None, :], other=0.0)
        p_p = p_ptr + o_m[:, None] * most_ranks + o_r[None, :]
        b_p = tl.load(p_p, mask=m_m[:, None] & is_trained[None, :], other=0.0)
        if DROPOUT:
            ids = row_ids_tile(row_ids_ptr, o_m, tl.minimum(id_rows, rows))
            kept = keep_tile(seeds_ptr, ids, i_w * BLOCK_W, threshold, BLOCK_M, BLOCK_W)
            b_x = tl.where(kept, b_x, 0.0)
        acc = tile_dot(tl.trans(b_x), b_p, acc, DOT, PRECISION, INTERPRET)

    if DROPOUT:
        acc = acc * inv_keep
    if WHOLE:
        _write_gradient(
            acc,
            out_ptr,
            q_ptr,
            de_ptr,
            e_ptr,
            tl.load(scale_ptr + group),
            is_trained,
            i_w,
            o_w,
            o_r,
            rank,
            R,
            W,
            total_ranks,
            stride_qr,
            stride_qw,
            e_ranks,
            WANT_DE,
        )
    else:
        p_out = out_ptr + (i_s * total_ranks + rank + o_r[None, :]) * W + o_w[:, None]
        tl.store(p_out, acc, mask=m_w[:, None] & (o_r < R)[None, :])


@triton.jit(do_not_specialize=["total_ranks", "splits", "e_ranks"])
def grouped_finish_kernel(
    part_ptr,
    out_ptr,
    q_ptr,
    de_ptr,
    e_ptr,
    scale_ptr,
    active_ptr,
    trainable_ptr,
    table_ptr,
    row_starts_ptr,
    rank_starts_ptr,
    W,
    total_ranks,
    stride_qr,
    stride_qw,
    splits,
    e_ranks,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MASKED: tl.constexpr,
    WANT_DE: tl.constexpr,
):
    """out (ΣR, W) = scale (Σ part (splits, ΣR, W))∘e for trained ranks, exact zeros for others.

    de (programs, ΣR): this program's share of the diagonal's gradient.
    """
    programs_w = tl.cdiv(W, BLOCK_W)
    i_0 = tl.program_id(0)
    i_w = (i_0 % programs_w).to(tl.int64)
    group, first, _, _, rank, R = _tile_of(
        table_ptr, i_0 // programs_w, row_starts_ptr, rank_starts_ptr
    )
    if MASKED:
        active_ptr += rank
        trainable_ptr += rank
    o_w = i_w * BLOCK_W + tl.arange(0, BLOCK_W)
    o_r = (first + tl.arange(0, BLOCK_R)).to(tl.int32)
    m_part = (o_w < W)[:, None] & (o_r < R)[None, :]
    _, is_trained = rank_masks(active_ptr, trainable_ptr, o_r, R, R, MASKED)

    acc = tl.zeros((BLOCK_W, BLOCK_R), dtype=tl.float32)
    p_part = part_ptr + (rank + o_r[None, :]) * W + o_w[:, None]
    for _ in range(0, splits):
        acc += tl.load(p_part, mask=m_part, other=0.0)
        p_part += total_ranks.to(tl.int64) * W
    _write_gradient(
        acc,
        out_ptr,
        q_ptr,
        de_ptr,
        e_ptr,
        tl.load(scale_ptr + group),
        is_trained,
        i_w,
        o_w,
        o_r,
        rank,
        R,
        W,
        total_ranks,
        stride_qr,
        stride_qw,
        e_ranks,
        WANT_DE,
    )
