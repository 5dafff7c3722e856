"""A node's work: letters in, letters out; the same code whatever carries them.

A process holds one prepared run: data, model and first values are loaded with the first letter and
stay (`workplace`), for as long as the process does. Flower's simulation engine keeps its processes
for a whole run; a SuperNode starts one for each message.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastrank.errors import UsageError
from fastrank.federated.config import resolve
from fastrank.federated.exchange import ClientError, Exchange
from fastrank.federated.flower import replica
from fastrank.federated.flower.agreement import describe, fingerprint
from fastrank.federated.flower.keep import Keep
from fastrank.federated.flower.letters import (
    Letter,
    LetterError,
    letter,
    take,
    take_run,
    write_number,
    write_score,
)
from fastrank.federated.flower.settings import words_of
from fastrank.federated.flower.silo import Silos, classes_of, silo_data
from fastrank.federated.local import evaluate
from fastrank.federated.methods.base import LocalResult, Method, ServerState
from fastrank.federated.participation import Fate
from fastrank.federated.simulation import Simulation
from fastrank.federated.wire import Payload, WireError, from_bytes, to_bytes

if TYPE_CHECKING:
    from fastrank.data import TextData

_log = logging.getLogger("fastrank")

_cached: tuple[Any, Workplace] | None = None


class Workplace:
    """A loaded run, and how far its model has been brought.

    Attributes:
        first: the state at the start of the run.
        at: the run and the round that the model was last arranged for; it can't go back.
    """

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.first = simulation.prepare()
        self.description = describe(simulation)
        self.agreed = fingerprint(self.description["agreed"])
        self.at: tuple[str, int] | None = None


@dataclass
class NodeExchange(Exchange):
    """The client's side of a round: payloads came in as bytes, and answers are collected.

    Attributes:
        payloads: what each client was sent.
        answers: client -> (result, payload's bytes, what it keeps).
    """

    payloads: Mapping[int, Payload] = field(default_factory=dict)
    answers: dict[int, tuple[LocalResult, bytes, Any]] = field(default_factory=dict)

    def send(self, client: int) -> Mapping[str, Tensor]:
        return self.method.received(self.payloads[client])

    def receive(self, result: LocalResult, sent: Any = None) -> None:
        payload, keeps = self.method.uplink(result)
        self.answers[result.client] = (result, to_bytes(payload), keeps)


class Node:
    """Answers letters.

    Args:
        options: the run's options, as `resolve` takes them.
        clients: the clients this node serves, as a function of how many there are: data tells.
        name: of its folder, unique among the nodes that share one.
        folder: where it keeps things between letters.
        method, data, partition: objects of one's own, as for `Simulation`; for a node of a run
            whose data lies in silos, ``data`` is its own, or the path of it.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        clients: Callable[[int], list[int]],
        *,
        name: str,
        folder: Path,
        method: type[Method] | None = None,
        data: TextData | str | None = None,
        partition: Any = None,
    ) -> None:
        # a node shows nothing and writes no run
        self.options = {k: v for k, v in options.items() if k not in ("output_dir", "report_to")}
        self.clients, self.name, self.folder = clients, name, folder
        self.method, self.data, self.partition = method, data, partition

    def workplace(self, *, fresh: bool = False) -> Workplace:
        """The process's prepared run, made anew only for another one (or ``fresh``)."""
        global _cached
        # nodes in one process share what they have in common
        own = (self.name, self.data) if isinstance(self.data, str) else id(self.data)
        options = json.dumps(self.options, sort_keys=True, default=str)
        key = (options, self.method, own, id(self.partition))
        if fresh or _cached is None or _cached[0] != key:
            _cached = None  # one model at a time
            _cached = (key, self._load())
        return _cached[1]

    def _load(self) -> Workplace:
        config, method = resolve(self.options, method=self.method)
        if classes_of(config.dataset) is None:
            return Workplace(Simulation(config, method, data=self.data, partition=self.partition))
        silos, served = Silos(config.num_clients), self.clients(config.num_clients)
        if len(served) != 1:
            raise UsageError(
                f"a silo is one client, but this node serves {words_of(served)}; start as many "
                "nodes as there are silos"
            )
        data, silos.tested = silo_data(self.data, config)
        place = Workplace(Simulation(config, method, data=data, partition=silos))
        silos.rows[served[0]] = np.arange(len(place.simulation.train.lengths))
        return place

    def answer(self, asked: Letter) -> Letter:
        """The reply to a letter; what can't be done is said in it, not raised."""
        try:
            place = self.workplace()
            if asked.kind == "hello":
                return self._hello(place)
            if asked.kind in ("train", "judge"):
                return self._work(asked, place)
            raise LetterError(f"there are no letters of the kind {asked.kind!r}")
        except (LetterError, WireError, UsageError, ClientError) as error:
            _log.warning("letter refused: %s", error)
            return letter("refused", reason=str(error))

    def _hello(self, place: Workplace) -> Letter:
        partition = place.simulation.partition
        served = self.clients(len(partition))
        more = {"examples": len(partition[served[0]])} if isinstance(partition, Silos) else {}
        return letter("hello", description=place.description, clients=words_of(served), **more)

    def _work(self, asked: Letter, place: Workplace) -> Letter:
        header = asked.header
        run, round = take_run(header), take(header, "round", int)
        if take(header, "agreed", str) != place.agreed:
            raise LetterError(
                "this node's configuration is not the one agreed on with the server at the start; "
                "was it started again with another?"
            )
        threads = take(header, "threads", int)
        if not 1 <= threads <= 4096:
            raise LetterError(f"threads must be from 1 to 4096, got {threads}")
        tasks = {take(task, "client", int): task for task in take(header, "clients", list, of=dict)}
        if strange := tasks.keys() - set(self.clients(len(place.simulation.partition))):
            raise LetterError(f"this node does not serve clients {sorted(strange)}")
        blobs = {client: asked.blob(task.get("payload")) for client, task in tasks.items()}
        read = {id(blob): from_bytes(blob) for blob in blobs.values()}
        payloads = {client: read[id(blob)] for client, blob in blobs.items()}
        if place.at is not None and (place.at[0] != run or place.at[1] > round):
            place = self.workplace(fresh=True)
        torch.set_num_threads(threads)  # sums are cut by threads, and with them the last bits
        keep = Keep(self.folder, run, self.name)
        state, missing = _state(asked, place, keep, round, list(read.values()))
        if missing:
            return letter("need", names=missing)
        place.at = (run, round)
        kept, failed = _own_states(keep, tasks)
        todo = {client: task for client, task in tasks.items() if client not in failed}
        if asked.kind == "judge":
            limit = take(header, "limit", int, none=True)
            return _judge(place.simulation, state, limit, kept, todo, failed)
        steps = {c: take(task, "max_steps", int, none=True) for c, task in todo.items()}
        exchange = NodeExchange(
            place.simulation.method,
            state,
            round,
            kept,
            fates={c: Fate(max_steps=count) for c, count in steps.items() if count is not None},
            on_client_error="drop",
            payloads=payloads,
        )
        place.simulation.method.arrange(place.simulation.model, state, round)
        for _ in place.simulation.executor.run(exchange, list(todo)):
            pass
        return _answers(exchange, keep, take(header, "floor", int), failed)


def _state(
    asked: Letter, place: Workplace, keep: Keep, round: int, payloads: list[Payload]
) -> tuple[ServerState, list[str]]:
    """The server's state as this node knows it, and what is missing of it."""
    sketched = take(asked.header, "sketch", dict)
    method, first = place.simulation.method, place.first
    since, kept = keep.replica()
    received = {name: value for p in payloads for name, value in p.tensors.items()}
    extra = take(sketched, "extra", dict)
    follows = method.replay({**first.server, **kept}, received, since, extra)
    values = asked.header.get("values")
    told = {} if values is None else from_bytes(asked.blob(values)).tensors
    followed, stored = ({f"server:{n}": v for n, v in known.items()} for known in (follows, kept))
    sources = [told, followed, stored, replica.flat(first)]
    state, missing = replica.fill(sketched, payloads, sources, method)
    if not missing and asked.kind == "train":
        new = {
            name: value
            for name, value in state.server.items()
            if name.startswith(method.public_server)
            and not value.is_meta
            and value is not first.server.get(name)
        }
        if new and (since != round or new.keys() != kept.keys()):
            keep.keep_replica(round, new)
    return state, missing


def _own_states(
    keep: Keep, tasks: Mapping[int, Mapping[str, Any]]
) -> tuple[dict[int, dict[str, Tensor]], dict[int, str]]:
    """What clients kept after their last turn that counted, and those for whom it is lost."""
    kept, failed = {}, {}
    for client, task in tasks.items():
        try:
            own = keep.client(client, take(task, "last", int, none=True))
        except LookupError as error:
            failed[client] = str(error)
        else:
            if own is not None:
                kept[client] = own
    return kept, failed


def _answers(exchange: NodeExchange, keep: Keep, floor: int, failed: Mapping[int, str]) -> Letter:
    """The reply of a round: updates as bytes, and what each client keeps put away."""
    results = []
    for place, (client, (result, _, keeps)) in enumerate(exchange.answers.items()):
        if keeps is not None:
            keep.keep_client(client, exchange.round, keeps, floor)
        results.append(
            {
                "client": client,
                "payload": place,
                "num_examples": result.num_examples,
                "num_steps": result.num_steps,
                "train_loss": write_number(result.train_loss),
                "kept": keeps is not None,
            }
        )
    blobs = [data for _, data, _ in exchange.answers.values()]
    failed = _reasons({**exchange.dropped, **failed})
    return letter("updates", blobs, results=results, failed=failed)


def _judge(
    simulation: Simulation,
    state: ServerState,
    limit: int | None,
    kept: Mapping[int, dict[str, Tensor]],
    tasks: Mapping[int, Mapping[str, Any]],
    failed: dict[int, str],
) -> Letter:
    """How well each client's own model does on its part of the test set; in a silo, its own."""
    size, scores = simulation.config.per_device_eval_batch_size, []
    simulation.method.show(simulation.model, state)
    for client, task in tasks.items():
        part = take(task, "part", list, of=int)
        if len(part) != 2 or not 0 <= part[0] < part[1]:
            raise LetterError(f"part must be [i, n] with i < n, got {part}")
        if isinstance(simulation.partition, Silos) and not simulation.partition.tested:
            failed[client] = "this silo has no test set"
            continue
        (own,) = simulation.method.personal(state, {client: kept.get(client, {})})
        simulation.model.load(own)
        score = evaluate(simulation.model, simulation.test, size, limit, part=tuple(part))
        scores.append({"client": client, "score": write_score(score)})
    return letter("scores", scores=scores, failed=_reasons(failed))


def _reasons(failed: Mapping[int, str]) -> list[dict[str, Any]]:
    return [{"client": c, "reason": reason[:2000]} for c, reason in sorted(failed.items())]
