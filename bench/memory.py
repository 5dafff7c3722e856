"""Bytes that one training step needs, beside the layer, its input and the incoming gradient."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrank.bench.timing import Step


@dataclass(frozen=True)
class Memory:
    """
    Args:
        peak_bytes: most bytes allocated at once during the step, over those held before it.
        saved_bytes: storages that autograd keeps between forward and backward and that did not
            exist before the step.
    """

    peak_bytes: int
    saved_bytes: int


def measure(step: Step, held: Iterable[Tensor], device: torch.device) -> Memory:
    """Run a step once and count.

    Args:
        step: one forward and backward; gradients it fills must be None before.
        held: tensors that exist anyway and that autograd may save: inputs and parameters.
        device: where it runs.
    """
    seen = {tensor.untyped_storage().data_ptr() for tensor in held}
    saved = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal saved
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            saved += storage.nbytes()
        return tensor

    def counted() -> None:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            step()

    peak = _cuda_peak if device.type == "cuda" else _cpu_peak
    return Memory(peak_bytes=peak(counted, device), saved_bytes=saved)


def _cuda_peak(step: Step, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(step: Step, device: torch.device) -> int:
    """Highest sum of torch's allocations and releases; scratch of vendor libraries is not torch's.

    Read from the profiler's raw events: its tables add up releases by operator, not by time.
    """
    # the profiler announces itself on stderr otherwise; it reads this when it first starts
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        step()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
