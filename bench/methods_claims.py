"""The headline claims of the four papers against what the common presets gave.

Each claim has the paper's figure, ours and a verdict. A verdict follows from the means over seeds
by the rule that stands in the claim itself; how much the seeds differ is given beside it, and seeds
share clients, data and cohorts between methods, so that gaps are taken seed by seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fastrank.bench.generated import table
from fastrank.federated.compare.load import FinishedRun
from fastrank.federated.methods._allocation import stage

Runs = list[FinishedRun]


def claims(
    found: dict[str, Runs],
    paired: Callable[[Runs, Runs], Any],
    mean_of: Callable[[Iterable[float]], Any],
) -> str:
    """The table of claims; empty where the runs that it needs are not finished."""
    at = _At(found["common"], paired, mean_of)
    rows = [
        *_fedara(at),
        *_slora(at),
        *_sa_fedlora(at),
        *_fed_plora(at, _At(found["heterogeneous"], paired, mean_of)),
    ]
    return table(["claim", "here", "verdict"], rows) if rows else ""


class _At:
    """Runs of a preset by method and alpha."""

    def __init__(self, runs: Runs, paired: Callable, mean_of: Callable) -> None:
        self.runs, self.paired, self.mean_of = runs, paired, mean_of

    def of(self, method: str, alpha: float = 0.1) -> Runs:
        return [r for r in self.runs if r.method == method and r.options["alpha"] == alpha]

    def gap(self, method: str, other: str, alpha: float = 0.1) -> Any:
        """Paired difference of final accuracies; None without both."""
        runs, others = self.of(method, alpha), self.of(other, alpha)
        return self.paired(runs, others) if runs and others else None

    def accuracy(self, method: str, alpha: float = 0.1) -> Any:
        return self.mean_of(r.summary["accuracy"] for r in self.of(method, alpha))


def _fedara(at: _At) -> Iterator[list[str]]:
    gap = at.gap("fedara", "fedit")
    if gap is None:
        return
    more, whole = (
        _bytes(at.of("fedit"), head) / _bytes(at.of("fedara"), head) for head in (False, True)
    )
    yield [
        "FedARA: at least FedIT's accuracy of the same first rank, alpha 0.1",
        f"{gap.points(signed=True)} points",
        _verdict(gap.value >= 0),
    ]
    yield [
        "FedARA: adapter bytes at most 1/2.40 of FedIT's",
        f"1/{more:.2f}; with the head 1/{whole:.2f}",
        _verdict(more >= 2.4),
    ]


def _slora(at: _At) -> Iterator[list[str]]:
    gap = at.gap("slora", "fedavg")
    if gap is None:
        return
    share = _bytes(at.of("slora"), True) / _bytes(at.of("fedavg"), True)
    yield [
        "SLoRA: within 1 point of full fine-tuning at alpha 0.1",
        f"{gap.points(signed=True)} points",
        _verdict(gap.value >= -0.01),
    ]
    yield [
        "SLoRA: with about 1 % of its bytes",
        f"{100 * share:.2f} %",
        _verdict(share <= 0.015),
    ]
    goal = at.accuracy("fedavg").value
    runs = at.of("slora")
    reached = [r for r in (_until(run, goal) for run in runs) if r is not None]
    text = f"{len(reached)} of {len(runs)} seeds reach {100 * goal:.1f} % within their rounds"
    if reached:
        rounds = statistics.fmean(r for r, _ in reached)
        whole = [r for r in (_until(run, goal) for run in at.of("fedavg")) if r is not None]
        sent = statistics.fmean(b for _, b in reached) / 1e6
        text += f", after {rounds:.0f} rounds and {sent:,.1f} MB"
        if whole:
            text += (
                f"; FedAvg first does after {statistics.fmean(r for r, _ in whole):.0f} rounds and "
                f"{statistics.fmean(b for _, b in whole) / 1e6:,.0f} MB"
            )
    yield [
        "SLoRA: up to 90 % less time to full fine-tuning's accuracy",
        text,
        "reported" if reached else _verdict(False),
    ]
    gaps = {a: at.gap("fedavg", "fedit", a) for a in (100, 1, 0.1)}
    if None not in gaps.values():
        values = [gaps[a].value for a in (100, 1, 0.1)]
        yield [
            "SLoRA: FedIT's distance to full fine-tuning grows as alpha falls",
            ", ".join(f"alpha {a:g}: {gap.points(signed=True)}" for a, gap in gaps.items()),
            _verdict(values[0] < values[1] < values[2]),
        ]
    noted = [_switch(run) for run in runs]
    before = at.mean_of(n["accuracy_before_switch"] for n in noted)
    after = at.mean_of(n["accuracy_after_switch"] for n in noted)
    kept = at.mean_of(n["switch_energy"] for n in noted)
    yield [
        "SLoRA: accuracy just before and after the switch",
        f"{before.points()} %, then {after.points()} %; the SVD keeps {kept.points()} % of the "
        "first stage's energy",
        "reported",
    ]


def _sa_fedlora(at: _At) -> Iterator[list[str]]:
    gap = at.gap("sa-fedlora", "fedavg")
    if gap is None:
        return
    saved = 1 - _bytes(at.of("sa-fedlora"), True) / _bytes(at.of("fedavg"), True)
    yield [
        "SA-FedLoRA: at least FedAvg's accuracy, alpha 0.1",
        f"{gap.points(signed=True)} points",
        _verdict(gap.value >= 0),
    ]
    yield [
        "SA-FedLoRA: at least 93.62 % fewer parameters sent, full-model rounds included",
        f"{100 * saved:.2f} % fewer",
        _verdict(saved >= 0.9362),
    ]
    late = statistics.fmean(_catch_up(run) for run in at.of("sa-fedlora"))
    whole = _bytes(at.of("fedavg"), True)
    yield [
        "the same, but for what clients download that take part for the first time after them",
        f"{100 * (saved + late / whole):.2f} % fewer",
        _verdict(saved + late / whole >= 0.9362),
    ]


def _fed_plora(at: _At, mixed: _At) -> Iterator[list[str]]:
    for where, runs, alpha in (("ranks 3, 6, 12, alpha 0.1", at, 0.1),
                               ("ranks 8 to 64, alpha 0.5", mixed, 0.5)):  # fmt: skip
        others = {m: runs.gap("fed-plora", m, alpha) for m in ("hetlora", "flexlora", "flora")}
        if None in others.values():
            continue
        best = min(others, key=lambda m: others[m].value)
        yield [
            f"Fed-PLoRA: at least the best of HetLoRA, FlexLoRA and FLoRA ({where})",
            f"{others[best].points(signed=True)} points against {best}, the best of the three",
            _verdict(others[best].value >= 0),
        ]


def _verdict(met: bool) -> str:
    return "met" if met else "**not met**"


def _bytes(runs: Runs, with_head: bool = False) -> float:
    """Tensor bytes of a run, up and down, mean over seeds."""
    heads = ("head_up", "head_down")
    return statistics.fmean(
        r.summary["payload_up"]
        + r.summary["payload_down"]
        - (0 if with_head else sum(r.summary[h] for h in heads))
        for r in runs
    )


def _catch_up(run: FinishedRun) -> int:
    """Bytes of the full model that SA-FedLoRA's late clients were sent: down beyond up."""
    first = stage(run.options["initiating"], len(run.rows)) + 1  # its last one goes to everybody
    return sum(row["payload_down"] - row["payload_up"] for row in run.rows[first:])


def _until(run: FinishedRun, goal: float) -> tuple[int, int] | None:
    """The first evaluated round that reaches an accuracy, and the tensor bytes sent by then."""
    sent = 0
    for row in run.rows:
        sent += row["payload_up"] + row["payload_down"]
        if row["accuracy"] is not None and row["accuracy"] >= goal:
            return row["round"], sent
    return None


def _switch(run: FinishedRun) -> dict[str, Any]:
    return next(row for row in run.metrics if "switch_energy" in row)
