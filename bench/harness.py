"""One case of a benchmark measured: variants in turn, memory, errors, and the rows that say so."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fastrank.bench import memory, timing
from fastrank.bench.accuracy import WRONG, Oracle
from fastrank.bench.cases import Case, LayerStep, Operands, Unavailable
from fastrank.bench.memory import Memory
from fastrank.bench.results_file import Row
from fastrank.bench.timing import Timing
from fastrank.bench.variants import Builder

# mode of a row -> what it is: "full" is a whole training step of the layer, called from Python;
# "full-graph" the same step replayed as a CUDA graph
MODES = ("full", "full-graph")


class WrongResult(ArithmeticError):
    """A variant whose results are too far from float64's to be timed."""


class DeviceLost(RuntimeError):
    """The device answers nothing any more; a new process may find it whole again."""


def check_alive(device: torch.device) -> None:
    """After a failure: an illegal access makes every later call of the process fail too.

    Raises:
        DeviceLost: it did.
    """
    try:
        torch.ones(1, device=device).add_(1).item()
    except Exception as error:
        raise DeviceLost(f"{device} is lost: {first_line(error)}") from error


@dataclass
class Measured:
    """What is known of one variant in one mode."""

    timing: Timing | None = None
    memory: Memory | None = None
    error: float | None = None
    skipped: str | None = None


@dataclass
class Cell:
    """All variants of one case, built on the same operands.

    Args:
        case: what is measured.
        builders: variant name -> builder.
        device: where.
    """

    case: Case
    builders: Mapping[str, Builder]
    device: torch.device
    steps: dict[str, LayerStep] = field(default_factory=dict)
    found: dict[str, Measured] = field(default_factory=dict)

    def prepare(self) -> None:
        """Build every variant, then measure its error and memory: results before speed."""
        operands = Operands.of(self.case, self.device)
        oracle = Oracle(operands.x, operands.dy, operands.weight, operands.bias)
        for name, build in self.builders.items():
            self.found[name] = Measured()
            step = self._guarded(name, lambda build=build: build(self.case, operands))
            if step is not None:
                self.steps[name] = step
                self._guarded(name, lambda name=name: self._look_at(name, oracle))
        for name, entry in self.found.items():
            if entry.skipped is not None:
                self.steps.pop(name, None)

    def _look_at(self, name: str, oracle: Oracle) -> None:
        step, entry = self.steps[name], self.found[name]
        error = oracle.worst(step, self.case.dropout)
        if not error <= WRONG[step.x.dtype]:
            raise WrongResult(f"relative error {error:.3g}")
        entry.error = error
        if self.device.type == "cuda":
            step()  # workspaces that stay are nobody's peak
            step.clear()
        entry.memory = memory.measure(step, step.held(), self.device)
        step.clear()

    def _guarded(self, name: str, work: Callable) -> object:
        """The result of work; a variant that fails is reported and left out, the others go on."""
        try:
            return work()
        except Unavailable as reason:
            self.found[name].skipped = str(reason)
        except torch.OutOfMemoryError:
            self.found[name].skipped = "out of memory"
        except Exception as error:
            traceback.print_exc()
            self.found[name].skipped = f"failed: {type(error).__name__}: {first_line(error)}"
        return None

    def measure(self, mode: str, clock: timing.Clock, seconds: float) -> dict[str, Measured]:
        """Time what was built in one mode."""
        found = {name: Measured(**vars(entry)) for name, entry in self.found.items()}
        steps: dict[str, timing.Step] = dict(self.steps)
        if mode == "full-graph":
            steps = {}
            for name, step in self.steps.items():
                replay = self._guarded(name, lambda step=step: timing.captured(step, self.device))
                found[name].skipped = self.found[name].skipped
                self.found[name].skipped = None
                if replay is not None:
                    steps[name] = replay
        if not steps:
            return found
        try:
            taken = timing.interleave(steps, clock, seconds=seconds)
        except Exception as error:
            traceback.print_exc()
            for name in steps:
                found[name].skipped = f"failed: {type(error).__name__}: {first_line(error)}"
            return found
        for name, timed in taken.items():
            found[name].timing = timed
        return found


def rows(
    bench: str,
    case: Mapping,
    mode: str,
    found: Mapping[str, Measured],
    pairs: Sequence[tuple[str, str]],
) -> list[Row]:
    """One row for every (variant, baseline); where either could not run, the reason."""
    return [_row(bench, case, mode, found, *pair) for pair in pairs]


def _row(
    bench: str,
    case: Mapping,
    mode: str,
    found: Mapping[str, Measured],
    variant: str,
    baseline: str,
) -> Row:
    row = {"bench": bench, "case": dict(case), "mode": mode}
    row |= {"variant": variant, "baseline": baseline}
    this, other = found[variant], found[baseline]
    for name, entry in ((variant, this), (baseline, other)):
        if entry.timing is None:
            return row | {"skipped": f"{name}: {entry.skipped}"}
    return row | {
        "median_s": this.timing.median_s,
        "q20_s": this.timing.q20_s,
        "q80_s": this.timing.q80_s,
        "baseline_median_s": other.timing.median_s,
        "speedup": other.timing.median_s / this.timing.median_s,
        "peak_bytes": this.memory and this.memory.peak_bytes,
        "baseline_peak_bytes": other.memory and other.memory.peak_bytes,
        "saved_bytes": this.memory and this.memory.saved_bytes,
        "baseline_saved_bytes": other.memory and other.memory.saved_bytes,
        "error": this.error,
        "baseline_error": other.error,
        "samples": this.timing.samples,
    }


def first_line(error: Exception) -> str:
    """An error's message in a line."""
    return (str(error).strip().splitlines() or [""])[0][:300]
