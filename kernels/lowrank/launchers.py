"""Launchers of the kernels of fused.py and gemm.py: allocate, size the grid, launch.

x is the wide matrix that a kernel reads, q a factor in either orientation with its strides over
(ranks, wide columns), p a narrow fp32 matrix (M, R). Operands are checked and compacted already.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastrank.kernels.common import dropout_threshold, interpreting
from fastrank.kernels.common.launch import cdiv, launch, split_count
from fastrank.kernels.lowrank.calls import HALVES, Call
from fastrank.kernels.lowrank.fused import (
    lowrank_dual_kernel,
    lowrank_expand_kernel,
    lowrank_finish_kernel,
    lowrank_gram_kernel,
    lowrank_shrink_kernel,
)
from fastrank.kernels.lowrank.gemm import lowrank_gemm_kernel

_TL_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# a dual read writes its parts once and reads them once; past this they would crowd the memory
_MAX_DUAL_PARTS_BYTES = 256 << 20
_MOST_SHRINK_SPLITS = 16
_MOST_GRAM_SPLITS = 32


def _dropout_arguments(call: Call, dropout: bool) -> dict:
    """Runtime arguments of a draw; without one the pointers are None."""
    seed, row_ids, p = call.aux.seed, call.aux.row_ids, call.branch.dropout_p
    return {
        "seed_ptr": seed if dropout else None,
        # the seed stands in for row ids that are not read: id_rows is 0
        "row_ids_ptr": (seed if row_ids is None else row_ids) if dropout else None,
        "threshold": dropout_threshold(p) - 2**31,
        "id_rows": 0 if row_ids is None else row_ids.shape[0],
        "inv_keep": 1.0 / (1.0 - p) if dropout else 1.0,
    }


def _dot_options(call: Call) -> dict:
    return {
        "DOT": _TL_DTYPES[call.dot],
        "PRECISION": call.precision,
        "INTERPRET": interpreting(),
    }


def _sum_parts(parts: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


class Shared(NamedTuple):
    """Several projections of one x, as a launch for all of them needs it."""

    ranks: tuple[int, ...]
    starts: Tensor  # int32 [P + 1]: where each one's ranks begin among all
    counts: Tensor  # int32 [P]: trained ranks

    def parts(self, flat: Tensor, rows: int) -> list[Tensor]:
        """Views (..., rows, R_i) of what a kernel wrote behind each other, (..., rows ΣR)."""
        sizes = [rows * r for r in self.ranks]
        split = flat.split(sizes, dim=-1)
        return [t.unflatten(-1, (rows, r)) for t, r in zip(split, self.ranks, strict=True)]


def _shared_arguments(shared: Shared | None) -> dict:
    return {
        "starts_ptr": None if shared is None else shared.starts,
        "counts_ptr": None if shared is None else shared.counts,
        "projections": 1 if shared is None else len(shared.ranks),
        "SHARED": shared is not None,
    }


def shrink(
    call: Call,
    x: Tensor,
    q: Tensor,
    q_strides: tuple[int, int],
    dropout: bool,
    shared: Shared | None = None,
) -> Tensor:
    """drop(x) qᵀ: fp32 (M, R). q_strides: q's strides over (ranks, columns of x).

    With `shared`, q and the masks and seeds of the call hold all projections; the result is flat.
    """
    (M, W), R = x.shape, call.branch.kept
    most, ranks = (R, R) if shared is None else (max(shared.ranks), sum(shared.ranks))
    block_r, tile = call.tile("shrink", M, W)
    arguments = _shared_arguments(shared)
    programs_m, programs_r = cdiv(M, tile.block_m) * arguments["projections"], cdiv(most, block_r)
    tiles = cdiv(W, tile.block_w)
    splits = split_count(programs_m * programs_r, tiles, _MOST_SHRINK_SPLITS, call.gpu.units)
    chunk = cdiv(tiles, splits)
    splits = cdiv(tiles, chunk)
    shape = (splits, M, R) if shared is None else (splits, M * ranks)
    parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    launch(
        lowrank_shrink_kernel,
        (programs_m, programs_r, splits),
        x_ptr=x,
        q_ptr=q,
        part_ptr=parts,
        active_ptr=call.masks[0],
        trainable_ptr=call.masks[1],
        M=M,
        W=W,
        R=ranks,
        trained=call.branch.trained,
        stride_xm=x.stride(0),
        stride_xw=x.stride(1),
        stride_qr=q_strides[0],
        stride_qw=q_strides[1],
        chunk_tiles=chunk,
        BLOCK_M=tile.block_m,
        BLOCK_W=tile.block_w,
        BLOCK_R=block_r,
        MASKED=call.masked,
        DROPOUT=dropout,
        **arguments,
        **_dropout_arguments(call, dropout),
        **_dot_options(call),
        **tile.options(call.gpu.hip),
    )
    return _sum_parts(parts)


def expand_(
    call: Call,
    out: Tensor,
    p: Tensor,
    q: Tensor,
    q_strides: tuple[int, int],
    e: Tensor | None,
    alpha: float,
    dropout: bool,
    add: bool,
) -> None:
    """out (M, W) (+)= alpha D∘((p∘e) q) in place. q_strides: over (ranks, columns of out)."""
    (M, W), R = out.shape, call.branch.kept
    block_r, tile = call.tile("expand", M, W)
    launch(
        lowrank_expand_kernel,
        (cdiv(M, tile.block_m), cdiv(W, tile.block_w)),
        out_ptr=out,
        p_ptr=p,
        q_ptr=q,
        e_ptr=p if e is None else e,
        active_ptr=call.masks[0],
        trainable_ptr=call.masks[1],
        M=M,
        W=W,
        R=R,
        trained=call.branch.trained,
        stride_om=out.stride(0),
        stride_qr=q_strides[0],
        stride_qw=q_strides[1],
        e_ranks=0 if e is None else R,
        alpha=alpha,
        BLOCK_M=tile.block_m,
        BLOCK_W=tile.block_w,
        BLOCK_R=block_r,
        MASKED=call.masked,
        DROPOUT=dropout,
        ADD=add,
        **_dropout_arguments(call, dropout),
        **_dot_options(call),
        **tile.options(call.gpu.hip),
    )


def gram(call: Call, x: Tensor, p: Tensor, dropout: bool, shared: Shared | None = None) -> Tensor:
    """Parts of drop(x)ᵀ p: fp32 (splits, W, R), to be added up.

    With `shared`, p is flat, one (M, R_i) after another, and so are the parts, (splits, W ΣR).
    """
    (M, W), R = x.shape, call.branch.kept
    most, ranks = (R, R) if shared is None else (max(shared.ranks), sum(shared.ranks))
    block_r, tile = call.tile("gram", M, W)
    arguments = _shared_arguments(shared)
    programs_w, programs_r = cdiv(W, tile.block_w) * arguments["projections"], cdiv(most, block_r)
    tiles = cdiv(M, tile.block_m)
    splits = split_count(programs_w * programs_r, tiles, _MOST_GRAM_SPLITS, call.gpu.units)
    chunk = cdiv(tiles, splits)
    splits = cdiv(tiles, chunk)
    shape = (splits, W, R) if shared is None else (splits, W * ranks)
    parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    launch(
        lowrank_gram_kernel,
        (programs_w, programs_r, splits),
        x_ptr=x,
        p_ptr=p,
        part_ptr=parts,
        active_ptr=call.masks[0],
        trainable_ptr=call.masks[1],
        M=M,
        W=W,
        R=ranks,
        trained=call.branch.trained,
        stride_xm=x.stride(0),
        stride_xw=x.stride(1),
        chunk_tiles=chunk,
        BLOCK_M=tile.block_m,
        BLOCK_W=tile.block_w,
        BLOCK_R=block_r,
        MASKED=call.masked,
        DROPOUT=dropout,
        **arguments,
        **_dropout_arguments(call, dropout),
        **_dot_options(call),
        **tile.options(call.gpu.hip),
    )
    return parts


def reads_once(call: Call, M: int, W: int) -> bool:
    """Whether shrink and gram of one (M, W) matrix share one read of it."""
    R = call.branch.kept
    if call.table.route("dual", call.operands, R, M, W) != "one_read":
        return False
    block_r, tile = call.tile("dual", M, W)
    return block_r >= R and 4 * M * R * cdiv(W, tile.block_w) <= _MAX_DUAL_PARTS_BYTES


def dual(
    call: Call, x: Tensor, p: Tensor, q: Tensor, q_strides: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """x qᵀ as fp32 (M, R), and parts of xᵀ p as fp32 (splits, W, R), from one read of x."""
    (M, W), R = x.shape, call.branch.kept
    block_r, tile = call.tile("dual", M, W)
    programs_w, tiles = cdiv(W, tile.block_w), cdiv(M, tile.block_m)
    splits = split_count(programs_w, tiles, _MOST_GRAM_SPLITS, call.gpu.units)
    chunk = cdiv(tiles, splits)
    splits = cdiv(tiles, chunk)
    shrunk = torch.empty(programs_w, M, R, dtype=torch.float32, device=x.device)
    parts = torch.empty(splits, W, R, dtype=torch.float32, device=x.device)
    launch(
        lowrank_dual_kernel,
        (programs_w, splits),
        x_ptr=x,
        p_ptr=p,
        q_ptr=q,
        shrunk_ptr=shrunk,
        gram_ptr=parts,
        active_ptr=call.masks[0],
        trainable_ptr=call.masks[1],
        M=M,
        W=W,
        R=R,
        stride_xm=x.stride(0),
        stride_xw=x.stride(1),
        stride_qr=q_strides[0],
        stride_qw=q_strides[1],
        chunk_tiles=chunk,
        BLOCK_M=tile.block_m,
        BLOCK_W=tile.block_w,
        BLOCK_R=block_r,
        MASKED=call.masked,
        **_dot_options(call),
        **tile.options(call.gpu.hip),
    )
    return _sum_parts(shrunk), parts


def finish(
    call: Call,
    parts: Tensor,
    out: Tensor,
    out_strides: tuple[int, int],
    q: Tensor,
    q_strides: tuple[int, int],
    e: Tensor | None,
    want_de: bool,
) -> Tensor | None:
    """out = scale (Σ parts)∘e for trained ranks and zeros for others; de (R) if asked for.

    Both strides are over (ranks, wide columns).
    """
    splits, W, R = parts.shape
    block_r, tile = call.tile("finish", 1, W)
    programs_w = cdiv(W, tile.block_w)
    de = None
    if want_de:
        de = torch.empty(programs_w, R, dtype=torch.float32, device=parts.device)
    launch(
        lowrank_finish_kernel,
        (programs_w, cdiv(R, block_r)),
        part_ptr=parts,
        out_ptr=out,
        q_ptr=q,
        de_ptr=de,
        e_ptr=parts if e is None else e,
        active_ptr=call.masks[0],
        trainable_ptr=call.masks[1],
        W=W,
        R=R,
        trained=call.branch.trained,
        parts=splits,
        stride_part=parts.stride(0),
        stride_or=out_strides[0],
        stride_ow=out_strides[1],
        stride_qr=q_strides[0],
        stride_qw=q_strides[1],
        e_ranks=0 if e is None else R,
        alpha=call.branch.scale,
        BLOCK_W=tile.block_w,
        BLOCK_R=block_r,
        MASKED=call.masked,
        WANT_DE=want_de,
        **tile.options(call.gpu.hip),
    )
    return None if de is None else _sum_parts(de)


def _aligned(t: Tensor) -> bool:
    """One stride is 1, and lines along it start at multiples of 16 bytes."""
    line = t.stride(0) if t.stride(1) == 1 else t.stride(1)
    return 1 in t.stride() and line % 8 == 0 and t.data_ptr() % 16 == 0


def gemm_step(call: Call, step: str, x: Tensor, w: Tensor, dropout: bool) -> str:
    """The name under which tables choose for a product of x (M, C) and w (C, W)."""
    plain = not (dropout or call.masked) and x.shape[1] % 64 == 0 and w.shape[1] % 16 == 0
    return step if plain and _aligned(x) and _aligned(w) else f"{step}_any"


def takes_gemm(call: Call, step: str, x: Tensor, w: Tensor, dropout: bool) -> bool:
    """Whether one kernel computes base and branch here. step: "forward" or "dx"."""
    if x.dtype not in HALVES or w.dtype != x.dtype:
        return False
    (M, C), W = x.shape, w.shape[1]
    step = gemm_step(call, step, x, w, dropout)
    return call.table.route(step, call.gemm_operands, call.branch.kept, M, W, C) == "gemm"


def gemm(
    call: Call,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    p: Tensor,
    q: Tensor,
    q_strides: tuple[int, int],
    e: Tensor | None,
    dropout: bool,
) -> Tensor:
    """x w + bias + scale D∘((p∘e) q): (M, W) in x's dtype. w (C, W) has any strides."""
    (M, C), W, R = x.shape, w.shape[1], call.branch.kept
    any_of = "gemm_any" if gemm_step(call, "", x, w, dropout) else "gemm"
    block_r, tile = call.table.tile(any_of, call.gemm_operands, R, M, W, C)
    out = torch.empty(M, W, dtype=x.dtype, device=x.device)
    launch(
        lowrank_gemm_kernel,
        (cdiv(M, tile.block_m) * cdiv(W, tile.block_w),),
        out_ptr=out,
        x_ptr=x,
        w_ptr=w,
        bias_ptr=bias,
        p_ptr=p,
        q_ptr=q,
        e_ptr=p if e is None else e,
        active_ptr=call.masks[0],
        trainable_ptr=call.masks[1],
        M=M,
        W=W,
        C=C,
        R=R,
        trained=call.branch.trained,
        stride_om=out.stride(0),
        stride_xm=x.stride(0),
        stride_xc=x.stride(1),
        stride_wc=w.stride(0),
        stride_ww=w.stride(1),
        stride_qr=q_strides[0],
        stride_qw=q_strides[1],
        e_ranks=0 if e is None else R,
        alpha=call.branch.scale,
        BLOCK_M=tile.block_m,
        BLOCK_W=tile.block_w,
        BLOCK_C=tile.block_c,
        BLOCK_R=block_r,
        GROUP_M=tile.group_m,
        EVEN_C=C % tile.block_c == 0,
        BIAS=bias is not None,
        MASKED=call.masked,
        DROPOUT=dropout,
        **_dropout_arguments(call, dropout),
        **_dot_options(call),
        **tile.options(call.gpu.hip),
    )
    return out
