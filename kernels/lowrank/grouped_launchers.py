"""Launchers of the kernels of grouped_fused.py: tiles, tables of tiles, grids.

A table names the group and the tile's first row (or rank) in it, for every tile of a launch. Where
the host knows the counts the table is exact, built here and kept; where only the device does, it is
built there and has as many entries as there could be tiles.

x is the wide matrix that a kernel reads, q a packed factor (ΣR, wide columns) with any strides, p
a narrow fp32 matrix (M, most ranks). Sizes, never values, decide tiles and splits.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from fastrank.kernels.common import dropout_threshold, interpreting
from fastrank.kernels.common.launch import Gpu, cdiv, gpu_of, launch, split_count
from fastrank.kernels.lowrank.calls import dot_dtype, dot_precision
from fastrank.kernels.lowrank.grouped_arguments import GroupedAux, GroupedBranch, Layout
from fastrank.kernels.lowrank.grouped_fused import (
    grouped_expand_kernel,
    grouped_finish_kernel,
    grouped_gram_kernel,
    grouped_shrink_kernel,
)
from fastrank.kernels.lowrank.tiles import Tile

_TL_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_MOST_SHRINK_SPLITS = 16
_MOST_GRAM_SPLITS = 32
# ranks that expand multiplies at once; more would spill on gfx942 and on sm_80
MOST_EXPAND_RANKS = {"half": 32, "tf32": 16, "ieee": 16}
# where an entry that isn't used begins: behind any group's rows and, in int32, ranks
_UNUSED = 1 << 30

# What multiplies (see tiles.py) and BLOCK_R -> tiles, for any GPU: each fits SMALL_SHARED and
# spills nowhere. Shrink and expand share a table, so their rows are the same.
TILES: dict[tuple[str, int], dict[str, Tile]] = {
    ("half", 16): {
        "shrink": Tile(64, 64, 4, 3),
        "expand": Tile(64, 128, 8, 1),
        "gram": Tile(32, 128, 8, 2),
    },
    ("half", 32): {
        "shrink": Tile(64, 64, 4, 2),
        "expand": Tile(64, 128, 8, 1),
        "gram": Tile(32, 128, 8, 2),
    },
    ("half", 64): {
        "shrink": Tile(64, 32, 8, 2),
        "expand": Tile(64, 128, 8, 1),
        "gram": Tile(32, 128, 8, 2),
    },
    ("tf32", 16): {
        "shrink": Tile(64, 32, 4, 2),
        "expand": Tile(64, 64, 8, 1),
        "gram": Tile(32, 64, 4, 2),
    },
    ("tf32", 32): {
        "shrink": Tile(64, 32, 8, 2),
        "expand": Tile(64, 64, 8, 1),
        "gram": Tile(32, 64, 4, 2),
    },
    ("ieee", 16): {
        "shrink": Tile(32, 32, 4, 2),
        "expand": Tile(32, 64, 8, 1),
        "gram": Tile(32, 64, 4, 2),
    },
    ("ieee", 32): {
        "shrink": Tile(32, 32, 8, 2),
        "expand": Tile(32, 64, 8, 1),
        "gram": Tile(32, 64, 8, 2),
    },
}
# what groups of at most FEW_ROWS rows on average have instead: rows of a tile that a group doesn't
# fill are work for nothing
FEW_ROWS = 16
FEW: dict[str, dict[str, Tile]] = {
    "half": {"shrink": Tile(16, 64, 4, 2), "expand": Tile(16, 128, 4, 1)},
    "tf32": {"shrink": Tile(16, 32, 4, 2), "expand": Tile(16, 64, 4, 1)},
    "ieee": {"shrink": Tile(16, 32, 4, 2), "expand": Tile(16, 64, 4, 1)},
}
# the end of gram where it is a kernel, with gram's BLOCK_R
FINISH = Tile(0, 64, 4, 2)


@dataclass(frozen=True)
class Call:
    """One call of the op, as the launchers need it."""

    layout: Layout
    branch: GroupedBranch
    aux: GroupedAux
    dot: torch.dtype  # operand dtype of the branch's dots
    precision: str  # input_precision of fp32 dots
    operands: str  # what multiplies, as TILES names it
    masks: tuple[Tensor | None, Tensor | None]  # active and trainable, one byte a rank, or Nones
    gpu: Gpu
    block_r: int
    tiles: dict[str, Tile]
    M: int
    total_ranks: int
    # of the largest group; of the average one where only the device knows
    ranks: int
    rows: int

    @property
    def dropout(self) -> bool:
        return self.branch.dropout_p > 0.0

    @property
    def masked(self) -> bool:
        return self.masks[0] is not None

    @functools.cached_property
    def row_table(self) -> Tensor:
        """The tiles of shrink and expand."""
        block = self.tiles["shrink"].block_m
        return make_table(self.layout.rows, self.layout.row_starts, self.M, block)

    @functools.cached_property
    def rank_table(self) -> Tensor:
        """The tiles of gram and finish."""
        layout = self.layout
        return make_table(layout.ranks, layout.rank_starts, self.total_ranks, self.block_r)


def start(
    M: int,
    x_dtype: torch.dtype,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    layout: Layout,
    branch: GroupedBranch,
    aux: GroupedAux,
) -> tuple[Call, Tensor, Tensor, Tensor | None]:
    """The call, and A, B, e; A and B in fp32 or the dot's dtype, e in fp32."""
    gpu, groups = gpu_of(A.device), layout.row_starts.shape[0] - 1
    dot = dot_dtype(x_dtype, A.dtype, branch)
    precision = dot_precision(x_dtype, dot, gpu.hip)
    if A.dtype not in (dot, torch.float32):
        A, B = A.to(dot), B.to(dot)
    e = None if e is None else e.float().contiguous()
    aux = GroupedAux(*(None if t is None else t.contiguous() for t in aux))
    total = A.shape[0]
    ranks = cdiv(total, groups) if layout.ranks is None else layout.max_rank
    rows = average = cdiv(M, groups)
    if layout.rows is not None:
        rows, average = max(layout.rows), cdiv(M, sum(m > 0 for m in layout.rows))
    operands = "half" if dot != torch.float32 else "ieee" if precision == "ieee" else "tf32"
    how = (dot, precision, operands, _masks(aux, A.device), gpu)
    tiles = tiles_for(operands, ranks, average)
    return Call(layout, branch, aux, *how, *tiles, M, total, ranks, rows), A, B, e


def tiles_for(operands: str, ranks: int, rows: int) -> tuple[int, dict[str, Tile]]:
    """BLOCK_R and the tile of each kernel, for groups of that many ranks and rows."""
    blocks = [block for multiplied, block in TILES if multiplied == operands]
    block_r = min((block for block in blocks if block >= ranks), default=max(blocks))
    found = TILES[operands, block_r]
    return block_r, found | FEW[operands] if rows <= FEW_ROWS else found


@functools.cache
def _ones(ranks: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # cached across calls: not born an inference tensor
        return torch.ones(ranks, dtype=torch.uint8, device=device)


def _masks(aux: GroupedAux, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Which ranks take part and which of these are trained, as bytes; two Nones for all."""
    active, trainable = (
        None if mask is None else mask.view(torch.uint8) for mask in (aux.active, aux.trainable)
    )
    if active is None and trainable is not None:
        active = _ones(trainable.shape[0], device)
    return active, active if trainable is None else trainable


# every layer of a model has the same few
@functools.lru_cache(maxsize=256)
def _host_table(counts: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    tiles = -(-np.asarray(counts, dtype=np.int64) // block)
    group = np.repeat(np.arange(len(counts)), tiles)
    first = (np.arange(len(group)) - np.repeat(tiles.cumsum() - tiles, tiles)) * block
    with torch.inference_mode(False):  # cached across calls: not born an inference tensor
        return torch.from_numpy(np.stack([group, first], axis=1)).to(device)


def _device_table(starts: Tensor, total: int, block: int) -> Tensor:
    groups = starts.shape[0] - 1
    tiles = (starts.diff() + (block - 1)) // block
    ends = tiles.cumsum(0)
    slots = torch.arange(total // block + groups, device=starts.device)
    group = torch.searchsorted(ends, slots, right=True)
    used = group < groups
    group = torch.where(used, group, 0)
    first = torch.where(used, (slots - (ends - tiles)[group]) * block, _UNUSED)
    return torch.stack([group, first], dim=1)


def make_table(counts: tuple[int, ...] | None, starts: Tensor, total: int, block: int) -> Tensor:
    """Tiles of `block` rows (or ranks): int64 `[tiles, 2]`, each one's group and first row in it.

    Args:
        counts: rows of each group, or None where only the device knows.
        starts: int64 `[G + 1]`, where they begin among all.
        total: rows of all groups, at most.
        block: rows of a tile.
    """
    if counts is None:
        return _device_table(starts, total, block)
    return _host_table(counts, block, starts.device)


def _layout_arguments(call: Call, table: Tensor) -> dict:
    return {
        "active_ptr": call.masks[0],
        "trainable_ptr": call.masks[1],
        "table_ptr": table,
        "row_starts_ptr": call.layout.row_starts,
        "rank_starts_ptr": call.layout.rank_starts,
        "MASKED": call.masked,
    }


def _dropout_arguments(call: Call, dropout: bool) -> dict:
    """Runtime arguments of a draw; without one the pointers are None."""
    (seeds, row_ids), p = call.aux[1:3], call.branch.dropout_p
    return {
        "seeds_ptr": seeds if dropout else None,
        # the seeds stand in for row ids that are not read: id_rows is 0
        "row_ids_ptr": (seeds if row_ids is None else row_ids) if dropout else None,
        "threshold": dropout_threshold(p) - 2**31,
        "id_rows": 0 if row_ids is None else row_ids.shape[0],
        "inv_keep": 1.0 / (1.0 - p) if dropout else 1.0,
        "DROPOUT": dropout,
    }


def _diagonal_arguments(call: Call, e: Tensor | None) -> dict:
    return {
        # the scales stand in for an e that is not read: e_ranks is 0
        "e_ptr": call.aux.scale if e is None else e,
        "e_ranks": 0 if e is None else e.shape[0],
        "scale_ptr": call.aux.scale,
    }


def _dot_arguments(call: Call, tile: Tile, block_r: int) -> dict:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_W": tile.block_w,
        "BLOCK_R": block_r,
        "DOT": _TL_DTYPES[call.dot],
        "PRECISION": call.precision,
        "INTERPRET": interpreting(),
        **tile.options(call.gpu.hip),
    }


def shrink(call: Call, x: Tensor, q: Tensor, dropout: bool) -> Tensor:
    """drop(x) qᵀ for each row's own ranks: fp32 (M, most ranks), beyond them not written."""
    (M, W), most, tile = x.shape, call.layout.max_rank, call.tiles["shrink"]
    table, tiles = call.row_table, cdiv(W, tile.block_w)
    programs = table.shape[0] * cdiv(call.ranks, call.block_r)
    splits = split_count(programs, tiles, _MOST_SHRINK_SPLITS, call.gpu.units)
    chunk = cdiv(tiles, splits)
    splits = cdiv(tiles, chunk)
    parts = torch.empty(splits, M, most, dtype=torch.float32, device=x.device)
    launch(
        grouped_shrink_kernel,
        (table.shape[0], cdiv(most, call.block_r), splits),
        x_ptr=x,
        q_ptr=q,
        part_ptr=parts,
        M=M,
        W=W,
        most_ranks=most,
        stride_xm=x.stride(0),
        stride_xw=x.stride(1),
        stride_qr=q.stride(0),
        stride_qw=q.stride(1),
        chunk_tiles=chunk,
        **_layout_arguments(call, table),
        **_dropout_arguments(call, dropout),
        **_dot_arguments(call, tile, call.block_r),
    )
    return parts[0] if splits == 1 else parts.sum(0)


def expand_(call: Call, out: Tensor, p: Tensor, q: Tensor, e: Tensor | None, dropout: bool) -> None:
    """out (M, W) += scale D∘((p∘e) q) in place, each row with its own ranks."""
    W, tile, table = out.shape[1], call.tiles["expand"], call.row_table
    launch(
        grouped_expand_kernel,
        (table.shape[0], cdiv(W, tile.block_w)),
        out_ptr=out,
        p_ptr=p,
        q_ptr=q,
        W=W,
        most_ranks=call.layout.max_rank,
        stride_om=out.stride(0),
        stride_qr=q.stride(0),
        stride_qw=q.stride(1),
        **_diagonal_arguments(call, e),
        **_layout_arguments(call, table),
        **_dropout_arguments(call, dropout),
        **_dot_arguments(call, tile, min(call.block_r, MOST_EXPAND_RANKS[call.operands])),
    )


def gradient(
    call: Call,
    x: Tensor,
    p: Tensor,
    q: Tensor,
    e: Tensor | None,
    dtype: torch.dtype,
    dropout: bool,
    want_de: bool,
) -> tuple[Tensor, Tensor | None]:
    """scale (pᵀ drop(x))∘e, each rank over its own rows: (ΣR, W) in `dtype`; and de (ΣR), fp32.

    q: the factor that the gradient is of.
    """
    W, total, tile, table = x.shape[1], q.shape[0], call.tiles["gram"], call.rank_table
    programs, pieces = table.shape[0] * cdiv(W, tile.block_w), cdiv(call.rows, tile.block_m)
    splits = split_count(programs, pieces, _MOST_GRAM_SPLITS, call.gpu.units)
    # masks' end and a draw's loop in one kernel would spill scalar registers on gfx942
    whole = splits == 1 and not (call.masked and dropout)
    # counts on the device may leave ranks to no group
    make = torch.zeros if call.layout.ranks is None else torch.empty
    out = make(total, W, dtype=dtype, device=x.device)
    block_w = tile.block_w if whole else FINISH.block_w
    shares, parts = None, out
    if want_de:
        shares = make(cdiv(W, block_w), total, dtype=torch.float32, device=x.device)
    if not whole:
        parts = torch.empty(splits, total, W, dtype=torch.float32, device=x.device)
    shared = {
        "q_ptr": q,
        "W": W,
        "total_ranks": total,
        "stride_qr": q.stride(0),
        "stride_qw": q.stride(1),
        "splits": splits,
        **_diagonal_arguments(call, e),
        **_layout_arguments(call, table),
    }
    launch(
        grouped_gram_kernel,
        (programs, splits),
        x_ptr=x,
        p_ptr=p,
        out_ptr=parts,
        de_ptr=shares if whole else None,
        most_ranks=call.layout.max_rank,
        stride_xm=x.stride(0),
        stride_xw=x.stride(1),
        WHOLE=whole,
        WANT_DE=want_de and whole,
        **shared,
        **_dropout_arguments(call, dropout),
        **_dot_arguments(call, tile, call.block_r),
    )
    if not whole:
        launch(
            grouped_finish_kernel,
            (table.shape[0] * cdiv(W, block_w),),
            part_ptr=parts,
            out_ptr=out,
            de_ptr=shares,
            BLOCK_W=block_w,
            BLOCK_R=call.block_r,
            WANT_DE=want_de,
            **shared,
            **FINISH.options(call.gpu.hip),
        )
    return out, shares.sum(0) if want_de else None
