"""What the tests of checkpoints share: small ones, comparisons, damage."""

import json

import torch

from fastrank.federated.checkpoint import Checkpoint, save_checkpoint, seal
from fastrank.federated.client_states import ClientStates
from fastrank.federated.methods.base import ServerState


def state_of(rounds):
    return ServerState(
        tensors={"b": torch.full((2, 3), float(rounds)), "a": torch.arange(4.0)},
        head=("a",),
        server={"momentum": torch.zeros(2)},
        extra={"stage": 2, "alive": {"query": [0, 2], "key": [1]}},
    )


def row_of(round):
    return {"round": round, "train_loss": 1 / round, "accuracy": None, "seconds": 0.25}


def saved(run, rounds, states=None, keep=2):
    """Checkpoints after 1, ..., rounds rounds; returns the clients' states."""
    states = ClientStates(run) if states is None else states
    for n in range(1, rounds + 1):
        states[n % 3] = {"own": torch.full((2,), float(n)), "first": torch.ones(1)}
        rows = [row_of(i) for i in range(1, n + 1)]
        metrics = [{"round": i, "noise": i / 7} for i in range(1, n + 1) if i % 2]
        facts = {"initial_accuracy": 0.5, "metrics": metrics}
        save_checkpoint(run, Checkpoint(n, state_of(n), states, rows, facts), keep)
    return states


def assert_is(found, rounds):
    assert found.rounds_done == rounds
    assert list(found.state.tensors) == ["b", "a"]
    assert torch.equal(found.state.tensors["b"], torch.full((2, 3), float(rounds)))
    assert found.state.head == ("a",)
    assert found.state.extra == {"stage": 2, "alive": {"query": [0, 2], "key": [1]}}
    assert list(found.state.extra["alive"]) == ["query", "key"]  # votes are counted in this order
    assert found.rows == [row_of(i) for i in range(1, rounds + 1)]
    odd = [i for i in range(1, rounds + 1) if i % 2]
    assert found.facts["metrics"] == [{"round": i, "noise": i / 7} for i in odd]
    for client in found.client_states:
        newest = max(n for n in range(1, rounds + 1) if n % 3 == client)
        kept = found.client_states[client]
        assert list(kept) == ["own", "first"]
        assert torch.equal(kept["own"], torch.full((2,), float(newest)))


def damage(path, kind):
    data = bytearray(path.read_bytes())
    if kind == "flipped":
        data[len(data) // 2] ^= 1
    elif kind == "cut":
        del data[len(data) // 2 :]
    elif kind == "empty":
        data.clear()
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(data)


def client_files(run):
    return sorted(p.name for p in (run / "checkpoints" / "clients").glob("*/*"))


def reseal(path, change):
    meta = json.loads(path.read_text())["meta"]
    change(meta)
    path.write_bytes(seal(meta))
