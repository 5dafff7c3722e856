"""pack, unpack, unpack_add_: a tensor's entries at a mask's positions, on their own and back.

A packed tensor has no indices: mask.positions() says where value i belongs, on every device.
formats.py says how values are stored. The gather and the conversion, and the decoding and the
scatter, are one kernel each on a GPU (fused.py), which gives the same bits as plain torch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrank.kernels.common import choose_backend
from fastrank.kernels.packing import draws, formats
from fastrank.kernels.packing.mask import SparseMask, cached_positions

POLICIES = ("raise", "zero")


@dataclass(frozen=True, eq=False)
class Packed:
    """Values at a mask's positions.

    Args:
        values: `[nnz]`, float32, bfloat16, float16 or int8.
        scale: fp32 `[ceil(nnz / block)]` for float16 and int8: value = stored * scale. None for
            the other two.
        status: int64 `[2]`, how many values were NaN and how many infinite when packed.
        mask: where they belong.
        block: values a scale, a power of two from 16 to 4096.

    Raises:
        ValueError, TypeError: parts that don't go together. What the values are is not looked at.
    """

    values: Tensor
    scale: Tensor | None
    status: Tensor
    mask: SparseMask
    block: int = 256

    def __post_init__(self) -> None:
        if not isinstance(self.mask, SparseMask):
            raise TypeError(f"mask is a {type(self.mask).__name__}; pass a SparseMask")
        check_format(self.values.dtype, self.block)
        nnz = self.mask.nnz
        if self.values.shape != (nnz,):
            raise ValueError(
                f"values have shape {list(self.values.shape)} but the mask keeps {nnz} entries "
                f"of {list(self.mask.shape)}; pass one value an entry"
            )
        blocks = formats.block_count(nnz, self.block)
        scaled = self.values.dtype in formats.SCALED
        if scaled != (self.scale is not None):
            wanted = f"need a scale [{blocks}]" if scaled else "take no scale"
            raise ValueError(f"values of {self.values.dtype} {wanted}")
        if scaled and (self.scale.shape != (blocks,) or self.scale.dtype != torch.float32):
            raise ValueError(
                f"scale is {self.scale.dtype} {list(self.scale.shape)}; {nnz} values in blocks of "
                f"{self.block} need float32 [{blocks}]"
            )
        if self.status.shape != (2,) or self.status.dtype != torch.int64:
            raise ValueError(
                f"status is {self.status.dtype} {list(self.status.shape)}; pass int64 [2], the "
                "counts of NaN and of infinite values"
            )
        devices = {t.device for t in (self.values, self.scale, self.status) if t is not None}
        if len(devices) > 1:
            raise ValueError(f"the parts are on {sorted(map(str, devices))}; pass them on one")

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales: what a payload carries."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)


def pack(
    dense: Tensor,
    mask: SparseMask,
    *,
    dtype: torch.dtype | None = None,
    block: int = 256,
    nonfinite: str = "raise",
    seed: int | None = None,
    backend: str = "auto",
) -> Packed:
    """The entries that mask keeps, converted on the way.

        >>> from fastrank.kernels.packing import SparseMask, pack
        >>> update = torch.randn(768, 3072)
        >>> packed = pack(update, SparseMask(update.shape, 0.01, seed=3), dtype=torch.int8)
        >>> packed.values.nbytes + packed.scale.nbytes, update.nbytes
        (23965, 9437184)

    Args:
        dense: float tensor of mask's shape, any strides; only kept entries are read.
        mask: which entries.
        dtype: of the stored values: float32, bfloat16, float16 or int8; None for dense's own, and
            float32 where that is float64.
        block: values a scale, of float16 and int8: a power of two from 16 to 4096.
        nonfinite: what is done about kept entries that are NaN or infinite (in fp32, or once in
            bf16). "raise" raises; "zero" stores zeros. Both count them in status. "raise" waits
            for a GPU, "zero" doesn't.
        seed: in [0, 2**64), the key of int8's stochastic rounding; None rounds to nearest. Other
            formats round to nearest always. Clients should use different ones.
        backend: "auto", "triton" or "reference".

    Raises:
        ValueError: arguments that don't fit; or non-finite entries, naming the tensor and counts.
    """
    _check_dense(dense, mask, "dense")
    dtype = _default_dtype(dense.dtype) if dtype is None else dtype
    check_format(dtype, block)
    if nonfinite not in POLICIES:
        raise ValueError(f"unknown policy {nonfinite!r}; nonfinite is one of {', '.join(POLICIES)}")
    source = None if seed is None else _rounding(mask, seed)
    source = source if dtype == torch.int8 else None
    dense = dense.detach()
    chosen = choose_backend(backend, dense.device, dense.dtype)
    if chosen == "triton" and mask.numel:
        flat, at = _located(dense, mask)  # a GPU counts a Bernoulli mask faster
    if chosen == "triton" and mask.nnz:
        from fastrank.kernels.packing import launchers

        values, scale, status = launchers.pack(flat, at, mask, dtype, block, source)
    else:
        flat, offsets = flattened(dense, cached_positions(mask, dense.device, "reference"))
        gathered = flat.index_select(0, offsets).to(torch.float32)
        values, scale, status = formats.encode(gathered, dtype, block, source)
    packed = Packed(values, scale, status, mask, block)
    if nonfinite == "raise":
        _raise_nonfinite(packed)
    return packed


def unpack(packed: Packed) -> Tensor:
    """The values in packed order: fp32 `[nnz]`, a fresh tensor.

    >>> from fastrank.kernels.packing import SparseMask, pack, unpack
    >>> dense, mask = torch.randn(64, 128), SparseMask((64, 128), density=0.1)
    >>> torch.equal(unpack(pack(dense, mask)), dense.flatten()[mask.positions()])
    True
    """
    return formats.decode(packed.values, packed.scale, packed.block)


def unpack_add_(
    dense: Tensor, packed: Packed, weight: float = 1.0, *, backend: str = "auto"
) -> Tensor:
    """dense += weight * values at the mask's positions, in place; every other entry keeps its bits.

        >>> from fastrank.kernels.packing import SparseMask, pack, unpack_add_
        >>> packed = pack(torch.ones(64, 128), SparseMask((64, 128), density=0.1))
        >>> float(unpack_add_(torch.zeros(64, 128), packed, weight=0.5).sum())  # 820 x 0.5
        410.0

    Args:
        dense: float tensor of the mask's shape, any strides that don't overlap. The product is
            rounded to fp32 and added in dense's dtype or fp32, whichever is wider.
        packed: what is added.
        weight: a finite number, rounded to fp32.
        backend: "auto", "triton" or "reference".

    Returns:
        dense.

    Raises:
        ValueError: arguments that don't fit, before anything is written.
    """
    _check_dense(dense, packed.mask, "dense")
    _check_writable(dense)
    if packed.values.device != dense.device:
        raise ValueError(
            f"dense is on {dense.device} but the packed values on {packed.values.device}; "
            "move one of them"
        )
    if not math.isfinite(single(weight)):
        raise ValueError(f"weight is {weight}; pass a number that is finite in float32")
    if packed.mask.nnz:
        dense = dense.detach() if dense.requires_grad else dense
        scatter_add_(dense, packed, weight, choose_backend(backend, dense.device, dense.dtype))
    return dense


def scatter_add_(dense: Tensor, packed: Packed, weight: float, chosen: str) -> None:
    """unpack_add_ of checked arguments by a chosen backend; nnz > 0."""
    if chosen == "triton":
        from fastrank.kernels.packing import launchers

        launchers.unpack_add_(*_located(dense, packed.mask), packed, single(weight))
        written(dense)
        return
    mask = packed.mask
    flat, offsets = flattened(dense, cached_positions(mask, dense.device, "reference"))
    wide = torch.promote_types(dense.dtype, torch.float32)
    added = unpack(packed).mul_(single(weight)).to(wide)
    flat.index_copy_(0, offsets, added.add_(flat.index_select(0, offsets)).to(dense.dtype))


def written(tensor: Tensor) -> None:
    """Tell autograd that a kernel wrote into the tensor."""
    if not tensor.is_inference():  # those have no version
        torch.autograd.graph.increment_version(tensor)


def flattened(dense: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(one-dimensional view of dense's memory, where the entries at flat positions are in it)."""
    if dense.is_contiguous():
        return dense.view(-1), positions
    steps = zip(dense.shape, dense.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in steps)
    flat = dense.as_strided((span,), (1,), dense.storage_offset())
    offsets = torch.zeros_like(positions)
    rest = positions
    for size, stride in zip(reversed(dense.shape), reversed(dense.stride()), strict=True):
        quotient = torch.div(rest, size, rounding_mode="floor")
        offsets += (rest - quotient * size) * stride
        rest = quotient
    return flat, offsets


def _located(dense: Tensor, mask: SparseMask) -> tuple[Tensor, Tensor | None]:
    """(dense's memory, offsets in it); None for those that a kernel draws itself."""
    if dense.is_contiguous() and mask.scheme == "stratified":
        return dense, None
    return flattened(dense, cached_positions(mask, dense.device, "triton"))


def single(number: float) -> float:
    """The number rounded to fp32, as every backend multiplies by it."""
    return torch.tensor(number, dtype=torch.float32).item()


def check_format(dtype: torch.dtype, block: int) -> None:
    """Raises ValueError for values of another dtype, or another block of scales."""
    if dtype not in formats.DTYPES:
        wanted = ", ".join(str(known).removeprefix("torch.") for known in formats.DTYPES)
        raise ValueError(f"values can't be stored as {dtype}; choose one of {wanted}")
    if block not in formats.BLOCKS:
        raise ValueError(f"block is {block!r}; it must be a power of two from 16 to 4096")


def _default_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in formats.DTYPES else torch.float32


def _rounding(mask: SparseMask, seed: int) -> draws.Stream:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ValueError(
            f"seed is {seed!r}; pass an int in [0, 2**64), or None to round to nearest"
        )
    return draws.stream(seed, mask.tensor_id, draws.ROUNDING, mask.round)


def _check_dense(dense: Tensor, mask: SparseMask, name: str) -> None:
    if not isinstance(dense, Tensor):
        raise TypeError(f"{name} is a {type(dense).__name__}; pass a tensor")
    if not isinstance(mask, SparseMask):
        raise TypeError(f"mask is a {type(mask).__name__}; pass a SparseMask")
    if tuple(dense.shape) != mask.shape:
        raise ValueError(
            f"{name} has shape {list(dense.shape)} but the mask is of {list(mask.shape)}; "
            "make the mask with the tensor's shape"
        )
    known = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if dense.layout != torch.strided or dense.dtype not in known:
        raise ValueError(
            f"{name} is {dense.dtype} with layout {dense.layout}; pass a strided tensor of "
            "float32, bfloat16, float16 or float64"
        )


def _check_writable(dense: Tensor) -> None:
    if dense.requires_grad and torch.is_grad_enabled():
        raise ValueError("dense requires grad; call under torch.no_grad(), or pass dense.detach()")
    if dense.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError("dense is an inference tensor; call under torch.inference_mode()")
    # strides in rising order each beyond all that smaller ones reach: no two entries share memory
    reach = 0
    for stride, size in sorted(zip(dense.stride(), dense.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                raise ValueError(
                    f"entries of dense overlap (shape {list(dense.shape)}, strides "
                    f"{list(dense.stride())}); pass dense.contiguous()"
                )
            reach += (size - 1) * stride


def _raise_nonfinite(packed: Packed) -> None:
    nan, infinite = packed.status.tolist()
    if nan or infinite:
        mask = packed.mask
        raise ValueError(
            f"tensor {mask.tensor_id!r} {list(mask.shape)}, round {mask.round}: {nan} NaN and "
            f"{infinite} infinite among the {mask.nnz} kept entries; pass nonfinite='zero' to "
            "store zeros, or leave the tensor out"
        )
