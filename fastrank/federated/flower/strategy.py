"""The server's side: a Strategy of Flower's that runs the simulator's round loop over a Grid."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fastrank.errors import UsageError
from fastrank.federated.callbacks import Callback
from fastrank.federated.config import resolve
from fastrank.federated.flower.letters import Letter, LetterError, Silence
from fastrank.federated.flower.records import content_of, letter_of
from fastrank.federated.flower.remote import connected
from fastrank.federated.flower.settings import options_of
from fastrank.federated.flower.silo import classes_of
from fastrank.federated.methods import Method
from fastrank.federated.simulation import RunResult

if TYPE_CHECKING:
    from fastrank.data import TextData

_log = logging.getLogger("fastrank")

# what Flower says when an app could not be loaded, raised or crashed: it would do so again
_BROKEN = (1, 2, 7, 8)


class Strategy(FlowerStrategy):
    """Any of fastrank's methods in a federation of Flower's.

    ``start`` runs all rounds: it draws cohorts by client, not by node, sends each node one message
    with its clients' payloads, validates what comes back, and writes the run directory that
    ``fastrank simulate`` would. Nodes that are gone, late or failed cost their clients' updates,
    which the ledger counts as dropped. A run that was cut short goes on with ``resume``, under a
    new run of Flower's.

    Args:
        options: of fastrank's, or the context's ``run_config`` (see `options_of`).
        method: the class of a method that fastrank doesn't know by name.
        data, partition: as for `Simulation`; give `client_app` the same. Where data lies in silos
            (silo.py), ``data`` has the server's test set, if ``test_dataset`` does not name it.
        callbacks: told of every stage and round.
        resume: a run directory to go on with; also the run configuration's ``resume``.
        start_timeout: seconds to wait for nodes that serve all clients; also ``start-timeout``.
        reply_timeout: seconds that a round's answers may take; also ``reply-timeout``.

    Attributes:
        run_result: `RunResult` of a run that has ended.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        method: type[Method] | None = None,
        data: TextData | None = None,
        partition: Any = None,
        callbacks: Iterable[Callback] = (),
        resume: str | None = None,
        start_timeout: float = 300.0,
        reply_timeout: float = 3600.0,
    ) -> None:
        given = {key.replace("-", "_"): value for key, value in options.items()}
        self.options, self.method = options_of(options), method
        if data is not None and classes_of(dataset := self.options.get("dataset", "")) is not None:
            data = dataclasses.replace(data, name=dataset)
        self.own = {"data": data, "partition": partition, "callbacks": list(callbacks)}
        self.resume = resume or given.get("resume") or None
        self.start_timeout = float(given.get("start_timeout") or start_timeout)
        self.reply_timeout = float(given.get("reply_timeout") or reply_timeout)
        self.run_result: RunResult | None = None
        self._messages: list[Message] = []
        self._heard: dict[int, Letter | Silence] = {}

    def start(self, grid: Grid, *given: Any, timeout: float | None = None, **more: Any) -> Result:
        """Run to the end and return Flower's view of the result; `run_result` has ours.

        Args:
            timeout: as ``reply_timeout``.
            given, more: what else Flower's signature has; methods start from their own values, and
                the rest are options.

        Raises:
            UsageError: options that can't work, or a node that does not agree with them.
        """
        if given or (more := [name for name, value in more.items() if value is not None]):
            raise UsageError(
                f"start() was given {', '.join(more) or 'more than a grid'}; fastrank's strategy "
                "takes its first values from the method and everything else from its options"
            )
        self.grid = grid
        wait = timeout or self.reply_timeout
        kind = connected(self, start_timeout=self.start_timeout, reply_timeout=wait)
        self.summary()
        if self.resume:
            found = kind.resume(self.resume, method=self.method, **self.own)
        else:
            found = kind(*resolve(self.options, method=self.method), **self.own).run()
        self.run_result = found
        return _result(found)

    def summary(self) -> None:
        """Log what is about to run."""
        chosen = ", ".join(f"{k}={v}" for k, v in sorted(self.options.items()))
        _log.info("fastrank: %s", f"going on with {self.resume}" if self.resume else chosen)

    # -- what carries letters (roster.Link) --------------------------------------------------------

    def nodes(self) -> set[int]:
        return set(self.grid.get_node_ids())

    def ask(
        self, kind: str, letters: Mapping[int, Letter], round: int, timeout: float
    ) -> dict[int, Letter | Silence]:
        self._messages = [
            Message(content_of(each), node, kind, ttl=timeout, group_id=str(round))
            for node, each in letters.items()
        ]
        self._heard, nothing = {}, (ArrayRecord(), ConfigRecord(), self.grid)
        hooks = {
            MessageType.TRAIN: (self.configure_train, self.aggregate_train),
            MessageType.EVALUATE: (self.configure_evaluate, self.aggregate_evaluate),
        }
        if kind in hooks:
            configure, aggregate = hooks[kind]
            messages = configure(round + 1, *nothing)
            aggregate(round + 1, self.grid.send_and_receive(messages, timeout=timeout))
        else:
            self._hear(self.grid.send_and_receive(self._messages, timeout=timeout))
        self._messages, late = [], Silence(f"no reply within {timeout:g} s")
        return {node: self._heard.get(node, late) for node in letters}

    def _hear(self, replies: Iterable[Message]) -> None:
        self._heard = {reply.metadata.src_node_id: _read(reply) for reply in replies}

    # -- Flower's hooks: a subclass sees every message of rounds in passing ------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages that are to be sent now."""
        if not self._messages:
            raise UsageError(
                "fastrank's strategy drives its rounds itself: call its start(); a wrapper that "
                "brings a start() of its own can't"
            )
        return self._messages

    configure_evaluate = configure_train  # to clients that judge models of their own

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Read replies; what they come to is the method's affair, not told to Flower."""
        self._hear(replies)
        return None, None

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Read what they say."""
        self._hear(replies)
        return None


def _read(reply: Message) -> Letter | Silence:
    if reply.has_error():
        error = reply.error
        reason = (error.reason or "no reason given").strip()[:1000]
        return Silence(f"Flower's error {error.code}: {reason}", broken=error.code in _BROKEN)
    try:
        return letter_of(reply.content)
    except LetterError as error:
        return Silence(str(error))


def _result(found: RunResult) -> Result:
    """The run as Flower's own strategies report theirs."""
    model = found.model
    names = model.base_names() if model.report is None else model.lora_names()
    result = Result(arrays=ArrayRecord(model.read(names + model.head_names())))
    trained = ("train_loss", "clients", "dropped", "bytes_up", "bytes_down")
    for row in found.rows:
        told = {key.replace("_", "-"): row[key] for key in trained if row[key] is not None}
        result.train_metrics_clientapp[row["round"]] = MetricRecord(told)
        if row["accuracy"] is not None:
            judged = {"loss": row["eval_loss"], "accuracy": row["accuracy"]}
            result.evaluate_metrics_serverapp[row["round"]] = MetricRecord(judged)
    return result
