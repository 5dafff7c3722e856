"""The grouped kernels compiled for GPUs that are not here: no spills, shared memory fits, Hopper's
instructions used; and bound by Triton for one, where nothing that varies in training recompiles.

What is compiled is what the launchers ask for in steps of every dtype, tile and flag. The normal
run compiles a spread of it; the slow one everything.
"""

import functools
import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import NamedTuple

import pytest
import torch

from fastrank.bench.static_steps import MODES
from fastrank.bench.static_steps import grouped_step as step
from fastrank.kernels.common.launch import Gpu, plan_launches, pretend

pytestmark = pytest.mark.aot

TARGETS = ("sm_80", "sm_90", "gfx942")
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


# a spread of what is launched: of each kernel and kind of product, with heavy flags
SAMPLE = (
    r"shrink-64x32x64x.*-bf16-fp32-dot-bf16-ieee-masked-dropout",
    r"shrink-(64|32)x32x32x.*-bf16-fp32-dot-fp32-(tf32x3|ieee)-masked-dropout",
    r"shrink-16x64x16x.*-bf16-bf16-dot-bf16-ieee-dropout",
    r"expand-(64x64|32x64)x16x.*-fp32-(bf16|fp32)-dot-fp32-(tf32x3|ieee)-masked-dropout",
    r"gram-32x128x64x.*-bf16-fp32-fp32-dot-bf16-ieee-whole-masked-want_de",
    r"gram-32x128x32x.*-bf16-bf16-bf16-dot-bf16-ieee-whole-dropout-want_de",
    r"gram-32x64x32x.*-fp32-fp32-fp32-dot-fp32-ieee-whole-masked-want_de",
    r"finish-.*x64x.*-fp32-fp32-masked-want_de",
)


class Variant(NamedTuple):
    """One kernel with what is fixed at compile time."""

    kernel: object
    types: dict
    constants: dict
    options: dict

    @property
    def tile(self) -> tuple[int, ...]:
        blocks = (self.constants.get(f"BLOCK_{b}", 0) for b in "MWR")
        return (*blocks, self.options["num_warps"], self.options["num_stages"])

    @property
    def name(self) -> str:
        parts = [self.kernel.__name__.split("_")[1], "x".join(map(str, self.tile))]
        parts += [self.types[p][1:] for p in ("x_ptr", "q_ptr", "out_ptr") if p in self.types]
        if "DOT" in self.constants:
            parts += [f"dot-{self.constants['DOT']}-{self.constants['PRECISION']}"]
        return "-".join(parts + [n.lower() for n, v in self.constants.items() if v is True])


def steps(hip: bool) -> Iterator[dict]:
    """Steps that between them take every dtype, tile and flag there is."""
    for mode, ranks, rows, masked, p in product(
        MODES, (16, 32, 64), (16, 64), (False, True), (0.0, 0.1)
    ):
        if not (hip and mode == "fp32-tf32"):
            common = {"mode": mode, "masked": masked, "p": p}
            common |= {"rows": (rows, rows), "ranks": (ranks, ranks)}
            for need_dB in (False, True):  # where dB is wanted, it is what de comes from
                yield common | {"needs": (True, True, need_dB, True)}


@functools.cache
def table(target: str) -> dict[str, Variant]:
    """name -> variant, of all that is launched on a target."""
    from fastrank.kernels.common.aot import TARGETS as KNOWN
    from fastrank.kernels.common.aot import signature_of

    found: dict[str, Variant] = {}

    def note(kernel, grid, arguments):
        options = {n: arguments.pop(n) for n in OPTIONS if n in arguments}
        variant = Variant(kernel, *signature_of(kernel, arguments), options)
        found[variant.name] = variant

    gpu = KNOWN[target][1]
    before = torch.get_float32_matmul_precision()
    try:
        for arguments in steps(gpu.hip):
            torch.set_float32_matmul_precision(MODES[arguments["mode"]][3])
            # few units need no splits, many have as many as there are tiles
            for units in (1, 1024):
                with plan_launches(note), pretend(gpu._replace(units=units)):
                    step(**arguments)
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def complaints(target: str, name: str) -> list[str]:
    """What is wrong with a variant on a target; empty when nothing is."""
    from fastrank.kernels.common.aot import compile_kernel
    from fastrank.kernels.lowrank.choices_file import SMALL_SHARED

    variant = table(target)[name]
    report = compile_kernel(*variant[:3], target, variant.options)
    print(f"{target} {name}: {report}")
    found = []
    if report.spills:
        found.append(f"{target} {name} spills: {report}")
    if report.shared > SMALL_SHARED:
        found.append(f"{target} {name} takes more shared memory than {SMALL_SHARED}: {report}")
    half = "dot-bf16" in name or "dot-fp16" in name
    # warp groups multiply 64 rows at a time
    whole = variant.tile[1 if name.startswith("gram") else 0] >= 64
    if target == "sm_90" and half and whole and report.wgmma == 0:
        found.append(f"{target} {name} doesn't use warp-group products: {report}")
    return found


def sampled(target: str) -> list[str]:
    """One variant for each pattern of SAMPLE that is launched on the target."""
    found = []
    for pattern in SAMPLE:
        found += [name for name in table(target) if re.fullmatch(pattern, name)][-1:]
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_a_spread_of_variants(target):
    names = sampled(target)
    assert {name.split("-")[0] for name in names} == {"shrink", "expand", "gram", "finish"}
    assert len(names) >= len(SAMPLE)
    assert [c for name in names for c in complaints(target, name)] == []


@pytest.mark.parametrize("target", TARGETS)
def test_every_tile_is_launched(target):
    """What is compiled leaves out nothing that the launchers could choose."""
    from fastrank.kernels.lowrank.grouped_launchers import (
        FEW,
        FINISH,
        MOST_EXPAND_RANKS,
        TILES,
    )

    expected, found = set(), set()
    for (operands, block_r), tiles in TILES.items():
        if not (target == "gfx942" and operands == "tf32"):
            several = (tiles | {"finish": FINISH}, FEW[operands])
            for name, tile in ((n, t) for by in several for n, t in by.items()):
                most = MOST_EXPAND_RANKS[operands] if name == "expand" else block_r
                expected.add((name, min(block_r, most), tile))
    for name, variant in table(target).items():
        block_m, block_w, block_r, warps, stages = variant.tile
        found.add((name.split("-")[0], block_r, (block_m, block_w, warps, stages)))
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant(target):
    names = list(table(target))
    assert len(names) > 400
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(complaints, [target] * len(names), names, chunksize=8)
        assert [c for several in found for c in several] == []


@pytest.fixture
def compiled(monkeypatch):
    """(kernel, hash of what was compiled) of each distinct launch, bound by Triton for sm_90."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    seen = set()

    def compile_only(kernel, grid, arguments):
        assert all(n > 0 for n in grid)
        found = kernel.run(grid=grid, warmup=True, **arguments)
        seen.add((kernel.__name__, found.hash))

    monkeypatch.setattr(driver, "_active", Driver())
    with plan_launches(compile_only), pretend(Gpu("sm_90", 4, 227 << 10)):
        yield seen


def test_nothing_that_varies_in_training_recompiles(compiled):
    """Groups, rows, ranks, the draw, and where counts and masks are."""
    step()
    first = set(compiled)
    assert {name for name, _ in first} == {f"grouped_{n}_kernel" for n in ("shrink", "expand")} | {
        "grouped_gram_kernel"
    }
    step(rows=(1, 130))
    step(rows=(17,), ranks=(16,))
    step(rows=(0, 33, 100, 0), ranks=(0, 1, 15, 7))
    step(rows=(40,) * 20, ranks=(1,) * 20)
    step(p=0.5, ids=True)
    step(on_device=True)
    step(rows=(20,) * 7, ranks=(3,) * 7, on_device=True)
    assert compiled == first
