"""Every specialisation that the launchers can select, to be compiled ahead of time.

An entry fixes what changes the machine code: operand types, tile, and flags. Sizes are taken to be
multiples of 16 where Triton specialises on that, and inner strides to be 1, as in real layers.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton.language as tl

from fastrank.kernels.lowrank.choices import Table
from fastrank.kernels.lowrank.fused import (
    lowrank_dual_kernel,
    lowrank_expand_kernel,
    lowrank_finish_kernel,
    lowrank_gram_kernel,
    lowrank_shrink_kernel,
)
from fastrank.kernels.lowrank.gemm import lowrank_gemm_kernel
from fastrank.kernels.lowrank.tiles import GemmTile, Tile

DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
HALVES = ("bf16", "fp16")
BOTH = (False, True)


@dataclass(frozen=True)
class Variant:
    """One kernel with what is fixed at compile time."""

    kernel: Any
    block_r: int
    tile: Tile | GemmTile
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
        if self.constants.get("stride_wc") == 1:
            flags.append("w-by-column")
        tile = "x".join(str(n) for n in self.tile)
        return "-".join([kernel, f"r{self.block_r}", tile, *types, *flags])


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
    "starts_ptr": "*i32",
    "counts_ptr": "*i32",
    "inv_keep": "fp32",
    "alpha": "fp32",
    # not specialised: see do_not_specialize in fused.py
    **dict.fromkeys(("M", "R", "trained", "chunk_tiles", "threshold"), "i32"),
    **dict.fromkeys(("id_rows", "e_ranks", "parts", "projections"), "i32"),
    **dict.fromkeys(("W", "C", "stride_part", "stride_xm", "stride_om"), "i32:16"),
    **dict.fromkeys(("stride_xc", "stride_wc", "stride_ww"), "i32:16"),
    **dict.fromkeys(("stride_qr", "stride_qw", "stride_or", "stride_ow"), "i32:16"),
}


def _variant(
    kernel: Any,
    block_r: int,
    tile: Tile | GemmTile,
    *,
    x: str | None = None,
    q: str | None = None,
    out: str | None = None,
    dot: tuple[str, str] | None = None,
    by_column: bool = False,
    w_by_column: bool = False,
    **flags: bool,
) -> Variant:
    """by_column: q is B (N, R), whose ranks are contiguous, instead of A (R, K).

    w_by_column: likewise for the gemm's w (C, W), whose columns are then contiguous.
    """
    fixed: dict[str, Any] = {
        "BLOCK_M": tile.block_m,
        "BLOCK_W": tile.block_w,
        "BLOCK_R": block_r,
        "INTERPRET": False,
        "SHARED": False,
        "stride_xw": 1,
        "stride_xc": 1,
        "stride_wc" if w_by_column else "stride_ww": 1,
        "stride_qr" if by_column else "stride_qw": 1,
        "stride_or" if by_column else "stride_ow": 1,
        **flags,
    }
    if isinstance(tile, GemmTile):
        fixed |= {"BLOCK_C": tile.block_c, "GROUP_M": tile.group_m}
    if dot is not None:
        fixed |= {"DOT": DTYPES[dot[0]], "PRECISION": dot[1]}
    absent = {"MASKED": ("active_ptr", "trainable_ptr"), "DROPOUT": ("seed_ptr", "row_ids_ptr")}
    absent |= {"WANT_DE": ("de_ptr",), "BIAS": ("bias_ptr",)}
    absent["SHARED"] = ("starts_ptr", "counts_ptr")
    for flag, pointers in absent.items():
        if not flags.get(flag, False):
            fixed |= dict.fromkeys(pointers)
    known = _TYPES | {"x_ptr": f"*{x}", "q_ptr": f"*{q}", "out_ptr": f"*{out}"}
    known |= {"w_ptr": f"*{x}", "bias_ptr": f"*{x}"}
    if by_column:  # the rank itself, seldom a multiple of 16
        known |= {"stride_qw": "i32", "stride_ow": "i32"}
    names = kernel.arg_names
    constants = {n: fixed[n] for n in names if n in fixed}
    return Variant(kernel, block_r, tile, {n: known[n] for n in names if n not in fixed}, constants)


def _dots(operands: str, hip: bool) -> Iterator[tuple[str, tuple[str, str], tuple[str, ...]]]:
    """(adapters, (operand dtype, precision), dtypes of x and dy) of a column of the tables."""
    if operands == "half":
        for half in HALVES:
            for adapters in (half, "fp32"):
                yield adapters, (half, "ieee"), (half,)
    elif operands == "mixed":
        yield "fp32", ("fp32", "ieee" if hip else "tf32x3"), HALVES
    else:
        precisions = ("tf32", "tf32x3") if operands == "tf32" else ("ieee",)
        for precision in precisions:
            yield "fp32", ("fp32", precision), ("fp32", *HALVES)


def variants(table: Table, hip: bool) -> list[Variant]:
    """All that a table can select, for NVIDIA or AMD.

    Of flags that only add work to the gemm (masks, a draw, an uneven C), all and none.
    lowrank_add's x and y may differ, one of them being fp32.
    """
    found: dict[str, Variant] = {}
    for kernel, operands, block_r, tile in table.tiles():
        if hip and operands == "tf32":
            continue
        for variant in _of_tile(kernel, operands, block_r, tile, hip):
            found[variant.name] = variant
    return list(found.values())


def _of_tile(kernel: str, operands: str, block_r: int, tile: Any, hip: bool) -> Iterator[Variant]:
    common = {"block_r": block_r, "tile": tile}
    if kernel == "finish":
        # q is compacted and may have been cast, out is the parameter's gradient
        for dtype, masked, want_de, by_column in itertools.product(DTYPES, BOTH, BOTH, BOTH):
            flags = {"MASKED": masked, "WANT_DE": want_de, "by_column": by_column}
            for q in {dtype, "fp32"}:
                yield _variant(lowrank_finish_kernel, **common, q=q, out=dtype, **flags)
        return
    for adapters, dot, dtypes in _dots(operands, hip):
        # what is read has a dot's own dtype where that is sixteen-bit; what is written may not
        for dtype in {*dtypes, "fp32"} if kernel == "expand" else dtypes:
            if kernel.startswith("gemm"):
                yield from _of_gemm(kernel, common, adapters, dot, dtype)
            else:
                yield from _of_kernel(kernel, common | {"dot": dot}, adapters, dtype)


def _of_kernel(kernel: str, common: dict, adapters: str, dtype: str) -> Iterator[Variant]:
    """dtype: of the wide operand, read or written."""
    for masked in BOTH:
        if kernel == "shrink":
            for dropout, by_column in ((False, False), (True, False), (False, True)):
                flags = {"MASKED": masked, "DROPOUT": dropout, "by_column": by_column}
                if not by_column:
                    shared = flags | {"SHARED": True}
                    yield _variant(lowrank_shrink_kernel, x=dtype, q=adapters, **common, **shared)
                yield _variant(lowrank_shrink_kernel, x=dtype, q=adapters, **common, **flags)
        elif kernel == "expand":
            for dropout, add in itertools.product(BOTH, BOTH):
                flags = {"MASKED": masked, "DROPOUT": dropout, "ADD": add}
                yield _variant(lowrank_expand_kernel, q=adapters, out=dtype, **common, **flags)
            flags = {"MASKED": masked, "DROPOUT": False, "ADD": True, "by_column": True}
            yield _variant(lowrank_expand_kernel, q=adapters, out=dtype, **common, **flags)
        elif kernel == "gram":
            for dropout, shared in itertools.product(BOTH, BOTH):
                flags = {"MASKED": masked, "DROPOUT": dropout, "SHARED": shared}
                yield _variant(lowrank_gram_kernel, x=dtype, **common, **flags)
        else:
            flags = {"MASKED": masked, "by_column": True}
            yield _variant(lowrank_dual_kernel, x=dtype, q=adapters, **common, **flags)


def _of_gemm(
    kernel: str, common: dict, adapters: str, dot: tuple[str, str], dtype: str
) -> Iterator[Variant]:
    """Forward (bias, q is B) and backward (a draw perhaps, q is A), for both layouts of weight."""
    types = {"x": dtype, "q": adapters, "out": dtype, "dot": dot}
    for forward, w_by_column in itertools.product(BOTH, BOTH):
        common = common | types | {"by_column": forward, "w_by_column": w_by_column}
        heaviest = {"MASKED": True, "EVEN_C": False, "DROPOUT": not forward, "BIAS": forward}
        lightest = {"MASKED": False, "EVEN_C": True, "DROPOUT": False, "BIAS": False}
        several = [lightest]
        if kernel == "gemm_any":
            several += [heaviest, lightest | {"DROPOUT": not forward, "BIAS": forward}]
        elif forward:
            several += [lightest | {"BIAS": True}]
        for flags in several:
            yield _variant(lowrank_gemm_kernel, **common, **flags)
