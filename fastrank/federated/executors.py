"""Who runs a round's clients, and how: one after another here.

Several side by side are in parallel.py, the processes of torchrun in torchrun.py. An executor is
called with the round's exchange and cohort and yields updates in the cohort's order; it knows
nothing of any method beyond the ``Method`` interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fastrank.federated.exchange import Exchange
from fastrank.federated.local import LocalOptions, train_client
from fastrank.federated.methods.base import LocalPlan, LocalResult, Update

if TYPE_CHECKING:
    from fastrank.data import Encoded
    from fastrank.federated.model import ResidentModel


class Sequential:
    """One client after another on the resident model: the plain engine, and every other's oracle.

    Args:
        model: the resident model; its values are overwritten by each client.
        examples: the whole encoded training set.
        partition: each client's positions in it.
        options: how clients train.
    """

    def __init__(
        self,
        model: ResidentModel,
        examples: Encoded,
        partition: Sequence[np.ndarray],
        options: LocalOptions,
    ) -> None:
        self.model = model
        self.examples = examples
        self.partition = partition
        self.options = options

    name = "Sequential"
    world_size = 1
    clients_in_parallel = 1

    def facts(self) -> dict[str, int]:
        """What the executor has learnt and a resumed run has to know."""
        return {}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go on from another executor's ``facts``."""

    def run(
        self,
        exchange: Exchange,
        cohort: Sequence[int],
        on_client: Callable[[int], None] = lambda client: None,
    ) -> Iterator[Update]:
        """Yield the valid updates of the cohort, in its order; ``on_client`` is told of each."""
        for client in cohort:
            update = exchange.attempt(client, self._run_one, exchange, client)
            on_client(client)
            if update is not None:
                yield update

    def _run_one(self, exchange: Exchange, client: int) -> Update | None:
        if len(self.partition[client]) == 0:
            return exchange.skip(client, "it has no examples")
        values = exchange.send(client)
        if exchange.lost(client):
            return None
        plan = exchange.plan(client)
        return exchange.receive(self.train(client, values, plan, exchange.round))

    def train(
        self, client: int, values: Mapping[str, Tensor], plan: LocalPlan, round: int
    ) -> LocalResult:
        """One client's local work, from the values it received."""
        self.model.load(values)
        with self.model.scaled(plan.scale):
            return train_client(
                self.model,
                plan,
                self.examples,
                self.partition[client],
                client,
                round,
                self.options,
            )
