"""Tiles of the low-rank kernels, and the shared memory that one needs.

Plain data, without Triton: choices.py reads and checks tables of these on any machine.
"""

from typing import NamedTuple

from fastrank.kernels.common.launch import launch_options


class Tile(NamedTuple):
    """Rows and wide columns of a tile, and how it is launched."""

    block_m: int
    block_w: int
    num_warps: int
    num_stages: int

    def options(self, hip: bool) -> dict:
        """Keywords of a launch."""
        return launch_options(self.num_warps, self.num_stages, hip)


class GemmTile(NamedTuple):
    """Rows, wide columns and contracted columns of a tile, and how it is launched."""

    block_m: int
    block_w: int
    block_c: int
    group_m: int  # rows of tiles that programs walk together
    num_warps: int
    num_stages: int

    def options(self, hip: bool) -> dict:
        """Keywords of a launch."""
        return launch_options(self.num_warps, self.num_stages, hip)


# What multiplies. "half": sixteen-bit operands; "tf32": fp32 operands on tensor cores, in one
# product or three; "ieee": fp32 as it is, outside the tensor cores of NVIDIA. For the gemm, whose
# base is sixteen-bit, what multiplies in the branch: "half", or "mixed" for fp32 adapters.
OPERANDS = {
    "shrink": ("half", "tf32", "ieee"),
    "expand": ("half", "tf32", "ieee"),
    "gram": ("half", "tf32", "ieee"),
    "dual": ("half", "tf32", "ieee"),
    "gemm": ("half", "mixed"),  # no mask, no draw, C a multiple of block_c
    "gemm_any": ("half", "mixed"),
    "finish": ("any",),
}


def tile_type(kernel: str) -> type[Tile] | type[GemmTile]:
    return GemmTile if kernel.startswith("gemm") else Tile


def shared_bytes(
    kernel: str, operands: str, block_r: int, tile: Tile | GemmTile, hip: bool = False
) -> int:
    """Shared memory that a program takes at most, whatever the dtypes of its adapters.

    The loads of every stage, and once what is rounded or turned before a dot. Ahead-of-time
    compilation checks that no variant takes more.
    """
    m, w, r = tile.block_m, tile.block_w, block_r
    wide = 2 if operands in ("half", "mixed") else 4  # bytes of an operand of the wide dot
    branch = 2 if operands == "half" else 4  # and of the branch's
    # AMD's pipeline keeps one of its stages in registers
    stages = max(tile.num_stages - 1, 1) if hip else tile.num_stages
    if kernel == "finish":
        return 4 * w * r + 64 * tile.num_warps
    if kernel == "expand":
        return max((4 + branch) * (m * r + r * w), 4 * m * w)
    if kernel.startswith("gemm"):
        loop = stages * wide * tile.block_c * (m + w)
        return max(loop, (4 + branch) * (m * r + r * w), m * w)
    if kernel == "dual":  # q (R, W) stays for the whole loop
        return stages * (wide * m * w + 4 * m * r) + branch * r * (m + w)
    narrow = r * (w if kernel == "shrink" else m)
    # x goes through registers and back where it is dropped, and so do the ids of its rows
    return stages * (wide * m * w + 4 * narrow) + wide * m * w + branch * narrow + 8 * m
