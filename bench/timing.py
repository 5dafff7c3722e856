"""Interleaved timing: every variant is sampled in turn, so that drift hits all of them alike.

A sample is one or more calls, enough to be far above the clock's resolution. Every round has an
order of its own: none always runs in the caches, or beside the spinning threads, that the same one
left behind.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Step = Callable[[], object]

# of one sample; the clock's resolution is below a microsecond
_SAMPLE_SECONDS = 2e-3
# fewer make a poor median
MIN_ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over the samples of a variant."""

    median_s: float
    q20_s: float
    q80_s: float
    samples: int

    @staticmethod
    def of(samples: Sequence[float]) -> Timing:
        """Median and quantiles, linear between neighbours."""
        if not samples:
            raise ValueError("no samples; time at least one round")
        return Timing(*(quantile(samples, q) for q in (0.5, 0.2, 0.8)), len(samples))


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile of samples, linear between its two neighbours."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class CpuClock:
    """Wall time of calls that return when they are done."""

    def seconds(self, step: Step, calls: int) -> float:
        """Mean seconds of one call over `calls` calls in a row."""
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - start) / calls


class CudaClock:
    """Time between two events on the current stream, the L2 cache overwritten before each sample.

    The host may be slower than the device: then the events see the host, which is what an eager
    step costs. Steps that are captured in a graph show the device alone.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(2 * cache, 1 << 20), dtype=torch.int8, device=device)
        self._device = device

    def seconds(self, step: Step, calls: int) -> float:
        """Mean seconds of one call; the cache is cold for the first of them."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        for _ in range(calls):
            step()
        end.record()
        torch.cuda.synchronize(self._device)
        return start.elapsed_time(end) * 1e-3 / calls


Clock = CpuClock | CudaClock


def clock_for(device: torch.device) -> Clock:
    """What measures time on a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def interleave(
    steps: Mapping[str, Step],
    clock: Clock,
    *,
    seconds: float,
    min_rounds: int | None = None,
    max_rounds: int = 150,
) -> dict[str, Timing]:
    """Time variants in turn.

    Args:
        steps: variant name -> one call of it.
        clock: what measures a sample.
        seconds: about how long all of it may take, the warm-up included.
        min_rounds: at least so many samples of each variant, whatever they take; None for
            MIN_ROUNDS, or 3 where there is no time at all.
        max_rounds: at most so many.

    Returns:
        Variant name -> seconds of one call.
    """
    if min_rounds is None:
        min_rounds = MIN_ROUNDS if seconds > 0 else 3
    begin = time.perf_counter()
    estimate = {}
    for name, step in steps.items():
        clock.seconds(step, 1)  # compiles, allocates
        estimate[name] = max(clock.seconds(step, 1), 1e-7)
    calls = {name: max(1, math.ceil(_SAMPLE_SECONDS / estimate[name])) for name in steps}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffled = list(steps), random.Random(0)
    with _no_collection():
        for done in range(max_rounds):
            spent = time.perf_counter() - begin
            if done >= min_rounds and spent + _per_round(estimate, calls) > seconds:
                break
            shuffled.shuffle(order)
            for name in order:
                samples[name].append(clock.seconds(steps[name], calls[name]))
    return {name: Timing.of(taken) for name, taken in samples.items()}


def _per_round(estimate: Mapping[str, float], calls: Mapping[str, int]) -> float:
    return sum(estimate[name] * calls[name] for name in calls)


@contextmanager
def _no_collection():
    """Garbage is collected before, not in the middle of somebody's sample."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def captured(step: Step, device: torch.device) -> Step:
    """The step as a CUDA graph: calling the result replays it.

    Args:
        step: runs on the device without a host sync; what it allocates belongs to the graph.
        device: a CUDA device.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
