"""The GPU path: launches the kernels of fused.py around the vendor's base products.

Same two functions as addmm.py, which serve the same calls; see there for the maths.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from fastrank.kernels.common import dropout_threshold, interpreting
from fastrank.kernels.common.launch import (
    cdiv,
    compute_units,
    is_hip,
    split_count,
)
from fastrank.kernels.lowrank.arguments import Aux, Branch
from fastrank.kernels.lowrank.compaction import scatter, select
from fastrank.kernels.lowrank.fused import (
    HIP_TILES,
    TILES,
    Tile,
    lowrank_dual_kernel,
    lowrank_expand_kernel,
    lowrank_finish_kernel,
    lowrank_gram_kernel,
    lowrank_shrink_kernel,
)

_TL_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# a dual read writes its parts once and reads them once; past this they would crowd the memory
_MAX_DUAL_PARTS_BYTES = 256 << 20
_MOST_SHRINK_SPLITS = 16
_MOST_GRAM_SPLITS = 32


class _Call(NamedTuple):
    """What every launch of one call shares."""

    branch: Branch
    aux: Aux
    dot: torch.dtype  # operand dtype of the dots
    precision: str  # input_precision of fp32 dots
    masks: tuple[Tensor | None, Tensor | None]  # active and trainable, one byte a rank, or Nones

    def tiles(self, kernel: str) -> dict[int, Tile]:
        """BLOCK_R -> tile, for this call's operands and device."""
        what = "half"
        if kernel == "finish":
            what = "any"
        elif self.dot == torch.float32:
            what = "ieee" if self.precision == "ieee" else "tf32"
        return (HIP_TILES if is_hip() else TILES)[kernel, what]

    def tile(self, kernel: str) -> tuple[int, Tile]:
        """(BLOCK_R, tile) for the ranks of this call."""
        tiles = self.tiles(kernel)
        block_r = min((r for r in tiles if r >= self.branch.kept), default=max(tiles))
        return block_r, tiles[block_r]

    @property
    def dropout(self) -> bool:
        return self.branch.dropout_p > 0.0 and self.branch.trained > 0

    @property
    def masked(self) -> bool:
        return self.masks[0] is not None


def dot_dtype(x: torch.dtype, adapters: torch.dtype, branch: Branch) -> torch.dtype:
    """The dtype that operands are rounded to: x's, or fp32 for adapters that differ from it."""
    if branch.autocast is not None or branch.precision == "compute" or x == adapters:
        return x
    return torch.float32


def dot_precision(x: torch.dtype, dot: torch.dtype) -> str:
    """input_precision for dots of this operand dtype.

    Sixteen-bit x against fp32 adapters: three tf32 products, exact in x and to 2**-22 in the
    adapters. Pure fp32 follows torch's own switch. AMD matrix cores multiply fp32 as it is.
    """
    if dot != torch.float32 or is_hip():
        return "ieee"
    if x != torch.float32:
        return "tf32x3"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@functools.cache
def _ones(ranks: int, device: torch.device) -> Tensor:
    # cached across calls, so it must not be born an inference tensor
    with torch.inference_mode(False):
        return torch.ones(ranks, dtype=torch.uint8, device=device)


def _start(
    x_dtype: torch.dtype, A: Tensor, B: Tensor, e: Tensor | None, branch: Branch, aux: Aux
) -> tuple[_Call, Tensor, Tensor, Tensor | None]:
    """The call, and A, B, e compacted; A and B in fp32 or the dot's dtype, e in fp32."""
    dot = dot_dtype(x_dtype, A.dtype, branch)
    A, B, e = select(A, B, e, branch, aux)
    if A.dtype not in (dot, torch.float32):
        A, B = A.to(dot), B.to(dot)
    e = None if e is None else e.float().contiguous()
    active, trainable = (None if m is None else m.contiguous().view(torch.uint8) for m in aux[3:])
    frozen_by_host = branch.dropout_p > 0.0 and 0 < branch.trained < branch.kept
    if active is not None or trainable is not None or frozen_by_host:
        ones = _ones(branch.kept, A.device)
        active = ones if active is None else active
        trainable = ones if trainable is None else trainable
    if aux.row_ids is not None:
        aux = aux._replace(row_ids=aux.row_ids.contiguous())
    call = _Call(branch, aux, dot, dot_precision(x_dtype, dot), (active, trainable))
    return call, A, B, e


def _dropout_arguments(call: _Call, dropout: bool) -> dict:
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


def _dot_options(call: _Call) -> dict:
    return {
        "DOT": _TL_DTYPES[call.dot],
        "PRECISION": call.precision,
        "INTERPRET": interpreting(),
    }


def _sum_parts(parts: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def shrink(call: _Call, x: Tensor, q: Tensor, q_strides: tuple[int, int], dropout: bool) -> Tensor:
    """drop(x) qᵀ: fp32 (M, R). q_strides: q's strides over (ranks, columns of x)."""
    (M, W), R = x.shape, call.branch.kept
    block_r, tile = call.tile("shrink")
    programs_m, programs_r = cdiv(M, tile.block_m), cdiv(R, block_r)
    tiles = cdiv(W, tile.block_w)
    units = compute_units(x.device)
    splits = split_count(programs_m * programs_r, tiles, _MOST_SHRINK_SPLITS, units)
    chunk = cdiv(tiles, splits)
    splits = cdiv(tiles, chunk)
    parts = torch.empty(splits, M, R, dtype=torch.float32, device=x.device)
    lowrank_shrink_kernel[(programs_m, programs_r, splits)](
        x_ptr=x,
        q_ptr=q,
        part_ptr=parts,
        active_ptr=call.masks[0],
        trainable_ptr=call.masks[1],
        M=M,
        W=W,
        R=R,
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
        **_dropout_arguments(call, dropout),
        **_dot_options(call),
        **tile.options(is_hip()),
    )
    return _sum_parts(parts)


def expand_(
    call: _Call,
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
    block_r, tile = call.tile("expand")
    lowrank_expand_kernel[(cdiv(M, tile.block_m), cdiv(W, tile.block_w))](
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
        **tile.options(is_hip()),
    )


def gram(call: _Call, x: Tensor, p: Tensor, dropout: bool) -> Tensor:
    """Parts of drop(x)ᵀ p: fp32 (splits, W, R), to be added up."""
    (M, W), R = x.shape, call.branch.kept
    block_r, tile = call.tile("gram")
    programs_w, programs_r = cdiv(W, tile.block_w), cdiv(R, block_r)
    tiles = cdiv(M, tile.block_m)
    units = compute_units(x.device)
    splits = split_count(programs_w * programs_r, tiles, _MOST_GRAM_SPLITS, units)
    chunk = cdiv(tiles, splits)
    splits = cdiv(tiles, chunk)
    parts = torch.empty(splits, W, R, dtype=torch.float32, device=x.device)
    lowrank_gram_kernel[(programs_w, programs_r, splits)](
        x_ptr=x,
        p_ptr=p,
        part_ptr=parts,
        M=M,
        W=W,
        R=R,
        stride_xm=x.stride(0),
        stride_xw=x.stride(1),
        chunk_tiles=chunk,
        BLOCK_M=tile.block_m,
        BLOCK_W=tile.block_w,
        BLOCK_R=block_r,
        DROPOUT=dropout,
        **_dropout_arguments(call, dropout),
        **_dot_options(call),
        **tile.options(is_hip()),
    )
    return parts


def fits_dual(call: _Call, M: int, W: int) -> bool:
    """Whether one read for shrink and gram moves fewer bytes than two."""
    R = call.branch.kept
    if max(call.tiles("dual")) < R:
        return False
    _, tile = call.tile("dual")
    return 4 * M * R * cdiv(W, tile.block_w) <= _MAX_DUAL_PARTS_BYTES


def dual(
    call: _Call, x: Tensor, p: Tensor, q: Tensor, q_strides: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """x qᵀ as fp32 (M, R), and parts of xᵀ p as fp32 (splits, W, R), from one read of x."""
    (M, W), R = x.shape, call.branch.kept
    block_r, tile = call.tile("dual")
    programs_w, tiles = cdiv(W, tile.block_w), cdiv(M, tile.block_m)
    splits = split_count(programs_w, tiles, _MOST_GRAM_SPLITS, compute_units(x.device))
    chunk = cdiv(tiles, splits)
    splits = cdiv(tiles, chunk)
    shrunk = torch.empty(programs_w, M, R, dtype=torch.float32, device=x.device)
    parts = torch.empty(splits, W, R, dtype=torch.float32, device=x.device)
    lowrank_dual_kernel[(programs_w, splits)](
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
        **tile.options(is_hip()),
    )
    return _sum_parts(shrunk), parts


def finish(
    call: _Call,
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
    block_r, tile = call.tile("finish")
    programs_w = cdiv(W, tile.block_w)
    de = None
    if want_de:
        de = torch.empty(programs_w, R, dtype=torch.float32, device=parts.device)
    lowrank_finish_kernel[(programs_w, cdiv(R, block_r))](
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
        stride_part=W * R,
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
        **tile.options(is_hip()),
    )
    return None if de is None else _sum_parts(de)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    branch: Branch,
    aux: Aux,
) -> tuple[Tensor, Tensor, None]:
    """Base and branch: y `[M, N]`, then what add_ returns."""
    y = F.linear(x, weight, bias)
    return y, *add_(y, x, A, B, e, branch, aux)


def add_(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    branch: Branch,
    aux: Aux,
) -> tuple[Tensor, None]:
    """Add the branch to y `[M, N]` in place; return S `[M, kept]`. Arguments as addmm.add_."""
    call, A, B, e = _start(x.dtype, A, B, e, branch, aux)
    S = shrink(call, x, A, A.stride(), call.dropout)
    expand_(call, y, S, B, B.stride()[::-1], e, branch.scale, dropout=False, add=True)
    return S, None


def backward(
    dy: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    S: Tensor | None,
    keep: None,
    branch: Branch,
    aux: Aux,
    needs: tuple[bool, bool, bool, bool],
    dx_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA, dB and de, None where not needed. Arguments as addmm.backward."""
    need_dx, need_dA, need_dB, need_de = needs
    like = (A, B, e)
    x_dtype = (branch.autocast or dx_dtype) if x is None else x.dtype
    call, A, B, e = _start(x_dtype, A, B, e, branch, aux)
    if call.dot != torch.float32:
        dy = dy.to(call.dot)  # lowrank_add under autocast to an fp32 y; otherwise nothing
    need_dA, need_dB, need_de = (
        need and branch.trained > 0 for need in (need_dA, need_dB, need_de)
    )
    from_rows = need_de and not (need_dA or need_dB)
    need_U = need_dx or need_dA or from_rows
    B_strides = B.stride()[::-1]

    dx = dy @ weight if need_dx and weight is not None else None
    U = G = dA = dB = de = None
    if need_U and need_dB and fits_dual(call, *dy.shape):
        U, G = dual(call, dy, S, B, B_strides)
    else:
        if need_U:
            U = shrink(call, dy, B, B_strides, dropout=False)
        if need_dB:
            G = gram(call, dy, S, dropout=False)
    if need_dB:
        dB = torch.empty(B.shape, dtype=like[1].dtype, device=dy.device)
        de = finish(call, G, dB, dB.stride()[::-1], B, B_strides, e, need_de)
    if need_dA:
        H = gram(call, x, U, call.dropout)
        dA = torch.empty(A.shape, dtype=like[0].dtype, device=dy.device)
        from_H = need_de and not need_dB
        share = finish(call, H, dA, dA.stride(), A, A.stride(), e, from_H)
        de = share if from_H else de
    if from_rows:
        de = _masked_row_sum(call, U, S)
    if need_dx:
        add = weight is not None
        if not add:
            dx = torch.empty(dy.shape[0], A.shape[1], dtype=dx_dtype, device=dy.device)
        expand_(call, dx, U, A, A.stride(), e, branch.scale, call.dropout, add)
    grads = (
        scatter(grad, dim, of, aux) if wanted else None
        for wanted, grad, dim, of in zip(needs[1:], (dA, dB, de), (0, 1, 0), like, strict=True)
    )
    return dx, *grads


def _masked_row_sum(call: _Call, U: Tensor, S: Tensor) -> Tensor:
    """de = scale Σ_M U∘S where neither dA nor dB is asked for."""
    de = (U * S).sum(0) * call.branch.scale
    ranks = torch.arange(de.shape[0], device=de.device)
    trained = ranks < call.branch.trained
    if call.masked:
        trained &= (call.masks[0] != 0) & (call.masks[1] != 0)
    return torch.where(trained, de, 0.0)
