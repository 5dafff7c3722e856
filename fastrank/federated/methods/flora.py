"""FLoRA: the clients' adapters are stacked, which adds up their products exactly, and merged.

Our reading of Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous
Low-Rank Adaptations" (arXiv 2409.05976) and of its code:

    round:  A freshly drawn, B = 0, of the client's own rank r_i     # known from seed and round
            local AdamW on A, B, head
            A = [p_1 s_1 A_1; ...; p_n s_n A_n],  B = [B_1 ... B_n]
            W = W + B A;   clients <- A, B, head                     # or W's change, if smaller

Every client merges what it is sent; one that missed rounds is sent those too (catch_up="charge").
A of a round is drawn from (seed, round, module) and shared: a client of rank r_i takes its first
rows. The branch is scaled by lora_alpha / r for all, or by lora_alpha / r_i (scaling).

Recorded: agg_noise and init_noise_function, both zero by construction (in the space of functions;
as parameters the adapters start anew each round).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastrank.federated.cohort import derive_seed
from fastrank.federated.methods import _base_change as base_change
from fastrank.federated.methods._factors import (
    Pair,
    only,
    pair_names,
    pairs,
    shapes_of,
    shares,
    stacked,
)
from fastrank.federated.methods._mixed_ranks import MixedScales, named
from fastrank.federated.methods.base import (
    WIRE_DTYPES,
    LocalPlan,
    ServerState,
    Update,
    weighted_mean,
)
from fastrank.federated.wire import Payload

if TYPE_CHECKING:
    from fastrank.federated.model import ResidentModel


@dataclass(frozen=True)
class FLoRA(base_change.Changes, MixedScales):
    """Stacking, merged into the base.

    Attributes:
        catch_up: "charge" sends a client all updates of the base since its last round; "ignore"
            the newest alone, as if everyone had listened all the time.
    """

    catch_up: str = "charge"

    name: ClassVar[str] = "flora"
    aggregations: ClassVar[tuple[str, ...]] = ("mean", "krum", "multi-krum")
    private_mean: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("catch_up", self.catch_up, base_change.CATCH_UP)

    # -- the server's side ---------------------------------------------------------------------

    def init(self, model: ResidentModel, seed: int) -> ServerState:
        state = super().init(model, seed)
        return base_change.with_changes(state, shapes_of(state.tensors))

    def arrange(self, model: ResidentModel, state: ServerState, round: int) -> None:
        model.change_base(base_change.changes(state))

    def show(self, model: ResidentModel, state: ServerState) -> None:
        base_change.show(model, state)

    def finish(self, model: ResidentModel, state: ServerState) -> None:
        self.show(model, state)
        model.base_changed = True

    def downlink(self, state: ServerState, client: int, round: int) -> Payload:
        head = {name: state.tensors[name] for name in state.head}
        return self.pack({**head, **base_change.owed(state, client, self.catch_up)}, round)

    def aggregate(
        self, state: ServerState, updates: Iterable[Update], round: int
    ) -> tuple[ServerState, dict[str, Any]]:
        updates = list(updates)
        p = shares(updates, self.weighting)
        ranks = [self.rank_of(state, update.client) for update in updates]
        weights = [w * self.scale_of(rank) for w, rank in zip(p, ranks, strict=True)]
        clients = [pairs(update.payload.tensors) for update in updates]
        stacks = {m: stacked([own[m] for own in clients], weights) for m in clients[0]}
        there = [update.client for update in updates]
        state = base_change.merged(state, stacks, round, there, WIRE_DTYPES[self.wire_dtype])
        head = weighted_mean((only(u, state.head) for u in updates), self.weighting)
        state = replace(state, tensors={**state.tensors, **head})
        return state, {"agg_noise": 0.0, "init_noise_function": 0.0}

    def without_adapters(self, state: ServerState) -> dict[str, Tensor]:
        return base_change.without(state.tensors)

    # -- the client's side ---------------------------------------------------------------------

    def origin(self, state: ServerState, client: int, round: int) -> Mapping[str, Tensor]:
        head = {name: state.tensors[name] for name in state.head}
        return {**head, **self.fresh(state, self.rank_of(state, client), round)}

    def received(self, payload: Payload) -> Mapping[str, Tensor]:
        # the base that the rest builds is the one that `arrange` has brought into the model
        return {n: v for n, v in payload.tensors.items() if not base_change.is_change(n)}

    def local(self, state: ServerState, client_state: Any, client: int, round: int) -> LocalPlan:
        plan = super().local(state, client_state, client, round)
        rank = self.rank_of(state, client)
        return replace(plan, start=self.fresh(state, rank, round))

    def fresh(self, state: ServerState, rank: int, round: int) -> dict[str, Tensor]:
        """Adapters of this rank to begin a round with: the seed's A, and B = 0."""
        names, drawn = pair_names(state.tensors), {}
        for index, module in enumerate(sorted(names, key=lambda m: names[m].A)):
            A, B = state.tensors[names[module].A], state.tensors[names[module].B]
            if round > 0:  # round 0 begins as every LoRA method of this seed does
                generator = torch.Generator()
                generator.manual_seed(derive_seed("init", self.run.seed, index, round))
                bound = A.shape[1] ** -0.5  # kaiming_uniform with a = sqrt(5)
                A = torch.empty(A.shape).uniform_(-bound, bound, generator=generator)
            drawn[module] = Pair(torch.zeros(len(B), rank), A[:rank].contiguous())
        return named(drawn, names)
