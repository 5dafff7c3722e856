"""What a node knows of the server's state.

A method's client side (`arrange`, `local`) is handed the server's state. In another process that
state is put together from what a client has: the payloads it is sent, the first values, which
follow from the seed, and what it kept of earlier rounds. The server sends a sketch, names, shapes
and digests of all tensors, and a node takes no value whose digest is another. What it can't find is

- asked for, once, if it belongs to the global model (`state.tensors`) or to those of the server's
  tensors that clients build their base from (`Method.public_server`);
- else a tensor on the meta device: names and shapes are there, and reading a value is an error.
  Momenta and the like never leave the server.

Values that a payload carries are taken from it as they came, with a 16-bit ``wire_dtype`` rounded.
Some payloads hold changes, not values; `Method.replay` follows those, so that nothing is asked for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastrank.federated.flower.letters import LetterError, take
from fastrank.federated.methods.base import Method, ServerState
from fastrank.federated.wire import Payload

_SECTIONS = ("tensors", "server")
_MAX_DIMS, _MAX_VALUES = 8, 1 << 40  # of a tensor that a sketch may name


def flat(state: ServerState) -> dict[str, Tensor]:
    """All tensors of a state as letters name them: "SECTION:NAME"."""
    return {f"{s}:{name}": value for s in _SECTIONS for name, value in getattr(state, s).items()}


def may_be_told(method: Method, key: str) -> bool:
    """Whether a client may have this tensor's value."""
    section, _, name = key.partition(":")
    return section == "tensors" or (section == "server" and name.startswith(method.public_server))


def digest_of(tensor: Tensor) -> str:
    """A short hash of dtype, shape and values."""
    values = tensor.detach().cpu().contiguous()
    sha = hashlib.sha256(f"{values.dtype}{list(values.shape)}".encode())
    sha.update(memoryview(values.reshape(-1).view(torch.uint8).numpy()))
    return sha.hexdigest()[:32]


@dataclass
class Digests:
    """Digests of tensors that stay as they are, each formed once."""

    _known: dict[int, tuple[Tensor, str]] = field(default_factory=dict)

    def of(self, tensor: Tensor) -> str:
        # the tensor is held, so that its id is not given to another
        found = self._known.get(id(tensor))
        if found is None:
            found = self._known[id(tensor)] = (tensor, digest_of(tensor))
        return found[1]

    def keep(self, tensors: Sequence[Tensor]) -> None:
        """Forget all others."""
        ids = {id(tensor) for tensor in tensors}
        self._known = {key: value for key, value in self._known.items() if key in ids}


def sketch(
    state: ServerState, payloads: Sequence[Payload], digests: Digests, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """A state without its values, as plain JSON, for clients that receive these payloads.

    Tensors of the global model that all payloads carry have no digest: they are what came.
    """
    came = set.intersection(*(set(payload.tensors) for payload in payloads)) if payloads else set()
    tables = {
        section: {
            name: [
                str(value.dtype).removeprefix("torch."),
                list(value.shape),
                None if section == "tensors" and name in came else digests.of(value),
            ]
            for name, value in getattr(state, section).items()
        }
        for section in _SECTIONS
    }
    digests.keep(list(flat(state).values()))
    return {**tables, "head": list(state.head), "extra": dict(extra)}


def fill(
    sketched: Mapping[str, Any],
    payloads: Sequence[Payload],
    sources: Sequence[Mapping[str, Tensor]],
    method: Method,
) -> tuple[ServerState, list[str]]:
    """The state of a sketch as far as it is known, and the names that have to be asked for.

    Args:
        sources: where to look for a value by its `flat` name, in this order.

    Raises:
        LetterError: a sketch that is none.
    """
    state: dict[str, dict[str, Tensor]] = {section: {} for section in _SECTIONS}
    missing: list[str] = []
    for section, values in state.items():
        for name, entry in take(sketched, section, dict).items():
            key = f"{section}:{name}"
            dtype, shape, digest = _entry(name, entry)
            carried = [p.tensors[name].to(dtype) for p in payloads if name in p.tensors]
            if 0 in shape:
                value = torch.empty(shape, dtype=dtype)
            elif digest is None:  # if all that came was cut to clients' ranks, it stays unknown
                value = next((v for v in carried if list(v.shape) == shape), None)
            else:
                stored = [source[key] for source in sources if key in source]
                value = next((v for v in carried + stored if digest_of(v) == digest), None)
            if value is None:
                value = torch.empty(shape, dtype=dtype, device="meta")
                if digest is not None and may_be_told(method, key):
                    missing.append(key)
            values[name] = value
    head = tuple(take(sketched, "head", list, of=str))
    return ServerState(**state, head=head, extra=take(sketched, "extra", dict)), missing


def _entry(name: str, entry: Any) -> tuple[torch.dtype, list[int], str | None]:
    tag, shape, digest = entry if isinstance(entry, list) and len(entry) == 3 else (None,) * 3
    dtype = getattr(torch, tag, None) if isinstance(tag, str) else None
    whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    known = isinstance(dtype, torch.dtype) and (digest is None or isinstance(digest, str))
    if not whole or not known or len(shape) > _MAX_DIMS:
        raise LetterError(f"the sketch of {name} is malformed: {str(entry)[:80]}")
    if math.prod(shape) > _MAX_VALUES:
        raise LetterError(f"the sketch of {name} has the shape {shape}, which no model has")
    return dtype, shape, digest
