"""Every specialisation that the launchers can select, to be compiled ahead of time.

Found by planning launches of every format, layout and kind of mask, not by a second list.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from fastrank.kernels.common.launch import Gpu, plan_launches, pretend
from fastrank.kernels.packing import draws, launchers
from fastrank.kernels.packing.formats import DTYPES, SCALED, block_count
from fastrank.kernels.packing.mask import SparseMask
from fastrank.kernels.packing.packed import Packed

_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# the shortest, the usual and the longest block of scales; those between compile alike
_BLOCKS = (16, 256, 4096)


class Variant(NamedTuple):
    """One kernel with what is fixed at compile time, as common.aot takes it."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        parts = [self.kernel.__name__.removeprefix("packing_").removesuffix("_kernel")]
        parts += [self.types[p][1:] for p in ("dense_ptr", "values_ptr") if p in self.types]
        for name in ("FORMAT", "TYPE", "BLOCK", "STRATA", "WIDTH"):
            if name in self.constants:
                parts.append(f"{name.lower()}-{self.constants[name]}")
        flags = [n.lower() for n, v in self.constants.items() if v is True]
        return "-".join(parts + flags)


def _packed(mask: SparseMask, dtype: torch.dtype, block: int) -> Packed:
    scale = torch.ones(block_count(mask.nnz, block)) if dtype in SCALED else None
    values = torch.zeros(mask.nnz, dtype=dtype)
    return Packed(values, scale, torch.zeros(2, dtype=torch.int64), mask, block)


def _formats() -> Iterator[tuple[torch.dtype, int]]:
    for dtype in DTYPES:
        for block in _BLOCKS if dtype in SCALED else (256,):
            yield dtype, block


def _plan() -> None:
    """One launch of each."""
    mask, cpu = SparseMask((64, 128), 0.01), torch.device("cpu")
    launchers.positions(mask, cpu)
    bernoulli = SparseMask((64, 128), 0.01, scheme="bernoulli")
    counts = launchers.count_kept(bernoulli, cpu)
    launchers.write_kept(bernoulli, torch.zeros_like(counts), 80)
    source = draws.stream(0, "", draws.ROUNDING, 0)
    for dtype, block in _formats():
        packed = _packed(mask, dtype, block)
        for dense in _FLOATS:
            flat = torch.zeros(64, 128, dtype=dense)
            for at in (None, mask.positions()):
                for rounding in (None, source) if dtype == torch.int8 else (None,):
                    launchers.pack(flat, at, mask, dtype, block, rounding)
                launchers.unpack_add_(flat, at, packed, 0.5)
        launchers.aggregate([packed], [1.0])
        for stratum in (4, 32, 100):
            own = SparseMask((64, 128), 1 / stratum)
            launchers.aggregate_dense([_packed(own, dtype, block)], [1.0], torch.zeros(64, 128))


def variants(gpu: Gpu) -> dict[str, Variant]:
    """name -> variant, of all that is launched on a GPU."""
    from fastrank.kernels.common.aot import signature_of

    found: dict[str, Variant] = {}

    def note(kernel: Any, grid: tuple, arguments: dict) -> None:
        options = {n: arguments.pop(n) for n in _OPTIONS if n in arguments}
        variant = Variant(kernel, *signature_of(kernel, arguments), options)
        found[variant.name] = variant

    with plan_launches(note), pretend(gpu):
        _plan()
    return found
