"""The quick cases of `fastrank bench` under pytest-benchmark: one of each op, every variant of it.

    pytest bench/ --benchmark-only [--bench-device cpu] [--benchmark-json FILE]

The cells are those of `fastrank bench`: every variant is built on the same operands and judged
before any of them is timed; one that is wrong fails, one that can't run here is skipped with the
reason. A GPU is waited for in every call. Variants follow one another here: what depends on a
percent belongs to `fastrank bench`, which takes them in turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from fastrank.bench import (
    grids,
    grouped_cases,
    harness,
    packing,
    packing_cases,
    simulate,
    simulate_cases,
    svd_cases,
    svd_peers,
    train_step,
)
from fastrank.bench.environment import environment
from fastrank.bench.simulate_cell import BASELINE, RoundCell

# op -> the variants of its case; those of another device or library are skipped with the reason
VARIANTS = {
    "lowrank": ("frozen", "peft", "fastrank", "peft-compiled", "flaggems+peft"),
    "grouped": ("frozen", "loop", "grouped"),
    "svd": ("fastrank", "torch.linalg.svd", "svd_lowrank", "svd_lowrank-8", "plain-torch",
            *svd_peers.ON_CPU, *svd_peers.ON_GPU),
    "packing": ("fastrank", "dense", "dense-blocked"),
    "simulate": (BASELINE, "fastrank-sequential", "fastrank"),
    "train-step": ("peft", "fastrank", "liger+peft"),
}  # fmt: skip
PARAMETERS = [(op, variant) for op, variants in VARIANTS.items() for variant in variants]

# what is compared on one kind of device alone; everything else has to be there on both
ONLY_ON = {
    "cpu": {"dense-blocked", *svd_peers.ON_CPU},
    "cuda": {"peft-compiled", "flaggems+peft", *svd_peers.ON_GPU},
}

# (name of the case, what each variant did before timing, a call of each)
Prepared = tuple[str, dict[str, harness.Measured], dict[str, Callable[[], object]]]


@pytest.fixture(scope="module")
def device(request) -> torch.device:
    name = request.config.getoption("--bench-device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.fail("no CUDA or ROCm device that torch can see; give --bench-device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.mark.parametrize(("op", "variant"), PARAMETERS, ids=["-".join(p) for p in PARAMETERS])
def test_speed(benchmark, device, op, variant):
    name, found, steps = _prepared(op, device)
    if variant not in found:
        elsewhere = [kind for kind, only in ONLY_ON.items() if variant in only]
        if not elsewhere or device.type in elsewhere:
            pytest.fail(f"{variant} is compared on {device.type}, and {op} left it out")
        pytest.skip(f"{variant} runs on {elsewhere[0]} alone; this is {device.type}")
    entry = found[variant]
    if entry.skipped is not None:
        failed = entry.skipped.startswith("failed")
        (pytest.fail if failed else pytest.skip)(entry.skipped)
    benchmark.group = f"{op} {name}"
    benchmark.extra_info.update(_facts(entry, device))
    step = steps[variant]
    if isinstance(step, train_step.TrainStep):  # PEFT and fastrank train one model
        step.prepare(step.model)
        step()
    benchmark(_waited_for(step, device))


@functools.lru_cache(maxsize=1)  # parameters come op by op
def _prepared(op: str, device: torch.device) -> Prepared:
    if op == "train-step":
        return _train_step(device)
    if op == "simulate":
        case = simulate_cases.cases(device, quick=True)[0]
        cell = RoundCell(case, simulate.BUILDERS, device)
    elif op == "svd":
        case = svd_cases.cases(device, quick=True)[0]
        cell = svd_cases.SvdCell(case, svd_cases.builders(case, device), device)
    elif op == "packing":
        cases = packing_cases.cases(device, quick=True)
        case = next(case for case in cases if case.kind == "aggregate")
        cell = packing_cases.PackingCell.of(packing.WORKS[case.kind](case, device))
    elif op == "grouped":
        case = grouped_cases.cases(device, quick=True)[0]
        cell = grouped_cases.GroupedCell(case, grouped_cases.BUILDERS, device)
    else:
        case = grids.cases(device, quick=True)[0]
        cell = harness.Cell(case, grids.builders(case, device), device)
    cell.prepare()
    return case.name, cell.found, dict(cell.steps)


def _train_step(device: torch.device) -> Prepared:
    case = train_step.Case("tiny", 16, 64, 1, 0.0, "autocast")
    steps, found = train_step.variants(case, device)
    train_step.judge(steps, found)
    return case.as_dict()["name"], found, dict(steps)


def _waited_for(step: Callable[[], object], device: torch.device) -> Callable[[], None]:
    def run() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _facts(entry: harness.Measured, device: torch.device) -> dict[str, object]:
    memory = entry.memory
    return environment(device) | {
        "error": entry.error,
        "peak_bytes": None if memory is None else memory.peak_bytes,
        "saved_bytes": None if memory is None else memory.saved_bytes,
    }
