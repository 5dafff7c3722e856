"""`fastrank bench all`: every benchmark there is, into one file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastrank.bench import options

# the others' own share of time; nothing is resumed
DEFAULTS: dict[str, Any] = {"device": "cpu", "quick": False, "threads": None, "out": None}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line's options; their defaults are DEFAULTS."""
    options.add_options(parser, quick="small cases, about a minute", seconds=None, resume=False)


def run(*, device: str, quick: bool, threads: int | None, out: str | Path | None) -> dict[str, Any]:
    """Run the others with the same options; see `fastrank.bench.run`."""
    from fastrank.bench import BENCHES, run

    with options.session(device, threads, None, out) as (_, results):
        for name in BENCHES:
            if name != "all":
                results.add(run(name, device=device, quick=quick, threads=threads)["rows"])
        return results.content()
