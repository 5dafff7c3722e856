"""Compile Triton kernels ahead of time for GPUs that are not here, and read what came out."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastrank.kernels.common.launch import Gpu

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
# GPUs to compile for
TARGETS: dict[str, tuple[GPUTarget, Gpu]] = {
    "sm_80": (GPUTarget("cuda", 80, 32), Gpu("sm_80", 108, 163 << 10)),
    "sm_90": (GPUTarget("cuda", 90, 32), Gpu("sm_90", 132, 227 << 10)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Gpu("gfx942", 304, 64 << 10)),
}


# Hopper's and older tensor-core products, loads and stores of spilled registers, asynchronous
# copies to shared memory; AMD's matrix products
INSTRUCTIONS = ("HGMMA", "HMMA", "DMMA", "LDL", "STL", "LDGSTS", "v_mfma")


@dataclass(frozen=True)
class Report:
    """Static facts of one compiled kernel."""

    registers: int  # per thread; vector registers on AMD
    spills: int  # bytes of stack and local memory (NVIDIA); spilled registers (AMD)
    shared: int  # bytes a program
    wgmma: int  # warp-group matrix instructions of Hopper in the code
    # how often each of INSTRUCTIONS stands in the machine code, where asked for
    instructions: dict[str, int] | None = None


def compile_kernel(
    kernel: triton.JITFunction,
    types: Mapping[str, str],
    constants: Mapping[str, object],
    target: str,
    options: Mapping[str, object],
    count: bool = False,
) -> Report:
    """Compile one specialisation.

    Args:
        kernel: a function under @triton.jit, decorated without TRITON_INTERPRET.
        types: argument -> Triton type ("*bf16", "i32", "fp32"); "i32:16" for an integer that is a
            multiple of 16. Pointers are taken to be aligned to 16 bytes.
        constants: constexpr arguments, those that are None, and those specialised to 1.
        target: a key of TARGETS.
        options: launch options, num_warps and the like.
        count: whether to disassemble and count instructions.

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
        return Report(
            _field(text, "vgpr_count"), spills, shared, 0, _count(text) if count else None
        )
    cubin = compiled.asm["cubin"]
    registers, spills = _resources(cubin)
    counts = _count(_tool("nvdisasm", cubin, "-c")) if count else None
    return Report(registers, spills, shared, compiled.asm["ptx"].count("wgmma.mma_async"), counts)


def signature_of(kernel: triton.JITFunction, arguments: Mapping[str, object]) -> tuple[dict, dict]:
    """(types, constants) for compile_kernel, as Triton would specialise a launch.

    Args:
        kernel: a function under @triton.jit.
        arguments: name -> tensor, number, None or constexpr value, all of the kernel's arguments.
    """
    types: dict[str, str] = {}
    constants: dict[str, object] = {}
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            types[name] = f"*{_TYPES[value.dtype]}"
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            wide = "i64" if not -(2**31) <= value < 2**31 else "i32"
            if parameter.do_not_specialize:
                types[name] = wide
            elif value == 1:
                constants[name] = 1
            else:
                types[name] = f"{wide}:16" if value % 16 == 0 else wide
    return types, constants


def _count(text: str) -> dict[str, int]:
    """Occurrences as an opcode: a word that dots or underscores may follow."""
    found = {name: len(re.findall(rf"\b{name}", text)) for name in INSTRUCTIONS}
    return {name: times for name, times in found.items() if times}


def _field(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", text)
    if found is None:
        raise RuntimeError(f"no {name} in the metadata of the compiled kernel")
    return int(found.group(1))


def _tool(name: str, cubin: bytes, *options: str) -> str:
    """What one of the binary tools in Triton's wheel prints of a cubin."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack and local memory) of the one kernel in a cubin."""
    text = _tool("cuobjdump", cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local
