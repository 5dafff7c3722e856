"""The convergence report's record: what was trained, by seed, and where it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastrank.bench.environment import environment
from fastrank.bench.results_file import write_json
from fastrank.errors import UsageError

# what has to agree before seeds are added to a file
_ORIGIN = ("device", "torch", "peft", "transformers", "fastrank", "threads")


class Record:
    """The file: whole at every moment, one entry for each seed and dropout.

    Args:
        path: made with the first entry, or gone on with.
        settings: what all seeds share, plain values.
        facts: what identifies model and data.

    Raises:
        UsageError: it is there and comes from other settings, versions, data or another machine.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        self.path = path
        if not path.parent.is_dir():
            raise UsageError(f"--out {path}: {path.parent} is no folder; make it, or give another")
        here = environment(torch.device("cpu"))
        self.content = {"environment": here, "settings": dict(settings), "task": dict(facts),
                        "seeds": []}  # fmt: skip
        if not path.exists():
            return
        before = read(path)
        pairs = [("settings", before["settings"], dict(settings))]
        pairs += [("task", before["task"], dict(facts))]
        pairs += [("environment", *({k: e.get(k) for k in _ORIGIN}
                                    for e in (before["environment"], here)))]  # fmt: skip
        for what, old, new in pairs:
            if old != new:
                odd = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
                raise UsageError(
                    f"{path} has another {what}: {odd[0]} {old.get(odd[0])!r}, here "
                    f"{new.get(odd[0])!r}; write to another file"
                )
        self.content = before

    def has(self, seed: int, dropout: float) -> bool:
        return any(e["seed"] == seed and e["dropout"] == dropout for e in self.content["seeds"])

    def add(self, entry: Mapping[str, Any]) -> None:
        self.content["seeds"].append(dict(entry))
        write_json(self.path, self.content)


def read(path: Path) -> dict[str, Any]:
    """A file that `Record` wrote.

    Raises:
        UsageError: it can't be read, or is something else.
    """
    try:
        content = json.loads(path.read_bytes())
        if not {"environment", "settings", "task", "seeds"} <= content.keys():
            raise ValueError("it lacks settings or seeds")
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{path} holds no convergence report ({error})") from error
    return content
