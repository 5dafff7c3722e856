"""A run's folder: what is written at the start and at the end, and what resume checks."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastrank._version import __version__
from fastrank.errors import UsageError
from fastrank.federated.checkpoint import Checkpoint, write_atomic
from fastrank.federated.config import option_values
from fastrank.federated.export import save_result
from fastrank.federated.ledger import Ledger

if TYPE_CHECKING:
    from fastrank.federated.simulation import Simulation

FORMAT = 1


def default_name(method: str) -> str:
    """runs/METHOD-DATE-TIME, local time."""
    return f"runs/{method}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def refuse_occupied(folder: Path) -> None:
    """Raise a UsageError unless the folder is absent or empty."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if (folder / "config.json").exists():
        raise UsageError(
            f"output_dir {str(folder)!r} already holds a run; go on with it by "
            f"'fastrank resume {folder}', or give another --output-dir"
        )
    if folder.exists():
        kind = "is not empty" if folder.is_dir() else "is a file"
        raise UsageError(f"output_dir {str(folder)!r} {kind}; give a new --output-dir")


def create(folder: Path, description: dict[str, Any]) -> None:
    """Make the folder and write config.json."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "config.json", _json(description))
    except OSError as error:
        raise UsageError(
            f"output_dir {str(folder)!r} can't be written: {error.strerror}; give another"
        ) from error


def describe(simulation: Simulation) -> dict[str, Any]:
    """config.json: the resolved options, versions, and fingerprints of data and partition."""
    sizes = [len(indices) for indices in simulation.partition]
    options = dataclasses.asdict(simulation.config) | option_values(simulation.method)
    options["output_dir"] = None  # the folder may be moved; its place decides nothing
    options["num_threads"] = torch.get_num_threads()
    packages = ("torch", "transformers", "peft", "numpy", "tokenizers", "triton")
    return {
        "format": FORMAT,
        "fastrank": __version__,
        "options": options,
        "resolved": {
            "executor": type(simulation.executor).__name__,
            "clients_in_parallel": simulation.executor.clients_in_parallel,
            "device": simulation.device.type,
            "task": simulation.data.task,
            "labels": list(simulation.data.label_names),
            "train_examples": len(simulation.train.lengths),
            "test_examples": len(simulation.test.lengths),
            "clients": len(sizes),
            "client_sizes": {
                "min": min(sizes),
                "median": float(np.median(sizes)),
                "max": max(sizes),
            },
            "adapted_modules": list(simulation.model.adapted_modules()),
        },
        "data_fingerprint": simulation.data.fingerprint,
        "partition_fingerprint": fingerprint(simulation.partition),
        "versions": {"python": platform.python_version(), **_versions(packages)},
    }


def fingerprint(partition: list[np.ndarray]) -> str:
    """A short hash of who holds what."""
    import hashlib

    digest = hashlib.sha256()
    for indices in partition:
        digest.update(len(indices).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(indices, dtype="<i8").tobytes())
    return digest.hexdigest()[:16]


def read(folder: Path) -> dict[str, Any]:
    """config.json of an unfinished run.

    Raises:
        UsageError: there is no run, it is damaged, finished, or of another format.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{str(folder)!r} holds no run (no config.json); give a run's folder")
    try:
        saved = json.loads(path.read_bytes())
        known = saved["format"]
        saved["options"]["method"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not a run's configuration ({error}); was it edited?"
        ) from error
    if known != FORMAT:
        raise UsageError(
            f"{path} has format {known}, fastrank {__version__} reads {FORMAT}; resume it with "
            f"fastrank {saved.get('fastrank')}"
        )
    if (folder / "summary.json").exists():
        raise UsageError(f"the run in {str(folder)!r} is finished; see its summary.json")
    return saved


def check_same(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with what would not give the uninterrupted run's bits."""
    for key in ("options", "resolved", "data_fingerprint", "partition_fingerprint", "versions"):
        before, after = saved[key], json.loads(_json(now))[key]
        if before == after:
            continue
        if isinstance(before, dict):
            names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
            shown = ", ".join(f"{n} was {before.get(n)!r}, is {after.get(n)!r}" for n in names)
        else:
            shown = f"was {before}, is {after}"
        raise UsageError(
            f"the run in {str(folder)!r} can't be resumed to the same result: {key}: {shown}; "
            "restore what it was, or start a new run"
        )


def finish(
    simulation: Simulation, checkpoint: Checkpoint, without_adapters: float | None
) -> dict[str, Any]:
    """Write the result, the curve and, last of all, summary.json."""
    folder, rows, model = simulation.output_dir, checkpoint.rows, simulation.model
    ledger = Ledger(rows)
    ledger.write(folder / "rounds.csv")
    write_metrics(folder, checkpoint.facts)
    result = save_result(model, folder)
    seq_cls = simulation.data.task == "seq-cls"
    summary = {
        "method": simulation.config.method,
        "output_dir": str(folder),
        "result": str(result),
        "rounds": len(rows),
        "initial_accuracy": checkpoint.facts["initial_accuracy"],
        "accuracy": rows[-1]["accuracy"],
        "eval_loss": rows[-1]["eval_loss"],
        "accuracy_without_adapters": without_adapters,
        "chance": 1 / len(simulation.data.label_names) if seq_cls else None,
        "eval_examples": len(simulation.test.lengths),
        "eval_unit": "texts" if seq_cls else "texts' tokens",
        **{
            column: ledger.total(column)
            for column in ("dropped", "bytes_up", "bytes_down", "payload_up", "payload_down",
                           "head_up", "head_down", "seconds")
        },
        "trainable_params": rows[-1]["trainable_params"],
        "total_params": sum(p.numel() for p in model.model.parameters()),
        "peak_memory": max(row["peak_memory"] for row in rows),
        "curve": _draw_curve(rows, folder / "curve.png", simulation.config.method),
    }  # fmt: skip
    write_atomic(folder / "summary.json", _json(summary))
    return summary


def write_metrics(folder: Path, facts: dict[str, Any]) -> None:
    """metrics.jsonl: a line for each round of which the method recorded something."""
    if recorded := facts.get("metrics"):
        lines = [json.dumps(entry, sort_keys=True) for entry in recorded]
        write_atomic(folder / "metrics.jsonl", ("\n".join(lines) + "\n").encode())


def _draw_curve(rows: list[dict[str, Any]], path: Path, title: str) -> bool:
    """Accuracy over rounds and over bytes; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    scored = [row for row in rows if row["accuracy"] is not None]
    sent = np.cumsum([row["bytes_up"] + row["bytes_down"] for row in rows]) / 1e6
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    accuracy = [row["accuracy"] for row in scored]
    axes[0].plot([row["round"] for row in scored], accuracy, marker="o", markersize=3)
    axes[0].set(xlabel="round", ylabel="accuracy", title=title)
    axes[1].plot([sent[row["round"] - 1] for row in scored], accuracy, marker="o", markersize=3)
    axes[1].set(xlabel="MB sent, up and down")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def _versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _json(value: Any) -> bytes:
    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {str(k): plain(v) for k, v in item.items()}
        if isinstance(item, (list, tuple)):
            return [plain(v) for v in item]
        if isinstance(item, float) and not math.isfinite(item):
            return None
        return item

    return (json.dumps(plain(value), indent=2, sort_keys=True) + "\n").encode()
