"""Which cases and variants `fastrank bench lowrank` measures on which device."""

from __future__ import annotations

import importlib.util
from itertools import product

import torch

from fastrank.bench import peers, variants
from fastrank.bench.cases import DTYPES, Case
from fastrank.bench.variants import Builder


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The grid of a device; quick: a few small cases of every kind."""
    return _gpu(quick) if device.type == "cuda" else _cpu(quick)


def _cpu(quick: bool) -> list[Case]:
    """Layers of encoders, in both dtypes; of one, also PEFT's other precisions in bf16."""
    rows = (64,) if quick else (128, 1024, 4096)
    shapes = ((96, 96), (96, 160)) if quick else ((384, 384), (768, 768), (768, 3072), (2048, 2048))
    ranks = (4,) if quick else (4, 16, 64)
    grid = product(rows, shapes, ranks, DTYPES, (0.0, 0.1))
    found = [Case(M, K, N, R, dtype, p) for M, (K, N), R, dtype, p in grid]
    size = (64, 96, 96, 4) if quick else (1024, 768, 768, 16)
    others = product(("autocast", "16-bit"), (0.0,) if quick else (0.0, 0.1))
    return found + [Case(*size, "bfloat16", p, precision=precision) for precision, p in others]


def _gpu(quick: bool) -> list[Case]:
    """Square layers and Llama-3-8B's MLP in bf16; what the targets are about comes first.

    Both of PEFT's usual precisions everywhere: float32 adapters under autocast, and 16-bit
    adapters. Float32 adapters without autocast, where it computes the branch in float32, at one
    size.
    """
    rows = (1024,) if quick else (8192, 2048, 32768)
    squares = [(d, d) for d in ((2048,) if quick else (4096, 2048, 8192))]
    shapes = squares + ([] if quick else [(4096, 14336), (14336, 4096)])
    ranks = (16,) if quick else (16, 8, 64)
    grid = product(ranks, rows, shapes, ("autocast", "16-bit", "peft"), (0.0, 0.1))
    return [
        Case(M, K, N, R, "bfloat16", p, bias=False, precision=precision)
        for R, M, (K, N), precision, p in grid
        if precision != "peft" or (R == 16 and rows[0] == M)
    ]


def builders(case: Case, device: torch.device) -> dict[str, Builder]:
    """Variant name -> builder, in the order of the first round.

    The peers take 16-bit adapters, as the designs they follow do.
    """
    made: dict[str, Builder] = {"frozen": variants.frozen, "peft": variants.peft}
    made["fastrank"] = variants.fastrank
    if not variants.has_peft():
        made["peft-schedule"] = peers.peft_schedule
    if device.type == "cuda" and case.precision == "16-bit":
        made["unsloth-schedule"] = peers.unsloth_schedule
        made["lorafusion-schedule"] = peers.lorafusion_schedule
    if device.type == "cuda" and _compiled(case):
        made["peft-compiled"] = peers.peft_compiled
    if device.type == "cuda" and importlib.util.find_spec("flag_gems") is not None:
        made["flaggems+peft"] = peers.flaggems
    return made


def _compiled(case: Case) -> bool:
    """The square layer that targets are about: each case is compiled anew, for many seconds."""
    return (case.M, case.K, case.N, case.R) in {(8192, 4096, 4096, 16), (1024, 2048, 2048, 16)}


def pairs(names: list[str]) -> list[tuple[str, str]]:
    """(variant, baseline) of a case's rows: fastrank over all, and all others over the frozen."""
    others = [name for name in names if name != "fastrank"]
    found = [("fastrank", name) for name in others]
    return found + [(name, "frozen") for name in others if name != "frozen"]
