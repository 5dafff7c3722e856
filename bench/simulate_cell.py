"""One case of `fastrank bench simulate` measured: updates first, then memory, then time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fastrank.bench import harness, memory, timing
from fastrank.bench.simulate_cases import Job, SimCase
from fastrank.bench.simulate_rounds import Contest, Judge, Round

BASELINE = "peft-sequential"

# (contest, local steps or None for the case's) -> a round
Builder = Callable[[Contest, int | None], Round]


class PerStep:
    """A clock of rounds that tells the time of one optimizer step of all clients.

    Args:
        clock: measures rounds.
        local_steps: of a round.
    """

    def __init__(self, clock: timing.Clock, local_steps: int) -> None:
        self.clock, self.local_steps = clock, local_steps

    def seconds(self, step: timing.Step, calls: int) -> float:
        return self.clock.seconds(step, calls) / self.local_steps


@dataclass
class RoundCell(harness.Cell):
    """All variants of one case, on the same start values and batches.

    Args:
        case: what is measured.
        builders: variant name -> builder; the baseline is none of them, it is always there.
        device: where.
    """

    case: SimCase
    builders: Mapping[str, Builder]
    device: torch.device
    contest: Contest | None = None

    def prepare(self) -> None:
        """Build both models, then check every variant's updates and measure its memory."""
        self.found = {name: harness.Measured() for name in (BASELINE, *self.builders)}
        self._guarded(BASELINE, self._meet)
        if self.contest is None:
            for entry in self.found.values():
                entry.skipped = self.found[BASELINE].skipped
            return
        for name, build in self.builders.items():
            self._guarded(name, lambda name=name, build=build: self._look_at(name, build))

    def _meet(self) -> None:
        contest = Contest(Job(self.case, self.device))
        self._judge = Judge(contest)
        self.found[BASELINE].error = self._judge.baseline_error
        self.found[BASELINE].memory = self._memory(contest, contest.by_peft(1))
        self.steps[BASELINE] = contest.by_peft()
        self.contest = contest

    def _look_at(self, name: str, build: Builder) -> None:
        contest, entry = self.contest, self.found[name]
        entry.error = self._judge.check(build(contest, self._judge.steps)())
        entry.memory = self._memory(contest, build(contest, 1))
        self.steps[name] = build(contest, None)

    def _memory(self, contest: Contest, round: Round) -> memory.Memory:
        """Of a round of one local step, over the models."""
        round()  # what an executor looks at once, and workspaces that stay
        return memory.measure(round, contest.held(), self.device)

    def measure(
        self, mode: str, clock: timing.Clock, seconds: float
    ) -> dict[str, harness.Measured]:
        """Time a step of all clients by every variant, in turn."""
        return super().measure(mode, PerStep(clock, self.case.local_steps), seconds)

    def close(self) -> None:
        """Let go of the models."""
        self.steps.clear()
        self.contest = None
        self._judge = None
        gc.collect()  # PEFT's modules hold each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
