"""FedAvg with full fine-tuning: every weight is trained and sent, the upper reference.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data"
(arXiv 1602.05629), algorithm 1 with AdamW as the client's optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from fastrank.errors import UsageError
from fastrank.federated.methods.base import Method, ServerState

if TYPE_CHECKING:
    from fastrank.federated.model import ResidentModel


@dataclass(frozen=True)
class FedAvg(Method):
    """w = sum p_i w_i over all parameters."""

    name: ClassVar[str] = "fedavg"
    default_learning_rate: ClassVar[float] = 3e-4

    def init(self, model: ResidentModel, seed: int) -> ServerState:
        narrow = {p.dtype for p in model.model.parameters()} - {torch.float32}
        if narrow:
            raise UsageError(
                f"{self.name} trains every weight and needs float32 ones, but the model is held in "
                f"{narrow.pop()}: small updates would round away; use --dtype float32"
            )
        head = model.head_names() if self.head == "train" else []
        return ServerState(tensors=model.read(model.base_names() + head), head=tuple(head))

    def shares_base(self, round: int) -> bool:
        return False
