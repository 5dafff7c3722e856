"""One round's traffic between the server and its clients: real bytes, counted and checked."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastrank.federated.methods.base import LocalResult, Method, ServerState, Update
from fastrank.federated.wire import Payload, WireError, from_bytes, nonfinite, to_bytes

_log = logging.getLogger("fastrank")


@dataclass
class Traffic:
    """Bytes of one round: whole messages, the tensor bytes in them, and the task head's share."""

    bytes_up: int = 0
    bytes_down: int = 0
    payload_up: int = 0
    payload_down: int = 0
    head_up: int = 0
    head_down: int = 0


@dataclass
class Exchange:
    """Carries payloads through the wire format, and counts and validates what crosses.

    Attributes:
        method, state, round: what is being run; ``round`` counts from 0.
        client_states: what each client keeps between its turns; updated by ``receive``.
        charge_initial: whether round 0's downlink is counted, although every client can derive the
            first values from the seed.
        drop_nonfinite: drop an update that holds NaN or Inf instead of averaging it in.
    """

    method: Method
    state: ServerState
    round: int
    client_states: dict[int, Any]
    charge_initial: bool = False
    drop_nonfinite: bool = True
    traffic: Traffic = field(default_factory=Traffic)
    dropped: dict[int, str] = field(default_factory=dict)
    _sent: tuple[Payload, bytes] | None = None

    def send(self, client: int) -> Mapping[str, Tensor]:
        """What the client reads off the wire."""
        payload = self.method.downlink(self.state, client, self.round)
        # most methods send everyone the same: such a payload is written once and counted each time
        if self._sent is None or not _same(self._sent[0], payload):
            self._sent = (payload, to_bytes(payload))
        data = self._sent[1]
        if self.round > 0 or self.charge_initial:
            self.traffic.bytes_down += len(data)
            self.traffic.payload_down += payload.payload_bytes
            self.traffic.head_down += payload.bytes_of(self.state.head)
        return self.method.received(from_bytes(data, max_bytes=len(data)))

    def receive(self, result: LocalResult) -> Update | None:
        """The client's update as the server reads it, or None if it had to be dropped."""
        payload, keeps = self.method.uplink(result)
        data = to_bytes(payload)
        self.traffic.bytes_up += len(data)
        self.traffic.payload_up += payload.payload_bytes
        self.traffic.head_up += payload.bytes_of(self.state.head)
        spec = self.method.uplink_spec(self.state, result.client, self.round)
        try:
            received = from_bytes(data, expect=spec)
        except WireError as error:
            return self._drop(result.client, str(error))
        bad = nonfinite(received) if self.drop_nonfinite else []
        if bad:
            return self._drop(result.client, f"{len(bad)} tensors hold NaN or Inf, {bad[0]} first")
        if keeps is not None:
            self.client_states[result.client] = keeps
        return Update(
            client=result.client,
            payload=received,
            num_examples=result.num_examples,
            num_steps=result.num_steps,
            train_loss=result.train_loss,
        )

    def skip(self, client: int, reason: str) -> None:
        """Leave a client out of the round before anything is sent to it."""
        self._drop(client, reason)

    def _drop(self, client: int, reason: str) -> None:
        self.dropped[client] = reason
        _log.warning("round %d: client %d dropped: %s", self.round + 1, client, reason)


def _same(a: Payload, b: Payload) -> bool:
    """Equal by identity of every tensor: cheap, and never true for different values."""
    return a.metadata == b.metadata and (
        a.tensors.keys() == b.tensors.keys()
        and all(a.tensors[name] is b.tensors[name] for name in a.tensors)
    )
