"""Compile Triton kernels ahead of time for GPUs that are not here, and read what came out."""

import functools
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastrank.kernels.common.launch import Gpu

# GPUs to compile for
TARGETS: dict[str, tuple[GPUTarget, Gpu]] = {
    "sm_80": (GPUTarget("cuda", 80, 32), Gpu("sm_80", 108, 163 << 10)),
    "sm_90": (GPUTarget("cuda", 90, 32), Gpu("sm_90", 132, 227 << 10)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Gpu("gfx942", 304, 64 << 10)),
}


@dataclass(frozen=True)
class Report:
    """Static facts of one compiled kernel."""

    registers: int  # per thread; vector registers on AMD
    spills: int  # bytes of stack and local memory (NVIDIA); spilled registers (AMD)
    shared: int  # bytes a program
    wgmma: int  # warp-group matrix instructions of Hopper in the code


def compile_kernel(
    kernel: triton.JITFunction,
    types: Mapping[str, str],
    constants: Mapping[str, object],
    target: str,
    options: Mapping[str, object],
) -> Report:
    """Compile one specialisation.

    Args:
        kernel: a function under @triton.jit, decorated without TRITON_INTERPRET.
        types: argument -> Triton type ("*bf16", "i32", "fp32"); "i32:16" for an integer that is a
            multiple of 16. Pointers are taken to be aligned to 16 bytes.
        constants: constexpr arguments, those that are None, and those specialised to 1.
        target: a key of TARGETS.
        options: launch options, num_warps and the like.

    Raises:
        ValueError: types and constants don't name each argument exactly once.
    """
    names = kernel.arg_names
    if sorted([*types, *constants]) != sorted(names):
        wrong = set(names).symmetric_difference([*types, *constants])
        raise ValueError(f"{kernel.__name__}: give each argument one type or value; wrong: {wrong}")
    signature = {n: "constexpr" if n in constants else types[n].split(":")[0] for n in names}
    divisible = [n for n in types if types[n].startswith("*") or types[n].endswith(":16")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in divisible}
    source = ASTSource(kernel, signature=signature, constexprs=dict(constants), attrs=attributes)
    compiled = triton.compile(source, target=TARGETS[target][0], options=dict(options))
    shared = compiled.metadata.shared
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        spills = _field(text, "vgpr_spill_count") + _field(text, "sgpr_spill_count")
        return Report(_field(text, "vgpr_count"), spills, shared, 0)
    registers, spills = _resources(compiled.asm["cubin"])
    return Report(registers, spills, shared, compiled.asm["ptx"].count("wgmma.mma_async"))


def _field(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", text)
    if found is None:
        raise RuntimeError(f"no {name} in the metadata of the compiled kernel")
    return int(found.group(1))


@functools.cache
def _cuobjdump() -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack and local memory) of the one kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local
