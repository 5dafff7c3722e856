"""A look before clients share passes: does the model keep its examples apart?

Stacked layers take it that rows are sorted by example. A model that puts another dimension first,
or lets examples of a batch touch each other, would go wrong in silence; so its logits for two
clients side by side are compared with each client's alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastrank.federated.stacked_training import Job
from fastrank.layers.stacked import Stack

if TYPE_CHECKING:
    from fastrank.data import Encoded
    from fastrank.federated.model import ResidentModel

_EXAMPLES = 3
# far above rounding, far below what a mixed-up row makes
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


@torch.no_grad()
def disagreement(model: ResidentModel, job: Job, examples: Encoded) -> str | None:
    """Why this model's clients can't share a pass, as a measurement; None if they can."""
    indices = np.resize(job.batches[0], _EXAMPLES)  # 1 of one client, 2 of the other
    generator = torch.Generator().manual_seed(0)
    known = model.parameters(job.plan.trainable)
    sides = [
        {name: _moved(job.values.get(name, known[name]), generator) for name in known}
        for _ in range(2)
    ]
    stack = Stack(model.model, known, sides)
    batch = model.collate(examples, indices)
    dropping = [m for m in model.model.modules() if isinstance(m, torch.nn.Dropout) and m.training]
    for module in dropping:
        module.eval()
    try:
        with stack:
            stack.running.begin([1, 2])
            together = model.logits(batch)
        before = model.read(known)
        for side, rows in zip(sides, (slice(0, 1), slice(1, 3)), strict=True):
            model.load(side)
            alone = model.logits({name: value[rows] for name, value in batch.items()})
            difference = (alone - together[rows]).norm() / alone.norm()
            if not difference <= _TOLERANCE.get(alone.dtype, 5e-2):
                return (
                    f"{type(model.model).__name__} mixes the examples of a batch (logits side by "
                    f"side differ from those alone by {difference:.1e})"
                )
        return None
    finally:
        model.load(before)
        for module in dropping:
            module.train()


def _moved(value: Tensor, generator: torch.Generator) -> Tensor:
    """Values nearby, so that two clients differ and no factor is zero."""
    value = value.detach().cpu()
    noise = torch.randn(value.shape, generator=generator)
    return value + 0.02 * noise.to(value.dtype)
