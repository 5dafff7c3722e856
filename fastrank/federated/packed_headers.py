"""What a message says of its packed tensors: written, and read as what a stranger wrote.

Fields, shapes and dtypes are checked against each other, and against what the receiver expects,
before a tensor is made. packed_wire.py has the format.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from fastrank.federated.wire import Spec, WireError
from fastrank.kernels.packing import Packed, SparseMask, TopK, formats

__all__ = ["MAX_ENTRIES", "Coded", "Expected", "Plan", "Seeded", "brief", "planned", "record_of"]

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
TOPK_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# what reading costs beside a Bernoulli mask's words, in words: its table of rows
_ROW_COST = 16

# the shape a tensor must have, or the mask it must be packed by
Expected = Mapping[str, tuple[int, ...] | SparseMask]


class Seeded(NamedTuple):
    """The header of a Packed."""

    mask: SparseMask
    block: int
    nonfinite: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.mask.shape


class Coded(NamedTuple):
    """The header of a TopK."""

    shape: tuple[int, ...]
    k: int


Plan = dict[str, Seeded | Coded]


def record_of(items: Mapping[str, Packed | TopK]) -> dict[str, Any]:
    """What a message's metadata says of these tensors.

    Raises:
        WireError: a name that can't be sent, or something that isn't packed.
    """
    fields: dict[str, Any] = {}
    for name, item in items.items():
        _check_name(name)
        if isinstance(item, Packed):
            fields[name] = _mask_fields(item)
        elif isinstance(item, TopK):
            fields[name] = {"scheme": "topk", "shape": list(item.shape), "k": item.k}
        else:
            raise WireError(f"{name} is a {type(item).__name__}; send what pack or topk_pack made")
    return {"version": VERSION, "generator": GENERATOR, "tensors": fields}


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


def planned(
    spec: Spec, metadata: Mapping[str, Any], expect: Expected | None, max_entries: int
) -> Plan:
    """The headers of a message's tensors, checked before any of its tensors is looked at.

    Args:
        expect, max_entries: as for load_packed.

    Raises:
        WireError: whatever is wrong with them.
    """
    fields = _tensor_fields(metadata)
    if expect is not None and fields.keys() != expect.keys():
        raise WireError(
            f"the message holds {_listed(fields)}, but {_listed(expect)} are expected; "
            "both sides must pack the same tensors"
        )
    plan: Plan = {}
    wanted: set[str] = set()
    for name, given in fields.items():
        _check_name(name)
        header = _header(name, given)
        if expect is not None:
            _check_expected(name, header, expect[name])
        wanted |= _check_parts(name, header, spec)
        plan[name] = header
    if extra := sorted(spec.keys() - wanted):
        raise WireError(f"{brief(extra[0])} belongs to no packed tensor of the message")
    if expect is None:
        _check_size(plan.values(), max_entries)
    # the only check that draws: last, and only what is known to be bounded
    for name, header in plan.items():
        if isinstance(header, Seeded):
            _check_count(name, header.mask, spec[f"{name}.values"][0][0])
    return plan


def _tensor_fields(metadata: Mapping[str, Any]) -> dict[str, Any]:
    record = metadata.get("packed")
    if not isinstance(record, dict):
        raise WireError("no packed entry in the metadata: the message holds no packed tensors")
    version, generator = record.get("version"), record.get("generator")
    if type(version) is not int or version != VERSION:
        raise WireError(
            f"packed version {brief(version)}, but this fastrank reads version {VERSION}: "
            "use one version of fastrank on both sides"
        )
    if generator != GENERATOR:
        raise WireError(
            f"positions come from the generator {brief(generator)}; this fastrank draws "
            f"{GENERATOR} and would put the values elsewhere"
        )
    if record.keys() != _RECORD or not isinstance(record["tensors"], dict):
        raise WireError(f"the packed entry has {_listed(record)}; wanted {_listed(_RECORD)}")
    return record["tensors"]


def _header(name: str, fields: Any) -> Seeded | Coded:
    """One tensor's fields in their own types and ranges."""
    scheme = fields.get("scheme") if isinstance(fields, dict) else None
    if not isinstance(scheme, str) or scheme not in _FIELDS:
        raise WireError(
            f"{brief(name)} has the scheme {brief(scheme)}; this fastrank reads "
            f"{', '.join(_FIELDS)}"
        )
    if fields.keys() != _FIELDS[scheme]:
        raise WireError(f"{brief(name)} has {_listed(fields)}; wanted {_listed(_FIELDS[scheme])}")
    shape = fields["shape"]
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_count, shape)):
        raise WireError(f"{brief(name)} has the shape {brief(shape)}; wanted sizes below 2**62")
    shape = tuple(shape)
    if scheme == "topk":
        k, numel = fields["k"], math.prod(shape)
        if not _is_count(k) or not k <= numel < 1 << 62:
            raise WireError(f"{brief(name)} has {brief(k)} values for a tensor of {list(shape)}")
        return Coded(shape, k)
    if type(fields["density"]) is not float:
        raise WireError(f"{brief(name)} has the density {brief(fields['density'])}; no float")
    named = ("density", "seed", "tensor_id", "round", "scheme")
    try:
        mask = SparseMask(shape, **{field: fields[field] for field in named})
    except (ValueError, TypeError) as error:
        raise WireError(f"{brief(name)} has no mask: {error}") from error
    if scheme == "stratified" and not _same(fields["stratum"], mask.stratum):
        raise WireError(
            f"{brief(name)} says stratum {brief(fields['stratum'])}, but density "
            f"{mask.density} has strata of {mask.stratum}"
        )
    block, counts = fields["block"], fields["nonfinite"]
    if type(block) is not int or block not in formats.BLOCKS:
        raise WireError(f"{brief(name)} has blocks of {brief(block)} values; see Packed.block")
    if not isinstance(counts, list) or len(counts) != 2 or not all(map(_is_count, counts)):
        raise WireError(f"{brief(name)} has non-finite counts {brief(counts)}; wanted two")
    return Seeded(mask, block, (counts[0], counts[1]))


def _check_expected(name: str, header: Seeded | Coded, wanted: Any) -> None:
    if isinstance(wanted, SparseMask):
        if not isinstance(header, Seeded) or header.mask != wanted:
            got = header.mask if isinstance(header, Seeded) else f"top-k of {list(header.shape)}"
            raise WireError(f"{brief(name)} is packed by {got}; expected {wanted}")
    elif header.shape != tuple(wanted):
        raise WireError(
            f"{brief(name)} is of a tensor of {list(header.shape)}; expected {list(wanted)}"
        )


def _check_parts(name: str, header: Seeded | Coded, spec: Spec) -> set[str]:
    """The names of a tensor's parts, all there and of the sizes and dtypes the header says."""
    values = f"{name}.values"
    shape, dtype = spec.get(values, (None, None))
    if shape is None or len(shape) != 1:
        raise WireError(f"{brief(name)} has no values in one dimension")
    count = shape[0]
    if isinstance(header, Coded):
        code = f"{name}.code"
        if dtype not in TOPK_DTYPES or count != header.k:
            raise WireError(
                f"{brief(name)} has {count} values of {dtype}; expected {header.k} floats"
            )
        code_shape, code_dtype = spec.get(code, (None, None))
        if code_dtype != torch.uint8 or len(code_shape) != 1:
            raise WireError(f"{brief(name)} has no code in one dimension of uint8")
        return {values, code}
    if dtype not in formats.DTYPES:
        raise WireError(f"{brief(name)} has values of {dtype}, which no packed tensor has")
    if sum(header.nonfinite) > count:
        raise WireError(f"{brief(name)} counts {header.nonfinite} non-finite among {count} values")
    if dtype not in formats.SCALED:
        return {values}
    scale = f"{name}.scale"
    wanted = ((formats.block_count(count, header.block),), torch.float32)
    if spec.get(scale) != wanted:
        raise WireError(
            f"{brief(name)} has the scale {spec.get(scale)}; {count} values in blocks of "
            f"{header.block} need {wanted}"
        )
    return {values, scale}


def _check_size(headers: Iterable[Seeded | Coded], max_entries: int) -> None:
    total = 0
    for header in headers:
        total += math.prod(header.shape)
        if isinstance(header, Seeded) and header.mask.scheme == "bernoulli":
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
                f"{brief(name)} has {count} values, but a Bernoulli mask of {list(mask.shape)} "
                f"at {mask.density} keeps about {mean:.0f}"
            )
    if count != mask.nnz:
        raise WireError(
            f"{brief(name)} has {count} values, but its mask keeps {mask.nnz} entries of "
            f"{list(mask.shape)}"
        )


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise WireError(f"{brief(name)} can't name a packed tensor; use a non-empty string")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise WireError(f"the name {brief(name)} is not valid Unicode") from None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _same(value: Any, number: int) -> bool:
    return type(value) is int and value == number


def brief(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    shown = ", ".join(brief(name) for name in ordered[:6])
    return f"{len(ordered)} ({shown}{', ...' if len(ordered) > 6 else ''})"
