"""Payloads to bytes and back: the only place that turns tensors into a message or reads one.

A message is a safetensors file in memory, readable by any safetensors reader:

    u64 length of the header, little-endian
    header    {"__metadata__": {"fastrank": J}, name: {"dtype", "shape", "data_offsets"}, ...}
    data      the tensors' bytes, without gaps, widest dtype first, then by name

J is one canonical-JSON string (several entries would come out of safetensors in random order) with
the format's name and version, the payload's metadata and a SHA-256 over header and data. Equal
payloads give equal bytes, whatever PYTHONHASHSEED or the order of the dict. Everything is checked
before a tensor is made; nothing is ever unpickled.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

__all__ = ["Payload", "Spec", "WireError", "from_bytes", "nonfinite", "spec_of", "to_bytes"]

FORMAT = "fastrank-payload"
VERSION = 1
DEFAULT_MAX_BYTES = 1 << 34  # a 7-billion-parameter model in 16 bits fits
MAX_HEADER_BYTES = 100_000_000  # what safetensors itself accepts
MAX_DIM = 2**63 - 1
MAX_DEPTH = 64  # of lists and objects in each other; Python's own limit depends on who calls

# the tags are safetensors'
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_TAGS = {dtype: tag for tag, dtype in _DTYPES.items()}

# tensor name -> (shape, dtype)
Spec = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class WireError(ValueError):
    """A payload that can't be sent, or bytes that are not the message that was expected."""


@dataclass(frozen=True, eq=False)
class Payload:
    """What crosses the wire: tensors by name, and JSON metadata (str keys, finite numbers)."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def payload_bytes(self) -> int:
        """Bytes of all tensors, without the container: what a method's formula counts."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.tensors.values())

    def bytes_of(self, names: Iterable[str]) -> int:
        """Bytes of the tensors with these names; names that are absent count nothing."""
        found = [self.tensors[name] for name in set(names) & self.tensors.keys()]
        return sum(tensor.numel() * tensor.itemsize for tensor in found)


def spec_of(tensors: Mapping[str, Tensor]) -> Spec:
    """The names, shapes and dtypes to `expect` of a message that should look like `tensors`."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def to_bytes(payload: Payload) -> bytes:
    """The canonical message of a payload.

    Tensors may be strided views, share memory, be empty or 0-dimensional and lie on any device.

    Raises:
        WireError: a tensor of an unsupported kind or dtype, or metadata that is not plain JSON.
    """
    for name, tensor in payload.tensors.items():
        _check_sendable(name, tensor)
    if not isinstance(payload.metadata, dict):
        raise WireError(f"metadata is a {type(payload.metadata).__name__}; expected a dict")
    _check_json(payload.metadata, "metadata")
    names = sorted(payload.tensors, key=lambda name: (-payload.tensors[name].itemsize, name))
    chunks, table, end = [], {}, 0
    for name in names:
        tensor = payload.tensors[name]
        chunk = _raw(tensor)
        begin, end = end, end + len(chunk)
        table[name] = {
            "dtype": _TAGS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        chunks.append(chunk)
    header = _header(table, payload.metadata, _digest(table, payload.metadata, chunks))
    header += b" " * (-len(header) % 8)  # data stays aligned for readers that map the file
    return b"".join([len(header).to_bytes(8, "little"), header, *chunks])


def from_bytes(
    data: bytes | bytearray | memoryview,
    *,
    expect: Spec | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    check: Callable[[Spec, dict[str, Any]], None] | None = None,
) -> Payload:
    """The payload of a message; its tensors lie on the CPU in memory of their own.

    Args:
        expect: names, shapes and dtypes the message must have, no more and no less.
        max_bytes: longer messages are refused unread.
        check: called with what the tensors will be and the metadata; raises WireError for what a
            format on top of this one doesn't take (packed_wire.py).

    Raises:
        WireError: whatever is wrong with the bytes, before any tensor is made from them.
    """
    view = memoryview(data).cast("B")
    if len(view) > max_bytes:
        raise WireError(f"message of {len(view)} bytes, but the limit is {max_bytes}")
    if len(view) < 8:
        raise WireError(f"message of {len(view)} bytes is cut off: it starts with 8 of length")
    length = int.from_bytes(view[:8], "little")
    if length > min(len(view) - 8, MAX_HEADER_BYTES):
        raise WireError(
            f"header of {length} bytes announced, but {len(view) - 8} bytes follow "
            f"(limit {MAX_HEADER_BYTES}): the message is cut off or not a payload"
        )
    table, metadata, digest = _parse_header(bytes(view[8 : 8 + length]))
    body = view[8 + length :]
    _check_table(table, len(body))
    if _digest(table, metadata, [body]) != digest:
        raise WireError("checksum mismatch: the message was changed on its way; send it again")
    if expect is not None:
        _check_expected(table, expect)
    if check is not None:
        shapes = {n: (tuple(one["shape"]), _DTYPES[one["dtype"]]) for n, one in table.items()}
        check(shapes, metadata)
    return Payload({name: _tensor(name, table[name], body) for name in sorted(table)}, metadata)


def nonfinite(payload: Payload) -> list[str]:
    """Sorted names of the tensors that hold a NaN or an infinity."""
    return sorted(name for name, tensor in payload.tensors.items() if not _all_finite(tensor))


def _all_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.itemsize == 1:
        tensor = tensor.float()  # isfinite knows no 8-bit floats; the conversion is exact
    return bool(torch.isfinite(tensor).all())


def _check_sendable(name: Any, tensor: Any) -> None:
    if not isinstance(name, str) or not name or name == "__metadata__":
        raise WireError(f"{name!r} can't name a tensor; use a non-empty string")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise WireError(f"tensor name {name!r} is not valid Unicode") from None
    if not isinstance(tensor, Tensor):
        raise WireError(f"{name} is a {type(tensor).__name__}; payloads carry torch tensors")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise WireError(f"{name} is sparse, quantised or meta; send a dense tensor with values")
    if tensor.dtype not in _TAGS:
        raise WireError(f"{name} has dtype {tensor.dtype}, which safetensors can't hold")


def _raw(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order; a copy only where strides or the device need one."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def _tensor(name: str, entry: dict[str, Any], body: memoryview) -> Tensor:
    begin, end = entry["data_offsets"]
    dtype = _DTYPES[entry["dtype"]]
    try:
        if begin == end:
            return torch.empty(entry["shape"], dtype=dtype)
        raw = torch.frombuffer(bytearray(body[begin:end]), dtype=torch.uint8)
        if dtype == torch.bool and int(raw.max()) > 1:
            raise WireError(f"{name} is BOOL but holds bytes other than 0 and 1")
        return raw.view(dtype).reshape(entry["shape"])
    except (RuntimeError, OverflowError) as error:
        raise WireError(f"{name} has a shape torch can't make: {entry['shape']}") from error


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _header(table: dict[str, Any], metadata: dict[str, Any], digest: str) -> bytes:
    record = {"format": FORMAT, "version": VERSION, "metadata": metadata, "sha256": digest}
    return _canonical({**table, "__metadata__": {"fastrank": _canonical(record)}}).encode()


def _digest(table: dict[str, Any], metadata: dict[str, Any], chunks: Iterable[memoryview]) -> str:
    """SHA-256 over the header as it reads with an empty digest, then the data."""
    sha = hashlib.sha256(_header(table, metadata, ""))
    for chunk in chunks:
        sha.update(chunk)
    return sha.hexdigest()


def _check_json(value: Any, where: str, depth: int = 1) -> None:
    """Refuse what JSON would drop, change or not give back equal: NaN, tuples, int keys, ..."""
    if depth > MAX_DEPTH:
        raise WireError(f"metadata is nested deeper than {MAX_DEPTH}; make it flatter")
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise WireError(f"{where} has the key {key!r}; JSON keys are strings")
            _check_json(item, f"{where}[{key!r}]", depth + 1)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_json(item, f"{where}[{i}]", depth + 1)
    elif type(value) is float:
        if value - value != 0.0:
            raise WireError(f"{where} is {value}; metadata holds finite numbers")
    elif value is not None and type(value) not in (bool, int, str):
        raise WireError(f"{where} is a {type(value).__name__}; metadata holds plain JSON")


def _parse_header(raw: bytes) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The table of tensors, the payload's metadata and the checksum a header claims."""
    table = _loads(raw, "header")
    entries = table.pop("__metadata__", None)
    if not isinstance(entries, dict) or not isinstance(entries.get("fastrank"), str):
        raise WireError("no fastrank entry in the metadata: these bytes are not a payload")
    record = _loads(entries["fastrank"], "metadata")
    if record.get("format") != FORMAT:
        raise WireError(f"format is {record.get('format')!r}; expected {FORMAT!r}")
    version = record.get("version")
    if type(version) is not int or version != VERSION:
        raise WireError(
            f"payload version {version!r}, but this fastrank reads version {VERSION}: "
            "use one version of fastrank on both sides"
        )
    if len(entries) != 1 or record.keys() != {"format", "version", "metadata", "sha256"}:
        raise WireError("missing or extra metadata entries")
    metadata = record["metadata"]
    if not isinstance(metadata, dict) or not isinstance(record["sha256"], str):
        raise WireError("malformed metadata entries")
    return table, metadata, record["sha256"]


def _loads(text: bytes | str, what: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN or infinities."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise WireError(f"{what} has a key twice")
        return made

    def constant(name: str) -> NoReturn:
        raise WireError(f"{what} holds {name}; only finite numbers are allowed")

    def number(literal: str) -> float:
        value = float(literal)
        return value if value - value == 0.0 else constant(literal)

    try:
        if isinstance(text, bytes):
            text = text.decode()
        value = json.loads(
            text, object_pairs_hook=unique, parse_constant=constant, parse_float=number
        )
    except WireError:
        raise
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise WireError(f"{what} is a JSON {type(value).__name__}; expected an object")
    _check_depth(value, what)
    return value


def _check_depth(value: dict[str, Any], what: str) -> None:
    """Refuse nesting that reading survives but writing it out again for the checksum may not."""
    level: list[Any] = [value]
    # metadata lies two levels down in its record
    for _ in range(MAX_DEPTH + 2):
        level = [x for x in level if isinstance(x, (dict, list))]
        level = [
            x for outer in level for x in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise WireError(f"{what} is nested deeper than {MAX_DEPTH}")


def _check_table(table: dict[str, Any], size: int) -> None:
    """Every entry well-formed, sizes as shapes and dtypes say, and data tiled without gaps."""
    spans = []
    for name, entry in table.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise WireError(f"{name} has a malformed header entry")
        tag, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(tag, str) or tag not in _DTYPES:
            raise WireError(f"{name} has the unknown dtype {tag!r}")
        if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
            raise WireError(f"{name} has a malformed shape or offsets: {shape!r}, {offsets!r}")
        begin, end = offsets
        if not begin <= end <= size:
            raise WireError(
                f"{name} lies at bytes {begin} to {end}, but the data has {size}: "
                "the message is cut off"
            )
        wanted = _DTYPES[tag].itemsize
        for dim in sorted(shape):  # zeros first: the product stays small or is already too large
            wanted *= dim
            if wanted > size:
                break
        if wanted != end - begin:
            raise WireError(f"{name} of {tag} {shape} does not take {end - begin} bytes")
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "follows a gap"
            raise WireError(f"{name} {fault}: it starts at byte {begin}, expected {position}")
        position = end
    if position != size:
        raise WireError(f"{size - position} bytes after the last tensor")


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= MAX_DIM for v in values)


def _check_expected(table: dict[str, Any], expect: Spec) -> None:
    missing = sorted(expect.keys() - table.keys())
    extra = sorted(table.keys() - expect.keys())
    if missing or extra:
        parts = [
            f"{word} {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for word, names in (("lacks", missing), ("adds", extra))
            if names
        ]
        raise WireError(f"{len(expect)} tensors expected; the message {' and '.join(parts)}")
    for name, (shape, dtype) in sorted(expect.items()):
        got_shape, got_dtype = tuple(table[name]["shape"]), _DTYPES[table[name]["dtype"]]
        if got_shape != tuple(shape) or got_dtype != dtype:
            raise WireError(
                f"{name} is {got_dtype} {list(got_shape)}; expected {dtype} {list(shape)}"
            )
