"""`python -m fastrank.bench.gpu --out DIR`: everything that is owed on a GPU, in one command.

Each step runs in a process of its own, so that one that breaks the device does not take the others
along. A call stops by itself after --budget seconds with exit status 75; the same command goes on
where it stopped, by the files in DIR. A step that fails is recorded and the next one runs; --only
runs it again.

Exit status: 0 all done, 1 a step failed, 2 bad input, 75 call again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastrank.errors import UsageError

UNFINISHED = 75
_SKIPPED, _FAILED, _DEVICE_LOST = 76, 77, 78
_RESTARTS = 5
# a step that overruns its own deadline by more is stopped
_GRACE = 45.0
# with less left no step is begun: importing torch and PEFT alone takes seconds
_LEAST = 20.0

# (step, seconds, log) -> exit status of its process, None where it was stopped
RunStep = Callable[[str, float, Path], int | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps that DIR lacks and return the exit status."""
    try:
        options = _parser().parse_args(argv)
        if options.step is not None:
            setting = (options.device, options.budget, options.seconds)
            return run_step(options.step, Path(options.out), *setting)
        return _run(options)
    except UsageError as error:
        print(f"fastrank.bench.gpu: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastrank.bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", metavar="DIR", help="where results, logs and the state go")
    add("--only", nargs="+", metavar="STEP", help="these steps alone, failed ones again")
    add("--list", action="store_true", help="print the steps and what DIR has of them")
    add("--budget", type=float, default=520.0, metavar="SECONDS", help="of one call (default 520)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses, on small shapes")
    # the process of one step, and what is left of the call
    add("--step", help=argparse.SUPPRESS)
    add("--seconds", type=float, help=argparse.SUPPRESS)
    return parser


def _run(options: argparse.Namespace) -> int:
    from fastrank.bench.gpu_steps import STEPS, forget_failures

    for name in options.only or ():
        if name not in STEPS:
            raise UsageError(f"no step is called {name!r}; choose from {', '.join(STEPS)}")
    if options.list:
        _print_steps(STEPS, State(Path(options.out)) if options.out else None)
        return 0
    if options.out is None:
        raise UsageError("give --out DIR, a folder for the results")
    if not options.budget > 0:
        raise UsageError(f"--budget is {options.budget}; give a positive number of seconds")
    _check_device(options.device)
    out = Path(options.out).resolve()
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out} can't be made: {error.strerror}") from error

    for name in options.only or ():
        if State(out).status(name) == "failed":
            forget_failures(out, name)

    def in_process(name: str, seconds: float, log: Path) -> int | None:
        command = [sys.executable, "-m", "fastrank.bench.gpu", "--step", name, "--out", str(out)]
        command += ["--device", options.device, "--budget", str(options.budget)]
        return _start([*command, "--seconds", str(seconds)], seconds, log)

    return run_all(
        out, in_process, tuple(STEPS), options.only or (), options.budget,
        again=" ".join(["python -m fastrank.bench.gpu", *(sys.argv[1:])]),
    )  # fmt: skip


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "no CUDA or ROCm device that torch can see; run on a machine with one, "
            "or rehearse with --device cpu"
        )


def run_all(
    out: Path,
    start: RunStep,
    steps: Sequence[str],
    only: Sequence[str],
    budget: float,
    again: str = "the same command",
    least: float = _LEAST,
) -> int:
    """Run what is missing until the budget is spent.

    Args:
        out: folder of results and state.
        start: runs one step.
        steps: all of them, in order; the last one makes the summary and always runs again.
        only: a choice of them, or empty for all; what failed before runs again.
        budget: seconds.
        again: the command that goes on.
        least: seconds that must be left for a step to begin.
    """
    state, end = State(out), time.monotonic() + budget
    chosen = [name for name in steps if not only or name in only]
    for name in chosen:
        status = state.status(name)
        finished = ("done", "skipped") if only else ("done", "skipped", "failed")
        if status in finished and name != steps[-1]:
            continue
        left = end - time.monotonic()
        if left < least:
            print(f"time is up; go on with: {again}")
            return UNFINISHED
        if _one(name, left, start, state, out / "logs" / f"{name}.log") == "unfinished":
            print(f"{name} is unfinished; go on with: {again}")
            return UNFINISHED
    failed = [name for name in steps if state.status(name) == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}; again with --only {' '.join(failed)}")
    return 1 if failed else 0


def _one(name: str, seconds: float, start: RunStep, state: State, log: Path) -> str:
    """Run one step, restarted where it lost the device, and record how it ended."""
    begin = time.monotonic()
    print(f"{name}: up to {seconds:.0f} s, log in {log}", flush=True)
    for _ in range(_RESTARTS):
        code = start(name, seconds - (time.monotonic() - begin), log)
        if code != _DEVICE_LOST:
            break
    taken = time.monotonic() - begin
    known = {0: "done", UNFINISHED: "unfinished", _SKIPPED: "skipped", None: "unfinished"}
    status = known.get(code, "failed")
    if code is None and state.status(name) == "stopped":
        status = "failed"  # twice past its deadline: it does not stop by itself
    state.record(name, "stopped" if code is None and status != "failed" else status, taken, log)
    print(f"{name}: {status}, {taken:.0f} s", flush=True)
    return status


class State:
    """state.json: how each step ended, its seconds over all calls, and its last words."""

    def __init__(self, out: Path) -> None:
        self.path = out / "state.json"
        self.steps: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            try:
                self.steps = json.loads(self.path.read_bytes())["steps"]
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{self.path} is damaged ({error}); remove it") from error

    def status(self, name: str) -> str:
        """ "done", "skipped", "failed", "unfinished", "stopped" or "not begun"."""
        return self.steps.get(name, {}).get("status", "not begun")

    def record(self, name: str, status: str, seconds: float, log: Path) -> None:
        from fastrank.bench.results_file import write_json

        before = self.steps.get(name, {}).get("seconds", 0.0)
        lines = log.read_text().strip().splitlines() if log.exists() else []
        self.steps[name] = {
            "status": status,
            "seconds": round(before + seconds, 1),
            "last_line": lines[-1] if lines else "",
        }
        write_json(self.path, {"steps": self.steps})


def _start(command: Sequence[str], seconds: float, log: Path) -> int | None:
    with log.open("a") as file:
        try:
            return subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds + _GRACE
            ).returncode
        except subprocess.TimeoutExpired:
            return None


def run_step(name: str, out: Path, device: str, budget: float, seconds: float) -> int:
    """One step in this process, with so many seconds left; its exit status says how it ended."""
    deadline = time.monotonic() + seconds
    from fastrank.bench.gpu_steps import STEPS, Failed, Setting, Skipped
    from fastrank.bench.harness import DeviceLost

    if name not in STEPS:
        raise UsageError(f"no step is called {name!r}; choose from {', '.join(STEPS)}")
    try:
        finished = STEPS[name](out, Setting(device, budget), deadline)
    except Skipped as reason:
        print(reason)
        return _SKIPPED
    except Failed as reason:
        print(reason)
        return _FAILED
    except DeviceLost as reason:
        print(reason)
        return _DEVICE_LOST
    except Exception:
        traceback.print_exc()
        return _FAILED
    return 0 if finished else UNFINISHED


def _print_steps(steps: dict[str, Any], state: State | None) -> None:
    for name, step in steps.items():
        status = f"[{state.status(name)}] " if state else ""
        print(f"{name:16} {status}{(step.__doc__ or '').splitlines()[0]}")


if __name__ == "__main__":
    sys.exit(main())
