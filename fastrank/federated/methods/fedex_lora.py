"""FedEx-LoRA: FedIT made exact, what averaging A and B apart misses going into the base.

Our reading of Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient
Fine-Tuning of Foundation Models" (arXiv 2410.09432):

    round:  clients <- A, B, head, and the last round's residual
            local AdamW on A, B, head
            A, B, head = sum p_i (A_i, B_i, head_i)
            W = W + sum p_i s B_i A_i - s B A                 # the residual

The residual crosses as factors, s p_i (A_i - A) and B_i - B of every client behind each other, of
the same size as the paper's and zero where the clients agree; or the base's whole change, where
that is smaller. One that missed rounds is sent those too (catch_up="charge").

Recorded: agg_noise, zero by construction, and residual, what FedIT's would have been.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fastrank.federated.methods import _base_change as base_change
from fastrank.federated.methods._factors import (
    centred,
    pairs,
    shapes_of,
    shares,
    stacked,
    whole_norm,
)
from fastrank.federated.methods.base import WIRE_DTYPES, ServerState, Update, weighted_mean
from fastrank.federated.methods.fedit import FedIT
from fastrank.federated.wire import Payload

if TYPE_CHECKING:
    from fastrank.federated.model import ResidentModel


@dataclass(frozen=True)
class FedExLoRA(base_change.Changes, FedIT):
    """FedAvg of A and B, the residual in the base.

    Attributes:
        catch_up: "charge" sends a client all residuals since its last round; "ignore" the newest
            alone, as if everyone had listened all the time.
    """

    catch_up: str = "charge"

    name: ClassVar[str] = "fedex-lora"
    aggregations: ClassVar[tuple[str, ...]] = ("mean", "krum", "multi-krum")
    private_mean: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("catch_up", self.catch_up, base_change.CATCH_UP)

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
        owed = base_change.owed(state, client, self.catch_up)
        return self.pack({**state.tensors, **owed}, round)

    def received(self, payload: Payload) -> Mapping[str, Tensor]:
        # the base that the rest builds is the one that `arrange` has brought into the model
        return {n: v for n, v in payload.tensors.items() if not base_change.is_change(n)}

    def aggregate(
        self, state: ServerState, updates: Iterable[Update], round: int
    ) -> tuple[ServerState, dict[str, Any]]:
        updates = list(updates)
        mean = weighted_mean(updates, self.weighting)
        clients = [pairs(update.payload.tensors) for update in updates]
        weights = [self.scale * p for p in shares(updates, self.weighting)]
        residual = {
            module: stacked([centred(own[module], middle) for own in clients], weights)
            for module, middle in pairs(mean).items()
        }
        there = [update.client for update in updates]
        state = base_change.merged(state, residual, round, there, WIRE_DTYPES[self.wire_dtype])
        state = replace(state, tensors={**state.tensors, **mean})
        return state, {"agg_noise": 0.0, "residual": whole_norm(residual.values())}

    def without_adapters(self, state: ServerState) -> dict[str, Tensor]:
        return base_change.without(state.tensors)
