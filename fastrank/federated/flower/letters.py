"""What server and nodes write each other: a JSON header and byte strings, in safe hands only.

    hello    server -> node    nothing
             node -> server    description, clients, and of a silo: examples
    train    server -> node    run, agreed, round, threads, floor, sketch,
                               clients [{client, payload, last, max_steps}], values
             node -> server    results [{client, payload, num_examples, num_steps, train_loss,
                               kept}], failed [{client, reason}]
    judge    server -> node    as train, and limit; clients [{client, payload, last, part}]
             node -> server    scores [{client, score}], failed
    either   node -> server    need [names], or refused, a reason

``payload`` and ``values`` count the letter's byte strings, which are messages of `wire`: JSON and
tensors, never a pickle. A header is read with the types it must have, or refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PROTOCOL = 1
MAX_HEADER = 1 << 28  # characters; a sketch takes about 150 a tensor
_RUN = re.compile(r"[0-9a-f]{32}")


class LetterError(ValueError):
    """A letter that is not what was expected; nothing of it was acted on."""


@dataclass(frozen=True, eq=False)
class Letter:
    """One message: a header of plain JSON and the byte strings it counts."""

    header: dict[str, Any]
    blobs: list[bytes] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.header["kind"]

    @property
    def num_bytes(self) -> int:
        return len(self.text()) + sum(len(blob) for blob in self.blobs)

    def text(self) -> str:
        """The header as it is sent, keys in their order: methods go through dicts in theirs."""
        return json.dumps(self.header, separators=(",", ":"), allow_nan=False)

    def blob(self, index: Any) -> bytes:
        """The byte string of this number."""
        if type(index) is not int or not 0 <= index < len(self.blobs):
            raise LetterError(f"byte string {index!r} asked for, but there are {len(self.blobs)}")
        return self.blobs[index]


@dataclass(frozen=True)
class Silence:
    """Why a node sent no letter.

    Attributes:
        broken: its program failed, and would again; else it was late, or is gone.
    """

    reason: str
    broken: bool = False


def letter(kind: str, blobs: list[bytes] | None = None, **header: Any) -> Letter:
    """A letter of this kind."""
    return Letter({"kind": kind, "protocol": PROTOCOL, **header}, blobs or [])


def read_letter(text: Any, blobs: list[bytes]) -> Letter:
    """A letter from its parts.

    Raises:
        LetterError: no JSON object, too long, or of another protocol.
    """
    if not isinstance(text, str) or len(text) > MAX_HEADER:
        raise LetterError("the header is no text, or a longer one than any letter has")
    try:
        header = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise LetterError(f"the header is not JSON: {error}") from None
    if not isinstance(header, dict) or not isinstance(header.get("kind"), str):
        raise LetterError("the header names no kind of letter")
    if header.get("protocol") != PROTOCOL:
        raise LetterError(
            f"protocol {header.get('protocol')!r}, but this fastrank speaks {PROTOCOL}; use one "
            "version of fastrank everywhere"
        )
    return Letter(header, blobs)


def take(
    header: Mapping[str, Any], key: str, kind: type, *, of: type | None = None, none: bool = False
) -> Any:
    """A header's value, of exactly this type; whole numbers are counts, none is negative.

    Args:
        of: the type of a list's entries.
        none: it may be missing.
    """
    value = header.get(key)
    if none and value is None:
        return None
    if type(value) is not kind:
        raise LetterError(f"{key} must be of type {kind.__name__}, got {str(value)[:80]!r}")
    if kind is int and not 0 <= value < 2**63:
        raise LetterError(f"{key} must be at least 0, got {value}")
    if of is not None and any(type(each) is not of for each in value):
        raise LetterError(f"{key} must be a list of {of.__name__}")
    return value


def take_run(header: Mapping[str, Any]) -> str:
    """A run's key: it names a folder, so nothing but hexadecimal digits passes."""
    run = take(header, "run", str)
    if not _RUN.fullmatch(run):
        raise LetterError(f"run must be 32 hexadecimal digits, got {run[:80]!r}")
    return run


def write_number(value: float) -> str:
    """A float as JSON can hold it whatever it is: NaN is news, too."""
    return float(value).hex()


def take_number(header: Mapping[str, Any], key: str) -> float:
    """A float that `write_number` wrote."""
    text = take(header, key, str)
    try:
        return float.fromhex(text)
    except (ValueError, OverflowError):
        raise LetterError(f"{key} is no number: {text[:80]!r}") from None


def write_score(score: Mapping[str, float]) -> dict[str, Any]:
    """A score of `local.evaluate` as a header holds it."""
    return {key: v if isinstance(v, int) else write_number(v) for key, v in score.items()}


def take_score(header: Mapping[str, Any]) -> dict[str, float]:
    """A score that `write_score` wrote: means of something, and the counts they are over."""
    score = take(header, "score", dict)
    found: dict[str, float] = {"count": take(score, "count", int)}
    means = ["loss", "accuracy"]
    if "rouge_l" in score:
        means.append("rouge_l")
        found["generated"] = take(score, "generated", int)
    for key in means:
        found[key] = take_number(score, key)
        if key != "loss" and found["count"] and not 0 <= found[key] <= 1:
            raise LetterError(f"{key} must be in [0, 1], got {found[key]}")
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"it holds {name}")
