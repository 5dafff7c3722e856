"""Weighted sums of packed updates, in the order given, in fp32, the same bits every time.

    total = Σ_c w_c v_c

where v_c are client c's values as fp32. Clients are added one after another in the order of the
list, each product rounded to fp32 before it is added: sort the list by client, not by arrival, and
the result doesn't depend on who came first.

The denominator is the caller's: weights are used as given. normalize=True divides them by their sum
over all clients, in float64, also at positions that only some clients' masks cover; weigh by the
clients that cover a position by dividing by aggregate_dense of the same weights over ones.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastrank.kernels.common import choose_backend
from fastrank.kernels.packing import formats
from fastrank.kernels.packing.mask import SparseMask
from fastrank.kernels.packing.packed import Packed, scatter_add_, unpack, written

# elements added at a time on a CPU: the sum and a client's values stay in a core's cache.
# A multiple of every block of scales
_PIECE = 1 << 16
# entries that NumPy adds at a time: sum and product stay in a core's own cache
_PLAIN_PIECE = 1 << 16


def aggregate(
    packed: Sequence[Packed],
    weights: Sequence[float] | Tensor,
    *,
    normalize: bool = False,
    backend: str = "auto",
) -> Packed | Tensor:
    """Σ_c w_c v_c, packed where all masks are the same.

        >>> from fastrank.kernels.packing import SparseMask, aggregate, pack, unpack
        >>> mask = SparseMask((64, 128), density=0.1)
        >>> updates = [pack(torch.full((64, 128), value), mask) for value in (1.0, 4.0)]
        >>> total = aggregate(updates, [200, 100], normalize=True)  # weighted by examples, say
        >>> round(float(unpack(total).mean()), 4)
        2.0

    Args:
        packed: the clients' updates, in a fixed order; of one tensor, on one device. Formats may
            differ.
        weights: one finite number a client, used as given (see the top of this file).
        normalize: divide the weights by their sum, which must not be 0.
        backend: "auto", "triton" or "reference".

    Returns:
        Packed fp32 with the clients' mask, its status the sum of theirs; where masks differ, the
        dense fp32 tensor that aggregate_dense gives.

    Raises:
        ValueError, TypeError: nothing to sum, or what doesn't go together.
    """
    weights = _checked(packed, weights, normalize)
    if not _same_mask(packed):
        return _dense(packed, weights, None, backend)
    return _shared(packed, weights, backend)


def aggregate_dense(
    packed: Sequence[Packed],
    weights: Sequence[float] | Tensor,
    *,
    normalize: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Σ_c w_c v_c as a tensor of the masks' shape: fp32, zero where no client kept an entry.

    Args:
        packed, weights, normalize, backend: as for aggregate; masks may differ in everything but
            their shape and tensor.
        out: contiguous fp32 tensor of that shape, overwritten; None for a new one.

    Raises:
        ValueError, TypeError: as aggregate, and for an out that doesn't fit.
    """
    weights = _checked(packed, weights, normalize)
    if out is not None:
        shape, device = packed[0].mask.shape, packed[0].values.device
        fits = out.dtype == torch.float32 and tuple(out.shape) == shape and out.device == device
        if not fits or not out.is_contiguous() or (out.requires_grad and torch.is_grad_enabled()):
            raise ValueError(
                f"out is {out.dtype} {list(out.shape)} on {out.device}; pass a contiguous float32 "
                f"{list(shape)} on {device} that needs no gradient"
            )
        out = out.detach()
    return _dense(packed, weights, out, backend)


def _shared(packed: Sequence[Packed], weights: list[float], backend: str) -> Packed:
    first = packed[0]
    device, nnz = first.values.device, first.mask.nnz
    status = torch.cat([one.status for one in packed]).view(-1, 2).sum(0)
    if choose_backend(backend, device, torch.float32) == "triton" and nnz:
        from fastrank.kernels.packing import launchers

        total = launchers.aggregate(_alike(packed), weights)
    else:
        total = torch.zeros(nnz, dtype=torch.float32, device=device)
        if device.type == "cpu" and all(one.values.dtype == torch.float32 for one in packed):
            _add_plain(total, [one.values for one in packed], weights)
        else:
            for start in range(0, nnz, _PIECE):
                piece = total[start : start + _PIECE]
                for one, weight in zip(packed, weights, strict=True):
                    piece.add_(_decoded(one, start, start + _PIECE).mul_(weight))
    return Packed(total, None, status, first.mask, first.block)


def _add_plain(total: Tensor, values: Sequence[Tensor], weights: list[float]) -> None:
    """total += Σ_c w_c v_c in place, fp32 on the CPU.

    By NumPy: the steps are so small that torch would spend them on waking its threads.
    """
    clients = [one.detach().numpy() for one in values]
    factors = [np.float32(weight) for weight in weights]
    whole, product = total.numpy(), np.empty(min(len(total), _PLAIN_PIECE), np.float32)
    with np.errstate(all="ignore"):  # a client's NaN or Inf is the caller's business
        for start in range(0, len(whole), _PLAIN_PIECE):
            piece = whole[start : start + _PLAIN_PIECE]
            part = product[: len(piece)]
            for client, factor in zip(clients, factors, strict=True):
                np.multiply(client[start : start + len(piece)], factor, out=part)
                np.add(piece, part, out=piece)


def _dense(
    packed: Sequence[Packed], weights: list[float], out: Tensor | None, backend: str
) -> Tensor:
    first = packed[0]
    device, shape = first.values.device, first.mask.shape
    chosen = choose_backend(backend, device, torch.float32)
    shared = _same_mask(packed)
    if chosen == "triton" and first.mask.numel and not shared and _one_stratum(packed):
        from fastrank.kernels.packing import launchers

        out = torch.empty(shape, dtype=torch.float32, device=device) if out is None else out
        launchers.aggregate_dense(_alike(packed), weights, out)
        written(out)
        return out
    out = torch.zeros(shape, dtype=torch.float32, device=device) if out is None else out.zero_()
    if shared:
        packed, weights = [_shared(packed, weights, backend)], [1.0]
    for one, weight in zip(packed, weights, strict=True):
        if one.mask.nnz:
            scatter_add_(out, one, weight, chosen)
    return out


def _same_mask(packed: Sequence[Packed]) -> bool:
    mask = packed[0].mask
    return all(one.mask is mask or one.mask == mask for one in packed)


def _one_stratum(packed: Sequence[Packed]) -> bool:
    """Whether one kernel can walk all clients: stratified masks of one S."""
    masks = [one.mask for one in packed]
    return all(m.scheme == "stratified" for m in masks) and len({m.stratum for m in masks}) == 1


def _alike(packed: Sequence[Packed]) -> Sequence[Packed]:
    """Updates of one format for one kernel: where theirs differ, their values as fp32."""
    first = packed[0]
    if all(one.values.dtype == first.values.dtype and one.block == first.block for one in packed):
        return packed
    return [Packed(unpack(one), None, one.status, one.mask, first.block) for one in packed]


def _decoded(one: Packed, start: int, stop: int) -> Tensor:
    values, scale, block = one.values[start:stop], one.scale, one.block
    if scale is not None:
        scale = scale[start // block : formats.block_count(stop, block)]
    return formats.decode(values, scale, block)


def _checked(
    packed: Sequence[Packed], weights: Sequence[float] | Tensor, normalize: bool
) -> list[float]:
    """Weights as fp32 numbers, after looking at everything."""
    if not packed:
        raise ValueError("there is nothing to sum; pass at least one packed update")
    for one in packed:
        if not isinstance(one, Packed):
            raise TypeError(f"an update is a {type(one).__name__}; pass what pack() returned")
    _check_masks([one.mask for one in packed])
    first = packed[0].values.device
    if any(one.values.device != first for one in packed):
        devices = {str(one.values.device) for one in packed}
        raise ValueError(f"updates are on {sorted(devices)}; move them to one device")
    numbers = weights.tolist() if isinstance(weights, Tensor) else [float(w) for w in weights]
    if len(numbers) != len(packed):
        raise ValueError(f"{len(packed)} updates but {len(numbers)} weights; pass one each")
    for index, number in enumerate(numbers):
        if not math.isfinite(number):
            raise ValueError(f"weight {index} is {number}; pass finite weights")
    if normalize:
        total = math.fsum(numbers)
        if total == 0:
            raise ValueError("the weights sum to 0 and can't be normalised; pass normalize=False")
        numbers = [number / total for number in numbers]
    with np.errstate(over="ignore"):
        rounded = np.array(numbers, dtype=np.float64).astype(np.float32)
    finite = np.isfinite(rounded)
    if not finite.all():
        index = int(finite.argmin())
        raise ValueError(f"weight {index} is {numbers[index]}, too large for float32")
    return rounded.tolist()


def _check_masks(masks: Sequence[SparseMask]) -> None:
    for index, mask in enumerate(masks):
        if mask is masks[0]:
            continue
        if mask.shape != masks[0].shape or mask.tensor_id != masks[0].tensor_id:
            raise ValueError(
                f"update {index} is of {mask.tensor_id!r} {list(mask.shape)} but the first of "
                f"{masks[0].tensor_id!r} {list(masks[0].shape)}; sum one tensor at a time"
            )
