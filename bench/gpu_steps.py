"""The steps of `python -m fastrank.bench.gpu`; each keeps its state in the files it writes.

A step is a function (out, setting, deadline) -> whether it is finished. It begins nothing after the
deadline (`time.monotonic()`), and called again it goes on with what its files lack.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastrank.bench import (
    grids,
    grouped,
    grouped_cases,
    lowrank,
    packing,
    packing_cases,
    rank_sweep,
    simulate,
    simulate_cases,
    simulate_memory,
    simulate_profile,
    svd,
    svd_cases,
    svd_merge,
    timing,
    train_step,
)
from fastrank.bench.cases import Case
from fastrank.bench.environment import environment, pick_device
from fastrank.bench.results_file import Results, failures, write_json
from fastrank.bench.variants import has_peft

# of the whole grid, over however many calls
_GRID_SECONDS = {"cpu": 10.0, "cuda": 400.0}
ROOT = Path(__file__).resolve().parents[1]


class Skipped(Exception):
    """A step that has nothing to do here; the message is the reason."""


class Failed(Exception):
    """A step that ran and found something wrong; the message says what."""


@dataclass(frozen=True)
class Setting:
    """
    Args:
        device: "cuda", or "cpu" to rehearse every step on small shapes.
        budget: seconds that a whole call has, of which this step may get less.
    """

    device: str
    budget: float

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"


Step = Callable[[Path, Setting, float], bool]


def describe_machine(out: Path, setting: Setting, deadline: float) -> bool:
    """environment.json: versions, the device's properties, and what the driver's tool says."""
    device = pick_device(setting.device)
    found: dict[str, Any] = {"environment": environment(device)}
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found["properties"] = {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "memory_bytes": p.total_memory,
            "multiprocessors": p.multi_processor_count,
            "l2_bytes": p.L2_cache_size,
            "torch_cuda": torch.version.cuda,
            "torch_hip": torch.version.hip,
        }
    found["driver"] = _driver_report()
    write_json(out / "environment.json", found)
    return True


def _driver_report() -> str | None:
    """Clocks, power and driver as nvidia-smi reports them, or None where there is none."""
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,power.draw"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def measure_bandwidth(out: Path, setting: Setting, deadline: float) -> bool:
    """bandwidth.json: bytes a second of a device copy, reads and writes counted."""
    device = pick_device(setting.device)
    sizes = (1 << 24,) if setting.rehearsal else (1 << 28, 1 << 30, 1 << 32)
    rates = {}
    for size in sizes:
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        step = {"copy": lambda source=source, target=target: target.copy_(source)}
        taken = timing.interleave(step, timing.clock_for(device), seconds=2.0)["copy"]
        rates[str(size)] = 2 * size / taken.median_s
        del source, target, step
    best = max(rates.values())
    write_json(out / "bandwidth.json", {"bytes_per_second": best, "by_size": rates})
    print(f"copy: {best / 1e9:.0f} GB/s, reads and writes")
    return True


def measure_matmul(out: Path, setting: Setting, deadline: float) -> bool:
    """matmul.json: FLOP a second of square bf16 products on random data."""
    device = pick_device(setting.device)
    rates = {}
    for n in (256,) if setting.rehearsal else (4096, 8192, 16384):
        generator = torch.Generator(device).manual_seed(0)
        a, b = (
            torch.randn(n, n, generator=generator, device=device, dtype=torch.bfloat16)
            for _ in range(2)
        )
        step = {"matmul": lambda a=a, b=b: a @ b}
        taken = timing.interleave(step, timing.clock_for(device), seconds=3.0)["matmul"]
        rates[str(n)] = 2 * n**3 / taken.median_s
    best = max(rates.values())
    write_json(out / "matmul.json", {"flops_per_second": best, "by_size": rates})
    print(f"bf16 matmul: {best / 1e12:.1f} TFLOP/s")
    return True


def run_tests(out: Path, setting: Setting, deadline: float) -> bool:
    """tests.json: `pytest -m gpu`, a process and a log for each file that has such tests."""
    folder = ROOT / "tests"
    if not folder.is_dir():
        raise Skipped("no tests beside this package: run it from a checkout")
    marked = re.compile(r"\bmark\.gpu\b")
    files = [p for p in sorted(folder.rglob("test_*.py")) if marked.search(p.read_text())]
    path = out / "tests.json"
    found = json.loads(path.read_bytes()) if path.exists() else {}
    (out / "logs").mkdir(exist_ok=True)
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        if name in found:
            continue
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        result = _run_tests_of(name, out / "logs" / f"{file.stem}.log", left)
        if result is None and left < 0.8 * setting.budget:
            return False  # it gets a whole call next time
        found[name] = result or {"status": "timeout", "line": f"ran past {left:.0f} s"}
        write_json(path, found)
        print(f"{name}: {found[name]['line']}")
    bad = [name for name, result in found.items() if result["status"] not in (0, 5)]
    if bad:
        raise Failed(f"tests failed in {', '.join(bad)}; see {out / 'logs'}")
    return True


def _run_tests_of(name: str, log: Path, seconds: float) -> dict[str, Any] | None:
    """Exit status and last line of one file's tests; None where the time ran out."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-o", "cache_dir=.pytest_cache"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [*command, name], cwd=ROOT, env=environment, stdout=file,
                stderr=subprocess.STDOUT, timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None
    lines = log.read_text().strip().splitlines() or [""]
    return {"status": done.returncode, "line": lines[-1]}


def tune(out: Path, setting: Setting, deadline: float) -> bool:
    """tune/: the sweep that writes a choice table."""
    if setting.rehearsal:
        raise Skipped("tuning needs a GPU")
    from fastrank.bench import tune as module

    folder = out / "tune"
    folder.mkdir(exist_ok=True)
    return module.sweep(folder, deadline=deadline)


def _use_tuned_choices(out: Path) -> None:
    """Measure with the table that the sweep on this machine wrote, where it is there."""
    table = out / "tune" / "choices.json"
    if table.exists():
        from fastrank.kernels.lowrank.choices import load_choices

        load_choices(table)
        print(f"choices of {table}")


def measure_shipped(out: Path, setting: Setting, deadline: float) -> bool:
    """lowrank-shipped.json: the target's shape with the choices that ship, before any tuning."""
    device = pick_device(setting.device)
    target, *others = grids.cases(device, quick=setting.rehearsal)
    shape = (target.M, target.K, target.N, target.R)
    same = [case for case in others if shape == (case.M, case.K, case.N, case.R)]
    seconds = 5.0 if setting.rehearsal else 30.0
    return _measure_grid(out / "lowrank-shipped.json", [target, *same], device, seconds, deadline)


def measure_lowrank(out: Path, setting: Setting, deadline: float) -> bool:
    """lowrank.json: the grid, case by case, with the choices of this machine's sweep if any."""
    device = pick_device(setting.device)
    _use_tuned_choices(out)
    cases = grids.cases(device, quick=setting.rehearsal)
    seconds = _GRID_SECONDS[device.type]
    return _measure_grid(out / "lowrank.json", cases, device, seconds, deadline)


def _measure_grid(
    path: Path, cases: list[Case], device: torch.device, seconds: float, deadline: float
) -> bool:
    results = Results(path, environment(device), resume=True)
    finished = lowrank.measure_cases(cases, device, results, seconds, deadline)
    if finished and failures(results.rows):
        raise Failed(f"{failures(results.rows)} rows failed; {path.name} has the reasons")
    return finished


def sweep_ranks(out: Path, setting: Setting, deadline: float) -> bool:
    """rank-sweep.json: one layer as its ranks are pruned."""
    device = pick_device(setting.device)
    _use_tuned_choices(out)
    results = Results(out / "rank-sweep.json", environment(device), resume=True)
    seconds = 5.0 if setting.rehearsal else 60.0
    if time.monotonic() + 2 * seconds > deadline:  # its kernels are compiled first
        return False
    rank_sweep.measure(device, setting.rehearsal, results, seconds)
    if failures(results.rows):
        raise Failed(f"{failures(results.rows)} rows failed; rank-sweep.json has the reasons")
    return True


def train(out: Path, setting: Setting, deadline: float) -> bool:
    """train-step.json: a whole model, in both of PEFT's usual precisions."""
    if not has_peft():
        raise Skipped("PEFT is not installed")
    device = pick_device(setting.device)
    _use_tuned_choices(out)
    results = Results(out / "train-step.json", environment(device), resume=True)
    shape, sequence = ("tiny", 32) if setting.rehearsal else ("llama-3-8b", 2048)
    seconds = 1.0 if setting.rehearsal else 60.0
    # building and warming up a model of 8 billion weights takes about as long as measuring it
    needed = 2 * seconds
    for precision in ("autocast", "16-bit"):
        case = train_step.Case(shape, 16, sequence, 1, 0.0, precision)
        if results.has(case.as_dict()["name"], "full"):
            continue
        if time.monotonic() + needed > deadline:
            return False
        train_step.measure(case, device, results, seconds)
        _release(device)
    if failures(results.rows):
        raise Failed(f"{failures(results.rows)} rows failed; train-step.json has the reasons")
    return True


def measure_grouped(out: Path, setting: Setting, deadline: float) -> bool:
    """grouped.json: many adapters on one frozen layer, in one pass and in a loop."""
    device = pick_device(setting.device)
    results = Results(out / "grouped.json", environment(device), resume=True)
    cases = grouped_cases.cases(device, quick=setting.rehearsal)
    seconds = 2.0 if setting.rehearsal else 60.0
    finished = grouped.measure_cases(cases, device, results, seconds, deadline)
    if finished and failures(results.rows):
        raise Failed(f"{failures(results.rows)} rows failed; grouped.json has the reasons")
    return finished


def measure_svd(out: Path, setting: Setting, deadline: float) -> bool:
    """svd.json: truncated SVD of many matrices at once, against torch and plain pipelines."""
    device = pick_device(setting.device)
    results = Results(out / "svd.json", environment(device), resume=True)
    cases = [
        *svd_cases.cases(device, setting.rehearsal),
        *svd_merge.cases(device, setting.rehearsal),
    ]
    seconds = 2.0 if setting.rehearsal else 240.0
    # true spectra and a looped SVD of large matrices take about as long as measuring a case
    needed = 2 * seconds / len(cases)
    finished = svd.measure_cases(cases, device, results, seconds, deadline - needed)
    if finished and failures(results.rows):
        raise Failed(f"{failures(results.rows)} rows failed; svd.json has the reasons")
    return finished


def measure_packing(out: Path, setting: Setting, deadline: float) -> bool:
    """packing.json: masks, packing, aggregation and packed gradients, against dense ways."""
    device = pick_device(setting.device)
    results = Results(out / "packing.json", environment(device), resume=True)
    cases = packing_cases.cases(device, setting.rehearsal)
    seconds = 2.0 if setting.rehearsal else 120.0
    needed = 2 * seconds / len(cases)
    finished = packing.measure_cases(cases, device, results, seconds, deadline - needed)
    if finished and failures(results.rows):
        raise Failed(f"{failures(results.rows)} rows failed; packing.json has the reasons")
    return finished


def measure_simulate(out: Path, setting: Setting, deadline: float) -> bool:
    """simulate.json: clients side by side, against one after another with PEFT."""
    if not has_peft():
        raise Skipped("PEFT is not installed")
    device = pick_device(setting.device)
    results = Results(out / "simulate.json", environment(device), resume=True)
    cases = simulate_cases.cases(device, quick=setting.rehearsal)
    seconds = 2.0 if setting.rehearsal else 200.0
    # building and checking a case takes about as long as measuring it
    needed = 2 * seconds / len(cases)
    finished = simulate.measure_cases(cases, device, results, seconds, deadline - needed)
    if finished and failures(results.rows):
        raise Failed(f"{failures(results.rows)} rows failed; simulate.json has the reasons")
    return finished


def measure_simulate_memory(out: Path, setting: Setting, deadline: float) -> bool:
    """simulate-memory.json: peak memory and time by how many clients share a pass."""
    seconds = 2.0 if setting.rehearsal else 60.0
    return _simulate_beside(
        out / "simulate-memory.json", setting, deadline, 3 * seconds,
        lambda device, results: simulate_memory.measure(
            device, setting.rehearsal, results, seconds
        ),
    )  # fmt: skip


def measure_simulate_profile(out: Path, setting: Setting, deadline: float) -> bool:
    """simulate-profile.json: what a client-parallel step is made of."""
    return _simulate_beside(
        out / "simulate-profile.json", setting, deadline, 5.0 if setting.rehearsal else 120.0,
        lambda device, results: simulate_profile.measure(device, setting.rehearsal, results),
    )  # fmt: skip


def _simulate_beside(
    path: Path,
    setting: Setting,
    deadline: float,
    needed: float,
    measure: Callable[[torch.device, Results], None],
) -> bool:
    """What `fastrank bench simulate` measures instead of its grid; begun with so many seconds."""
    if not has_peft():
        raise Skipped("PEFT is not installed")
    if time.monotonic() + needed > deadline:
        return False
    device = pick_device(setting.device)
    results = Results(path, environment(device), resume=True)
    measure(device, results)
    _release(device)
    if failures(results.rows):
        raise Failed(f"{failures(results.rows)} rows failed; {path.name} has the reasons")
    return True


def report_static(out: Path, setting: Setting, deadline: float) -> bool:
    """static/: what the compilers of this machine's Triton make of every kernel; no timing."""
    if setting.rehearsal:
        raise Skipped("takes minutes and no GPU: python -m fastrank.bench.static --out DIR")
    from fastrank.bench import static

    if static.main(["--out", str(out / "static")]):
        raise Failed("a kernel is not as it should be; the log says which")
    return True


def _release(device: torch.device) -> None:
    gc.collect()  # PEFT's modules hold each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


def summarise(out: Path, setting: Setting, deadline: float) -> bool:
    """README.md and roofline.json, from the files that are there."""
    from fastrank.bench.gpu_summary import write_summary

    write_summary(out)
    return True


STEPS: dict[str, Step] = {
    "environment": describe_machine,
    "bandwidth": measure_bandwidth,
    "matmul": measure_matmul,
    "tests": run_tests,
    "lowrank-shipped": measure_shipped,
    "tune": tune,
    "lowrank": measure_lowrank,
    "rank-sweep": sweep_ranks,
    "train-step": train,
    "grouped": measure_grouped,
    "svd": measure_svd,
    "packing": measure_packing,
    "simulate": measure_simulate,
    "simulate-memory": measure_simulate_memory,
    "simulate-profile": measure_simulate_profile,
    "static": report_static,
    "summary": summarise,
}


def forget_failures(out: Path, name: str) -> None:
    """Drop what failed from a step's file, so that the step measures it again."""
    path = out / f"{name}.json"
    if not path.exists():
        return
    content = json.loads(path.read_bytes())
    if name == "tests":
        content = {file: found for file, found in content.items() if found["status"] in (0, 5)}
    elif "rows" in content:
        content["rows"] = [row for row in content["rows"] if not failures([row])]
    write_json(path, content)
