"""Ranks of adapters one by one while a client trains: which learn, and how much each matters.

Factors are looked at rank-major: A `[R, K]` and E `[R, 1]` as they are, B `[N, R]` transposed. The
same code serves one client and several side by side, whose ranks then lie behind each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

SCORES = ("sensitivity", "adalora")
_BETA = 0.85  # of both averages; AdaLoRA (arXiv:2303.10512), PEFT's default

# bool [R] for every adapted module, or one each by module name
RankMask = Tensor | Mapping[str, Tensor]


def module_of(factor: str) -> str:
    """The adapted module that a factor's parameter belongs to."""
    for role in ("lora_A", "lora_B", "lora_E"):
        head, found, _ = factor.partition(f".{role}.")
        if found:
            return head
    raise ValueError(f"{factor} is no factor of an adapter")


def is_factor(name: str) -> bool:
    return any(f".{role}." in name for role in ("lora_A", "lora_B", "lora_E"))


def rank_major(name: str, value: Tensor) -> Tensor:
    """A view of a factor whose dim 0 is the rank; its own inverse."""
    return value.t() if ".lora_B." in name else value


def mask_of(ranks: RankMask, module: str) -> Tensor | None:
    """The ranks of one module that are trained; None for a module that isn't named: all of them."""
    return ranks.get(module) if isinstance(ranks, Mapping) else ranks


class RankScores:
    """How much each rank matters, from w g of every element at every step (raw gradients g).

    "sensitivity": the mean of |w g| over the steps. "adalora": the product of the exponential
    averages of |w g| and of its deviation, as of the last step (arXiv:2303.10512, eqs. 8 to 10).
    A rank's score in a factor is the mean over the factor's other dimension.

    Args:
        kind: one of SCORES.
    """

    def __init__(self, kind: str) -> None:
        assert kind in SCORES
        self.kind = kind
        self._sums: dict[str, Tensor] = {}  # [R], or Ibar [R, W]
        self._deviations: dict[str, Tensor] = {}  # Ubar [R, W]
        self._steps: dict[str, Tensor] = {}  # [R]: steps each rank took part in

    @torch.no_grad()
    def add(self, name: str, value: Tensor, grad: Tensor) -> None:
        """One step of a factor, rank-major `[R, W]`; fewer ranks than before are the first ones."""
        each = (value * grad).abs()
        if name not in self._sums:
            self._steps[name] = each.new_zeros(len(each))
            first = each.new_zeros(each.shape if self.kind == "adalora" else len(each))
            self._sums[name], self._deviations[name] = first, torch.zeros_like(first)
        part = slice(0, len(each))
        self._steps[name][part] += 1
        if self.kind == "sensitivity":
            self._sums[name][part] += each.mean(1)
            return
        mean, deviation = self._sums[name][part], self._deviations[name][part]
        mean.lerp_(each, 1 - _BETA)
        deviation.lerp_((each - mean).abs(), 1 - _BETA)

    def of(self, name: str) -> Tensor:
        """Scores of a factor's ranks, fp32 `[R]` on the CPU."""
        if self.kind == "sensitivity":
            found = self._sums[name] / self._steps[name].clamp_min(1)
        else:
            found = (self._sums[name] * self._deviations[name]).mean(1)
        return found.float().cpu()


class HeldRanks:
    """Untrained ranks put back after a step: a zero gradient does not stop weight decay.

    Args:
        factors: (rank-major view, bool mask of the trained ranks or None for all) of each factor.
    """

    def __init__(self, factors: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        self._held = []
        for view, trained in factors:
            if trained is None:
                continue
            index = (~trained).nonzero()[:, 0].to(view.device)
            self._held.append((view, index, view.detach()[index].clone()))

    @torch.no_grad()
    def restore(self) -> None:
        for view, index, values in self._held:
            view.detach()[index] = values
