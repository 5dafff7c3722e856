"""Limits of the GPUs that kernels are compiled for: peaks for a roofline, and what fits at once.

Occupancy is what registers and shared memory allow, nothing else (barriers and scalar registers are
never the first to run out here).

NVIDIA, warps a multiprocessor (SM), after NVIDIA's occupancy calculator and the table "Technical
Specifications per Compute Capability" of the CUDA C++ Programming Guide, 8.0 and 9.0 alike but for
shared memory: 64 warps, 32 blocks, 4 partitions of 16,384 registers, given out by the warp in units
of 256; 164 KiB (8.0) or 228 KiB (9.0) of shared memory in units of 128 bytes, 1 KiB of which the
driver takes for every block.

    by registers  4 floor(16384 / ceil256(32 registers)) warps, in whole blocks
    by memory     floor(all / ceil128(shared + 1024)) blocks

AMD gfx942, waves a SIMD, after LLVM's AMDGPU back end (AMDGPUBaseInfo,
getNumWavesPerEUWithNumVGPRs; the assembler prints the register bound as "Occupancy"): 4 SIMDs a
compute unit (CU), 8 waves each, 512 vector registers, both kinds together, in units of 8; 64 KiB of
LDS a CU in units of 512 bytes.

    by registers  floor(512 / ceil8(registers)) waves a SIMD
    by memory     floor(65536 / ceil512(shared)) workgroups a CU, their waves spread over the SIMDs
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Machine(NamedTuple):
    """Figures of the makers' data sheets, dense."""

    target: str
    flops_per_second: float  # bf16
    bytes_per_second: float
    fp32_flops_per_second: float  # without rounding operands
    fp64_flops_per_second: float  # on matrix units


MACHINES = {
    "H200": Machine("sm_90", 989e12, 4.8e12, 67e12, 67e12),
    "H100": Machine("sm_90", 989e12, 3.35e12, 67e12, 67e12),
    "A100": Machine("sm_80", 312e12, 2.04e12, 19.5e12, 19.5e12),
}
MI300X = Machine("gfx942", 1307.4e12, 5.3e12, 163.4e12, 163.4e12)
# the one that a kernel's time is predicted for
PEAKS = {"sm_80": ("A100", MACHINES["A100"]), "sm_90": ("H200", MACHINES["H200"])}
PEAKS["gfx942"] = ("MI300X", MI300X)

# what good kernels reach of them
OF_FLOPS, OF_BYTES = 0.72, 0.85
# products of fp32 operands on NVIDIA's tensor cores, against bf16's rate
_SLOWER = {"half": 1.0, "tf32": 2.0, "tf32x3": 6.0}

MOST_REGISTERS = {"sm_80": 255, "sm_90": 255, "gfx942": 512}
_SHARED_OF_SM = {"sm_80": 164 << 10, "sm_90": 228 << 10}
# warps a multiprocessor, waves a SIMD
MOST_WARPS = {"sm_80": 64, "sm_90": 64, "gfx942": 8}


def predicted(moved: float, flops: Mapping[str, float], machine: Machine) -> tuple[float, str]:
    """Seconds at the roofline and what binds, "bytes" or "flops".

    Args:
        moved: bytes.
        flops: by what multiplies: "half", "tf32", "tf32x3", "ieee" (fp32 as it is), "fp64", or
            "fma" for what isn't a product of tiles.
    """
    moving = moved / (OF_BYTES * machine.bytes_per_second)
    computing = 0.0
    for kind, count in flops.items():
        if kind in ("ieee", "fma"):
            computing += count / (OF_FLOPS * machine.fp32_flops_per_second)
        elif kind == "fp64":
            computing += count / (OF_FLOPS * machine.fp64_flops_per_second)
        else:
            computing += count * _SLOWER[kind] / (OF_FLOPS * machine.flops_per_second)
    return (moving, "bytes") if moving >= computing else (computing, "flops")


def occupancy(target: str, registers: int, shared: int, warps: int) -> float:
    """Warps a multiprocessor (waves a SIMD on AMD) that can be there at once; 0: none fits.

    Args:
        registers: of a thread; both kinds of vector registers on AMD.
        shared: bytes of a program.
        warps: of a program.
    """
    if target == "gfx942":
        waves = min(8, 512 // _up(registers, 8))
        groups = 4 * waves // warps
        if shared:
            groups = min(groups, (64 << 10) // _up(shared, 512))
        return groups * warps / 4
    fitting = min(64, 4 * (16384 // _up(32 * registers, 256)))
    blocks = min(32, fitting // warps, _SHARED_OF_SM[target] // _up(shared + 1024, 128))
    return blocks * warps


def _up(n: int, unit: int) -> int:
    return -(-max(n, 1) // unit) * unit
