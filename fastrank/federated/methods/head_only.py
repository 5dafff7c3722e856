"""Head only: FedAvg of the task head over a frozen encoder, the control every adapter must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastrank.errors import UsageError
from fastrank.federated.methods.base import Method, ServerState

if TYPE_CHECKING:
    from fastrank.federated.model import ResidentModel


@dataclass(frozen=True)
class HeadOnly(Method):
    """Trains and averages the task head alone."""

    name: ClassVar[str] = "head-only"
    default_learning_rate: ClassVar[float] = 1e-2
    default_head_learning_rate: ClassVar[float] = 1e-2

    def init(self, model: ResidentModel, seed: int) -> ServerState:
        names = model.head_names()
        if self.head == "freeze" or not names:
            raise UsageError(
                "head-only needs a task head to train, but "
                + ("head='freeze'" if names else "this model has none")
                + "; use it for classification, or choose another method"
            )
        return ServerState(tensors=model.read(names), head=tuple(names))
