"""Nodes in this process: letters are written out and read back, and nothing else is shared."""

import csv
import json
from functools import partial
from pathlib import Path

from fastrank.federated.config import resolve
from fastrank.federated.flower import node as nodes
from fastrank.federated.flower.letters import Silence, read_letter
from fastrank.federated.flower.node import Node
from fastrank.federated.flower.remote import connected
from fastrank.federated.flower.settings import clients_of
from fastrank.federated.simulation import Simulation


class Loopback:
    """A link to `count` nodes that share the clients; node ids are as unlike as Flower's.

    Attributes:
        said: every (kind, round, node, letter, reply) in turn.
        absent: nodes that are not there.
        silent: (kind, round, node) -> why no reply comes back.
        forgetful: each letter finds a new process, as under a SuperNode.
    """

    def __init__(self, options, folder: Path, count: int, *, forgetful=False, data=None, **own):
        self.nodes_ = {}
        for i in range(count):
            where = {"partition-id": i, "num-partitions": count}
            mine = data[i] if isinstance(data, list) else data
            self.nodes_[7919 * (count - i) + 13] = Node(
                options, partial(clients_of, where), name=str(i), folder=folder, data=mine, **own
            )
        self.said, self.absent, self.silent = [], set(), {}
        self.forgetful = forgetful
        self.behave()

    def behave(self):
        """Carry everything, and change nothing."""
        self.absent.clear()
        self.silent.clear()
        self.meddle = lambda kind, round, node, reply: reply

    def nodes(self):
        return set(self.nodes_) - self.absent

    def ask(self, kind, letters, round, timeout):
        replies = {}
        for node in reversed(list(letters)):  # answers come in any order
            if (reason := self.silent.get((kind, round, node))) is not None:
                replies[node] = reason if isinstance(reason, Silence) else Silence(reason)
                continue
            if self.forgetful:
                nodes._cached = None
            asked = letters[node]
            found = self.nodes_[node].answer(read_letter(asked.text(), list(asked.blobs)))
            reply = read_letter(found.text(), list(found.blobs))
            reply = self.meddle(kind, round, node, reply)
            self.said.append((kind, round, node, asked, reply))
            replies[node] = reply
        return replies


def federated(options, folder: Path, count: int = 3, *, link=None, method=None, **link_options):
    """A run over nodes in this process: (result, link)."""
    options = {"executor": "sequential", **options}
    if method is not None:
        link_options["method"] = method
    link = link or Loopback(options, folder / "nodes", count, **link_options)
    kind = connected(link, start_timeout=0.0)
    whole = {**options, "output_dir": str(folder / "remote")}
    return kind(*resolve(whole, method=method)).run(), link


def plain(options, folder: Path, *, method=None, **more):
    """The same run in the simulator."""
    options = {"executor": "sequential", **options, "output_dir": str(folder / "plain")}
    return Simulation(*resolve(options, method=method), **more).run()


def rows_of(folder):
    """rounds.csv, without what is measured."""
    with open(folder / "rounds.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for key in ("seconds", "peak_memory", "energy_j"):
            del row[key]
    return rows


def assert_same(folder, *, result=True):
    """Every bit of ledger and result."""
    a, b = folder / "plain", folder / "remote"
    assert rows_of(a) == rows_of(b)
    assert len(rows_of(a)) > 0
    if result:
        kind = "adapter" if (a / "adapter").exists() else "model"
        files = list((a / kind).glob("*.safetensors"))
        assert files
        for path in files:
            assert path.read_bytes() == (b / kind / path.name).read_bytes(), path.name


def crossed(folder):
    """transport.jsonl"""
    return [json.loads(line) for line in (folder / "remote/transport.jsonl").open()]
