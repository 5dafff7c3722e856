"""Houlsby adapters: FedAvg of two small bottlenecks in every block.

Our reading of Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (arXiv 1902.00751),
averaged by FedAvg:

    y = W x + b;   y <- y + up(act(down(y)))        # after both sublayers of each block,
                                                    # before the residual sum; up = 0 at first
    round:  clients <- down, up (and norms), head
            local AdamW on them;   means

Unknown in the federated studies that use it, hence options: the width, the activation, whether
LayerNorms train too (the original trains them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from fastrank.errors import UsageError
from fastrank.federated import bottleneck
from fastrank.federated.methods.base import Method, ServerState

if TYPE_CHECKING:
    from fastrank.federated.model import ResidentModel


@dataclass(frozen=True)
class Houlsby(Method):
    """FedAvg of bottleneck adapters.

    Attributes:
        bottleneck_size: q, the adapters' inner width.
        activation: "gelu" or "relu".
        train_norms: train the LayerNorms of the blocks too.
    """

    bottleneck_size: int = 16
    activation: str = "gelu"
    train_norms: bool = False

    name: ClassVar[str] = "houlsby"
    default_learning_rate: ClassVar[float] = 5e-3
    places: ClassVar[tuple[str, ...]] = ("attention", "feed-forward")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("activation", self.activation, tuple(bottleneck.ACTIVATIONS))
        if self.bottleneck_size < 1:
            raise UsageError(
                f"{self.name}: bottleneck_size must be at least 1, got {self.bottleneck_size}"
            )

    def init(self, model: ResidentModel, seed: int) -> ServerState:
        names = bottleneck.attach(
            model.model, self.bottleneck_size, self.places, self.activation, seed
        )
        if self.train_norms:
            names += self._norms(model)
        head = model.head_names() if self.head == "train" else []
        return ServerState(tensors=model.read(names + head), head=tuple(head))

    def _norms(self, model: ResidentModel) -> list[str]:
        """LayerNorms of the blocks."""
        return [
            f"{block}.{path}.{leaf}"
            for block, module in bottleneck.blocks(model.model)
            for path, norm in module.named_modules()
            if isinstance(norm, nn.LayerNorm)
            for leaf, _ in norm.named_parameters()
        ]

    def without_adapters(self, state: ServerState) -> dict[str, Tensor]:
        return {
            name: value.new_zeros(value.shape) if f".{bottleneck.UP}." in name else value
            for name, value in state.tensors.items()
        }
