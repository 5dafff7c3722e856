"""HetLoRA: clients of unequal ranks train truncations of one adapter; the server zero-pads.

Our reading of Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation
Models" (arXiv 2401.06432); no official code is known:

    round:  client i <- the first r_i ranks of A and B, and the head
            local AdamW on loss + lam sum_l ‖B[:, γr_i:]‖ ‖A[γr_i:, :]‖     # the tail's product
            if the tail's product is smaller than it was at the start:
                drop the tail: r_i = γr_i, from this update on
            A, B = sum w_i (A_i, B_i padded with zeros to rank r),  w_i ~ ‖ΔW_i‖_F

The tail starts at floor(γ r_i) but is never empty: rounding 0.99 r to the nearest would switch the
penalty and the pruning off for all r <= 50. Both sides can tell from what crosses the network
whether a client prunes, so the new rank costs no bytes; the update in which it happens still has
the old size. Zeros of padding take part in the mean, as in the paper; ranks that none of a round's
clients has stay as they are, for with A and B both zero they would never train again.

Unknown, so options: lam; whether weights follow the norm of the whole update ("norm"; of all
modules together here) or the samples; min_rank. The head is weighted by samples where adapters are
weighted by norm. Recorded: agg_noise; init_noise_function, the mean over the round's clients of
what truncation left out; the clients' mean rank and how many pruned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrank.errors import UsageError
from fastrank.federated.methods._factors import (
    Pair,
    averaging_noise,
    only,
    pair_names,
    pairs,
    shares,
    whole_norm,
)
from fastrank.federated.methods._mixed_ranks import MixedRanks, first_ranks, later_ranks, named
from fastrank.federated.methods.base import (
    WIRE_DTYPES,
    LocalPlan,
    ServerState,
    Update,
    weighted_mean,
)
from fastrank.federated.wire import Payload


@dataclass(frozen=True)
class HetLoRA(MixedRanks):
    """Truncation, penalised tails, self-pruning, zero-padding.

    Attributes:
        weighting: adapters' server weights: "norm" of each client's update, "samples" or "uniform".
        gamma: share of a client's ranks before its tail.
        lam: weight of the tail's penalty.
        prune: whether clients drop a tail that shrank.
        min_rank: rank at which a client prunes no more.
    """

    weighting: str = "norm"
    gamma: float = 0.99
    lam: float = 1e-3
    prune: bool = True
    min_rank: int = 1

    name: ClassVar[str] = "hetlora"
    aggregations: ClassVar[tuple[str, ...]] = ("mean", "krum", "multi-krum")
    private_mean: ClassVar[bool] = False
    weightings: ClassVar[tuple[str, ...]] = ("norm", "samples", "uniform")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gamma <= 1:
            raise UsageError(f"gamma must be above 0 and at most 1, got {self.gamma}")
        if not 0 <= self.lam < float("inf"):
            raise UsageError(f"lam must be at least 0 and finite, got {self.lam}")
        if not 1 <= self.min_rank <= self.r:
            raise UsageError(f"min_rank must be from 1 to r = {self.r}, got {self.min_rank}")

    # -- the server's side ---------------------------------------------------------------------

    def rank_of(self, state: ServerState, client: int) -> int:
        """The client's rank after the pruning it has done so far."""
        pruned = state.extra.get("ranks", {})
        return pruned.get(str(client), super().rank_of(state, client))

    def mean_rank(self, state: ServerState) -> float:
        pruned = state.extra.get("ranks", {})
        lost = sum(super(HetLoRA, self).rank_of(state, int(c)) - left for c, left in pruned.items())
        return super().mean_rank(state) - lost / self.run.num_clients

    def downlink(self, state: ServerState, client: int, round: int) -> Payload:
        rank = self.rank_of(state, client)
        mine = {m: first_ranks(pair, rank) for m, pair in pairs(state.tensors).items()}
        return self.pack({**state.tensors, **named(mine, pair_names(state.tensors))}, round)

    def origin(self, state: ServerState, client: int, round: int) -> Mapping[str, Tensor]:
        return self.downlink(state, client, round).tensors

    def aggregate(
        self, state: ServerState, updates: Iterable[Update], round: int
    ) -> tuple[ServerState, dict[str, Any]]:
        updates, before = list(updates), pairs(state.tensors)
        started = [self.rank_of(state, update.client) for update in updates]
        clients = [pairs(update.payload.tensors) for update in updates]
        ranks = dict(state.extra.get("ranks", {}))
        pruned = 0
        for i, (update, rank) in enumerate(zip(updates, started, strict=True)):
            left = self.rank_after(before, clients[i], rank)
            if left < rank:
                clients[i] = {m: first_ranks(pair, left) for m, pair in clients[i].items()}
                ranks[str(update.client)] = left
                pruned += 1
        weights = self.weights(updates, clients)
        padded = [{m: padded_to(self.r, pair) for m, pair in own.items()} for own in clients]
        mean = {m: _mean([own[m] for own in padded], weights) for m in before}
        held = max(next(iter(own.values())).A.shape[0] for own in clients)
        new = {m: kept_from(held, mean[m], before[m]) for m in before}
        by_samples = "samples" if self.weighting == "norm" else self.weighting
        head = weighted_mean((only(u, state.head) for u in updates), by_samples)
        left_out = [
            self.scale * whole_norm(later_ranks(pair, rank) for pair in before.values())
            for rank in started
        ]
        tensors = {**state.tensors, **named(new, pair_names(state.tensors)), **head}
        metrics = {
            "agg_noise": averaging_noise(padded, weights, mean, self.scale),
            "init_noise_function": sum(left_out) / len(left_out),
            "mean_client_rank": sum(started) / len(started),
            "pruned": pruned,
        }
        return replace(state, tensors=tensors, extra={**state.extra, "ranks": ranks}), metrics

    def weights(self, updates: list[Update], clients: list[dict[str, Pair]]) -> list[float]:
        """The adapters' weights, which sum to 1."""
        if self.weighting != "norm":
            return shares(updates, self.weighting)
        norms = [whole_norm(own.values()) for own in clients]
        if not sum(norms) > 0:  # nobody has moved B from zero: all products are equal
            return shares(updates, "samples")
        return [norm / sum(norms) for norm in norms]

    def rank_after(self, before: Mapping[str, Pair], after: Mapping[str, Pair], rank: int) -> int:
        """A client's rank once it has looked at its tail; ``before`` is the server's adapter."""
        left = max(tail_start(rank, self.gamma), self.min_rank)
        if not self.prune or left >= rank:
            return rank
        wire = WIRE_DTYPES[self.wire_dtype]
        received = [
            Pair(*(part.to(wire).float() for part in first_ranks(pair, rank)))
            for pair in before.values()
        ]
        shrank = tail_product(after.values(), self.gamma) < tail_product(received, self.gamma)
        return left if shrank else rank

    # -- the client's side ---------------------------------------------------------------------

    def local(self, state: ServerState, client_state: Any, client: int, round: int) -> LocalPlan:
        plan = super().local(state, client_state, client, round)
        if self.lam == 0:
            return plan
        names = pair_names(plan.trainable).values()

        def penalty(parameters: Mapping[str, Tensor]) -> Tensor:
            own = (Pair(parameters[pair.B], parameters[pair.A]) for pair in names)
            return self.lam * tail_product(own, self.gamma)

        return replace(plan, penalty=penalty)

    def public_extra(self, extra: Mapping[str, Any], clients: Sequence[int]) -> dict[str, Any]:
        pruned = extra.get("ranks", {})
        return {**extra, "ranks": {str(c): pruned[str(c)] for c in clients if str(c) in pruned}}


def tail_start(rank: int, gamma: float) -> int:
    """The first rank of the tail: floor(gamma rank), but at least one rank is left to it."""
    # 0.29 * 100 is 28.999...
    return min(math.floor(gamma * rank + 1e-9), rank - 1)


def tail_product(products: Iterable[Pair], gamma: float) -> Tensor:
    """sum_l ‖B[:, γr:]‖_F ‖A[γr:, :]‖_F, a 0-dimensional tensor."""
    each = []
    for pair in products:
        B, A = later_ranks(pair, tail_start(pair.A.shape[0], gamma))
        each.append(B.norm() * A.norm())
    return torch.stack(each).sum()


def padded_to(rank: int, pair: Pair) -> Pair:
    """The same product with ranks of zeros behind it."""
    more = rank - pair.A.shape[0]
    return Pair(F.pad(pair.B, (0, more)), F.pad(pair.A, (0, 0, 0, more)))


def kept_from(rank: int, new: Pair, old: Pair) -> Pair:
    """The new product with the old one's ranks from this one on."""
    B, A = later_ranks(old, rank)
    return Pair(torch.cat([new.B[:, :rank], B], dim=1), torch.cat([new.A[:rank], A]))


def _mean(products: list[Pair], weights: list[float]) -> Pair:
    """sum_i w_i B_i and sum_i w_i A_i, in float64 and rounded once."""
    B, A = (
        sum(w * part.double() for w, part in zip(weights, parts, strict=True)).float()
        for parts in zip(*products, strict=True)
    )
    return Pair(B, A)
