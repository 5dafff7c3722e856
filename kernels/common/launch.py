"""How kernels are launched, and for which device: small rules shared by the launchers."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Gpu(NamedTuple):
    """What launches depend on."""

    capability: str  # "sm_90", "gfx942"; "none" where kernels are interpreted
    units: int  # streaming multiprocessors (compute units)
    shared: int  # bytes of shared memory that one program may have

    @property
    def hip(self) -> bool:
        return self.capability.startswith("gfx")


# what stands in where there is no device to ask: the interpreter
INTERPRETED = Gpu("none", 4, 64 << 10)

_pretended: Gpu | None = None
_planner: Callable[[Any, tuple, dict], None] | None = None


@functools.cache
def _ask(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return INTERPRETED
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        capability = found.gcnArchName.split(":")[0]
        return Gpu(capability, found.multi_processor_count, found.shared_memory_per_block)
    capability = f"sm_{found.major}{found.minor}"
    return Gpu(capability, found.multi_processor_count, found.shared_memory_per_block_optin)


def gpu_of(device: torch.device) -> Gpu:
    """Facts of a device, asked for once."""
    return _ask(device) if _pretended is None else _pretended


@contextmanager
def pretend(gpu: Gpu) -> Iterator[None]:
    """Launches in here are sized and chosen as on this GPU: for planning and tests."""
    global _pretended
    before, _pretended = _pretended, gpu
    try:
        yield
    finally:
        _pretended = before


@contextmanager
def plan_launches(planner: Callable[[Any, tuple, dict], None]) -> Iterator[None]:
    """Hand each launch in here to planner(kernel, grid, arguments) instead of running it."""
    global _planner
    before, _planner = _planner, planner
    try:
        yield
    finally:
        _planner = before


def launch(kernel: Any, grid: tuple, **arguments: Any) -> None:
    """kernel[grid](**arguments), unless plan_launches() has it go elsewhere."""
    if _planner is None:
        kernel[grid](**arguments)
    else:
        _planner(kernel, grid, arguments)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def split_count(programs: int, pieces: int, most: int, units: int) -> int:
    """Into how many parts a reduction of `pieces` tiles is cut so that two programs run a unit."""
    return max(1, min(2 * units // max(programs, 1), pieces, most))


def launch_options(num_warps: int, num_stages: int, hip: bool) -> dict:
    """Keywords of a Triton launch."""
    found = {"num_warps": num_warps, "num_stages": num_stages}
    found["enable_fp_fusion"] = True  # a fused multiply-add only drops a rounding
    if not hip:
        # the hardware's limit, said aloud: left alone, ptxas spills a few bytes now and then
        # to fit one more program on a multiprocessor
        found["maxnreg"] = min(255, 65536 // (32 * num_warps))
    return found
