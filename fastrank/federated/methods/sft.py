"""Sparse fine-tuning: FedAvg of a seeded share of the weights' entries.

Our reading of SLoRA's first stage on its own (arXiv 2308.06522, where it is the baseline SFT):

    server, once: mask_l from (seed, l), density d;  delta = 0
    round:  clients <- packed delta of every matrix, head
            local AdamW on delta (and head): gradient at the mask's positions only
            delta = sum p_i delta_i                # packed, in the mask's order, no indices

Unknown, hence options: the mask's law (``mask``), its density, and whether it covers the adapted
matrices alone or embeddings, norms and biases too (``mask_targets``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from fastrank.federated.methods import _sparse
from fastrank.federated.methods.base import Method, ServerState

if TYPE_CHECKING:
    from fastrank.federated.model import ResidentModel


@dataclass(frozen=True)
class SFT(Method):
    """FedAvg of packed updates at one random mask.

    Attributes:
        density: share of the entries of each tensor that trains.
        mask: "stratified" (one entry in every round(1/density)) or "bernoulli" (independent draws).
        mask_targets: "adapted" masks the matrices of ``target_modules``, "all" every parameter
            outside the head.
        target_modules: "all-linear" (every linear of the repeated blocks) or module-name endings.
    """

    density: float = 0.01
    mask: str = "stratified"
    mask_targets: str = "adapted"
    target_modules: str | tuple[str, ...] = "all-linear"

    name: ClassVar[str] = "sft"
    default_learning_rate: ClassVar[float] = 5e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        _sparse.check_mask(self.name, self.density, self.mask, self.mask_targets)

    def init(self, model: ResidentModel, seed: int) -> ServerState:
        masks = _sparse.begin(
            model,
            seed,
            target_modules=self.target_modules,
            density=self.density,
            mask=self.mask,
            mask_targets=self.mask_targets,
        )
        head = model.head_names() if self.head == "train" else []
        return ServerState(tensors=model.read([*masks, *head]), head=tuple(head))

    def shares_base(self, round: int) -> bool:
        return False  # each client overlays the weights with values of its own

    def without_adapters(self, state: ServerState) -> dict[str, Tensor]:
        return _sparse.without_values(state)

    def finish(self, model: ResidentModel, state: ServerState) -> None:
        """W0 + delta in plain weights: a whole model, as transformers loads it."""
        self.show(model, state)
        _sparse.end(model, fold=True)
