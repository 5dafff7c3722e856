"""Every specialisation of the kernels that triton_path.py can launch, to be compiled ahead of time.

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
HALVES = ("bf16", "fp16")
BOTH = (False, True)


@dataclass(frozen=True)
class Variant:
    """One kernel with what is fixed at compile time."""

    kernel: Any
    block_r: int
    tile: Tile
    types: dict[str, str]  # see common.aot.compile_kernel
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        types = [
            self.types[n].lstrip("*") for n in ("x_ptr", "q_ptr", "out_ptr") if n in self.types
        ]
        if "DOT" in self.constants:
            types += [f"dot-{self.constants['DOT']}-{self.constants['PRECISION']}"]
        flags = [k.lower() for k, v in self.constants.items() if v is True]
        if self.constants.get("stride_qr") == 1:
            flags.append("q-by-column")
        kernel = self.kernel.__name__.removeprefix("lowrank_").removesuffix("_kernel")
        return "-".join([kernel, f"r{self.block_r}", *types, *flags])


_TYPES = {
    "p_ptr": "*fp32",
    "e_ptr": "*fp32",
    "de_ptr": "*fp32",
    "part_ptr": "*fp32",
    "gram_ptr": "*fp32",
    "shrunk_ptr": "*fp32",
    "active_ptr": "*u8",
    "trainable_ptr": "*u8",
    "seed_ptr": "*i64",
    "row_ids_ptr": "*i64",
    "inv_keep": "fp32",
    "alpha": "fp32",
    # not specialised: see do_not_specialize in fused.py
    **dict.fromkeys(("M", "R", "trained", "chunk_tiles", "threshold"), "i32"),
    **dict.fromkeys(("id_rows", "e_ranks", "parts"), "i32"),
    **dict.fromkeys(("W", "stride_part", "stride_xm", "stride_om"), "i32:16"),
    **dict.fromkeys(("stride_qr", "stride_qw", "stride_or", "stride_ow"), "i32:16"),
}


def _variant(
    kernel: Any,
    block_r: int,
    tile: Tile,
    *,
    x: str | None = None,
    q: str | None = None,
    out: str | None = None,
    dot: tuple[str, str] | None = None,
    by_column: bool = False,
    **flags: bool,
) -> Variant:
    """by_column: q is B (N, R), whose ranks are contiguous, instead of A (R, K)."""
    fixed: dict[str, Any] = {
        "BLOCK_M": tile.block_m,
        "BLOCK_W": tile.block_w,
        "BLOCK_R": block_r,
        "INTERPRET": False,
        "stride_xw": 1,
        "stride_qr" if by_column else "stride_qw": 1,
        "stride_or" if by_column else "stride_ow": 1,
        **flags,
    }
    if dot is not None:
        fixed |= {"DOT": DTYPES[dot[0]], "PRECISION": dot[1]}
    absent = {"MASKED": ("active_ptr", "trainable_ptr"), "DROPOUT": ("seed_ptr", "row_ids_ptr")}
    absent["WANT_DE"] = ("de_ptr",)
    for flag, pointers in absent.items():
        if not flags.get(flag, False):
            fixed |= dict.fromkeys(pointers)
    known = _TYPES | {"x_ptr": f"*{x}", "q_ptr": f"*{q}", "out_ptr": f"*{out}"}
    names = kernel.arg_names
    constants = {n: fixed[n] for n in names if n in fixed}
    return Variant(kernel, block_r, tile, {n: known[n] for n in names if n not in fixed}, constants)


def _dots(hip: bool) -> Iterator[tuple[str, tuple[str, str], str, tuple[str, ...]]]:
    """(adapters, (operand dtype, precision), column of the tile table, dtypes of x and dy)."""
    for half in HALVES:
        for adapters in (half, "fp32"):
            yield adapters, (half, "ieee"), "half", (half,)
    for precision in ("ieee",) if hip else ("tf32x3", "tf32", "ieee"):
        yield "fp32", ("fp32", precision), precision[:4], ("fp32", *HALVES)


def variants(hip: bool) -> list[Variant]:
    """All of them, for NVIDIA or AMD; lowrank_add's x and y may differ, one of them being fp32."""
    found: dict[str, Variant] = {}
    table = HIP_TILES if hip else TILES
    for adapters, dot, what, dtypes in _dots(hip):
        for kernel in ("shrink", "expand", "gram", "dual"):
            # what is read has a dot's own dtype where that is sixteen-bit; what is written may not
            wide = {*dtypes, "fp32"} if kernel == "expand" else dtypes
            for (block_r, tile), dtype in itertools.product(table[kernel, what].items(), wide):
                for variant in _of_kernel(kernel, block_r, tile, adapters, dot, dtype):
                    found[variant.name] = variant
    for (block_r, tile), dtype in itertools.product(table["finish", "any"].items(), DTYPES):
        for masked, want_de, by_column in itertools.product(BOTH, BOTH, BOTH):
            flags = {"MASKED": masked, "WANT_DE": want_de, "by_column": by_column}
            # q is compacted and may have been cast, out is the parameter's gradient
            for q in {dtype, "fp32"}:
                variant = _variant(lowrank_finish_kernel, block_r, tile, q=q, out=dtype, **flags)
                found[variant.name] = variant
    return list(found.values())


def _of_kernel(
    kernel: str, block_r: int, tile: Tile, adapters: str, dot: tuple[str, str], dtype: str
) -> Iterator[Variant]:
    """dtype: of the wide operand, read or written."""
    common = {"block_r": block_r, "tile": tile, "dot": dot}
    for masked in BOTH:
        if kernel == "shrink":
            for dropout, by_column in ((False, False), (True, False), (False, True)):
                flags = {"MASKED": masked, "DROPOUT": dropout, "by_column": by_column}
                yield _variant(lowrank_shrink_kernel, x=dtype, q=adapters, **common, **flags)
        elif kernel == "expand":
            for dropout, add in itertools.product(BOTH, BOTH):
                flags = {"MASKED": masked, "DROPOUT": dropout, "ADD": add}
                yield _variant(lowrank_expand_kernel, q=adapters, out=dtype, **common, **flags)
            flags = {"MASKED": masked, "DROPOUT": False, "ADD": True, "by_column": True}
            yield _variant(lowrank_expand_kernel, q=adapters, out=dtype, **common, **flags)
        elif kernel == "gram":
            yield _variant(lowrank_gram_kernel, x=dtype, **common, DROPOUT=masked)
        else:
            flags = {"MASKED": masked, "by_column": True}
            yield _variant(lowrank_dual_kernel, x=dtype, q=adapters, **common, **flags)
