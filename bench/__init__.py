"""Micro-benchmarks: `fastrank bench NAME` and `fastrank.bench.run(NAME, ...)`.

Importing this package loads nothing; each benchmark is loaded when it is run.
"""

import importlib
from typing import Any

from fastrank.errors import UsageError

# name -> module with add_options(parser) and run(**options) -> dict
BENCHES = {
    "lowrank": "fastrank.bench.lowrank",
    "grouped": "fastrank.bench.grouped",
    "svd": "fastrank.bench.svd",
    "packing": "fastrank.bench.packing",
    "train-step": "fastrank.bench.train_step",
    "simulate": "fastrank.bench.simulate",
    "all": "fastrank.bench.everything",
}


def load(name: str) -> Any:
    """The module of a benchmark.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in BENCHES:
        raise UsageError(f"no benchmark is called {name!r}; choose one of {', '.join(BENCHES)}")
    return importlib.import_module(BENCHES[name])


def run(name: str, **options: Any) -> dict[str, Any]:
    """Run one benchmark and return what its file holds: `environment` and `rows`.

        results = fastrank.bench.run("lowrank", device="cpu", quick=True, out="lowrank.json")

    Args:
        name: one of `BENCHES`.
        options: as on the command line, with underscores; an option left out has its default.

    Raises:
        UsageError: an unknown benchmark or option, or a value that doesn't fit.
    """
    module = load(name)
    unknown = sorted(options.keys() - module.DEFAULTS.keys())
    if unknown:
        raise UsageError(
            f"{name} has no option {', '.join(unknown)}; it takes {', '.join(module.DEFAULTS)}"
        )
    return module.run(**(module.DEFAULTS | options))
