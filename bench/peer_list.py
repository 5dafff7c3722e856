"""Every peer that the benchmarks compare with, and whether it ran or why it didn't.

A peer runs where it is installed and its device is there; nothing here is a dependency. What a
results file says of it comes from the rows: measured in one of them, skipped with a reason, or not
part of that grid, for the reason given here.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

_PROCESS = (
    "it changes transformers for the whole process when it is imported: it can't take turns with "
    "the others"
)
_PROGRAM = "it is a training program of its own, not a layer that takes these operands"


@dataclass(frozen=True)
class Peer:
    """
    Args:
        name: as people call it.
        bench: where it is compared.
        rows: names of its variant or baseline in rows; empty where it never has one.
        module: what must be importable; None for code of this repository.
        install: how one gets it.
        devices: where it can run.
        why_not: the reason it is in no row though it is there and so is its device.
        precisions: of a case ("precision"), where only such rows are about it.
        ours: rows come from our own implementation of its published schedule.
    """

    name: str
    bench: str
    rows: tuple[str, ...]
    module: str | None
    install: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    why_not: str = "not part of this grid"
    precisions: tuple[str, ...] = ()
    ours: bool = False

    def concerns(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is about it."""
        return (
            row["bench"] == self.bench
            and (row["variant"] in self.rows or row["baseline"] in self.rows)
            and (not self.precisions or row["case"].get("precision") in self.precisions)
        )

    def version(self) -> str | None:
        """The installed version; None where it is missing or code of this repository."""
        return None if self.module is None else _version(self.module)

    def reason(self, device: str) -> str:
        """Why no row is about it.

        Args:
            device: type of the device that was measured.
        """
        if self.module is not None and not _found(self.module):
            return f"not installed ({self.install})"
        if device not in self.devices:
            return "needs a GPU" if device == "cpu" else "runs on CPUs"
        return self.why_not


_GPU = ("cuda",)
_CPU = ("cpu",)
PEERS = (
    Peer("PEFT", "lowrank", ("peft",), "peft", "pip install peft", precisions=("peft",)),
    Peer(
        "PEFT with 16-bit adapters or autocast", "lowrank", ("peft",), "peft", "pip install peft",
        precisions=("16-bit", "autocast"),
    ),
    Peer(
        "torch.compile'd PEFT", "lowrank", ("peft-compiled",), "peft", "pip install peft", _GPU,
        "compiled for the largest square layer alone: every case compiles anew",
    ),
    Peer(
        "FlagGems", "lowrank", ("flaggems+peft",), "flag_gems", "pip install flag_gems", _GPU,
    ),
    Peer(
        "Unsloth's layer schedule", "lowrank", ("unsloth-schedule",), None, "bench/peers.py", _GPU,
        "16-bit adapters alone", ours=True,
    ),
    Peer(
        "LoRAFusion's layer schedule", "lowrank", ("lorafusion-schedule",), None,
        "bench/lorafusion.py", _GPU, "16-bit adapters alone", ours=True,
    ),
    Peer("mLoRA", "grouped", (), "mlora", "its repository on the path", _GPU, _PROGRAM),
    Peer("LoRAFusion", "grouped", (), "lorafusion", "its repository on the path", _GPU, _PROGRAM),
    Peer("torch.linalg.svd, svd_lowrank", "svd", ("torch.linalg.svd", "svd_lowrank"), "torch", ""),
    Peer(
        "scikit-learn's randomized_svd", "svd", ("sklearn",), "sklearn",
        "pip install 'fastrank[peers]'", _CPU,
    ),
    Peer(
        "SciPy's svds", "svd", ("scipy-svds",), "scipy", "pip install 'fastrank[peers]'", _CPU,
    ),
    Peer("JAX's jnp.linalg.svd", "svd", ("jax",), "jax", "pip install jax", _CPU),
    Peer("CuPy's linalg.svd", "svd", ("cupy",), "cupy", "pip install cupy-cuda12x", _GPU),
    Peer("PEFT's add_weighted_adapter", "svd", ("peft-merge",), "peft", "pip install peft"),
    Peer(
        "zstandard", "packing", ("zstd-bitmap",), "zstandard", "pip install 'fastrank[peers]'",
    ),
    Peer("PEFT", "train-step", ("peft",), "peft", "pip install peft"),
    Peer(
        "Liger with PEFT", "train-step", ("liger+peft",), "liger_kernel",
        "pip install liger-kernel", _GPU,
    ),
    Peer("Unsloth", "train-step", ("unsloth",), "unsloth", "pip install unsloth", _GPU, _PROCESS),
    Peer("PEFT, one client after another", "simulate", ("peft-sequential",), "peft",
         "pip install peft"),
    Peer("Flower on Ray", "simulate", ("flower-ray", "flower-ray-examples"), "flwr",
         "pip install 'fastrank[flower]'", _CPU),
)  # fmt: skip


def states(rows: Iterable[Mapping[str, Any]], device: str) -> list[dict[str, Any]]:
    """Each peer of the benches that rows come from: did it run, which version, or why not.

    Args:
        rows: of a results file.
        device: type of the device that was measured, "cpu" or "cuda".
    """
    rows = list(rows)
    benches = {row["bench"] for row in rows}
    return [_state(peer, rows, device) for peer in PEERS if peer.bench in benches]


def _state(peer: Peer, rows: list[Mapping[str, Any]], device: str) -> dict[str, Any]:
    own = [row for row in rows if peer.concerns(row)]
    ran = any("skipped" not in row for row in own)
    state = {"name": peer.name, "bench": peer.bench, "ran": ran, "version": peer.version()}
    if peer.ours:
        state["ours"] = True
    if ran:
        return state
    if not own:
        return state | {"reason": peer.reason(device)}
    who, _, words = own[0]["skipped"].partition(": ")
    return state | {"reason": words if who in peer.rows else own[0]["skipped"]}


def lines(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a person reads below a benchmark's table."""
    said = []
    for peer in found:
        name = peer["name"] if peer["version"] is None else f"{peer['name']} {peer['version']}"
        ours = " (our implementation)" if peer.get("ours") else ""
        said.append(f"peer {name}: {f'measured{ours}' if peer['ran'] else peer['reason']}")
    return said


@functools.cache
def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@functools.cache
def _version(module: str) -> str | None:
    if not _found(module):
        return None
    try:
        return metadata.version({"sklearn": "scikit-learn"}.get(module, module))
    except metadata.PackageNotFoundError:  # CuPy's wheels are named after CUDA's version
        names = metadata.packages_distributions().get(module, [])
        return metadata.version(names[0]) if names else None
