"""`fastrank bench all`: every benchmark there is, into one file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from fastrank.bench.environment import environment, pick_device
from fastrank.bench.results_file import Results

DEFAULTS: dict[str, Any] = {"device": "cpu", "quick": False, "threads": None, "out": None}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line's options; their defaults are DEFAULTS."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default cpu")
    parser.add_argument("--quick", action="store_true", help="a few small cases, seconds")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--out", metavar="FILE.json", help="where the rows go")


def run(*, device: str, quick: bool, threads: int | None, out: str | Path | None) -> dict[str, Any]:
    """Run the others with the same options; see `fastrank.bench.run`."""
    from fastrank.bench import BENCHES, run

    where = environment(pick_device(device)) | {"threads": threads or torch.get_num_threads()}
    results = Results(None if out is None else Path(out), where)
    for name in BENCHES:
        if name != "all":
            rows = run(name, device=device, quick=quick, threads=threads)["rows"]
            results.add(rows)
    return results.content()
