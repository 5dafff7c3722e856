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

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

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

VERSION = 1
GENERATOR = "philox4x32-10/v1"
# entries that all tensors of unexpected shapes may have together: one layer of 8192 x 8192
MAX_ENTRIES = 1 << 26
MAX_DIMS = 16

_RECORD = frozenset(("version", "generator", "tensors"))
_MASK = frozenset(
    ("scheme", "density", "seed", "shape", "tensor_id", "round", "block", "nonfinite")
)
_TOPK = frozenset(("scheme", "shape", "k"))
_FIELDS = {"stratified": _MASK | {"stratum"}, "bernoulli": _MASK, "topk": _TOPK}
_TOPK_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# what reading costs beside a Bernoulli mask's words, in words: its table of rows
_ROW_COST = 16

# the shape a tensor must have, or the mask it must be packed by
Expected = Mapping[str, tuple[int, ...] | SparseMask]


class _Seeded(NamedTuple):
    """The header of a Packed."""

    mask: SparseMask
    block: int
    nonfinite: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.mask.shape


class _Coded(NamedTuple):
    """The header of a TopK."""

    shape: tuple[int, ...]
    k: int


_Plan = dict[str, _Seeded | _Coded]


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
    plan: _Plan = {}

    def check(spec: Spec, metadata: dict[str, Any]) -> None:
        plan.update(_planned(spec, metadata, expect, max_entries))

    payload = from_bytes(data, max_bytes=max_bytes, check=check)
    return {name: _made(name, plan[name], payload.tensors) for name in sorted(plan)}


def to_payload(items: Mapping[str, Packed | TopK], **header: Any) -> Payload:
    """Packed tensors as a method's payload; `to_bytes` of it is what dump_packed returns.

    Raises:
        WireError: as dump_packed.
    """
    if "packed" in header:
        raise WireError("header 'packed' is the format's own; give it another name")
    tensors: dict[str, Tensor] = {}
    fields: dict[str, Any] = {}
    for name, item in items.items():
        _check_name(name)
        if isinstance(item, Packed):
            tensors[f"{name}.values"], fields[name] = item.values, _mask_fields(item)
            if item.scale is not None:
                tensors[f"{name}.scale"] = item.scale
        elif isinstance(item, TopK):
            tensors[f"{name}.values"], tensors[f"{name}.code"] = item.values, item.code
            fields[name] = {"scheme": "topk", "shape": list(item.shape), "k": item.k}
        else:
            raise WireError(f"{name} is a {type(item).__name__}; send what pack or topk_pack made")
    record = {"version": VERSION, "generator": GENERATOR, "tensors": fields}
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
    plan = _planned(spec_of(payload.tensors), payload.metadata, expect, max_entries)
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


def _mask_fields(packed: Packed) -> dict[str, Any]:
    mask = packed.mask
    fields = {
        "scheme": mask.scheme,
        "density": mask.density,
        "seed": mask.seed,
        "shape": list(mask.shape),
        "tensor_id": mask.tensor_id,
        "round": mask.round,
        "block": packed.block,
        "nonfinite": packed.status.tolist(),
    }
    return fields | ({"stratum": mask.stratum} if mask.scheme == "stratified" else {})


def _planned(
    spec: Spec, metadata: Mapping[str, Any], expect: Expected | None, max_entries: int
) -> _Plan:
    """The headers of a message's tensors, checked before any of its tensors is looked at."""
    fields = _tensor_fields(metadata)
    if expect is not None and fields.keys() != expect.keys():
        raise WireError(
            f"the message holds {_listed(fields)}, but {_listed(expect)} are expected; "
            "both sides must pack the same tensors"
        )
    plan: _Plan = {}
    wanted: set[str] = set()
    for name, given in fields.items():
        _check_name(name)
        header = _header(name, given)
        if expect is not None:
            _check_expected(name, header, expect[name])
        wanted |= _check_parts(name, header, spec)
        plan[name] = header
    if extra := sorted(spec.keys() - wanted):
        raise WireError(f"{_brief(extra[0])} belongs to no packed tensor of the message")
    if expect is None:
        _check_size(plan.values(), max_entries)
    # the only check that draws: last, and only what is known to be bounded
    for name, header in plan.items():
        if isinstance(header, _Seeded):
            _check_count(name, header.mask, spec[f"{name}.values"][0][0])
    return plan


def _tensor_fields(metadata: Mapping[str, Any]) -> dict[str, Any]:
    record = metadata.get("packed")
    if not isinstance(record, dict):
        raise WireError("no packed entry in the metadata: the message holds no packed tensors")
    version, generator = record.get("version"), record.get("generator")
    if type(version) is not int or version != VERSION:
        raise WireError(
            f"packed version {_brief(version)}, but this fastrank reads version {VERSION}: "
            "use one version of fastrank on both sides"
        )
    if generator != GENERATOR:
        raise WireError(
            f"positions come from the generator {_brief(generator)}; this fastrank draws "
            f"{GENERATOR} and would put the values elsewhere"
        )
    if record.keys() != _RECORD or not isinstance(record["tensors"], dict):
        raise WireError(f"the packed entry has {_listed(record)}; wanted {_listed(_RECORD)}")
    return record["tensors"]


def _header(name: str, fields: Any) -> _Seeded | _Coded:
    """One tensor's fields in their own types and ranges."""
    scheme = fields.get("scheme") if isinstance(fields, dict) else None
    if not isinstance(scheme, str) or scheme not in _FIELDS:
        raise WireError(
            f"{_brief(name)} has the scheme {_brief(scheme)}; this fastrank reads "
            f"{', '.join(_FIELDS)}"
        )
    if fields.keys() != _FIELDS[scheme]:
        raise WireError(f"{_brief(name)} has {_listed(fields)}; wanted {_listed(_FIELDS[scheme])}")
    shape = fields["shape"]
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_count, shape)):
        raise WireError(f"{_brief(name)} has the shape {_brief(shape)}; wanted sizes below 2**62")
    shape = tuple(shape)
    if scheme == "topk":
        k, numel = fields["k"], math.prod(shape)
        if not _is_count(k) or not k <= numel < 1 << 62:
            raise WireError(f"{_brief(name)} has {_brief(k)} values for a tensor of {list(shape)}")
        return _Coded(shape, k)
    if type(fields["density"]) is not float:
        raise WireError(f"{_brief(name)} has the density {_brief(fields['density'])}; no float")
    named = ("density", "seed", "tensor_id", "round", "scheme")
    try:
        mask = SparseMask(shape, **{field: fields[field] for field in named})
    except (ValueError, TypeError) as error:
        raise WireError(f"{_brief(name)} has no mask: {error}") from error
    if scheme == "stratified" and not _same(fields["stratum"], mask.stratum):
        raise WireError(
            f"{_brief(name)} says stratum {_brief(fields['stratum'])}, but density "
            f"{mask.density} has strata of {mask.stratum}"
        )
    block, counts = fields["block"], fields["nonfinite"]
    if type(block) is not int or block not in formats.BLOCKS:
        raise WireError(f"{_brief(name)} has blocks of {_brief(block)} values; see Packed.block")
    if not isinstance(counts, list) or len(counts) != 2 or not all(map(_is_count, counts)):
        raise WireError(f"{_brief(name)} has non-finite counts {_brief(counts)}; wanted two")
    return _Seeded(mask, block, (counts[0], counts[1]))


def _check_expected(name: str, header: _Seeded | _Coded, wanted: Any) -> None:
    if isinstance(wanted, SparseMask):
        if not isinstance(header, _Seeded) or header.mask != wanted:
            got = header.mask if isinstance(header, _Seeded) else f"top-k of {list(header.shape)}"
            raise WireError(f"{_brief(name)} is packed by {got}; expected {wanted}")
    elif header.shape != tuple(wanted):
        raise WireError(
            f"{_brief(name)} is of a tensor of {list(header.shape)}; expected {list(wanted)}"
        )


def _check_parts(name: str, header: _Seeded | _Coded, spec: Spec) -> set[str]:
    """The names of a tensor's parts, all there and of the sizes and dtypes the header says."""
    values = f"{name}.values"
    shape, dtype = spec.get(values, (None, None))
    if shape is None or len(shape) != 1:
        raise WireError(f"{_brief(name)} has no values in one dimension")
    count = shape[0]
    if isinstance(header, _Coded):
        code = f"{name}.code"
        if dtype not in _TOPK_DTYPES or count != header.k:
            raise WireError(
                f"{_brief(name)} has {count} values of {dtype}; expected {header.k} floats"
            )
        code_shape, code_dtype = spec.get(code, (None, None))
        if code_dtype != torch.uint8 or len(code_shape) != 1:
            raise WireError(f"{_brief(name)} has no code in one dimension of uint8")
        return {values, code}
    if dtype not in formats.DTYPES:
        raise WireError(f"{_brief(name)} has values of {dtype}, which no packed tensor has")
    if sum(header.nonfinite) > count:
        raise WireError(f"{_brief(name)} counts {header.nonfinite} non-finite among {count} values")
    if dtype not in formats.SCALED:
        return {values}
    scale = f"{name}.scale"
    wanted = ((formats.block_count(count, header.block),), torch.float32)
    if spec.get(scale) != wanted:
        raise WireError(
            f"{_brief(name)} has the scale {spec.get(scale)}; {count} values in blocks of "
            f"{header.block} need {wanted}"
        )
    return {values, scale}


def _check_size(headers: Iterable[_Seeded | _Coded], max_entries: int) -> None:
    total = 0
    for header in headers:
        total += math.prod(header.shape)
        if isinstance(header, _Seeded) and header.mask.scheme == "bernoulli":
            total += _ROW_COST * math.prod(header.shape[:-1])
    if total > max_entries:
        raise WireError(
            f"tensors of {total} entries (rows of Bernoulli masks counted in), but the limit is "
            f"{max_entries}: say the shapes with expect, or raise max_entries"
        )


def _check_count(name: str, mask: SparseMask, count: int) -> None:
    """As many values as the mask keeps."""
    if mask.scheme == "bernoulli" and mask.density < 1:
        # twelve standard deviations off: not worth the drawing
        mean = mask.numel * mask.density
        if abs(count - mean) > 12 * math.sqrt(mean) + 64:
            raise WireError(
                f"{_brief(name)} has {count} values, but a Bernoulli mask of {list(mask.shape)} "
                f"at {mask.density} keeps about {mean:.0f}"
            )
    if count != mask.nnz:
        raise WireError(
            f"{_brief(name)} has {count} values, but its mask keeps {mask.nnz} entries of "
            f"{list(mask.shape)}"
        )


def _made(name: str, header: _Seeded | _Coded, tensors: Mapping[str, Tensor]) -> Packed | TopK:
    """The item, its bytes checked."""
    values = tensors[f"{name}.values"]
    try:
        if isinstance(header, _Coded):
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
        raise WireError(f"{_brief(name)}: {error}") from error
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
        raise WireError(f"{_brief(name)} holds {fault}: {bad} of {good.numel()}")


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise WireError(f"{_brief(name)} can't name a packed tensor; use a non-empty string")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise WireError(f"the name {_brief(name)} is not valid Unicode") from None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _same(value: Any, number: int) -> bool:
    return type(value) is int and value == number


def _brief(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    shown = ", ".join(_brief(name) for name in ordered[:6])
    return f"{len(ordered)} ({shown}{', ...' if len(ordered) > 6 else ''})"
