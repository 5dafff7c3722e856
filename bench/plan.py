"""How the time of a grid is shared out among its cases."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from fastrank.bench import peers, timing, variants
from fastrank.bench.cases import Case, Operands

# rounds of all variants that building, error, memory and warm-up cost, and that shall be timed
_BEFORE, _TIMED = 5, 8
# seconds that a case of short steps takes: the samples' least length times their number
_LEAST = 0.8


def seconds_per_round(cases: Sequence[Case], device: torch.device) -> list[float]:
    """About how long one call of each variant takes, all together, for each case.

    Two measured costs a dtype, of a medium case: a product's FLOP, and what PEFT adds for an
    element of x or y. Skinny products are part of the latter.
    """
    costs = {dtype: _calibrate(dtype, device) for dtype in {case.dtype for case in cases}}
    found = []
    for case in cases:
        per_flop, per_element = costs[case.dtype]
        elements = case.M * (case.K + case.N)
        found.append(3 * per_flop * case.frozen_flops + 2 * per_element * elements)
    return found


def weights(rounds: Sequence[float]) -> list[float]:
    """Seconds that each case is worth, from seconds a round."""
    return [_LEAST + (_BEFORE + _TIMED) * seconds for seconds in rounds]


def least(rounds: Sequence[float]) -> float:
    """Seconds that the cases take at least, however little time they are given."""
    return (_BEFORE + timing.MIN_ROUNDS) * sum(rounds)


def _calibrate(dtype: str, device: torch.device) -> tuple[float, float]:
    """Seconds a FLOP of the frozen layer, and a further element of PEFT's."""
    case = Case(1024, 768, 768, 16, dtype, 0.1)
    operands, clock = Operands.of(case, device), timing.clock_for(device)
    taken = []
    for build in (variants.frozen, variants.peft if variants.has_peft() else peers.peft_schedule):
        step = build(case, operands)
        clock.seconds(step, 2)
        taken.append(min(clock.seconds(step, 1) for _ in range(3)))
    frozen, adapted = taken
    elements = case.M * (case.K + case.N)
    return frozen / case.frozen_flops, max(adapted - frozen, 0.0) / elements


class Budget:
    """Seconds for a list of cases, shared out by weight; what one leaves goes to those after it.

    Args:
        seconds: for all of them.
        weights: of each case, in order.
    """

    def __init__(self, seconds: float, weights: Sequence[float]) -> None:
        self._end = time.monotonic() + seconds
        self._left = list(weights)

    def next(self) -> float:
        """Seconds for the next case, 0 when the time is spent."""
        weight, total = self._left[0], sum(self._left)
        del self._left[0]
        left = max(0.0, self._end - time.monotonic())
        return left * weight / total if total else 0.0
