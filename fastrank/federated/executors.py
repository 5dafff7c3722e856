"""Who runs a round's clients, and how: one after another here.

An executor is called with the round's exchange and cohort and yields updates in the cohort's order;
it knows nothing of any method beyond the ``Method`` interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastrank.federated.exchange import Exchange
from fastrank.federated.local import LocalOptions, train_client
from fastrank.federated.methods.base import Update

if TYPE_CHECKING:
    from fastrank.data import Encoded
    from fastrank.federated.model import ResidentModel


class ClientError(RuntimeError):
    """A client's local work failed; names the client and the round (counted from 1)."""


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

    def run(
        self,
        exchange: Exchange,
        cohort: Sequence[int],
        on_client: Callable[[int], None] = lambda client: None,
    ) -> Iterator[Update]:
        """Yield the valid updates of the cohort, in its order; ``on_client`` is told of each."""
        for client in cohort:
            try:
                update = self._run_one(exchange, client)
            except Exception as error:
                raise ClientError(
                    f"client {client} failed in round {exchange.round + 1}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            on_client(client)
            if update is not None:
                yield update

    def _run_one(self, exchange: Exchange, client: int) -> Update | None:
        self.model.load(exchange.send(client))
        plan = exchange.method.local(
            exchange.state, exchange.client_states.get(client), client, exchange.round
        )
        result = train_client(
            self.model,
            plan,
            self.examples,
            self.partition[client],
            client,
            exchange.round,
            self.options,
        )
        return exchange.receive(result)


EXECUTORS = {"sequential": Sequential}
