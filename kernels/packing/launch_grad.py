"""Launcher of the kernel of fused_grad.py: tiles, splits, and the order parts are added in."""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastrank.kernels.common import interpreting
from fastrank.kernels.common.launch import (
    Gpu,
    cdiv,
    gpu_of,
    launch,
    launch_options,
    split_count,
)
from fastrank.kernels.packing.fused_grad import masked_gradient_kernel
from fastrank.kernels.packing.mask import SparseMask
from fastrank.kernels.packing.overlay import Places

_TL_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# parts are packed, so many of them cost little; each should have a few tiles of rows to add up
_MOST_SPLITS = 16
_LEAST_TILES = 4


class Tile(NamedTuple):
    """Rows of X, and rows and columns of dW, of a program's tile, and how it is launched."""

    block_m: int
    block_n: int
    block_k: int
    group_n: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, itemsize: int, hip: bool) -> int:
        """Shared memory of the loop: both operands, a stage at a time."""
        # AMD's pipeline keeps one of its stages in registers
        stages = max(self.num_stages - 1, 1) if hip else self.num_stages
        return stages * self.block_m * (self.block_n + self.block_k) * itemsize


# What multiplies -> tiles, the first that a GPU's shared memory holds is taken; the last fits all.
# "half": sixteen-bit operands; "tf32": fp32 on tensor cores; "ieee": fp32 outside of NVIDIA's.
TILES: dict[str, tuple[Tile, ...]] = {
    "half": (
        Tile(64, 128, 256, 8, 8, 3),
        Tile(64, 128, 128, 8, 8, 3),
        Tile(32, 128, 128, 8, 8, 2),
    ),
    "tf32": (Tile(32, 128, 128, 8, 8, 3), Tile(32, 64, 64, 8, 4, 2)),
    "ieee": (Tile(16, 64, 64, 8, 8, 2),),
}


def masked_gradient(dy: Tensor, x: Tensor, places: Places, tile: Tile | None = None) -> Tensor:
    """The kept entries of dyᵀ x: fp32 `[nnz]`; dy `[M, N]` and x `[M, K]` with any strides, M > 0.

    Args:
        tile: instead of the one that the GPU and dtype decide.
    """
    (M, K), N, mask, gpu = x.shape, dy.shape[1], places.mask, gpu_of(x.device)
    operands = operands_of(x.dtype, gpu.hip)
    if tile is None:
        tile = tile_for(operands, gpu)
    programs = cdiv(N, tile.block_n) * cdiv(K, tile.block_k)
    tiles = cdiv(M, tile.block_m)
    splits = split_count(programs, max(1, tiles // _LEAST_TILES), _MOST_SPLITS, gpu.units)
    chunk = cdiv(tiles, splits)
    splits = cdiv(tiles, chunk)
    drawn = mask.scheme == "stratified"
    parts = torch.empty(splits, mask.nnz, dtype=torch.float32, device=x.device)
    launch(
        masked_gradient_kernel,
        (programs, splits),
        dy_ptr=dy,
        x_ptr=x,
        part_ptr=parts,
        positions_ptr=None if drawn else places.positions,
        cuts_ptr=None if drawn else places.cuts(tile.block_k),
        M=M,
        N=N,
        K=K,
        tiles=chunk,
        slots=_slots(mask, tile.block_k),
        **_mask_words(mask),
        stride_dm=dy.stride(0),
        stride_dn=dy.stride(1),
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_N=tile.group_n,
        DRAWN=drawn,
        DOT=_TL_DTYPES[x.dtype],
        PRECISION="tf32" if operands == "tf32" else "ieee",
        INTERPRET=interpreting(),
        **launch_options(tile.num_warps, tile.num_stages, gpu.hip),
    )
    return parts[0] if splits == 1 else parts.sum(0)


def operands_of(dtype: torch.dtype, hip: bool) -> str:
    """What multiplies: fp32 follows torch's own switch; AMD matrix cores multiply it as it is."""
    if dtype != torch.float32:
        return "half"
    return "ieee" if hip or torch.get_float32_matmul_precision() == "highest" else "tf32"


def tile_for(operands: str, gpu: Gpu) -> Tile:
    """The largest tile of the table that the GPU holds."""
    itemsize = 2 if operands == "half" else 4
    several = TILES[operands]
    fits = (tile for tile in several if tile.shared_bytes(itemsize, gpu.hip) <= gpu.shared)
    return next(fits, several[-1])


def _slots(mask: SparseMask, columns: int) -> int:
    """How many strata a row of a tile of so many columns can touch; of no use for other masks."""
    if mask.scheme != "stratified":
        return 1
    return (columns + mask.stratum - 2) // mask.stratum + 1


def _mask_words(mask: SparseMask) -> dict:
    """What a stratified mask is drawn from, in int32s; for others the strata are ones.

    An argument's type follows its magnitude: as int32 with the same bits a word has one type.
    """
    drawn = mask.scheme == "stratified"
    S, last = (mask.stratum, mask.last_stratum) if drawn else (1, 1)
    (low, high), c2, c3 = mask.stream.key, mask.stream.c2, mask.stream.c3
    words = {"stratum": S, "last": last, "key_low": low, "key_high": high, "c2": c2, "c3": c3}
    words = {name: word - (1 << 32) if word >= 1 << 31 else word for name, word in words.items()}
    return words | {"nnz": mask.nnz}
