"""Host side of the Triton kernels: what they are given, and how much a program takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton.language as tl
from torch import Tensor

from fastrank.kernels.common import interpreting
from fastrank.kernels.common.launch import cdiv, gpu_of, launch, launch_options
from fastrank.kernels.packing import draws, formats
from fastrank.kernels.packing.fused import (
    packing_aggregate_kernel,
    packing_aggregate_masks_kernel,
    packing_bernoulli_kernel,
    packing_pack_kernel,
    packing_positions_kernel,
    packing_unpack_kernel,
)

if TYPE_CHECKING:
    from fastrank.kernels.packing.mask import SparseMask
    from fastrank.kernels.packing.packed import Packed

# items of a program, and for how many of them there is a warp
ITEMS, A_WARP = 1024, 256
# entries of a stratum that a program of aggregate_dense takes, and how many entries in all
MOST_WIDTH, TILE = 128, 2048

_FORMATS = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "int8",
}
_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.uint8,
}


def positions(mask: SparseMask, device: torch.device) -> Tensor:
    """Sorted flat positions of a mask that keeps some but not all: int64 `[nnz]`."""
    if mask.scheme == "bernoulli":
        return _bernoulli(mask, device)
    out = torch.empty(mask.nnz, dtype=torch.int64, device=device)
    launch(
        packing_positions_kernel,
        (cdiv(mask.nnz, ITEMS),),
        out_ptr=out,
        **_mask_words(mask),
        ITEMS=ITEMS,
        **_options(device),
    )
    return out


def _bernoulli(mask: SparseMask, device: torch.device) -> Tensor:
    """Count, scan, write: the words are drawn twice and nothing of mask's size is stored."""
    counts = count_kept(mask, device)
    ends = counts.cumsum(0)
    return write_kept(mask, ends - counts, int(ends[-1]))


def count_kept(mask: SparseMask, device: torch.device) -> Tensor:
    """Kept entries of each ITEMS entries of a Bernoulli mask: int64 `[tiles]`."""
    counts = torch.empty(cdiv(mask.numel, ITEMS), dtype=torch.int64, device=device)
    _run_bernoulli(mask, counts, None)
    return counts


def write_kept(mask: SparseMask, starts: Tensor, total: int) -> Tensor:
    """The kept entries themselves: int64 `[total]`. starts: where those of each tile begin."""
    out = torch.empty(total, dtype=torch.int64, device=starts.device)
    _run_bernoulli(mask, out, starts)
    return out


def _run_bernoulli(mask: SparseMask, out: Tensor, starts: Tensor | None) -> None:
    launch(
        packing_bernoulli_kernel,
        (cdiv(mask.numel, ITEMS),),
        out_ptr=out,
        starts_ptr=starts,
        **_stream_words(mask.stream),
        threshold=_int32(mask.threshold),
        numel=mask.numel,
        ITEMS=ITEMS,
        WRITE=starts is not None,
        **_options(out.device),
    )


def pack(
    flat: Tensor,
    at: Tensor | None,
    mask: SparseMask,
    dtype: torch.dtype,
    block: int,
    source: draws.Stream | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(stored, scale, status), as formats.encode gives them; nnz > 0.

    Args:
        flat: the tensor's memory.
        at: int64 `[nnz]`, where the kept entries are in it; None for the mask's positions, which
            the kernel draws itself.
        others: as there.
    """
    scaled = dtype in formats.SCALED
    # without scales a program's items are its one block
    rows, block = (max(1, ITEMS // block), block) if scaled else (1, ITEMS)
    nnz, device = mask.nnz, flat.device
    stored = torch.empty(nnz, dtype=dtype, device=device)
    scale = None
    if scaled:
        count = formats.block_count(nnz, block)
        scale = torch.empty(count, dtype=torch.float32, device=device)
    status = torch.zeros(2, dtype=torch.int64, device=device)
    launch(
        packing_pack_kernel,
        (cdiv(nnz, rows * block),),
        dense_ptr=flat,
        positions_ptr=at,
        out_ptr=_bytes(stored),
        scale_ptr=scale,
        status_ptr=status,
        **_mask_words(mask),
        **_stream_words(draws.Stream(0, 0, 0) if source is None else source, rounding=True),
        FORMAT=_FORMATS[dtype],
        STOCHASTIC=source is not None,
        DRAWN=at is None,
        BLOCK=block,
        ROWS=rows,
        INTERPRET=interpreting(),
        **_options(device, rows * block),
    )
    return stored, scale, status


def unpack_add_(flat: Tensor, at: Tensor | None, packed: Packed, weight: float) -> None:
    """flat[at] += weight * values; nnz > 0. flat, at: as for pack."""
    launch(
        packing_unpack_kernel,
        (cdiv(packed.mask.nnz, ITEMS),),
        dense_ptr=flat,
        positions_ptr=at,
        values_ptr=_bytes(packed.values.contiguous()),
        scale_ptr=None if packed.scale is None else packed.scale.contiguous(),
        weight=weight,
        **_mask_words(packed.mask),
        SCALED=packed.scale is not None,
        BYTES=packed.values.dtype == torch.int8,
        DRAWN=at is None,
        BLOCK=packed.block,
        ITEMS=ITEMS,
        INTERPRET=interpreting(),
        **_options(flat.device),
    )


def aggregate(packed: Sequence[Packed], weights: Sequence[float]) -> Tensor:
    """Σ_c w_c v_c of clients with one mask: fp32 `[nnz]`; nnz > 0."""
    table, kept, one = _table(packed, weights)
    nnz, device = one.mask.nnz, one.values.device
    out = torch.empty(nnz, dtype=torch.float32, device=device)
    launch(
        packing_aggregate_kernel,
        (cdiv(nnz, ITEMS),),
        out_ptr=out,
        table_ptr=table,
        nnz=nnz,
        clients=len(packed),
        **_format(one),
        ITEMS=ITEMS,
        **_options(device),
    )
    del kept  # the table holds addresses alone: until here its buffers must live
    return out


def aggregate_dense(packed: Sequence[Packed], weights: Sequence[float], out: Tensor) -> None:
    """out = Σ_c w_c v_c of clients with stratified masks of one stratum; not empty."""
    table, kept, one = _table(packed, weights)
    mask = one.mask
    width = min(MOST_WIDTH, max(16, 1 << (mask.stratum - 1).bit_length()))
    strata = TILE // width
    words = _mask_words(mask)
    launch(
        packing_aggregate_masks_kernel,
        (cdiv(mask.nnz, strata), cdiv(mask.stratum, width)),
        out_ptr=out,
        table_ptr=table,
        stratum=words["stratum"],
        last=words["last"],
        nnz=mask.nnz,
        numel=mask.numel,
        clients=len(packed),
        **_format(one),
        STRATA=strata,
        WIDTH=width,
        **_options(out.device),
    )
    del kept


def _table(
    packed: Sequence[Packed], weights: Sequence[float]
) -> tuple[Tensor, list[Tensor | None], Packed]:
    """(table of clients as fused.py reads it, the buffers whose addresses it holds, one client).

    All clients have one format.
    """
    first = packed[0]
    buffers, rows = [], []
    for one, weight in zip(packed, weights, strict=True):
        values = _aligned(one.values)
        scale = None if one.scale is None else one.scale.contiguous()
        buffers += [values, scale]
        source = one.mask.stream
        bits = torch.tensor(weight, dtype=torch.float32).view(torch.int32).item()
        address = 0 if scale is None else scale.data_ptr()
        seed = draws.signed_seed(source.seed)
        rows.append((values.data_ptr(), address, bits, seed, source.c2, source.c3))
    # from pageable memory: staged before the call returns, so nothing waits for the device
    table = torch.tensor(rows, dtype=torch.int64).to(first.values.device, non_blocking=True)
    return table, buffers, first


def _aligned(values: Tensor) -> Tensor:
    values = values.contiguous()
    return values if values.data_ptr() % 16 == 0 else values.clone()


def _format(one: Packed) -> dict:
    return {
        "SCALED": one.scale is not None,
        "BYTES": one.values.dtype == torch.int8,
        "TYPE": _TYPES[one.values.dtype],
        "BLOCK": one.block,
    }


def _mask_words(mask: SparseMask) -> dict:
    """Kernel arguments that a mask is drawn from; a Bernoulli mask has no strata."""
    drawn = mask.scheme == "stratified"
    return {
        **_stream_words(mask.stream),
        "stratum": _int32(mask.stratum) if drawn else 1,
        "last": _int32(mask.last_stratum) if drawn else 1,
        "nnz": mask.nnz,
    }


def _stream_words(source: draws.Stream, rounding: bool = False) -> dict:
    low, high = source.key
    names = ("low", "high", "c2", "c3") if rounding else ("key_low", "key_high", "c2", "c3")
    prefix = "rounding_" if rounding else ""
    words = (low, high, source.c2, source.c3)
    return {prefix + name: _int32(word) for name, word in zip(names, words, strict=True)}


def _int32(word: int) -> int:
    """The int32 with the bits of a word in [0, 2**32)."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _bytes(values: Tensor) -> Tensor:
    return values.view(torch.uint8) if values.dtype == torch.int8 else values


def _options(device: torch.device, items: int = ITEMS) -> dict:
    options = launch_options(max(4, items // A_WARP), 2, gpu_of(device).hip)
    # a fused multiply-add would round otherwise than plain torch does
    return options | {"enable_fp_fusion": False}
