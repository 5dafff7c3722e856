"""The tuning sweep: times the tiles and routes of the low-rank kernels, writes a table of choices.

    python -m fastrank.bench.tune --out DIR [--only shrink/half] [--budget SECONDS]

DIR/points.jsonl takes one line for each point as it is done, so that a sweep that was stopped goes
on where it was. When all points are there, DIR/choices.json is written: a table with what was
measured for this device's compute capability, for fastrank.kernels.lowrank.load_choices().

At each point all candidates and the vendor's route are timed in turn, in one run. A candidate whose
result is wrong, that spills registers or that can't run is recorded with the reason, and not timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastrank.bench import tune_table
from fastrank.bench.environment import environment
from fastrank.bench.timing import Clock, clock_for, interleave
from fastrank.bench.tune_points import Candidate, Operands, Point, candidates, points, table_of
from fastrank.kernels.common.launch import gpu_of, plan_launches
from fastrank.kernels.lowrank.choices import SHIPPED
from fastrank.kernels.lowrank.choices_file import dumps, parse

_SECONDS = 0.25  # of timing, a candidate
_UNFINISHED = 75


def sweep(
    out: Path,
    *,
    deadline: float | None,
    only: str | None = None,
    some: Sequence[Point] | None = None,
    device: torch.device | None = None,
    clock: Clock | None = None,
) -> bool:
    """Measure what `out` lacks; when nothing is left, write out/choices.json.

    Args:
        out: an existing folder.
        deadline: a time of time.monotonic() after which no point is begun; None for none.
        only: points whose key ("shrink/half/r16/8192x4096") contains this.
        some, device, clock: other points, another device and another clock than a GPU's.

    Returns:
        Whether every point asked for is measured.

    Raises:
        RuntimeError: no CUDA or ROCm device, and none given.
        ValueError: `only` names no point, or points.jsonl comes from another machine.
    """
    if device is None:
        if not torch.cuda.is_available():
            raise RuntimeError("tuning needs a CUDA or ROCm device, and torch sees none")
        device = torch.device("cuda")
    every = list(points() if some is None else some)
    wanted = [p for p in every if only is None or only in p.key]
    if not wanted:
        raise ValueError(f"no point has {only!r} in its name, such as {every[0].key!r}")
    clock = clock_for(device) if clock is None else clock
    log = out / "points.jsonl"
    done = _read(log, device)
    for number, point in enumerate(wanted):
        if point.key in done:
            continue
        if deadline is not None and time.monotonic() >= deadline:
            return False
        record = measure(point, device, clock)
        with log.open("a") as file:
            file.write(json.dumps(record) + "\n")
        done[point.key] = record
        print(f"[{number + 1}/{len(wanted)}] {point.key}: {_best(record)}", flush=True)
    if all(p.key in done for p in every):
        _write_table(out / "choices.json", {p: done[p.key] for p in every}, device)
    return True


def measure(point: Point, device: torch.device, clock: Clock) -> dict:
    """One point's record: seconds of each candidate that may be chosen, reasons of the others."""
    operands = Operands(point, device)
    accepted, refused = {}, {}
    for candidate in candidates(point, operands):
        reason = _why_not(candidate)
        if reason is None:
            accepted[candidate.name] = candidate.run
        else:
            refused[candidate.name] = reason
    timings = {}
    if accepted:
        timings = interleave(accepted, clock, seconds=_SECONDS * len(accepted), max_rounds=50)
    seconds = {name: [t.median_s, t.q20_s, t.q80_s] for name, t in timings.items()}
    where = {"capability": gpu_of(device).capability, "key": point.key}
    return where | {"seconds": seconds, "refused": refused}


def _why_not(candidate: Candidate) -> str | None:
    """The reason that a candidate can't be chosen. Its first run is the one that is checked."""
    compiled = []

    def run_and_keep(kernel, grid, arguments):
        compiled.append(kernel[grid](**arguments))

    try:
        with plan_launches(run_and_keep):
            result = candidate.run()
        error = candidate.error(result)
    except Exception as problem:  # whatever a compiler or driver says of a tile is a reason
        return f"{type(problem).__name__}: {str(problem)[:200]}"
    if not error <= candidate.tolerance:
        return f"error {error:.3g} against float64 is above {candidate.tolerance:.3g}"
    spills = max((getattr(c, "n_spills", None) or 0 for c in compiled), default=0)
    return f"spills {spills} registers" if spills else None


def _best(record: dict) -> str:
    seconds = {name: s[0] for name, s in record["seconds"].items()}
    if not seconds:
        return "no candidate can be chosen"
    best = min(seconds, key=seconds.__getitem__)
    text = f"{best} {seconds[best] * 1e6:.1f} us"
    if "vendor" in seconds:
        text += f", vendor {seconds['vendor'] * 1e6:.1f} us"
    return text


def _read(log: Path, device: torch.device) -> dict[str, dict]:
    if not log.exists():
        return {}
    records = {}
    capability = gpu_of(device).capability
    for line in log.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that was being written when a run was killed
        if record["capability"] != capability:
            raise ValueError(
                f"{log} was measured on {record['capability']}, this is {capability}; "
                "name another --out"
            )
        records[record["key"]] = record
    return records


def _write_table(path: Path, records: dict[Point, dict], device: torch.device) -> None:
    measured = {
        point: {name: s[0] for name, s in record["seconds"].items()}
        for point, record in records.items()
    }
    capability = gpu_of(device).capability
    mine = tune_table.entry(measured, table_of(device))
    shipped = json.loads(SHIPPED.read_text())["devices"]
    table = {"environment": environment(device), "devices": {capability: mine}}
    parse({"devices": shipped | table["devices"]}, path.name)
    path.write_text(dumps(table) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastrank.bench.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the measurements")
    parser.add_argument("--only", help="points whose name contains this")
    parser.add_argument("--budget", type=float, help="seconds after which no point is begun")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    deadline = None if given.budget is None else time.monotonic() + given.budget
    try:
        finished = sweep(given.out, deadline=deadline, only=given.only)
    except (RuntimeError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if not finished:
        print("stopped by --budget; the same command goes on from here")
    return 0 if finished else _UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
