"""Cases of `fastrank bench packing`, and the cell that judges and measures one of them.

What a case is about is a `Work`: operands made once, variants that work on them, and how their
results are judged. packing_wire.py has those of a message's way, packing_train.py those of a layer.
"""

from __future__ import annotations

import functools
import tracemalloc
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from fastrank.bench import harness, memory
from fastrank.bench.memory import Memory
from fastrank.bench.timing import Step

# relative to float64: what is above computes something else, and its time says nothing
WRONG = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 1e-3, "int8": 3e-2}
FORMATS = ("float32", "bfloat16", "float16", "int8")


@dataclass(frozen=True)
class PackingCase:
    """What is measured.

    Args:
        name: unique.
        kind: which Work.
        device: "cpu" or "cuda".
        N, K: of the tensor.
        M: rows of a layer's input.
        clients: how many updates are summed.
        dtype: what values are stored in, or a layer's dtype.
        own_masks: whether each client has a mask of its own.
    """

    name: str
    kind: str
    device: str
    N: int
    K: int
    M: int = 0
    clients: int = 0
    dtype: str = "float32"
    own_masks: bool = False
    density: float = 0.01

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def cases(device: torch.device, quick: bool) -> list[PackingCase]:
    """The cases of a device, those that goals are about first.

    64 dense deltas of 2048 x 2048 take 1.1 GB on a CPU, of 4096 x 4096 4.3 GB on a GPU.
    """
    cuda = device.type == "cuda"
    if quick:
        sizes = {"large": 512, "layer": 256, "sum": 256, "M": 128, "clients": 8}
    else:
        sizes = {"large": 4096, "layer": 4096, "sum": 4096 if cuda else 2048, "M": 4096,
                 "clients": 64}  # fmt: skip
    n, layer, total = sizes["large"], sizes["layer"], sizes["sum"]
    label, clients = "16.8M" if n == 4096 else f"{n}x{n}", sizes["clients"]

    def case(name: str, kind: str, size: int = n, **changes: Any) -> PackingCase:
        return PackingCase(name, kind, device.type, size, size, **changes)

    rows = {"size": layer, "M": sizes["M"]}
    found = [
        case(f"mask-{label}", "mask"),
        case(f"aggregate-{clients}", "aggregate", total, clients=clients),
        case(f"weight-grad-{layer}", "weight-grad", **rows),
        case(f"weight-grad-{layer}-bfloat16", "weight-grad", **rows, dtype="bfloat16"),
        case(f"backward-{layer}", "backward", **rows),
        *(
            case(f"{way}-{label}-{dtype}", way, dtype=dtype)
            for way in ("pack", "unpack")
            for dtype in (("float32", "int8") if quick else FORMATS)
        ),
        case(f"topk-encode-{label}", "topk-encode"),
        case(f"topk-decode-{label}", "topk-decode"),
        case(f"topk-{label}", "topk"),
        case(f"aggregate-{clients}-own-masks", "aggregate", total, clients=clients,
             own_masks=True),
        case("finetune-tiny" if quick else "finetune-bert-base", "finetune",
             64 if quick else 768, M=32 if quick else 128),
    ]  # fmt: skip
    if not quick:
        found.append(case(f"aggregate-{clients}-int8", "aggregate", total, clients=clients,
                          dtype="int8"))  # fmt: skip
    if cuda and not quick:
        found += [
            case(f"{way}-268M-{dtype}", way, 16384, dtype=dtype)
            for way in ("pack", "unpack")
            for dtype in FORMATS
        ]
        found.append(case("weight-grad-768-bfloat16", "weight-grad", 768, M=4096, dtype="bfloat16"))
    return found


class Work(ABC):
    """Operands of a case and the variants that work on them. Subclasses make both.

    Args:
        case: what is measured.
        device: where.
    """

    # the variants that a CUDA graph can hold: nothing of them waits for the device
    graph: tuple[str, ...] = ()

    def __init__(self, case: PackingCase, device: torch.device) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator().manual_seed(0)

    @abstractmethod
    def variants(self) -> Mapping[str, Callable[[], Step]]:
        """Name -> what makes a step; "fastrank" first."""

    @abstractmethod
    def error(self, name: str, result: Any) -> float | None:
        """How far a variant's result is from the exact one; None where there is nothing to judge.

        Raises:
            WrongResult: it is another thing.
        """

    def reset(self) -> None:  # noqa: B027  a hook, empty where steps write to nothing of the case
        """Make what steps write to as it was."""

    def measured(self, name: str, step: Step) -> tuple[Any, Memory]:
        """(a step's result, what it took)."""
        return result_and_memory(step, self.device)

    def extras(self, name: str) -> dict[str, float]:
        """Further figures of a variant for its rows."""
        return {}

    def randn(self, *shape: int) -> torch.Tensor:
        """The same draws for every run of a case."""
        return torch.randn(shape, generator=self.generator).to(self.device)


def result_and_memory(step: Step, device: torch.device) -> tuple[Any, Memory]:
    """Run a step once and count.

    On a CPU what NumPy and Python allocate is added to what torch does: the sum of the two peaks.
    And there it runs in a thread of its own: scratch memory that one thread keeps from call to call
    is new to it, and counts.
    """
    if device.type == "cuda":
        kept: list[Any] = []
        taken = memory.measure(lambda: kept.append(step()), (), device)
        return kept[0], taken
    _start_profiler()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_on_cpu, step, device).result()


def _on_cpu(step: Step, device: torch.device) -> tuple[Any, Memory]:
    kept: list[Any] = []

    def traced() -> None:
        tracemalloc.start()
        try:
            result = step()
            kept.extend((result, tracemalloc.get_traced_memory()[1]))
        finally:
            tracemalloc.stop()

    taken = memory.measure(traced, (), device)
    return kept[0], Memory(taken.peak_bytes + kept[1], taken.saved_bytes)


@functools.cache
def _start_profiler() -> None:
    """In the thread that imported torch: it complains about a start in another."""
    memory.measure(lambda: None, (), torch.device("cpu"))


@dataclass
class PackingCell(harness.Cell):
    """All variants of one case on the same operands."""

    case: PackingCase
    builders: Mapping[str, Callable[[], Step]]
    work: Work = field(kw_only=True)

    @staticmethod
    def of(work: Work) -> PackingCell:
        """The cell of a work's variants."""
        return PackingCell(work.case, work.variants(), work.device, work=work)

    def prepare(self) -> None:
        """Build every variant, then judge its result and count its memory: results before speed."""
        for name, build in self.builders.items():
            self.found[name] = harness.Measured()
            step = self._guarded(name, build)
            if step is not None:
                self.steps[name] = step
                self._guarded(name, lambda name=name: self._judge(name))
            if self.found[name].skipped is not None:
                self.steps.pop(name, None)

    def _judge(self, name: str) -> None:
        step, entry = self.steps[name], self.found[name]
        step()  # masks that are drawn once, workspaces that stay: nobody's peak
        self.work.reset()
        result, entry.memory = self.work.measured(name, step)
        error = self.work.error(name, result)
        if error is not None and not error <= WRONG[self.case.dtype]:
            raise harness.WrongResult(f"relative error {error:.3g}")
        entry.error = error
