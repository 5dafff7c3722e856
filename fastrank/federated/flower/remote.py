"""The simulator's round loop with its clients elsewhere.

`RemoteSimulation` is `Simulation` with another executor: cohorts, downlinks, validation,
aggregation, evaluation, ledger, checkpoints and the run directory are the same code. Beside the run
directory's files it writes transport.jsonl, the bytes that really crossed: the ledger's payloads,
and headers, sketches and what nodes had to ask for.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastrank.federated.callbacks import Callback
from fastrank.federated.checkpoint import list_checkpoints
from fastrank.federated.exchange import Exchange
from fastrank.federated.flower.agreement import describe, fingerprint
from fastrank.federated.flower.letters import (
    Letter,
    LetterError,
    Silence,
    letter,
    take,
    take_number,
    take_score,
)
from fastrank.federated.flower.replica import Digests, flat, may_be_told, sketch
from fastrank.federated.flower.roster import Link, Roster
from fastrank.federated.flower.silo import Silos, classes_of, server_data
from fastrank.federated.local import pooled
from fastrank.federated.methods.base import LocalResult, Method, ServerState, Update
from fastrank.federated.simulation import Simulation
from fastrank.federated.storage import write_atomic
from fastrank.federated.wire import Payload, WireError, from_bytes, to_bytes

_log = logging.getLogger("fastrank")

TRANSPORT = "transport.jsonl"
NO_NODE = "no node serves it now"
_CROSSED = ("nodes", "bytes_down", "bytes_up", "asked_for", "asked_for_bytes", "seconds")


class RemoteError(RuntimeError):
    """A round in which no client answered; names the round and the first reasons."""


class RemoteExecutor:
    """Sends a round's cohort to the nodes that serve it and reads their answers.

    Args:
        simulation: prepared, whose clients are run.
        roster: where they are.
        agreed: the fingerprint of what all nodes have agreed to.

    Attributes:
        run_key: names the run on the nodes, where clients keep what is theirs.
        kept: client -> the last round after which it kept something that counts.
        transport: what crossed in the present round.
    """

    name = "Flower"
    world_size = 1
    clients_in_parallel = 1

    def __init__(self, simulation: RemoteSimulation, roster: Roster, agreed: str) -> None:
        self.simulation, self.roster, self.agreed = simulation, roster, agreed
        self.method, self.partition = simulation.method, simulation.partition
        self.run_key = uuid.uuid4().hex
        self.kept: dict[int, int] = {}
        self.rounds_done = 0
        self.transport: dict[str, float] = dict.fromkeys(_CROSSED, 0)
        self._digests = Digests()

    def facts(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        kept = {str(client): round for client, round in self.kept.items()}
        return {"remote": {"run": self.run_key, "kept": kept, "rounds_done": self.rounds_done}}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go on with the nodes' folders of an interrupted run."""
        if "remote" in facts:
            saved = facts["remote"]
            self.run_key, self.rounds_done = saved["run"], saved["rounds_done"]
            self.kept = {int(client): round for client, round in saved["kept"].items()}

    # -- training --------------------------------------------------------------------------------

    def run(
        self,
        exchange: Exchange,
        cohort: Sequence[int],
        on_client: Callable[[int], None] = lambda client: None,
    ) -> Iterator[Update]:
        """Yield the valid updates of the cohort, in its order; ``on_client`` is told of each."""
        self.rounds_done = exchange.round + 1
        self.transport = dict.fromkeys(_CROSSED, 0)
        self.roster.refresh()
        sent = {client: self._send(exchange, client) for client in cohort}
        payloads = {client: data for client, data in sent.items() if data is not None}
        steps = {client: fate.max_steps for client, fate in exchange.fates.items()}
        tasks = {c: {"last": self.kept.get(c), "max_steps": steps.get(c)} for c in payloads}
        answers, reasons = self._ask("train", exchange.state, exchange.round, tasks, payloads)
        unseated = [c for c, reason in exchange.dropped.items() if reason == NO_NODE]
        if not answers and (tasks or unseated):
            reasons |= dict.fromkeys(unseated, NO_NODE)
            first = "; ".join(f"client {c}: {reasons[c]}" for c in sorted(reasons)[:3])
            raise RemoteError(
                f"none of the {len(reasons)} clients of round {exchange.round + 1} answered "
                f"({first}); the run can be resumed from its last checkpoint"
            )
        for client in cohort:
            update = None
            if client in answers:
                update = self._receive(exchange, client, *answers.pop(client))
            elif client in reasons:
                exchange.skip(client, reasons[client])
            on_client(client)
            if update is not None:
                yield update

    def _send(self, exchange: Exchange, client: int) -> bytes | None:
        if len(self.partition[client]) == 0:
            return exchange.skip(client, "it has no examples")
        if client not in self.roster.seats:
            return exchange.skip(client, NO_NODE)
        data = exchange.outgoing(client)
        return None if exchange.lost(client) else data

    def _receive(
        self, exchange: Exchange, client: int, result: Mapping[str, Any], data: bytes
    ) -> Update | None:
        try:
            count, wanted = take(result, "num_examples", int), len(self.partition[client])
            if count != wanted:
                raise LetterError(f"it says it has {count} examples, but it has {wanted}")
            steps, loss = take(result, "num_steps", int), take_number(result, "train_loss")
            kept, payload = take(result, "kept", bool), from_bytes(data)
        except (LetterError, WireError) as error:
            exchange.traffic.bytes_up += len(data)
            return exchange.skip(client, str(error))
        measured = LocalResult(client, exchange.round, {}, count, steps, loss)
        update = exchange.receive(measured, sent=(payload, None))
        if update is not None and kept:
            self.kept[client] = exchange.round
        return update

    # -- clients' own models ---------------------------------------------------------------------

    def judge(self, state: ServerState, limit: int | None) -> dict[str, float] | None:
        """Mean loss and accuracy of the models that clients keep, each on its share of the test.

        In silos each on its own test set, if it has one. None if no client answered.
        """
        seated = [client for client in sorted(self.kept) if client in self.roster.seats]
        if len(seated) < len(self.kept):
            away = len(self.kept) - len(seated)
            _log.warning("%d clients' own models can't be judged", away)
        data = to_bytes(Payload(dict(state.tensors)))  # unrounded: the judge is no client
        shared = not isinstance(self.partition, Silos)
        tasks = {
            client: {"last": self.kept[client], "part": [i, len(seated)] if shared else [0, 1]}
            for i, client in enumerate(seated)
        }
        payloads = dict.fromkeys(seated, data)
        answers, reasons = self._ask("judge", state, self.rounds_done, tasks, payloads, limit=limit)
        scores = []
        for client in filter(answers.__contains__, seated):
            try:
                scores.append(take_score(answers[client][0]))
            except LetterError as error:
                reasons[client] = str(error)
        for client, reason in reasons.items():
            _log.warning("the model of client %d could not be judged: %s", client, reason)
        return pooled(scores) if scores else None

    # -- letters ---------------------------------------------------------------------------------

    def _ask(
        self,
        kind: str,
        state: ServerState,
        round: int,
        tasks: Mapping[int, dict[str, Any]],
        payloads: Mapping[int, bytes],
        **more: Any,
    ) -> tuple[dict[int, tuple[dict[str, Any], bytes]], dict[int, str]]:
        """Each client's answer and its bytes, and the others' reasons for having none."""
        began = time.perf_counter()
        by_node: dict[int, list[int]] = {}
        for client in tasks:
            by_node.setdefault(self.roster.seats[client], []).append(client)
        parsed = {id(data): from_bytes(data) for data in payloads.values()}
        oldest = next(iter(list_checkpoints(self.simulation.output_dir)), None)
        more |= {
            "run": self.run_key,
            "agreed": self.agreed,
            "round": round,
            "threads": torch.get_num_threads(),
            # no server goes back further than to its oldest checkpoint
            "floor": 0 if oldest is None else int(oldest.name.removeprefix("round_")),
        }
        letters = {}
        for node, clients in by_node.items():
            blobs = list({id(payloads[c]): payloads[c] for c in clients}.values())
            places = {id(blob): i for i, blob in enumerate(blobs)}
            letters[node] = letter(
                kind,
                blobs,
                **more,
                sketch=sketch(
                    state,
                    [parsed[id(blob)] for blob in blobs],
                    self._digests,
                    self.method.public_extra(state.extra, clients),
                ),
                clients=[
                    {"client": c, "payload": places[id(payloads[c])], **tasks[c]} for c in clients
                ],
            )
        replies = self._converse(kind, letters, state, round)
        answers: dict[int, tuple[dict[str, Any], bytes]] = {}
        reasons: dict[int, str] = {}
        for node, clients in by_node.items():
            found, failed = _read(replies.get(node, Silence("no reply")), clients)
            answers |= found
            reasons |= {c: f"node {node}: {reason}" for c, reason in failed.items()}
        self._count("nodes", len(letters))
        self._count("seconds", time.perf_counter() - began)
        return answers, reasons

    def _converse(
        self, kind: str, letters: Mapping[int, Letter], state: ServerState, round: int
    ) -> dict[int, Letter | Silence]:
        """Replies to letters, once nodes have been told what they had to ask for."""
        replies = self._exchange(kind, letters, round)
        again = {}
        for node, reply in replies.items():
            if isinstance(reply, Letter) and reply.kind == "need":
                try:
                    again[node] = self._told(letters[node], reply, state)
                except LetterError as error:
                    replies[node] = Silence(str(error))
        return replies | self._exchange(kind, again, round) if again else replies

    def _told(self, asked: Letter, reply: Letter, state: ServerState) -> Letter:
        """The same letter with the values a node lacks."""
        names, held = take(reply.header, "names", list, of=str), flat(state)
        for name in names:
            if name not in held or not may_be_told(self.method, name):
                raise LetterError(f"it asked for {name!r}, which is not for clients")
        data = to_bytes(Payload({name: held[name] for name in names}))
        self._count("asked_for", len(set(names)))
        self._count("asked_for_bytes", len(data))
        return Letter({**asked.header, "values": len(asked.blobs)}, [*asked.blobs, data])

    def _exchange(
        self, kind: str, letters: Mapping[int, Letter], round: int
    ) -> dict[int, Letter | Silence]:
        flower_kind = "evaluate" if kind == "judge" else kind
        simulation = self.simulation
        replies = simulation.link.ask(flower_kind, letters, round, simulation.reply_timeout)
        self._count("bytes_down", sum(each.num_bytes for each in letters.values()))
        got = [reply for reply in replies.values() if isinstance(reply, Letter)]
        self._count("bytes_up", sum(reply.num_bytes for reply in got))
        return replies

    def _count(self, key: str, value: float) -> None:
        self.transport[key] += value


class RemoteSimulation(Simulation):
    """`Simulation` whose clients are trained by nodes.

    Class attributes, set by a subclass for one federation (`connected`):
        link: what carries letters.
        start_timeout: seconds to wait for nodes that serve all clients, and for a node that is
            asked for the first time to load its data and model.
        reply_timeout: seconds a round's answers may take; later ones are left out.
    """

    link: Link
    start_timeout: float = 300.0
    reply_timeout: float = 3600.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.callbacks.insert(0, _Transport(self))

    def prepare(self) -> ServerState:
        in_silos = classes_of(self.config.dataset) is not None
        if in_silos:
            self.data = server_data(self.data or self.config.test_dataset, self.config)
            self._partition = Silos(self.config.num_clients)
        state = super().prepare()
        description = describe(self)
        self._tell("on_stage", f"waiting for nodes that serve {len(self.partition)} clients")
        roster = Roster(self.link, description, self.partition, timeout=self.start_timeout)
        roster.gather()
        if in_silos:  # config.json says how many they are
            total = sum(len(own) for own in self.partition)
            self.train = dataclasses.replace(self.train, lengths=np.zeros(total, dtype=np.int64))
        self.executor = RemoteExecutor(self, roster, fingerprint(description["agreed"]))
        return state

    def _evaluate(
        self, state: ServerState, limit: int | None, clients: Mapping[int, Any] | None = None
    ) -> dict[str, float]:
        personal = type(self.method).personal is not Method.personal
        if personal and clients is not None and self.executor.kept:
            score = self.executor.judge(state, limit)
            if score is not None:
                return score
        return super()._evaluate(state, limit, clients)


def connected(link: Link, **timeouts: float) -> type[RemoteSimulation]:
    """`RemoteSimulation` on this link, whose `resume` makes another on it."""
    return type("RemoteSimulation", (RemoteSimulation,), {"link": link, **timeouts})


class _Transport(Callback):
    """Keeps transport.jsonl: a line for each round of the run."""

    def __init__(self, simulation: RemoteSimulation) -> None:
        self.simulation = simulation
        self.lines: list[dict[str, Any]] = []

    def on_start(self, simulation: Simulation, rounds_done: int) -> None:
        path = simulation.output_dir / TRANSPORT
        if path.exists():  # rounds after the checkpoint are run again
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            self.lines = [line for line in lines if line["round"] <= rounds_done]

    def on_round_end(self, row: dict[str, Any]) -> None:
        crossed = {k: round(v, 3) for k, v in self.simulation.executor.transport.items()}
        self.lines.append({"round": row["round"], **crossed})
        text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in self.lines)
        write_atomic(self.simulation.output_dir / TRANSPORT, text.encode())


def _read(
    reply: Letter | Silence, clients: Sequence[int]
) -> tuple[dict[int, tuple[dict[str, Any], bytes]], dict[int, str]]:
    """What a node says of each of its clients: answers, and reasons for having none."""
    if isinstance(reply, Silence):
        return {}, dict.fromkeys(clients, reply.reason)
    answers: dict[int, tuple[dict[str, Any], bytes]] = {}
    reasons = dict.fromkeys(clients, "nothing was said of this client")
    try:
        if reply.kind == "refused":
            return {}, dict.fromkeys(clients, take(reply.header, "reason", str)[:2000])
        if reply.kind not in ("updates", "scores"):
            raise LetterError(f"its reply is of the kind {reply.kind[:20]!r}")
        key = "results" if reply.kind == "updates" else "scores"
        for result in take(reply.header, key, list, of=dict):
            client = take(result, "client", int)
            if client not in clients or client in answers:
                raise LetterError(f"it answers for client {client}, which it was not asked for")
            data = reply.blob(result.get("payload")) if reply.kind == "updates" else b""
            answers[client] = (result, data)
        for failed in take(reply.header, "failed", list, of=dict):
            reasons[take(failed, "client", int)] = take(failed, "reason", str)[:2000]
    except LetterError as error:
        return {}, dict.fromkeys(clients, str(error))
    return answers, {c: reasons[c] for c in clients if c not in answers}
