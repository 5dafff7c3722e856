"""Triton kernels of the masked low-rank matmul. Tile sizes are data: choices.json.

    shrink  P = drop(X) Qᵀ             S = drop(x) Aᵀ, U = dY B
    expand  O (+)= α D∘((P∘c) Q)       y += s (S∘e) Bᵀ, dx += s D∘((U∘e) A)
    gram    G = drop(X)ᵀ P             H = drop(x)ᵀ U, G = dYᵀ S
    dual    shrink and gram of one matrix in one read of it: U and G from dY
    finish  α (Σ parts)∘c, masked      dA from H, dB from G, and de = α Σ Q∘(Σ parts)

Key decisions
- No atomics: programs that share a reduction write parts, which are added in a fixed order.
- S and U stay fp32 (a few bytes a row); operands are rounded to DOT once, right before a dot.
- Ranks that are off are never loaded from A, B or e, and a NaN in x that reaches their columns of P
  stays there: expand doesn't load them, and finish overwrites them by a select (0 * NaN is NaN).
- A tile of ranks that are all off is skipped: masks on the device save time too, from tile to tile.
- Trained ranks read dropped x, frozen ones x as it is: two dots on one tile when both can occur.
- Row and column offsets are int64. R, row counts and p are runtime values: no recompilation.
"""

import triton
import triton.language as tl

from fastrank.kernels.common.jit import keep_tile, rank_masks, row_ids_tile, tile_dot


@triton.jit(
    do_not_specialize=["M", "R", "trained", "chunk_tiles", "threshold", "id_rows", "projections"]
)
def lowrank_shrink_kernel(
    x_ptr,
    q_ptr,
    part_ptr,
    active_ptr,
    trainable_ptr,
    seed_ptr,
    row_ids_ptr,
    starts_ptr,
    counts_ptr,
    M,
    W,
    R,
    trained,
    stride_xm,
    stride_xw,
    stride_qr,
    stride_qw,
    chunk_tiles,
    threshold,
    id_rows,
    projections,
    inv_keep,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SHARED: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """part[split] (M, R) = drop(x) (M, W) qᵀ over one chunk of columns.

    SHARED: for several projections of one x, whose ranks lie behind each other in q and the masks,
    from starts[i] on; R is their sum, counts[i] how many are trained, part[split] one (M, R_i)
    after another.
    """
    i_0 = tl.program_id(0)
    i_r = tl.program_id(1)
    i_s = tl.program_id(2).to(tl.int64)
    ranks, before = R, 0  # of all projections together, and before this one
    if SHARED:
        # projections of a tile of x are neighbours, so that all but the first find it in L2
        i_p, i_0 = i_0 % projections, i_0 // projections
        before = tl.load(starts_ptr + i_p).to(tl.int64)
        R = (tl.load(starts_ptr + i_p + 1) - before).to(tl.int32)
        trained = tl.load(counts_ptr + i_p)
        if MASKED:
            active_ptr += before
            trainable_ptr += before
        if DROPOUT:
            seed_ptr += i_p
        q_ptr += before * stride_qr
    i_m = i_0.to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    on, is_trained = rank_masks(active_ptr, trainable_ptr, o_r, R, trained, MASKED)
    m_m = o_m < M
    if DROPOUT:
        row = row_ids_tile(row_ids_ptr, o_m, id_rows)

    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if DROPOUT and MASKED:
        acc_frozen = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    start = i_s * chunk_tiles * BLOCK_W
    tiles = chunk_tiles
    if MASKED or SHARED:  # a tile of ranks that are all off is zeros, and reads nothing
        tiles = tl.where(tl.max(on.to(tl.int32), axis=0) > 0, chunk_tiles, 0)
    for i_w in range(0, tiles):
        column = start + i_w * BLOCK_W
        o_w = column + tl.arange(0, BLOCK_W)
        m_w = o_w < W
        p_x = x_ptr + o_m[:, None] * stride_xm + o_w[None, :] * stride_xw
        b_x = tl.load(p_x, mask=m_m[:, None] & m_w[None, :], other=0.0)
        p_q = q_ptr + o_w[:, None] * stride_qw + o_r[None, :].to(tl.int64) * stride_qr
        b_q = tl.load(p_q, mask=m_w[:, None] & on[None, :], other=0.0)  # (BLOCK_W, BLOCK_R)
        if DROPOUT:
            kept = keep_tile(seed_ptr, row, column, threshold, BLOCK_M, BLOCK_W)
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
    p_part = part_ptr + (i_s * ranks + before) * M + o_m[:, None] * R + o_r[None, :]
    tl.store(p_part, acc, mask=m_m[:, None] & (o_r < R)[None, :])


@triton.jit(do_not_specialize=["M", "R", "trained", "threshold", "id_rows", "e_ranks"])
def lowrank_expand_kernel(
    out_ptr,
    p_ptr,
    q_ptr,
    e_ptr,
    active_ptr,
    trainable_ptr,
    seed_ptr,
    row_ids_ptr,
    M,
    W,
    R,
    trained,
    stride_om,
    stride_qr,
    stride_qw,
    threshold,
    id_rows,
    e_ranks,
    inv_keep,
    alpha,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    ADD: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out (M, W) (+)= alpha D∘((p∘e) (M, R) q (R, W)); out has unit column stride."""
    i_m = tl.program_id(0).to(tl.int64)
    i_w = tl.program_id(1).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_w = i_w * BLOCK_W + tl.arange(0, BLOCK_W)
    m_m = o_m < M
    m_w = o_w < W

    acc = tl.zeros((BLOCK_M, BLOCK_W), dtype=tl.float32)
    if DROPOUT and MASKED:
        acc_frozen = tl.zeros((BLOCK_M, BLOCK_W), dtype=tl.float32)
    for r in range(0, R, BLOCK_R):
        o_r = r + tl.arange(0, BLOCK_R)
        on, is_trained = rank_masks(active_ptr, trainable_ptr, o_r, R, trained, MASKED)
        p_p = p_ptr + o_m[:, None] * R + o_r[None, :]
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
        row = row_ids_tile(row_ids_ptr, o_m, id_rows)
        kept = keep_tile(seed_ptr, row, i_w * BLOCK_W, threshold, BLOCK_M, BLOCK_W)
        acc = tl.where(kept, acc * inv_keep, 0.0)
        if MASKED:
            acc += acc_frozen
    acc *= alpha
    p_out = out_ptr + o_m[:, None] * stride_om + o_w[None, :]
    m_out = m_m[:, None] & m_w[None, :]
    if ADD:
        acc += tl.load(p_out, mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=m_out)


@triton.jit(
    do_not_specialize=["M", "R", "trained", "chunk_tiles", "threshold", "id_rows", "projections"]
)
def lowrank_gram_kernel(
    x_ptr,
    p_ptr,
    part_ptr,
    active_ptr,
    trainable_ptr,
    seed_ptr,
    row_ids_ptr,
    starts_ptr,
    counts_ptr,
    M,
    W,
    R,
    trained,
    stride_xm,
    stride_xw,
    chunk_tiles,
    threshold,
    id_rows,
    projections,
    inv_keep,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SHARED: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """part[split] (W, R) = drop(x)ᵀ (W, M) p (M, R) over one chunk of rows; untrained ranks: 0.

    SHARED: as in shrink, p and part being one (M, R_i) and (W, R_i) after another.
    """
    i_0 = tl.program_id(0)
    i_r = tl.program_id(1)
    i_s = tl.program_id(2).to(tl.int64)
    ranks, before = R, 0  # of all projections together, and before this one
    if SHARED:
        # projections of a tile of x are neighbours, so that all but the first find it in L2
        i_p, i_0 = i_0 % projections, i_0 // projections
        before = tl.load(starts_ptr + i_p).to(tl.int64)
        R = (tl.load(starts_ptr + i_p + 1) - before).to(tl.int32)
        trained = tl.load(counts_ptr + i_p)
        if MASKED:
            active_ptr += before
            trainable_ptr += before
        if DROPOUT:
            seed_ptr += i_p
        p_ptr += before * M
    i_w = i_0.to(tl.int64)
    o_w = i_w * BLOCK_W + tl.arange(0, BLOCK_W)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_w = o_w < W
    _, is_trained = rank_masks(active_ptr, trainable_ptr, o_r, R, trained, MASKED)

    acc = tl.zeros((BLOCK_W, BLOCK_R), dtype=tl.float32)
    start = i_s * chunk_tiles * BLOCK_M
    tiles = chunk_tiles
    if MASKED or SHARED:  # only trained ranks have gradients
        tiles = tl.where(tl.max(is_trained.to(tl.int32), axis=0) > 0, chunk_tiles, 0)
    for i_m in range(0, tiles):
        o_m = start + i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        p_x = x_ptr + o_m[:, None] * stride_xm + o_w[None, :] * stride_xw
        b_x = tl.load(p_x, mask=m_m[:, None] & m_w[None, :], other=0.0)
        p_p = p_ptr + o_m[:, None] * R + o_r[None, :]
        b_p = tl.load(p_p, mask=m_m[:, None] & is_trained[None, :], other=0.0)
        if DROPOUT:
            row = row_ids_tile(row_ids_ptr, o_m, id_rows)
            kept = keep_tile(seed_ptr, row, i_w * BLOCK_W, threshold, BLOCK_M, BLOCK_W)
            b_x = tl.where(kept, b_x, 0.0)
        acc = tile_dot(tl.trans(b_x), b_p, acc, DOT, PRECISION, INTERPRET)

    if DROPOUT:
        acc = acc * inv_keep
    p_part = part_ptr + (i_s * ranks + before) * W + o_w[:, None] * R + o_r[None, :]
    tl.store(p_part, acc, mask=m_w[:, None] & (o_r < R)[None, :])


@triton.jit(do_not_specialize=["M", "R", "chunk_tiles"])
def lowrank_dual_kernel(
    x_ptr,
    p_ptr,
    q_ptr,
    shrunk_ptr,
    gram_ptr,
    active_ptr,
    trainable_ptr,
    M,
    W,
    R,
    stride_xm,
    stride_xw,
    stride_qr,
    stride_qw,
    chunk_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MASKED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """shrunk[i_w] (M, R) = x qᵀ over one tile of columns, gram[i_s] (W, R) = xᵀ p over one chunk
    of rows: one read of x (M, W). All ranks fit BLOCK_R.
    """
    i_w = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1).to(tl.int64)
    o_w = i_w * BLOCK_W + tl.arange(0, BLOCK_W)
    o_r = tl.arange(0, BLOCK_R)
    m_w = o_w < W
    m_r = o_r < R
    on, _ = rank_masks(active_ptr, trainable_ptr, o_r, R, R, MASKED)
    p_q = q_ptr + o_w[:, None] * stride_qw + o_r[None, :].to(tl.int64) * stride_qr
    b_q = tl.load(p_q, mask=m_w[:, None] & on[None, :], other=0.0)  # (BLOCK_W, BLOCK_R)

    acc = tl.zeros((BLOCK_W, BLOCK_R), dtype=tl.float32)
    start = i_s * chunk_tiles * BLOCK_M
    for i_m in range(0, chunk_tiles):
        o_m = start + i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        p_x = x_ptr + o_m[:, None] * stride_xm + o_w[None, :] * stride_xw
        b_x = tl.load(p_x, mask=m_m[:, None] & m_w[None, :], other=0.0)
        p_p = p_ptr + o_m[:, None] * R + o_r[None, :]
        b_p = tl.load(p_p, mask=m_m[:, None] & m_r[None, :], other=0.0)
        acc = tile_dot(tl.trans(b_x), b_p, acc, DOT, PRECISION, INTERPRET)
        b_s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        b_s = tile_dot(b_x, b_q, b_s, DOT, PRECISION, INTERPRET)
        p_s = shrunk_ptr + (i_w * M + o_m[:, None]) * R + o_r[None, :]
        tl.store(p_s, b_s, mask=m_m[:, None] & m_r[None, :])

    p_g = gram_ptr + (i_s * W + o_w[:, None]) * R + o_r[None, :]
    tl.store(p_g, acc, mask=m_w[:, None] & m_r[None, :])


@triton.jit(do_not_specialize=["R", "trained", "parts", "e_ranks"])
def lowrank_finish_kernel(
    part_ptr,
    out_ptr,
    q_ptr,
    de_ptr,
    e_ptr,
    active_ptr,
    trainable_ptr,
    W,
    R,
    trained,
    parts,
    stride_part,
    stride_or,
    stride_ow,
    stride_qr,
    stride_qw,
    e_ranks,
    alpha,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MASKED: tl.constexpr,
    WANT_DE: tl.constexpr,
):
    """out = alpha (Σ part (W, R))∘e for trained ranks, exact zeros for the others, in out's dtype.

    de (programs, R): this program's share of alpha Σ_w q∘(Σ part), added up by the launcher.
    """
    i_w = tl.program_id(0).to(tl.int64)
    i_r = tl.program_id(1)
    o_w = i_w * BLOCK_W + tl.arange(0, BLOCK_W)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_w = o_w < W
    m_r = o_r < R
    m_part = m_w[:, None] & m_r[None, :]
    _, is_trained = rank_masks(active_ptr, trainable_ptr, o_r, R, trained, MASKED)

    acc = tl.zeros((BLOCK_W, BLOCK_R), dtype=tl.float32)
    p_part = part_ptr + o_w[:, None] * R + o_r[None, :]
    for _ in range(0, parts):
        acc += tl.load(p_part, mask=m_part, other=0.0)
        p_part += stride_part
    acc *= alpha
    o_r = o_r.to(tl.int64)
    if WANT_DE:
        p_q = q_ptr + o_w[:, None] * stride_qw + o_r[None, :] * stride_qr
        b_q = tl.load(p_q, mask=m_w[:, None] & is_trained[None, :], other=0.0).to(tl.float32)
        b_de = tl.where(is_trained, tl.sum(acc * b_q, axis=0), 0.0)
        tl.store(de_ptr + i_w * R + o_r, b_de, mask=m_r)
    acc *= tl.load(e_ptr + o_r, mask=is_trained & (o_r < e_ranks), other=1.0)[None, :]
    acc = tl.where(is_trained[None, :], acc, 0.0)
    p_out = out_ptr + o_w[:, None] * stride_ow + o_r[None, :] * stride_or
    tl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=m_part)
