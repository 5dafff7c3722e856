"""Which node serves which clients: nodes have random ids, so they are asked."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from fastrank.errors import UsageError
from fastrank.federated.flower.agreement import differences
from fastrank.federated.flower.letters import Letter, LetterError, Silence, letter, take
from fastrank.federated.flower.settings import read_ranges, words_of
from fastrank.federated.flower.silo import Silos

_log = logging.getLogger("fastrank")


class Link(Protocol):
    """What carries letters to nodes and back; `strategy.Strategy` is Flower's."""

    def nodes(self) -> set[int]:
        """Ids of the nodes that are there now."""

    def ask(
        self, kind: str, letters: Mapping[int, Letter], round: int, timeout: float
    ) -> dict[int, Letter | Silence]:
        """Each node's reply, or the reason why there is none."""


class Roster:
    """Seats of all clients, filled by asking every node that turns up.

    Args:
        description: the server's, from `agreement.describe`.
        partition: of the run; each client needs a node before it starts. Silos fill it.
        timeout: seconds to wait for nodes at the start, and for one to load its data and model.
    """

    def __init__(
        self,
        link: Link,
        description: Mapping[str, Any],
        partition: Sequence[np.ndarray],
        *,
        timeout: float,
        pause: float = 1.0,
    ) -> None:
        self.link, self.description, self.partition = link, description, partition
        self.timeout, self.pause = timeout, pause
        self.seats: dict[int, int] = {}
        self._met: set[int] = set()

    def gather(self) -> None:
        """Wait until every client has a node.

        Raises:
            UsageError: a node with another configuration, two nodes for one client, or too few
                nodes in time.
        """
        deadline, count = time.monotonic() + self.timeout, len(self.partition)
        self._greet(strict=True)
        while len(self.seats) < count:
            if time.monotonic() >= deadline:
                without = words_of(set(range(count)) - self.seats.keys())
                raise UsageError(
                    f"{len(self._met)} nodes came within {self.timeout:g} s, and none of them "
                    f"serves clients {without}; start more nodes, or raise start-timeout; with "
                    f"Flower's simulation engine set num-supernodes to {count}, or to a number of "
                    "nodes that share the clients"
                )
            time.sleep(self.pause)
            self._greet(strict=True)

    def refresh(self) -> None:
        """Meet nodes that are new and forget those that are gone."""
        gone = self._met - self.link.nodes()
        if gone:
            self._met -= gone
            lost = [client for client, node in self.seats.items() if node in gone]
            self.seats = {c: node for c, node in self.seats.items() if node not in gone}
            _log.warning("%d nodes left; no node for clients %s", len(gone), words_of(lost))
        self._greet(strict=False)

    def _greet(self, *, strict: bool) -> None:
        new = self.link.nodes() - self._met
        if not new:
            return
        asked = {node: letter("hello") for node in sorted(new)}
        for node, reply in sorted(self.link.ask("query", asked, 0, self.timeout).items()):
            try:
                self._seat(node, reply, strict=strict)
            except (UsageError, LetterError) as error:
                if strict:
                    raise UsageError(f"node {node}: {error}") from None
                self._met.add(node)
                _log.warning("node %d is not taken on: %s", node, error)

    def _seat(self, node: int, reply: Letter | Silence, *, strict: bool) -> None:
        if isinstance(reply, Silence):
            if reply.broken:
                raise UsageError(reply.reason)
            # gone again, or still loading: it is asked once more, until the time is up
            _log.warning("node %d did not answer: %s", node, reply.reason)
            return
        if reply.kind == "refused":
            raise UsageError(take(reply.header, "reason", str))
        described = take(reply.header, "description", dict)
        if found := differences(self.description["agreed"], described.get("agreed")):
            raise UsageError(
                "it runs another configuration than the server: "
                + "; ".join(found[:20])
                + (f"; and {len(found) - 20} more" if len(found) > 20 else "")
                + "; give both sides the same options and data"
            )
        clients = read_ranges(take(reply.header, "clients", str), len(self.partition))
        taken = [c for c in clients if self.seats.get(c, node) != node]
        if taken and strict:
            raise UsageError(
                f"it serves clients {words_of(taken)}, and node {self.seats[taken[0]]} does, too; "
                "give every node a partition-id, or clients, of its own"
            )
        if isinstance(self.partition, Silos):
            for client in clients:
                self.partition.told(client, take(reply.header, "examples", int))
        if taken:
            _log.warning("clients %s moved to node %d", words_of(taken), node)
        self._met.add(node)
        self.seats.update(dict.fromkeys(clients, node))
        unlike = differences(self.description["may_differ"], described.get("may_differ"))
        if unlike:
            _log.warning("node %d: results may differ in their last bits: %s", node,
                         "; ".join(unlike))  # fmt: skip
        _log.info("node %d serves clients %s", node, words_of(clients))
