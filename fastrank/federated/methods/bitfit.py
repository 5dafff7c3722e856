"""BitFit: FedAvg of the biases (and the head), everything else frozen.

Our reading of Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for
Transformer-based Masked Language-models" (arXiv 2106.10199), averaged by FedAvg:

    round:  clients <- biases, head
            local AdamW on them
            biases, head = sum p_i (biases_i, head_i)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastrank.errors import UsageError
from fastrank.federated.methods.base import Method, ServerState

if TYPE_CHECKING:
    from fastrank.federated.model import ResidentModel


@dataclass(frozen=True)
class BitFit(Method):
    """Trains and averages every bias, those of norms included."""

    name: ClassVar[str] = "bitfit"
    default_learning_rate: ClassVar[float] = 3e-3

    def init(self, model: ResidentModel, seed: int) -> ServerState:
        biases = [n for n in model.base_names() if n.rpartition(".")[2] == "bias"]
        if not biases:
            raise UsageError(
                f"bitfit trains biases, but {type(model.model).__name__} has none outside its "
                "head; choose another method, such as fedit"
            )
        head = model.head_names() if self.head == "train" else []
        return ServerState(tensors=model.read(biases + head), head=tuple(head))
