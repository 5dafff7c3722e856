"""Packed sparse updates as messages: what `pack` and `topk_pack` return, to bytes and back.

    data = dump_packed({"layer.0": pack(delta, mask, dtype=torch.int8)}, round=3)
    updates = load_packed(data, expect={"layer.0": mask})

A message is one of wire.py's (a safetensors file with a SHA-256 over header and data). Tensor NAME
travels as NAME.values, and NAME.scale or NAME.code where it has one; a seeded mask has no index
bytes. Its metadata holds, beside what the caller adds,

    "packed": {"version": 1, "generator": "philox4x32-10/v1", "tensors": {NAME: fields, ...}}

    fields of a seeded mask  scheme ("stratified" or "bernoulli"), density, seed, shape, tensor_id,
                             round, block (values a scale), nonfinite ([NaN, infinite] counted when
                             it was packed), and stratum (S) of a stratified one
    fields of a top-k        scheme ("topk"), shape, k

which costs below 1 KiB a tensor for names of up to about 100 characters.

Nothing of a message is trusted. Fields, shapes and dtypes are checked against each other before a
tensor is made; then the values must be finite, as they are stored and as they decode (`pack` counts
and drops what is not, so a message that holds one was damaged), and top-k codes are decoded and
their positions bounded. A message is good as a whole or refused as a whole, with a reason.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastrank.federated.packed_headers import (
    MAX_ENTRIES,
    Coded,
    Expected,
    Plan,
    Seeded,
    brief,
    planned,
    record_of,
)
from fastrank.federated.wire import (
    DEFAULT_MAX_BYTES,
    Payload,
    Spec,
    WireError,
    from_bytes,
    spec_of,
    to_bytes,
)
from fastrank.kernels.packing import Packed, SparseMask, TopK, formats, unpack

__all__ = ["dump_packed", "from_payload", "load_packed", "packed_spec", "to_payload"]


def dump_packed(items: Mapping[str, Packed | TopK], **header: Any) -> bytes:
    """The message of packed tensors.

    Args:
        items: name -> what `pack`, `aggregate` or `topk_pack` returned, on any device.
        header: further metadata, plain JSON; `wire.from_bytes(data).metadata` has it.

    Raises:
        WireError: what can't be sent, non-finite values among it.
    """
    return to_bytes(to_payload(items, **header))


def load_packed(
    data: bytes | bytearray | memoryview,
    *,
    expect: Expected | None = None,
    max_entries: int = MAX_ENTRIES,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> dict[str, Packed | TopK]:
    """The packed tensors of a message, on the CPU in memory of their own, in order of their names.

    Args:
        expect: the names a message must have, no more and no less, with each one's shape, or its
            whole mask. A server knows both: with masks it spends nothing on what a peer made up.
        max_entries: of all tensors together whose shapes are not expected. A few bytes can stand
            for a large tensor, which unpacking allocates, or of which a Bernoulli mask has to be
            drawn to be checked.
        max_bytes: longer messages are refused unread.

    Raises:
        WireError: whatever is wrong with the message; nothing of it is then returned.
    """
    plan: Plan = {}

    def check(spec: Spec, metadata: dict[str, Any]) -> None:
        plan.update(planned(spec, metadata, expect, max_entries))

    payload = from_bytes(data, max_bytes=max_bytes, check=check)
    return {name: _made(name, plan[name], payload.tensors) for name in sorted(plan)}


def to_payload(items: Mapping[str, Packed | TopK], **header: Any) -> Payload:
    """Packed tensors as a method's payload; `to_bytes` of it is what dump_packed returns.

    Raises:
        WireError: as dump_packed.
    """
    if "packed" in header:
        raise WireError("header 'packed' is the format's own; give it another name")
    record = record_of(items)
    tensors: dict[str, Tensor] = {}
    for name, item in items.items():
        tensors[f"{name}.values"] = item.values
        if isinstance(item, TopK):
            tensors[f"{name}.code"] = item.code
        elif item.scale is not None:
            tensors[f"{name}.scale"] = item.scale
    payload = Payload(tensors, {**header, "packed": record})
    # the receiver's checks: what leaves can be read
    known = {n: one.mask if isinstance(one, Packed) else one.shape for n, one in items.items()}
    from_payload(payload, expect=known)
    return payload


def from_payload(
    payload: Payload, *, expect: Expected | None = None, max_entries: int = MAX_ENTRIES
) -> dict[str, Packed | TopK]:
    """The packed tensors of a payload that `wire.from_bytes` read; they share its memory.

    Args:
        expect, max_entries: as for load_packed.

    Raises:
        WireError: as load_packed.
    """
    plan = planned(spec_of(payload.tensors), payload.metadata, expect, max_entries)
    return {name: _made(name, plan[name], payload.tensors) for name in sorted(plan)}


def packed_spec(masks: Mapping[str, SparseMask], dtype: torch.dtype, block: int = 256) -> Spec:
    """Names, shapes and dtypes of the payload of tensors packed by these masks: what a method's
    `uplink_spec` returns."""
    spec: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, mask in masks.items():
        spec[f"{name}.values"] = ((mask.nnz,), dtype)
        if dtype in formats.SCALED:
            spec[f"{name}.scale"] = ((formats.block_count(mask.nnz, block),), torch.float32)
    return spec


def _made(name: str, header: Seeded | Coded, tensors: Mapping[str, Tensor]) -> Packed | TopK:
    """The item, its bytes checked."""
    values = tensors[f"{name}.values"]
    try:
        if isinstance(header, Coded):
            item = TopK(values, tensors[f"{name}.code"], header.k, header.shape)
            item.positions()
            _require(torch.isfinite(values), name, "values that are NaN or infinite")
            return item
        scale = tensors.get(f"{name}.scale")
        status = torch.tensor(header.nonfinite, dtype=torch.int64, device=values.device)
        item = Packed(values, scale, status, header.mask, header.block)
    except (ValueError, TypeError) as error:
        if isinstance(error, WireError):
            raise
        raise WireError(f"{brief(name)}: {error}") from error
    if scale is not None:
        _require(scale > 0, name, "scales that are NaN, zero or negative")
    if values.dtype == torch.int8:
        _require(values != -128, name, "int8 values outside -127 to 127")
    elif values.dtype == torch.float16:
        powers = (scale.view(torch.int32) & 0x7FFFFF) == 0
        _require(powers, name, "float16 scales that are no powers of two")
    _require(torch.isfinite(unpack(item)), name, "values that are NaN or infinite")
    return item


def _require(good: Tensor, name: str, fault: str) -> None:
    bad = good.numel() - int(good.sum())
    if bad:
        raise WireError(f"{brief(name)} holds {fault}: {bad} of {good.numel()}")
