"""What the benchmarks of single ops share on the command line, and around their work."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastrank.bench import peer_list
from fastrank.bench.environment import environment, pick_device
from fastrank.bench.results_file import Results
from fastrank.errors import UsageError

DEFAULTS: dict[str, Any] = {
    "device": "cpu",
    "quick": False,
    "threads": None,
    "seconds": None,
    "out": None,
    "resume": False,
}


def add_options(
    parser: argparse.ArgumentParser, *, quick: str, seconds: str | None, resume: bool = True
) -> None:
    """The options of DEFAULTS.

    Args:
        quick: what --quick measures.
        seconds: how long the samples take by default; None for a benchmark without --seconds.
        resume: whether it has --resume.
    """
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default cpu")
    add("--quick", action="store_true", help=quick)
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    if seconds is not None:
        text = f"time to spend on samples, about ({seconds})"
        add("--seconds", type=float, metavar="S", help=text)
    add("--out", metavar="FILE.json", help="where the rows go; FILE.csv beside it has them flat")
    if resume:
        add("--resume", action="store_true", help="go on with the cases FILE lacks")


@contextmanager
def session(
    device: str,
    threads: int | None,
    seconds: float | None,
    out: str | Path | None,
    resume: bool = False,
) -> Iterator[tuple[torch.device, Results]]:
    """The device and the results to fill, with so many threads in here.

    Raises:
        UsageError: a device that isn't there, a number out of range, a file that can't be written.
    """
    where = pick_device(device)
    if threads is not None and threads < 1:
        raise UsageError(f"--threads is {threads}; give at least 1")
    if seconds is not None and not seconds > 0:
        raise UsageError(f"--seconds is {seconds}; give a positive number")
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        results = Results(None if out is None else Path(out), environment(where), resume=resume)
        results.check_writable()
        yield where, results
    finally:
        torch.set_num_threads(before)


def finish(results: Results) -> dict[str, Any]:
    """What the file holds, after a line for every peer: measured, or why not."""
    content = results.content()
    for line in peer_list.lines(content["peers"]):
        print(line, flush=True)
    return content
