"""Error of a layer's outputs and gradients against float64, dropout included.

The dropout that a variant drew is read off the variant itself, with no knowledge of its generator:
the same seed is used for a probe whose gradients show what was kept, and by how much it was scaled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fastrank.bench.cases import LayerStep

# rows that errors are measured on: a float64 product of more costs seconds
MAX_ROWS = 256
# above it a result is wrong, not rounded, and its time says nothing
WRONG = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
_SEED = 20


def relative_error(value: Tensor, exact: Tensor) -> float:
    """The larger of two relative errors: Frobenius norm and largest element, in float64."""
    value, exact = value.double(), exact.double()
    difference = value - exact
    pairs = (
        (difference.norm(), exact.norm()),
        (difference.abs().max(), exact.abs().max()),
    )
    return largest(float(size / of) if float(of) else float(size) for size, of in pairs)


def largest(errors: Iterable[float]) -> float:
    """The largest of them, NaN where one is: Python's max passes over it."""
    found = list(errors)
    return math.nan if any(map(math.isnan, found)) else max(found)


class Oracle:
    """Float64 results of one case on its first rows; the base's share is computed once.

    Args:
        x: `[M, K]`.
        dy: `[M, N]`.
        weight: `[N, K]`.
        bias: `[N]` or None.
    """

    def __init__(self, x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.x, self.dy = x[:MAX_ROWS], dy[:MAX_ROWS]
        self._x, self._dy, weight = self.x.double(), self.dy.double(), weight.double()
        self._y = self._x @ weight.T if bias is None else self._x @ weight.T + bias.double()
        self._dx = self._dy @ weight

    def worst(self, step: LayerStep, dropout: float) -> float:
        """The largest relative error over y and every gradient of a variant."""
        step = step.on(self.x, self.dy)
        factor = drawn_dropout(step, dropout) if dropout > 0.0 and step.trained else None
        torch.manual_seed(_SEED)
        outputs = step.outputs()
        exact = self.exact(step, factor)
        return largest(relative_error(value, exact[name]) for name, value in outputs.items())

    def exact(self, step: LayerStep, factor: Tensor | None) -> dict[str, Tensor]:
        """y, dx, dA and dB in float64 for the step's own adapters; factor `[M, K]` or None."""
        if not step.trained:
            return {"y": self._y, "dx": self._dx}
        A, B = (step.trained[name].detach().double() for name in ("dA", "dB"))
        if step.active is not None:
            # a product with zeros on both sides has zero gradients for both
            A, B = A * step.active[:, None], B * step.active
        kept = self._x if factor is None else self._x * factor
        S, U = kept @ A.T, (self._dy @ B) * step.scale
        share = U @ A if factor is None else (U @ A) * factor
        return {
            "y": self._y + (S @ B.T) * step.scale,
            "dx": self._dx + share,
            "dA": U.T @ kept,
            "dB": (self._dy.T @ S) * step.scale,
        }


def drawn_dropout(step: LayerStep, p: float) -> Tensor:
    """What the step's next draw multiplies x with: 0, or 1 / (1 - p), float64 `[M, K]`.

    A and B are all ones for one step: a dropped element of dx has the base's gradient alone, and dA
    counts the kept ones. An implementation may draw with a p rounded by up to 2**-16; dA shows the
    factor it used where it is in float32.
    """
    A, B = step.trained["dA"], step.trained["dB"]
    before = A.detach().clone(), B.detach().clone()
    probe = step.on(torch.ones_like(step.x), torch.ones_like(step.dy))
    with torch.no_grad():
        A.fill_(1.0)
        B.fill_(1.0)
    try:
        torch.manual_seed(_SEED)
        found = probe.outputs()
    finally:
        with torch.no_grad():
            A.copy_(before[0])
            B.copy_(before[1])
    (N, R), nominal = B.shape, 1.0 / (1.0 - p)
    branch = step.scale * N * R  # of dx, where kept; the base's share is about sqrt(N / K)
    kept = found["dx"].double() > branch / 2
    factor = nominal
    if A.dtype == torch.float32 and step.autocast is None:
        drawn = float(found["dA"].double().sum()) / (step.scale * N * R * float(kept.sum()))
        if abs(drawn / nominal - 1.0) < 2.0**-15:
            factor = drawn
    return kept.double() * factor
