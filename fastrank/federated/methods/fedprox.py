"""FedProx: full fine-tuning in which clients are held near the model they received.

Our reading of Li et al., "Federated Optimization in Heterogeneous Networks" (arXiv 1812.06127),
algorithm 2 with AdamW in place of its inexact solver:

    client: min_w loss_i(w) + (mu / 2) ‖w - w^t‖²        # from w^t, not from the first weights
    server: w = sum p_i w_i

Unknown for fine-tuning transformers, so an option: mu. The paper's server takes a plain mean of
clients drawn by their size; here clients are drawn evenly and weighted by size (weighting).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastrank.errors import UsageError
from fastrank.federated.methods.base import WIRE_DTYPES, LocalPlan, ServerState
from fastrank.federated.methods.fedavg import FedAvg


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg with a proximal term.

    Attributes:
        mu: weight of the squared distance from the received model; 0 is FedAvg.
    """

    mu: float = 0.01

    name: ClassVar[str] = "fedprox"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mu < float("inf"):
            raise UsageError(f"mu must be at least 0 and finite, got {self.mu}")

    def local(self, state: ServerState, client_state: Any, client: int, round: int) -> LocalPlan:
        plan = super().local(state, client_state, client, round)
        if self.mu == 0:
            return plan
        wire = WIRE_DTYPES[self.wire_dtype]  # the client knows the values as they came
        received = {name: state.tensors[name].to(wire) for name in plan.trainable}
        return replace(plan, penalty=proximal(received, self.mu))


def proximal(
    start: Mapping[str, Tensor], weight: float
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """(weight / 2) ‖w - start‖² over all parameters, as a `LocalPlan.penalty`."""
    there: dict[str, Tensor] = {}  # start where the parameters are, moved once

    def penalty(parameters: Mapping[str, Tensor]) -> Tensor:
        if not there:
            there.update({n: start[n].to(p.device, p.dtype) for n, p in parameters.items()})
        squares = [(p - there[n]).square().sum() for n, p in parameters.items()]
        return weight / 2 * torch.stack(squares).sum()

    return penalty
