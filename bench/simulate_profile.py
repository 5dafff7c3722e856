"""`fastrank bench simulate --profile`: what a client-parallel step is made of.

The profiler names every operator that a round runs; each one's own time goes to one kind:

- frozen-products: products with the frozen weights, forward and backward;
- grouped-branches: the rest of grouped_lowrank_linear, its Python's operators included;
- attention: scaled_dot_product_attention, forward and backward;
- norms-activations: layer norms, GELU and the like;
- optimizer-clipping: per-client clipping and AdamW;
- rest: what is left of the wall time. Other operators (residual sums, embeddings, heads, loss,
  stacking and reading values), and the Python and autograd between operators.

Rows have mode "profile": `median_s` is the kind's time in a step of all clients, over several
profiled rounds, `baseline_median_s` that of the whole step under the profiler, `share` their
quotient, and `unprofiled_s` what the step takes without the profiler. On a GPU an operator's time
is that of its kernels, and `rest` holds the time in which the device waits.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from fastrank.bench import harness, timing
from fastrank.bench.harness import Measured
from fastrank.bench.progress import Report, milliseconds
from fastrank.bench.results_file import Results, Row
from fastrank.bench.simulate_cases import Job, SimCase, cases
from fastrank.bench.simulate_rounds import Contest, Round, executor_name
from fastrank.federated.stacked_optimizer import StackedOptimizer
from fastrank.kernels.common import products

KINDS = ("frozen-products", "grouped-branches", "attention", "norms-activations",
         "optimizer-clipping", "rest")  # fmt: skip
WHOLE = "whole-step"
# what tells most about an operator comes first: base products run inside of _Grouped
_TELLING = ("optimizer-clipping", "attention", "frozen-products", "grouped-branches",
            "norms-activations", "rest")  # fmt: skip
_ROUNDS = 3
_FROZEN, _OPTIMIZER = "fastrank::frozen", "fastrank::optimizer"
_GROUPED = ("_Grouped", "_GroupedBackward")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "mkldnn::_linear_pointwise")
_NORMS = ("layer_norm", "rms_norm", "gelu", "silu", "relu", "tanh")
_COLUMNS = (("case", 30), ("kind", 20), ("ms", 8), ("share", 7))


def measure(device: torch.device, quick: bool, results: Results) -> None:
    """Profile the cases that the goals are about and that `results` lacks."""
    todo = [c for c in cases(device, quick)[:2] if not results.has(_name(c, KINDS[-1]), "profile")]
    with Report(_COLUMNS) as report:
        report.start(len(todo) * len(KINDS))
        for case in todo:
            rows = profile_case(case, device)
            results.add(rows)
            for row in rows:
                cells = [case.name, row["variant"], milliseconds(row["median_s"])]
                report.row([*cells, f"{row['share']:.1%}"])


def profile_case(case: SimCase, device: torch.device) -> list[Row]:
    """A row for every kind."""
    contest = Contest(Job(case, device))
    executor = contest.executor("client-parallel")
    round = contest.by(executor)
    round()
    plain = statistics.median(_wall(round, device) for _ in range(_ROUNDS)) / case.local_steps
    taken = [_profiled(round, case, device) for _ in range(_ROUNDS)]
    found = {
        kind: Measured(timing.Timing.of([one[kind] / case.local_steps for one in taken]))
        for kind in (*KINDS, WHOLE)
    }
    whole = found[WHOLE].timing.median_s
    facts = {
        "executor": executor_name(executor),
        "clients_in_parallel": executor.clients_in_parallel,
        "unprofiled_s": plain,
    }
    rows = []
    for kind in KINDS:
        # a kind that a case has nothing of still has a finite speed-up
        found[kind].timing = _at_least(found[kind].timing, 1e-9)
        point = case.as_dict() | {"name": _name(case, kind)}
        (row,) = harness.rows("simulate", point, "profile", found, [(kind, WHOLE)])
        rows.append(row | facts | {"share": row["median_s"] / whole})
    return rows


def _at_least(taken: timing.Timing, seconds: float) -> timing.Timing:
    quantiles = (taken.median_s, taken.q20_s, taken.q80_s)
    return timing.Timing(*(max(seconds, s) for s in quantiles), taken.samples)


def _name(case: SimCase, kind: str) -> str:
    return f"profile-{case.name}-{kind}"


def _wall(round: Round, device: torch.device) -> float:
    begin = time.perf_counter()
    round()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _profiled(round: Round, case: SimCase, device: torch.device) -> dict[str, float]:
    """Seconds of every kind, and of the whole, in one round."""
    # the profiler announces itself on stderr otherwise; it reads this when it first starts
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with (
        profile(activities=activities, record_shapes=True, acc_events=True) as trace,
        _scopes(case.r),
    ):
        whole = _wall(round, device)
    spent, known = dict.fromkeys(KINDS, 0.0), {}
    for event in trace.events():
        microseconds = (
            event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        )
        spent[_kind_of(event, case.r, known)] += microseconds * 1e-6
    spent["rest"] = max(0.0, whole - sum(s for kind, s in spent.items() if kind != "rest"))
    return spent | {WHOLE: whole}


def _kind_of(event: Any, rank: int, known: dict[int, int]) -> str:
    """The kind of an operator, by its name and operands and by what it runs inside of.

    Args:
        event: the profiler's.
        rank: of the adapters.
        known: places in `_TELLING` of the events met so far, by id.
    """
    waiting = []
    while event is not None and id(event) not in known:
        waiting.append(event)
        event = event.cpu_parent
    place = len(_TELLING) - 1 if event is None else known[id(event)]
    for event in reversed(waiting):
        place = min(place, _TELLING.index(_own_kind(event, rank)))
        known[id(event)] = place
    return _TELLING[place]


def _own_kind(event: Any, rank: int) -> str:
    name = event.name
    if name == _OPTIMIZER:
        return "optimizer-clipping"
    if "scaled_dot_product" in name:
        return "attention"
    if name == _FROZEN or (name in _PRODUCTS and _is_frozen(event.input_shapes, rank)):
        return "frozen-products"
    if name in _GROUPED:
        return "grouped-branches"
    return "norms-activations" if any(norm in name for norm in _NORMS) else "rest"


def _is_frozen(shapes: Sequence[Sequence[int]], rank: int) -> bool:
    """Whether two matrices are multiplied of which neither is a factor of rank `rank`."""
    matrices = [shape for shape in shapes if len(shape) == 2]
    return len(matrices) >= 2 and min(map(min, matrices)) > rank


@contextmanager
def _scopes(rank: int) -> Iterator[None]:
    """Names for what operators alone don't tell: the base's products, and the optimizer."""

    def frozen(first: torch.Tensor, second: torch.Tensor, *rest: Any) -> Any:
        thin = min(*first.shape, *second.shape) <= rank  # a factor of a branch
        return nullcontext() if thin else torch.profiler.record_function(_FROZEN)

    def optimizer(*arguments: Any) -> Any:
        return torch.profiler.record_function(_OPTIMIZER)

    places = [
        (products, "linear", frozen),
        (products, "mm", frozen),
        (StackedOptimizer, "clip", optimizer),
        (StackedOptimizer, "step", optimizer),
    ]
    before = [getattr(owner, name) for owner, name, _ in places]
    try:
        for (owner, name, scope), own in zip(places, before, strict=True):
            setattr(owner, name, _within(scope, own))
        yield
    finally:
        for (owner, name, _), own in zip(places, before, strict=True):
            setattr(owner, name, own)


def _within(scope: Callable[..., Any], work: Callable) -> Callable:
    def run(*arguments: Any, **keywords: Any) -> Any:
        with scope(*arguments):
            return work(*arguments, **keywords)

    return run
