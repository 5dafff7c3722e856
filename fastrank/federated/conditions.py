"""What a run's clients and server are up against: faults, hostile clients, robust rules, privacy.

The round loop asks one object. Each part is a file of its own: participation.py (who reports back),
attacks.py (what hostile clients upload), clipping.py and robust.py (what the server does about it),
privacy.py. Nothing here has a memory: all of it is a function of (seed, round, client).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastrank.errors import UsageError
from fastrank.federated import attacks, participation, privacy, robust
from fastrank.federated.clipping import Clip
from fastrank.federated.cohort import derive_seed, sample_cohort
from fastrank.federated.exchange import FAILED, ClientError, Exchange
from fastrank.federated.methods.base import Method, Rule, ServerState, Update

if TYPE_CHECKING:
    from fastrank.federated.config import Config
    from fastrank.federated.local import LocalOptions

# they find a client's last turn by drawing cohorts of a fixed size again
_FIXED_COHORTS = ("sa-fedlora", "slora")


class Conditions:
    """The conditions of one run.

    Args:
        config: resolved; `Conditions.check` has let it pass.
        partition: each client's examples.
        options: how clients train.
    """

    def __init__(
        self, config: Config, partition: Sequence[np.ndarray], options: LocalOptions
    ) -> None:
        self.config, self.partition, self.options = config, partition, options
        self.attack = attacks.Attack.of(config, len(partition))
        self.participation = participation.Participation.of(config)
        self.rule: Rule | None = privacy.rule_of(config) or robust.rule_of(config)
        self.budget = None if config.dp_clip is None else privacy.Budget(config, len(partition))
        self.clip = self.budget.clip if self.budget else None
        if config.clip_update_norm is not None:
            self.clip = Clip(config.clip_update_norm, config.robust_on)

    @staticmethod
    def check(config: Config, method: Method) -> None:
        """Raise a UsageError for options that don't go together, before anything is loaded."""
        attacks.check(config)
        participation.check(config)
        robust.check(config, method)
        privacy.check(config, method)
        if config.attack in ("sign-flip", "scale", "gaussian") and not method.measurable:
            raise UsageError(
                f"attack {config.attack} needs to know where a client began, which "
                "uplink_ranks='voted' leaves open; use uplink_ranks='alive'"
            )
        if config.client_sampling == "poisson" and method.name in _FIXED_COHORTS:
            raise UsageError(
                f"{method.name} knows only cohorts of a fixed size; use client_sampling fixed"
            )

    def cohort(self, round: int) -> list[int]:
        """The clients of a round, ascending; with Poisson sampling there may be none."""
        config, clients = self.config, len(self.partition)
        size = config.clients_per_round
        if config.client_sampling == "poisson":
            # so many heads of N coins, and then any subset of that size: what N coins would choose
            rng = np.random.default_rng(derive_seed("cohort-size", config.seed, round))
            size = int(rng.binomial(clients, config.clients_per_round / clients))
        return sample_cohort(clients, size, config.seed, round)

    def exchange(
        self, method: Method, state: ServerState, round: int, clients: dict, cohort: Sequence[int]
    ) -> Exchange:
        """A round's exchange.

        Args:
            clients: what each client keeps between its turns.
        """
        config = self.config
        return Exchange(
            method,
            state,
            round,
            clients,
            config.charge_initial,
            config.drop_nonfinite,
            fates=self._fates(round, cohort),
            attack=self.attack,
            clip=self.clip,
            on_client_error=config.on_client_error,
        )

    def _fates(self, round: int, cohort: Sequence[int]) -> dict[int, participation.Fate]:
        steps = {
            client: participation.planned_steps(len(self.partition[client]), self.options)
            for client in cohort
        }
        return self.participation.fates(round, steps)

    def aggregate(
        self, method: Method, state: ServerState, updates: list[Update] | Any, round: int
    ) -> tuple[ServerState, dict[str, Any]]:
        """The round's valid updates (at least one) through the rule, into the method."""
        if self.rule is None:
            return method.aggregate(state, updates, round)
        chosen, noted = self.rule.select(method, state, list(updates), round)
        state, metrics = method.aggregate(state, chosen, round)
        return state, {**metrics, **noted}

    def nobody(
        self, method: Method, state: ServerState, exchange: Exchange
    ) -> tuple[ServerState, dict[str, Any]]:
        """The state after a round without a valid update: as it was, but for privacy's noise.

        Raises:
            ClientError: every client whose work was not lost otherwise raised an exception. That is
                a bug in the work and no accident, unless one client was all that was left.
        """
        failed = {c: why for c, why in exchange.dropped.items() if why.startswith(FAILED)}
        if len(failed) > 1 or 0 < len(failed) == len(exchange.dropped):
            client, why = min(failed.items())
            more = f" (and so did {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise ClientError(
                f"client {client} failed in round {exchange.round + 1}: "
                f"{why.removeprefix(FAILED)}{more}; no client of the round is left"
            )
        if self.budget is None:
            return state, {}
        # without the noise everyone would see that the round was empty
        noisy = method.combine(state, [], exchange.round)
        return dataclasses.replace(state, tensors={**state.tensors, **noisy}), {}

    def record(self, exchange: Exchange) -> dict[str, Any]:
        """What metrics.jsonl says of a round's clients; empty if nothing happened to any."""
        noted: dict[str, Any] = {}
        if exchange.dropped:
            noted["drop_reasons"] = {str(c): why for c, why in sorted(exchange.dropped.items())}
        if cut := {c: f.max_steps for c, f in exchange.fates.items() if f.max_steps is not None}:
            noted["steps_cut"] = {str(c): steps for c, steps in sorted(cut.items())}
        if self.budget is not None:
            noted["epsilon"] = self.budget.epsilon(exchange.round + 1)
        return noted

    def summary(self, rounds: int) -> dict[str, Any]:
        """What summary.json says, over what every run's says."""
        return {} if self.budget is None else {"privacy": self.budget.record(rounds)}
