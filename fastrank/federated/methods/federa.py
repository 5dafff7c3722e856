"""FeDeRA: adapters that begin as the leading part of the weights themselves.

Our reading of Yan et al., "FeDeRA: Efficient Fine-tuning of Language Models in Federated Learning
Leveraging Weight Decomposition" (arXiv 2404.18848), second-hand; no code was available:

    init:   U σ Vᵀ = top-r SVD of W0;   s B A = U σ Vᵀ        # per adapted matrix
            base = W0 - s B A, frozen                         # so the start is the base model
    then FedIT: clients train A, B and the head, the server averages each

Clients know W0, so they can do the decomposition themselves and round 0 costs nothing. The base
stays what it is for the whole run. (Held in 16 bits it rounds, and the start is only nearly exact.)

Unknown, so an option: whether the singular values go into both factors or into B (svd_split).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from fastrank.federated.methods._factors import Pair, check_rank_fits, pair_names, pairs
from fastrank.federated.methods._mixed_ranks import named
from fastrank.federated.methods.base import ServerState
from fastrank.federated.methods.fedit import FedIT
from fastrank.kernels.svd import refactor

if TYPE_CHECKING:
    from fastrank.federated.model import ResidentModel

_FIRST = "first/"


@dataclass(frozen=True)
class FeDeRA(FedIT):
    """FedIT from the leading singular directions of the weights.

    Attributes:
        svd_split: singular values' roots in both factors ("balanced"), or all of them in B ("B").
    """

    svd_split: str = "balanced"

    name: ClassVar[str] = "federa"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("svd_split", self.svd_split, ("balanced", "B"))

    def init(self, model: ResidentModel, seed: int) -> ServerState:
        state = super().init(model, seed)
        weights = {m: w.float().cpu() for m, w in model.base_weights().items()}
        check_rank_fits(self.r, {m: tuple(w.shape) for m, w in weights.items()}, self.name)
        found = refactor(
            weights, self.r, scaling=self.scale, split=self.svd_split, accuracy="tight", seed=seed
        )
        first = named({m: Pair(f.B, f.A) for m, f in found.items()}, pair_names(state.tensors))
        state = replace(
            state,
            tensors={**state.tensors, **first},
            server={_FIRST + name: value for name, value in first.items()},
        )
        self.show(model, state)
        return state

    def arrange(self, model: ResidentModel, state: ServerState, round: int) -> None:
        model.change_base(self.taken_out(state))

    def show(self, model: ResidentModel, state: ServerState) -> None:
        self.arrange(model, state, 0)
        model.load(state.tensors)

    def finish(self, model: ResidentModel, state: ServerState) -> None:
        self.show(model, state)
        model.base_changed = True

    def taken_out(self, state: ServerState) -> dict[str, Tensor]:
        """-s B A of the first adapters, `[N, K]` fp64: what the base lacks of W0."""
        first = {n.removeprefix(_FIRST): value for n, value in state.server.items()}
        return {
            module: -self.scale * (pair.B.double() @ pair.A.double())
            for module, pair in pairs(first).items()
        }

    def without_adapters(self, state: ServerState) -> dict[str, Tensor]:
        """W0: what training has changed is the difference from the first adapters."""
        first = {n.removeprefix(_FIRST): value for n, value in state.server.items()}
        return {**state.tensors, **first}
