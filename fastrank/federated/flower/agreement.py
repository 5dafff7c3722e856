"""What server and nodes must have in common, and how they differ where they don't.

Both describe themselves as config.json does. Options that each side decides for itself are left
out; devices and versions of other packages may differ, at the price of equal bits, and are named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastrank.federated import rundir
from fastrank.federated.flower.silo import Silos

if TYPE_CHECKING:
    from fastrank.federated.model import ResidentModel
    from fastrank.federated.simulation import Simulation

# a node writes no run; where data and model lie is its own affair, their fingerprints say what
# they are
_OWN = frozenset(
    {
        "output_dir", "device", "num_threads", "charge_initial", "drop_nonfinite", "eval_every",
        "max_eval_examples", "checkpoint_every", "keep_checkpoints", "report_to", "dataset",
        "test_dataset", "model",
    }
)  # fmt: skip
_EVERYWHERE = ("task", "labels", "clients", "adapted_modules")
_OF_SHARED_DATA = ("train_examples", "test_examples", "client_sizes")


def describe(simulation: Simulation) -> dict[str, Any]:
    """A prepared run as plain JSON: ``agreed`` has to be equal everywhere, ``may_differ`` not.

    Of data in silos no side knows more than its own: kind and labels must agree, not the examples.
    """
    whole = json.loads(json.dumps(rundir.describe(simulation)))
    agreed = {
        "fastrank": whole["fastrank"],
        "options": {k: v for k, v in whole["options"].items() if k not in _OWN},
        "resolved": {key: whole["resolved"][key] for key in _EVERYWHERE},
        "model_fingerprint": model_fingerprint(simulation.model),
        "reader_fingerprint": reader_fingerprint(simulation.model.tokenizer),
    }
    if isinstance(simulation.partition, Silos):
        kinds = {type(example).__name__ for example in simulation.data.train.examples}
        agreed["resolved"]["examples"] = sorted(kinds)
    else:
        agreed["resolved"] |= {key: whole["resolved"][key] for key in _OF_SHARED_DATA}
        agreed |= {key: whole[key] for key in ("data_fingerprint", "partition_fingerprint")}
    may_differ = {"device": whole["resolved"]["device"], **whole["versions"]}
    return {"agreed": agreed, "may_differ": may_differ}


def model_fingerprint(model: ResidentModel) -> str:
    """A short hash of every parameter's name, dtype and shape, and of a few of its values.

    A sample, so that it costs nothing for large models: it tells models apart, not attackers.
    Only frozen values are looked at: the others are in the method's hands.
    """
    digest = hashlib.sha256()
    base = {n for n in model.base_names() if ".lora_" not in n}
    for name, parameter in sorted(model.model.named_parameters()):
        digest.update(f"{name}|{parameter.dtype}|{list(parameter.shape)}|".encode())
        if name in base and parameter.numel():
            values = parameter.detach().reshape(-1)
            step = max(1, values.numel() // 16)
            digest.update(values[::step][:17].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def reader_fingerprint(reader: Any) -> str:
    """A short hash of what a tokenizer, or image processor, makes of its inputs."""
    if (backend := getattr(reader, "backend_tokenizer", None)) is not None:
        told = json.loads(backend.to_str())
        for last in ("truncation", "padding"):  # of its latest call
            told.pop(last, None)
    else:
        told = reader.get_vocab() if hasattr(reader, "get_vocab") else reader.to_dict()
    told = [told, getattr(reader, "chat_template", None)]
    return fingerprint(told)[:16]


def fingerprint(told: Any) -> str:
    """A short hash of plain values; of what was agreed on, say."""
    body = json.dumps(told, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(body.encode()).hexdigest()[:32]


def differences(server: Any, node: Any, where: str = "") -> list[str]:
    """Every value that differs, by its path: "options.r is 8 on the server, 4 on the node"."""
    if isinstance(server, Mapping) and isinstance(node, Mapping):
        found = []
        for key in sorted({*server, *node}):
            path, missing = f"{where}.{key}" if where else str(key), "not there"
            found += differences(server.get(key, missing), node.get(key, missing), path)
        return found
    if server == node:
        return []
    return [f"{where} is {_short(server)} on the server, {_short(node)} on the node"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
