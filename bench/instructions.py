"""Instructions of small CPU calls: `python -m fastrank.bench.instructions --out FILE.json`.

Where a call takes microseconds, a clock on a shared machine says little; Valgrind's callgrind
counts the same instructions again and again. All cases run in one process under callgrind, which
counts between the switches that torch.utils.benchmark uses (torch._C._valgrind_toggle):
Timer.collect_callgrind would start a process for each case and import everything under
instrumentation, which took seven minutes a case. Shapes are so small that what is counted is mostly
what a call costs before anything is multiplied: Python, dispatch, autograd.

Valgrind shows programs a processor with AVX2 and no AVX-512, so counts hardly depend on the
machine; they do on the versions of Python and torch, which the file records. One thread, garbage
collection off while counting.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastrank.bench import variants
from fastrank.bench.cases import Case, Operands
from fastrank.bench.environment import environment
from fastrank.errors import UsageError

Step = Callable[[], object]
# calls before counting, calls in a count, counts of which the median is taken
_WARM, _CALLS, _COUNTS = 10, 5, 3
_ROWS, _WIDTH, _RANK = 32, 64, 8
_GROUPS = (2, 4, 8, 3)
_SHAPE, _DENSITY, _CLIENTS = (64, 64), 1 / 16, 4
# One instruction set whatever the machine has, and one order of sets and dicts.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "PYTHONHASHSEED": "0",
}


def _layer(dropout: float) -> tuple[Case, Operands]:
    case = Case(_ROWS, _WIDTH, _WIDTH, _RANK, "float32", dropout)
    return case, Operands.of(case, torch.device("cpu"))


def patched(dropout: float) -> Step:
    """Forward and backward of PEFT's layer after patch(): gradients of x, A and B."""
    return variants.fastrank(*_layer(dropout))


def peft(dropout: float) -> Step:
    """The same of PEFT's own layer."""
    return variants.peft(*_layer(dropout))


def op(dropout: float) -> Step:
    """The same of lowrank_linear."""
    from fastrank.kernels.lowrank import lowrank_linear

    _, given = _layer(dropout)
    x, A, B = (t.clone().requires_grad_() for t in (given.x, given.A, given.B))

    def step() -> None:
        x.grad = A.grad = B.grad = None
        y = lowrank_linear(x, given.weight, given.bias, A, B, scale=1.0, dropout_p=dropout)
        y.backward(given.dy)

    return step


def add() -> Step:
    """lowrank_add, forward and backward."""
    from fastrank.kernels.lowrank import lowrank_add

    _, given = _layer(0.0)
    x, A, B = (t.clone().requires_grad_() for t in (given.x, given.A, given.B))
    base = torch.zeros(_ROWS, _WIDTH)

    def step() -> None:
        x.grad = A.grad = B.grad = None
        lowrank_add(base, x, A, B).backward(given.dy)

    return step


def grouped() -> Step:
    """grouped_lowrank_linear of four adapters, forward and backward."""
    from fastrank.kernels.lowrank import grouped_lowrank_linear

    _, given = _layer(0.0)
    total = sum(_GROUPS)
    x = given.x.clone().requires_grad_()
    A, B = (torch.randn(total, _WIDTH, requires_grad=True) for _ in range(2))
    rows, scale = [_ROWS // len(_GROUPS)] * len(_GROUPS), [1.0] * len(_GROUPS)

    def step() -> None:
        x.grad = A.grad = B.grad = None
        y = grouped_lowrank_linear(
            x, given.weight, given.bias, A, B, rows=rows, ranks=_GROUPS, scale=scale
        )
        y.backward(given.dy)

    return step


def peft_loop() -> Step:
    """Four layers of PEFT's on one weight, each on its share of the rows, one after another."""
    steps = []
    for rank in _GROUPS:
        case = Case(_ROWS // len(_GROUPS), _WIDTH, _WIDTH, rank, "float32")
        steps.append(variants.peft(case, Operands.of(case, torch.device("cpu"))))

    def step() -> None:
        for each in steps:
            each()

    return step


def _mask(client: int = 0):
    from fastrank.kernels.packing import SparseMask

    return SparseMask(_SHAPE, _DENSITY, seed=client, tensor_id="layer.weight")


def positions() -> Step:
    """The kept positions of a mask, drawn anew."""
    mask = _mask()
    return lambda: mask.positions()


def packed() -> Step:
    from fastrank.kernels.packing import pack

    dense, mask = torch.randn(_SHAPE), _mask()
    return lambda: pack(dense, mask)


def unpacked() -> Step:
    from fastrank.kernels.packing import pack, unpack_add_

    dense, mask = torch.randn(_SHAPE), _mask()
    values = pack(dense, mask)
    return lambda: unpack_add_(dense, values, 0.0)


def aggregated() -> Step:
    """Four clients' updates under one mask."""
    from fastrank.kernels.packing import aggregate, pack

    mask = _mask()
    clients = [pack(torch.randn(_SHAPE), mask) for _ in range(_CLIENTS)]
    return lambda: aggregate(clients, [1.0] * _CLIENTS)


def svd() -> Step:
    """Four sums of 16 thin products cut to rank 4."""
    from fastrank.kernels.svd import FactoredSum, truncated_svd

    operand = FactoredSum(torch.randn(4, 64, 16), torch.randn(4, 16, 48))
    return lambda: truncated_svd(operand, 4)


# case -> what is counted -> its builder; "peft" where PEFT has an equivalent
CASES: dict[str, dict[str, Callable[[], Step]]] = {
    "patched layer": {"fastrank": partial(patched, 0.0), "peft": partial(peft, 0.0)},
    "patched layer, dropout": {"fastrank": partial(patched, 0.1), "peft": partial(peft, 0.1)},
    "lowrank_linear": {"fastrank": partial(op, 0.0), "peft": partial(peft, 0.0)},
    "lowrank_linear, dropout": {"fastrank": partial(op, 0.1), "peft": partial(peft, 0.1)},
    "lowrank_add": {"fastrank": add},
    "grouped_lowrank_linear": {"fastrank": grouped, "peft": peft_loop},
    "mask positions": {"fastrank": positions},
    "pack": {"fastrank": packed},
    "unpack_add_": {"fastrank": unpacked},
    "aggregate": {"fastrank": aggregated},
    "truncated_svd": {"fastrank": svd},
}


def built(name: str, variant: str) -> Step:
    """A step of CASES, with the same draws every time."""
    torch.manual_seed(0)
    return CASES[name][variant]()


def why_not() -> str | None:
    """Why nothing can be counted here, or None."""
    for tool in ("valgrind", "callgrind_control"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed; Debian has it: apt-get install valgrind"
    if not torch._C._valgrind_supported_platform():
        return "this build of torch knows no Valgrind"
    return None


def run(out: str | Path | None = None, only: Sequence[str] = ()) -> dict[str, Any]:
    """Count the cases and return `environment` and `counts`, written to `out` where that is given.

    There are no times, so `rows`, where readers of results files look for them, is empty.

    Args:
        only: names of CASES; all where it is empty.

    Raises:
        UsageError: an unknown case, or no Valgrind.
    """
    if unknown := sorted(set(only) - CASES.keys()):
        raise UsageError(f"no case is called {unknown[0]!r}; choose among {', '.join(CASES)}")
    if reason := why_not():
        raise UsageError(reason)
    names = list(only) or list(CASES)
    counts = _counted(names)
    rows = []
    for name, variant in _pairs(names):
        several = sorted(counts[name, variant])
        row = {"case": name, "variant": variant, "instructions": several[len(several) // 2]}
        rows.append(row | {"lowest": several[0], "highest": several[-1], "calls": _CALLS})
    found = {"environment": environment(torch.device("cpu")), "rows": [], "counts": rows}
    found["environment"] |= {"threads": 1, "valgrind": _version()}
    if out is not None:
        lines = [json.dumps(row) for row in rows]
        text = '{\n"environment": ' + json.dumps(found["environment"])
        text += ',\n"rows": [],\n"counts": [\n'
        Path(out).write_text(text + ",\n".join(lines) + "\n]\n}\n")
    return found


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, variant) for name in names for variant in CASES[name]]


def _counted(names: Sequence[str]) -> dict[tuple[str, str], list[int]]:
    """(case, variant) -> instructions a call, of each count."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--collect-atstart=no"]
        command += [f"--callgrind-out-file={folder}/out", sys.executable, "-m"]
        command += [__spec__.name, "--count", *names]
        # where callgrind_control and Valgrind meet
        environ = os.environ | _ENVIRONMENT | {"TMPDIR": folder}
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"counting failed under Valgrind:\n{done.stdout}\n{done.stderr}")
        return _read(Path(folder), _pairs(names))


def _read(folder: Path, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], list[int]]:
    """What callgrind dumped into out.1, out.2, ...: _COUNTS for each pair, in order."""
    totals = []
    for i in range(len(pairs) * _COUNTS):
        text = (folder / f"out.{i + 1}").read_text()
        found = re.search(r"^totals: (\d+)", text, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"callgrind's dump {i + 1} of {len(pairs) * _COUNTS} has no totals")
        totals.append(int(found.group(1)) // _CALLS)
    return {pair: totals[i * _COUNTS :][:_COUNTS] for i, pair in enumerate(pairs)}


def _count(names: Sequence[str]) -> None:
    """The counting process itself: one dump for each count."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, variant in _pairs(names):
        step = built(name, variant)
        for _ in range(_WARM):
            step()
        gc.collect()
        gc.disable()
        _instrument("on")
        for _ in range(_COUNTS):
            torch._C._valgrind_toggle()
            for _ in range(_CALLS):
                step()
            torch._C._valgrind_toggle_and_dump_stats()
        _instrument("off")
        gc.enable()


def _instrument(state: str) -> None:
    """Instrumentation costs a factor of ten or so, so what isn't counted goes without."""
    command = ["callgrind_control", f"--instr={state}", str(os.getpid())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or "OK" not in done.stdout:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")


def _version() -> str:
    done = subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=True)
    return done.stdout.strip().removeprefix("valgrind-")


class OpCount(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the ops that torch dispatches in here, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def dispatched(step: Step) -> int:
    """Ops that one warm call dispatches, its backward's included."""
    for _ in range(2):
        step()
    with OpCount() as counted:
        step()
    return counted.count


def table(found: dict[str, Any]) -> str:
    """The counts as people read them."""
    known = {(row["case"], row["variant"]): row["instructions"] for row in found["counts"]}
    lines = [f"{'case':24} {'fastrank':>12} {'PEFT':>12}  fastrank / PEFT"]
    for name in dict.fromkeys(row["case"] for row in found["counts"]):
        ours, theirs = known[name, "fastrank"], known.get((name, "peft"))
        other = f"{theirs:12,}  {ours / theirs:.2f}" if theirs else f"{'-':>12}"
        lines.append(f"{name:24} {ours:12,} {other}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastrank.bench.instructions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", metavar="FILE.json", help="where the counts go")
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="; ".join(CASES))
    parser.add_argument("--count", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.count:
        _count(given.count)
        return 0
    try:
        print(table(run(given.out, given.only)))
    except UsageError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
