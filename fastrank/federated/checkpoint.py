"""Checkpoints that are whole or absent: written aside, flushed, renamed; checked when read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from fastrank.errors import UsageError
from fastrank.federated.methods.base import ServerState

_log = logging.getLogger("fastrank")

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on after ``rounds_done`` rounds."""

    rounds_done: int
    state: ServerState
    client_states: dict[int, dict[str, Tensor]]
    rows: list[dict[str, Any]]
    facts: dict[str, Any]


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file in one step: a reader sees the old bytes or the new ones, never a mixture."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    _sync_folder(path.parent)


def save_checkpoint(run: Path, checkpoint: Checkpoint, keep: int = 2) -> Path:
    """Write ``run/checkpoints/round_NNNN`` and remove all but the newest ``keep``."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"round_{checkpoint.rounds_done:04d}"
    aside = folder / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    clients = {
        f"{client}/{name}": tensor
        for client, kept in sorted(checkpoint.client_states.items())
        for name, tensor in kept.items()
    }
    files = {
        "state.safetensors": _dump(checkpoint.state.tensors),
        "server.safetensors": _dump(checkpoint.state.server),
        "clients.safetensors": _dump(clients),
    }
    meta = {
        "format": FORMAT,
        "rounds_done": checkpoint.rounds_done,
        "head": list(checkpoint.state.head),
        # safetensors gives names back in random order, and sums over them must not change
        "order": {
            "state.safetensors": list(checkpoint.state.tensors),
            "server.safetensors": list(checkpoint.state.server),
            "clients.safetensors": list(clients),
        },
        "extra": checkpoint.state.extra,
        "rows": checkpoint.rows,
        "facts": checkpoint.facts,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    body = json.dumps(meta, sort_keys=True)
    files["meta.json"] = json.dumps(
        {"sha256": hashlib.sha256(body.encode()).hexdigest(), "meta": meta}, sort_keys=True
    ).encode()
    for name, data in files.items():
        write_atomic(aside / name, data)
    if target.exists():  # a damaged one of this round, replaced after a fall-back
        shutil.rmtree(target)
    os.rename(aside, target)
    _sync_folder(folder)
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders, oldest first; half-written ones have other names."""
    return sorted((run / "checkpoints").glob("round_[0-9]*"), key=lambda p: int(p.name[6:]))


def load_latest(run: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; None if the run has none at all.

    A damaged one is named in a warning and the one before it is taken.

    Raises:
        UsageError: there are checkpoints but none can be read.
    """
    found = list_checkpoints(run)
    for path in reversed(found):
        try:
            return _load(path)
        except (OSError, ValueError, KeyError) as error:
            _log.warning("%s is damaged (%s); trying the checkpoint before it", path, error)
    if found:
        raise UsageError(
            f"{run} has {len(found)} checkpoints and none can be read; start the run again in "
            "another --output-dir"
        )
    return None


def _load(path: Path) -> Checkpoint:
    outer = json.loads((path / "meta.json").read_bytes())
    meta = outer["meta"]
    if hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest() != outer["sha256"]:
        raise ValueError("meta.json does not match its checksum")
    if meta["format"] != FORMAT:
        raise ValueError(f"format {meta['format']}, this version reads {FORMAT}")
    tensors = {}
    for name, wanted in meta["sha256"].items():
        data = (path / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != wanted:
            raise ValueError(f"{name} does not match its checksum")
        loaded = load_safetensors(data)
        tensors[name] = {key: loaded[key] for key in meta["order"][name]}
    clients: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors["clients.safetensors"].items():
        client, name = key.split("/", 1)
        clients.setdefault(int(client), {})[name] = tensor
    state = ServerState(
        tensors=tensors["state.safetensors"],
        head=tuple(meta["head"]),
        server=tensors["server.safetensors"],
        extra=meta["extra"],
    )
    return Checkpoint(meta["rounds_done"], state, clients, meta["rows"], meta["facts"])


def _dump(tensors: dict[str, Tensor]) -> bytes:
    return save_safetensors({name: value.contiguous() for name, value in tensors.items()})


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
