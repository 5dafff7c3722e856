"""Clients side by side: a cohort's adapters over one frozen base, in one pass."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastrank.federated.exchange import ClientError, Exchange
from fastrank.federated.executors import Sequential
from fastrank.federated.local import LocalOptions, client_batches
from fastrank.federated.methods.base import LocalResult, Update
from fastrank.federated.passes import PassCost
from fastrank.federated.stacked_probe import disagreement
from fastrank.federated.stacked_training import Job, train_together
from fastrank.federated.torchrun import Torchrun
from fastrank.federated.world import World
from fastrank.layers.stacked import why_not

if TYPE_CHECKING:
    from fastrank.data import Encoded
    from fastrank.federated.model import ResidentModel

_log = logging.getLogger("fastrank")


class ClientParallel:
    """Trains clients of a round together wherever their base is shared.

    A client's result depends on the clients beside it by rounding alone: batches, dropout,
    clipping, steps and rates are its own. Rounds, models or plans that can't be shared go to
    `Sequential`, and the reason is logged once.

    Args:
        model, examples, partition, options: as for `Sequential`.
        clients_in_parallel: most clients that share a pass; running out of memory lowers it.
    """

    name = "ClientParallel"
    world_size = 1

    def __init__(
        self,
        model: ResidentModel,
        examples: Encoded,
        partition: Sequence[np.ndarray],
        options: LocalOptions,
        clients_in_parallel: int,
    ) -> None:
        self.model, self.examples = model, examples
        self.partition, self.options = partition, options
        self.sequential = Sequential(model, examples, partition, options)
        self.cost = PassCost.of(model.model, model.device)
        self.clients_in_parallel = clients_in_parallel
        self._lowered = False
        self._reasons: dict[tuple[str, ...], str | None] = {}
        self._said: set[str] = set()

    def facts(self) -> dict[str, int]:
        """Clients in a pass, once memory has set them."""
        return {"clients_in_parallel": self.clients_in_parallel} if self._lowered else {}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go on with as few clients in a pass as an interrupted run ended up with."""
        if "clients_in_parallel" in facts:
            self.clients_in_parallel, self._lowered = facts["clients_in_parallel"], True

    def run(
        self,
        exchange: Exchange,
        cohort: Sequence[int],
        on_client: Callable[[int], None] = lambda client: None,
    ) -> Iterator[Update]:
        """Yield the valid updates of the cohort, in its order; ``on_client`` is told of each."""
        if reason := self._round_reason(exchange):
            self._say(reason)
            yield from self.sequential.run(exchange, cohort, on_client)
            return
        waiting = list(cohort)
        while waiting:
            chunk = waiting[: self.clients_in_parallel]
            waiting = waiting[len(chunk) :]
            for client, result in self._chunk(exchange, chunk):
                update = None
                if result is not None:
                    update = exchange.attempt(client, exchange.receive, result)
                on_client(client)
                if update is not None:
                    yield update

    def _round_reason(self, exchange: Exchange) -> str | None:
        if not exchange.method.shares_base(exchange.round):
            return f"{exchange.method.name} changes the base itself"
        if self.options.base_dropout:
            return "base_dropout draws for the whole batch"
        return None

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            _log.warning("clients train one after another: %s", reason)

    def _chunk(
        self, exchange: Exchange, clients: Sequence[int]
    ) -> Iterator[tuple[int, LocalResult | None]]:
        """Each client's result, in order; None for one that has no examples or has failed."""
        jobs = {client: exchange.attempt(client, self._job, exchange, client) for client in clients}
        found: dict[int, LocalResult | None] = dict.fromkeys(clients)
        for alike in _alike([job for job in jobs.values() if job is not None]):
            reason = self._reason(alike)
            if reason is None:
                try:
                    found.update((r.client, r) for r in self._together(alike, exchange.round))
                    continue
                except ClientError as error:
                    if exchange.on_client_error == "raise":
                        raise
                    reason = str(error)  # whose fault it was shows when each trains alone
            self._say(reason)
            for job in alike:
                found[job.client] = self._alone(job, exchange)
        yield from found.items()

    def _job(self, exchange: Exchange, client: int) -> Job | None:
        indices = self.partition[client]
        if len(indices) == 0:
            exchange.skip(client, "it has no examples")
            return None
        values = dict(exchange.send(client))
        if exchange.lost(client):
            return None
        plan = exchange.plan(client)
        steps = client_batches(
            self.examples, indices, client, exchange.round, self.options, plan.max_steps
        )
        return Job(client, plan, values, [indices[step] for step in steps], len(indices))

    def _reason(self, jobs: Sequence[Job]) -> str | None:
        """Why these clients can't go through one base, or None."""
        first = jobs[0]
        shared = [name for name in first.values if name not in first.plan.trainable]
        for job in jobs[1:]:
            for name in shared:
                if not torch.equal(job.values[name], first.values[name]):
                    return f"clients receive different values of {name}, which they don't train"
        self.model.load({name: first.values[name] for name in shared})
        names = first.plan.trainable
        if names not in self._reasons:
            self.model.set_training(base_dropout=False)
            self._reasons[names] = why_not(self.model.model, names) or disagreement(
                self.model, first, self.examples
            )
            self.model.model.eval()
        return self._reasons[names]

    def _together(self, jobs: Sequence[Job], round: int) -> list[LocalResult]:
        """All jobs' results; halves the clients of a pass for as long as memory runs out."""
        done: list[LocalResult] = []
        while len(done) < len(jobs):
            some = jobs[len(done) : len(done) + self.clients_in_parallel]
            try:
                done += train_together(
                    self.model, some, self.examples, round, self.options, self.cost.overhead
                )
            except Exception as error:
                if not is_out_of_memory(error) or len(some) == 1:
                    clients = [job.client for job in some]
                    raise ClientError.of(clients, round, error) from error
                fewer = (len(some) + 1) // 2
            else:
                continue
            # past the handler, whose traceback kept the failed pass's tensors alive
            self.clients_in_parallel, self._lowered = fewer, True
            gc.collect()
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            _log.warning("round %d: out of memory; %d clients a pass now", round + 1, fewer)
        return done

    def _alone(self, job: Job, exchange: Exchange) -> LocalResult | None:
        train = self.sequential.train
        return exchange.attempt(job.client, train, job.client, job.values, job.plan, exchange.round)


def make_executor(
    name: str,
    clients_in_parallel: int | str,
    model: ResidentModel,
    examples: Encoded,
    partition: Sequence[np.ndarray],
    options: LocalOptions,
    world: World | None = None,
    clients_per_round: int | None = None,
) -> Sequential | ClientParallel | Torchrun:
    """The executor that a configuration names.

    "auto" decides by shapes alone (`PassCost`), never by timing, so that runs repeat bit for bit:
    one client after another where a client's own step fills the device, else as many together as
    a pass has room for.

    Args:
        name: "auto", "client-parallel" or "sequential".
        clients_in_parallel: a number, or "auto".
        world: the processes that share every round's ``clients_per_round``, if there are several:
            so few go together that each has some.
    """
    together = clients_in_parallel
    if together == "auto":
        tokens = options.batch_size * int(np.quantile(examples.lengths, 0.75))
        cost = PassCost.of(model.model, model.device)
        together = cost.clients_in_parallel(len(partition), tokens, forced=name != "auto")
    several = world is not None and world.size > 1
    if several:
        together = min(int(together), math.ceil(clients_per_round / world.size))
    if name == "sequential" or (name == "auto" and together == 1):
        executor = Sequential(model, examples, partition, options)
    else:
        executor = ClientParallel(model, examples, partition, options, int(together))
    return Torchrun(executor, world, examples.lengths) if several else executor


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def _alike(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs by the names and rates they train."""
    kinds: dict[tuple, list[Job]] = {}
    for job in jobs:
        plan = job.plan
        rates = tuple(sorted(plan.learning_rates.items()))
        key = (plan.trainable, rates, plan.scores)
        kinds.setdefault(key, []).append(job)
    return list(kinds.values())
