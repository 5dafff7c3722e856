"""One round's traffic between the server and its clients: real bytes, counted and checked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from torch import Tensor

from fastrank.errors import UsageError
from fastrank.federated.methods.base import LocalPlan, LocalResult, Method, ServerState, Update
from fastrank.federated.wire import Payload, WireError, from_bytes, nonfinite, to_bytes

if TYPE_CHECKING:
    from fastrank.federated.attacks import Attack
    from fastrank.federated.participation import Fate

_log = logging.getLogger("fastrank")
_P, _T = ParamSpec("_P"), TypeVar("_T")

FAILED = "failed: "  # how the reason begins where a client's own work raised an exception


class ClientError(RuntimeError):
    """A client's local work failed; names the client and the round (counted from 1)."""

    @classmethod
    def of(cls, clients: Sequence[int], round: int, error: Exception) -> ClientError:
        who = f"client {clients[0]}" if len(clients) == 1 else f"one of clients {list(clients)}"
        return cls(f"{who} failed in round {round + 1}: {type(error).__name__}: {error}")


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
        fates: clients that fail or are late in this round.
        attack: what hostile clients upload instead of their update.
        clip: what the server makes of a valid update before it is combined with others.
        on_client_error: "drop" lets a client's exception cost that client alone; "raise" ends the
            run.

    Filled in as the round goes: ``traffic`` and ``dropped`` (client -> reason).
    """

    method: Method
    state: ServerState
    round: int
    client_states: dict[int, Any]
    charge_initial: bool = False
    drop_nonfinite: bool = True
    traffic: Traffic = field(default_factory=Traffic)
    dropped: dict[int, str] = field(default_factory=dict)
    fates: Mapping[int, Fate] = field(default_factory=dict)
    attack: Attack | None = None
    clip: Callable[[Update, Mapping[str, Tensor], float], Update] | None = None
    on_client_error: str = "raise"
    _sent: tuple[Payload, bytes] | None = None

    def send(self, client: int) -> Mapping[str, Tensor]:
        """What the client reads off the wire."""
        data = self.outgoing(client)
        return self.method.received(from_bytes(data, max_bytes=len(data)))

    def outgoing(self, client: int) -> bytes:
        """The client's downlink as it crosses the wire, counted."""
        payload = self.method.downlink(self.state, client, self.round)
        # most methods send everyone the same: such a payload is written once and counted each time
        if self._sent is None or not _same(self._sent[0], payload):
            self._sent = (payload, to_bytes(payload))
        data = self._sent[1]
        if self.round > 0 or self.charge_initial:
            self.traffic.bytes_down += len(data)
            self.traffic.payload_down += payload.payload_bytes
            self.traffic.head_down += payload.bytes_of(self.state.head)
        return data

    def lost(self, client: int) -> bool:
        """Whether nothing will come back from a client that was sent its downlink."""
        fate = self.fates.get(client)
        if fate is None or fate.reason is None:
            return False
        self._drop(client, fate.reason)
        return True

    def plan(self, client: int) -> LocalPlan:
        """What the client trains, in as many steps as it has time for."""
        own = self.client_states.get(client)
        plan = self.method.local(self.state, own, client, self.round)
        fate = self.fates.get(client)
        return plan if fate is None else replace(plan, max_steps=fate.max_steps)

    def receive(
        self, result: LocalResult, sent: tuple[Payload, Any] | None = None
    ) -> Update | None:
        """The client's update as the server reads it, or None if it had to be dropped.

        ``sent`` is what the method's `uplink` came to, where that ran in another process.
        """
        payload, keeps = sent or self.method.uplink(result)
        if self.attack is not None and self.attack.by(result.client):
            start = self.method.origin(self.state, result.client, self.round)
            payload = self.attack(payload, start, result.client, self.round)
        data = to_bytes(payload)
        self.traffic.bytes_up += len(data)
        self.traffic.payload_up += payload.payload_bytes
        self.traffic.head_up += payload.bytes_of(self.state.head)
        try:
            received = self.method.accept(data, self.state, result.client, self.round)
        except WireError as error:
            return self._drop(result.client, str(error))
        bad = nonfinite(received) if self.drop_nonfinite else []
        if bad:
            return self._drop(result.client, f"{len(bad)} tensors hold NaN or Inf, {bad[0]} first")
        if (named := received.metadata.get("round")) != self.round:
            return self._drop(
                result.client,
                f"its message is of round {_counted(named)}, a replay or a late one: it is round "
                f"{self.round + 1}",
            )
        if keeps is not None:
            self.client_states[result.client] = keeps
        update = Update(
            client=result.client,
            payload=received,
            num_examples=result.num_examples,
            num_steps=result.num_steps,
            train_loss=result.train_loss,
        )
        if self.clip is None:
            return update
        start = self.method.origin(self.state, result.client, self.round)
        return self.clip(update, start, self.method.scale_for(self.state, result.client))

    def attempt(
        self, client: int, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T | None:
        """work(...); None where it raises and that costs only this client, which is then dropped.

        Raises:
            ClientError: it raised and that ends the run. An option that can't work is no client's
                fault and always does.
        """
        try:
            return work(*args, **kwargs)
        except Exception as error:
            if self.on_client_error == "raise" or isinstance(error, UsageError):
                raise ClientError.of([client], self.round, error) from error
            self._drop(client, f"{FAILED}{type(error).__name__}: {error}", error)
            return None

    def skip(self, client: int, reason: str) -> None:
        """Leave a client out of the round before anything is sent to it."""
        self._drop(client, reason)

    def _drop(self, client: int, reason: str, error: Exception | None = None) -> None:
        self.dropped[client] = reason
        # an exception's traceback is what a method's author needs
        text = "round %d: client %d dropped: %s"
        _log.warning(text, self.round + 1, client, reason, exc_info=error)


def _counted(round: Any) -> Any:
    """A round of a message as people count, from 1; whatever else stands there as it is."""
    return round + 1 if type(round) is int else repr(round)


def _same(a: Payload, b: Payload) -> bool:
    """Equal by identity of every tensor: cheap, and never true for different values."""
    return a.metadata == b.metadata and (
        a.tensors.keys() == b.tensors.keys()
        and all(a.tensors[name] is b.tensors[name] for name in a.tensors)
    )
