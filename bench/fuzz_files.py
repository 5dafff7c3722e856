"""Hostile files of a run: checkpoints, the journal, clients' states and config.json, mutated.

Half of the mutations are damage that a checksum sees; the other half are forged: any entry changed,
every checksum made right again. Whatever comes, reading must end in one of three ways: the newest
checkpoint as it was (or another valid one), the one before it with a warning, or a UsageError. It
must write nothing outside the run, keep its memory, and leave whole what it doesn't take.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import random
import shutil
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastrank.errors import UsageError

NUMBERS = [0, 1, -1, 2, 7, 2**31, 2**32 + 1, 2**60, 2**63, -(2**70), 10**30]
ODD = [None, True, 0.5, float("nan"), "", "x", "../../escape", "/etc/passwd", [], {}, [[1]], "\x00",
       "a" * 3000, {"a": {"b": []}}, [None] * 9, *NUMBERS]  # fmt: skip
NAMES = [
    "../../../escape",
    "/tmp/escape",
    "meta.json",
    "..",
    "a/b",
    "",
    "\x00",
    "99999999999999999999",
]
FILLS = (b"\x00" * 9, b"\xff" * 9, b"[" * 5000, b'"../"', b"1e999")
MOST_MEMORY = 64 << 20  # a reading of some kilobytes


class Loud(logging.Handler):
    """Counts warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


@dataclass
class Tally:
    """What became of the inputs."""

    inputs: int = 0
    taken: int = 0
    fell_back: int = 0
    refused: int = 0
    reasons: Counter = field(default_factory=Counter)
    slowest_s: float = 0.0
    peak_bytes: int = 0

    def add(self, kind: str, seconds: float) -> None:
        self.inputs += 1
        setattr(self, kind, getattr(self, kind) + 1)
        self.slowest_s = max(self.slowest_s, seconds)


def make_run(folder: Path) -> None:
    """A run of two rounds with every kind of file, by hand."""
    from fastrank.federated.checkpoint import Checkpoint, save_checkpoint
    from fastrank.federated.client_states import ClientStates
    from fastrank.federated.methods.base import ServerState

    states, rows, metrics = ClientStates(folder), [], []
    for n in (1, 2):
        states[n] = {"own": torch.full((3,), float(n)), "first": torch.arange(2)}
        rows.append({"round": n, "train_loss": 1 / n, "accuracy": None, "clients": 4})
        metrics.append({"round": n, "noise": 0.25 * n, "ranks": {"m": n}})
        state = ServerState(
            tensors={"b": torch.full((2, 3), float(n)), "a": torch.arange(4.0)},
            head=("a",),
            server={"momentum": torch.zeros(2)},
            extra={"stage": n},
        )
        facts = {"initial_accuracy": 0.5, "metrics": metrics}
        save_checkpoint(folder, Checkpoint(n, state, states, rows, facts))


def make_config(folder: Path) -> bytes:
    """config.json of a run that was never started; returns its bytes."""
    import dataclasses

    from fastrank.federated import rundir
    from fastrank.federated.config import option_values, resolve

    config, method = resolve({"method": "fedit", "num_rounds": 3})
    description = {
        "format": rundir.FORMAT,
        "fastrank": "0.1.0",
        "options": dataclasses.asdict(config) | option_values(method),
        "resolved": {"executor": "Sequential", "labels": ["a", "b"], "clients": 20},
        "data_fingerprint": "ab" * 32,
        "partition_fingerprint": "cd" * 8,
        "versions": {"torch": "2.13.0", "python": "3.11"},
    }
    rundir.create(folder, description)
    return (folder / "config.json").read_bytes()


# -- mutations ------------------------------------------------------------------------------------


def damaged(
    data: bytes,
    rng: random.Random,
    *,
    times: Sequence[int] = (1, 1, 2, 5),
    kinds: Sequence[int] = range(7),
    lengths: Sequence[int] = (2**60,),
    fills: Sequence[bytes] = FILLS,
    over: int | None = 9,
) -> bytes:
    """The faults of transport and storage, and headers of hostile lengths; nothing is put right.

    Args:
        times: how many faults; one of these is drawn.
        kinds: which fault; one of these is drawn for each: 0 a bit flipped, 1 the end cut, 2 a
            piece cut, 3 noise put in, 4 another header length, 5 a piece filled, 6 all replaced.
        lengths: header lengths to claim, beside 0, 8, the whole and any.
        fills: what pieces are filled with.
        over: bytes that a filling takes the place of; None for as many as it has.
    """
    out = bytearray(data)
    for _ in range(rng.choice(times)):
        i = rng.randrange(max(len(out), 1))
        kind = rng.choice(kinds)
        if kind == 0 and out:
            out[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[i:]
        elif kind == 2:
            del out[i : i + rng.randint(1, 40)]
        elif kind == 3:
            out[i:i] = rng.randbytes(rng.randint(1, 20))
        elif kind == 4:
            claimed = rng.choice([0, 8, len(out), *lengths, rng.getrandbits(64)])
            out[:8] = claimed.to_bytes(8, "little")
        elif kind == 5:
            fill = rng.choice(fills)
            out[i : i + (len(fill) if over is None else over)] = fill
        else:
            out = bytearray(rng.randbytes(rng.randint(0, 200)))
    return bytes(out)


def forged_value(value: Any, rng: random.Random) -> Any:
    """The value with one entry somewhere in it changed, removed, added or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.08:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.16:
            return {**value, rng.choice(NAMES): copy.deepcopy(value[key])}
        return {**value, key: forged_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [*value[:i], forged_value(value[i], rng), *value[i + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.4:
        return value + rng.choice([-1, 1, 5, 2**32])
    return rng.choice(ODD)


def forge_checkpoint(folder: Path, rng: random.Random) -> None:
    """Change what round 2's checkpoint says or holds, its checksums made right again."""
    from fastrank.federated import journal
    from fastrank.federated.checkpoint import seal

    target = folder / "checkpoints" / "round_0002"
    meta = json.loads((target / "meta.json").read_text())["meta"]
    kind = rng.randrange(5)
    if kind <= 1:
        for _ in range(rng.choice([1, 1, 2])):
            changed = forged_value(meta, rng)
            meta = changed if isinstance(changed, dict) else meta
    elif kind == 2:  # tensors
        name = rng.choice(["state.safetensors", "server.safetensors"])
        data = damaged((target / name).read_bytes(), rng)
        if rng.random() < 0.5:
            data = _forged_header((target / name).read_bytes(), rng)
        (target / name).write_bytes(data)
        meta["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    elif kind == 3:  # rounds
        path = folder / journal.COPIES[0]
        lines = path.read_bytes().splitlines(keepends=True)[:2]
        entry = forged_value(json.loads(lines[1]), rng)
        lines[1] = (json.dumps(entry) + "\n").encode()
        if rng.random() < 0.2:
            lines[1] = damaged(lines[1], rng)
        for name in journal.COPIES:
            (folder / name).write_bytes(b"".join(lines))
        new = (folder / journal.COPIES[0]).read_bytes().splitlines(keepends=True)
        mark = journal._linked(journal.Mark(), new)
        meta["journal"] = {**mark._asdict(), "rounds": 2}
    else:  # what a client keeps
        path = folder / "checkpoints" / "clients" / "000000" / "2.2.safetensors"
        data = damaged(path.read_bytes(), rng)
        path.write_bytes(data)
        meta["clients"]["written"]["2"] = hashlib.sha256(data).hexdigest()
    (target / "meta.json").write_bytes(seal(meta))


def _forged_header(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    changed = forged_value(table, rng)
    header = json.dumps(changed).encode()
    claimed = len(header) if rng.random() < 0.9 else rng.choice([2**60, 2**63, 0])
    return claimed.to_bytes(8, "little") + header + data[8 + length :]


# -- the checks -----------------------------------------------------------------------------------


def fuzz_checkpoints(count: int, seed: int, work: Path) -> Tally:
    """Read that many mutated runs.

    Raises:
        AssertionError: a reading that ended in another way, or touched what it must not.
    """
    from fastrank.federated.checkpoint import load_latest

    original, run, around = work / "original", work / "around" / "run", work / "around"
    make_run(original)
    files = sorted(p.relative_to(original) for p in original.rglob("*") if p.is_file())
    newest = [p for p in files if "round_0001" not in str(p)]
    before = {p: (original / p).read_bytes() for p in files}
    shutil.copytree(original, run)
    names = _names(around)
    rng, tally, loud = random.Random(seed), Tally(), Loud()
    log = logging.getLogger("fastrank")
    log.addHandler(loud)
    propagate, log.propagate = log.propagate, False
    sync, os.fsync = (
        os.fsync,
        lambda handle: None,
    )  # a mended journal is flushed: not the point here
    try:
        for number in range(count):
            looked_at = number % 37 == 0  # tracing makes a reading ten times as slow
            if looked_at:
                tracemalloc.start()
            if number % 2:
                forge_checkpoint(run, rng)
            else:
                for _ in range(rng.choice([1, 1, 1, 3])):
                    path = rng.choice(newest)
                    (run / path).write_bytes(damaged(before[path], rng))
            loud.count = 0
            began = time.perf_counter()
            try:
                found = load_latest(run)
                kind = _judged(found, loud.count, number)
            except UsageError as error:
                kind = "refused"
                tally.reasons[_reason(error)] += 1
            tally.add(kind, time.perf_counter() - began)
            if looked_at:
                tally.peak_bytes = max(tally.peak_bytes, tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
                assert tally.peak_bytes < MOST_MEMORY, number
                assert _names(around) == names, number
            for path in files:
                if (run / path).read_bytes() != before[path]:
                    (run / path).write_bytes(before[path])
    finally:
        tracemalloc.stop()
        os.fsync = sync
        log.removeHandler(loud)
        log.propagate = propagate
    return tally


def _judged(found: Any, warnings: int, number: int) -> str:
    """How a checkpoint that was read came about; it must be whole."""
    assert found.rounds_done in (1, 2), number
    assert len(found.rows) == found.rounds_done, number
    for tensors in (found.state.tensors, found.state.server):
        assert all(isinstance(v, torch.Tensor) for v in tensors.values()), number
    kept = {client: found.client_states[client] for client in found.client_states}  # or refused
    assert all(list(own) == ["own", "first"] for own in kept.values()), number
    if found.rounds_done == 1:
        assert warnings, number
        assert torch.equal(found.state.tensors["b"], torch.ones(2, 3)), number
        assert list(found.client_states) == [1], number
        return "fell_back"
    return "taken"


def fuzz_configs(count: int, seed: int, work: Path) -> Tally:
    """Read that many mutated config.json files as resume does, up to the resolved options.

    Half have a copy that was changed in the same way, as somebody would who makes checksums right.

    Raises:
        AssertionError: a reading that ended in anything but options or a UsageError.
    """
    from fastrank.federated import rundir
    from fastrank.federated.config import resolve

    run = work / "around" / "configured"
    before = make_config(run)
    copy_of = run / "checkpoints" / "config.json"
    names = _names(work / "around")
    rng, tally = random.Random(seed), Tally()
    log = logging.getLogger("fastrank")
    disabled, log.disabled = log.disabled, True
    try:
        for number in range(count):
            if rng.random() < 0.5:
                data = damaged(before, rng)
            else:
                changed = json.loads(before)
                for _ in range(rng.choice([1, 1, 2, 3])):
                    changed = forged_value(changed, rng)
                data = json.dumps(changed).encode()
            (run / "config.json").write_bytes(data)
            copy_of.write_bytes(data if number % 2 else before)
            began = time.perf_counter()
            try:
                saved = rundir.read(run)
                resolve({**saved["options"], "output_dir": str(run)})
            except UsageError as error:
                tally.reasons[_reason(error)] += 1
                kind = "refused"
            else:
                kind = "fell_back" if saved == json.loads(before) else "taken"
            tally.add(kind, time.perf_counter() - began)
            assert number % 37 or _names(work / "around") == names, number
    finally:
        log.disabled = disabled
    return tally


def _names(folder: Path) -> list[str]:
    return sorted(str(p) for p in folder.parent.rglob("*"))


def _reason(error: Exception) -> str:
    words = [w for w in str(error).split() if w.isalpha()]
    return " ".join(words[:5])


FUZZERS: dict[str, Callable[[int, int, Path], Tally]] = {
    "checkpoints": fuzz_checkpoints,
    "config.json": fuzz_configs,
}
