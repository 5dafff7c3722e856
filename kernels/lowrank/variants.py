"""Every specialisation of the kernels that triton_path.py can launch: compiled ahead of time.

An entry fixes what changes the machine code: operand types, tile, and flags. Integers are taken to
be multiples of 16 where Triton specialises on that, and inner strides to be 1, as in real layers.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton.language as tl

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

DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


@dataclass(frozen=True)
class Operands:
    """Dtypes of a call: x (dY), the adapters, the dots."""

    x: str
    adapters: str
    dot: str
    tf32: bool = False  # pure fp32 with torch's tf32 switch on

    @property
    def name(self) -> str:
        return f"{self.x}-{self.adapters}-{self.dot}" + ("-tf32" if self.tf32 else "")

    def what(self, hip: bool) -> str:
        """The column of the tile table."""
        if self.dot != "fp32":
            return "half"
        return "ieee" if self.precision(hip) == "ieee" else "tf32"

    def precision(self, hip: bool) -> str:
        if self.dot != "fp32" or hip:
            return "ieee"
        return "tf32x3" if self.x != "fp32" else "tf32" if self.tf32 else "ieee"


OPERANDS = (
    *(Operands(t, t, t) for t in ("bf16", "fp16")),  # sixteen-bit adapters
    *(Operands(t, "fp32", t) for t in ("bf16", "fp16")),  # fp32 adapters under autocast
    *(Operands(t, "fp32", "fp32") for t in ("bf16", "fp16")),  # fp32 adapters without
    Operands("fp32", "fp32", "fp32"),
    Operands("fp32", "fp32", "fp32", tf32=True),
)


@dataclass(frozen=True)
class Variant:
    kernel: Any
    operands: Operands
    block_r: int
    tile: Tile
    types: dict[str, str]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        flags = "".join(f"-{k.lower()}" for k, v in self.constants.items() if v is True)
        name = self.kernel.__name__.removeprefix("lowrank_").removesuffix("_kernel")
        out = self.types.get("out_ptr", "").lstrip("*")
        return f"{name}-r{self.block_r}-{self.operands.name}{'-to-' + out if out else ''}{flags}"


_POINTERS = {"e_ptr": "*fp32", "part_ptr": "*fp32", "p_ptr": "*fp32", "de_ptr": "*fp32"}
_RUNTIME = {
    "M": "i32",
    "R": "i32",
    "trained": "i32",
    "chunk_tiles": "i32",
    "threshold": "i32",
    "id_rows": "i32",
    "e_ranks": "i32",
    "parts": "i32",
    "W": "i32:16",
    "stride_part": "i32:16",
    "stride_xm": "i32:16",
    "stride_om": "i32:16",
    "inv_keep": "fp32",
    "alpha": "fp32",
    "shrunk_ptr": "*fp32",
    "gram_ptr": "*fp32",
}


def _variant(
    kernel: Any,
    operands: Operands,
    block_r: int,
    tile: Tile,
    hip: bool,
    *,
    out: str | None = None,
    rank_major: bool = True,
    **flags: bool,
) -> Variant:
    """rank_major: q is A (R, K), whose columns are contiguous; otherwise B (N, R)."""
    names = kernel.arg_names
    wanted = {
        "BLOCK_M": tile.block_m,
        "BLOCK_W": tile.block_w,
        "BLOCK_R": block_r,
        "DOT": DTYPES[operands.dot],
        "PRECISION": operands.precision(hip),
        "INTERPRET": False,
        "stride_xw": 1,
        "stride_qw" if rank_major else "stride_qr": 1,
        "stride_ow" if rank_major else "stride_or": 1,
        **flags,
    }
    if not flags.get("MASKED", False):
        wanted |= {"active_ptr": None, "trainable_ptr": None}
    if not flags.get("DROPOUT", False):
        wanted |= {"seed_ptr": None, "row_ids_ptr": None}
    if not flags.get("WANT_DE", True):
        wanted |= {"de_ptr": None}
    constants = {n: wanted[n] for n in names if n in wanted}
    known = {
        **_POINTERS,
        **_RUNTIME,
        "x_ptr": f"*{operands.x}",
        "q_ptr": f"*{operands.adapters}",
        "out_ptr": f"*{out}",
        "active_ptr": "*u8",
        "trainable_ptr": "*u8",
        "seed_ptr": "*i64",
        "row_ids_ptr": "*i64",
        "stride_qr": "i32:16",
        "stride_qw": "i32:16",
        "stride_or": "i32:16",
        "stride_ow": "i32:16",
    }
    types = {n: known[n] for n in names if n not in constants}
    return Variant(kernel, operands, block_r, tile, types, constants)


def variants(hip: bool) -> Iterator[Variant]:
    """All of them, for NVIDIA or AMD."""
    both = (False, True)
    for operands in OPERANDS:
        if operands.tf32 and hip:
            continue
        what = operands.what(hip)
        for (kernel, of), tiles in (HIP_TILES if hip else TILES).items():
            if of not in (what, "any"):
                continue
            for block_r, tile in tiles.items():
                common = (operands, block_r, tile, hip)
                yield from _of_kernel(kernel, common, operands, both)


def _of_kernel(kernel: str, common: tuple, operands: Operands, both: tuple) -> Iterator[Variant]:
    outs = sorted({operands.x, "fp32"})
    if kernel == "shrink":
        for masked, dropout in itertools.product(both, both):
            flags = {"MASKED": masked, "DROPOUT": dropout}
            yield _variant(lowrank_shrink_kernel, *common, **flags)
            if not dropout:
                yield _variant(lowrank_shrink_kernel, *common, rank_major=False, **flags)
    elif kernel == "expand":
        for masked, dropout, add, out in itertools.product(both, both, both, outs):
            flags = {"MASKED": masked, "DROPOUT": dropout, "ADD": add}
            yield _variant(lowrank_expand_kernel, *common, out=out, **flags)
            if add and not dropout:
                yield _variant(lowrank_expand_kernel, *common, out=out, rank_major=False, **flags)
    elif kernel == "gram":
        for dropout in both:
            yield _variant(lowrank_gram_kernel, *common, DROPOUT=dropout)
    elif kernel == "dual":
        for masked in both:
            yield _variant(lowrank_dual_kernel, *common, rank_major=False, MASKED=masked)
    else:
        for masked, want_de, rank_major in itertools.product(both, both, both):
            flags = {"MASKED": masked, "WANT_DE": want_de}
            out = operands.adapters
            yield _variant(lowrank_finish_kernel, *common, out=out, rank_major=rank_major, **flags)
