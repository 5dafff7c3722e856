"""The launches of one adapted layer's step on a GPU that is not here.

The real path runs on tensors without storage: its launches are handed over instead of run, and
the vendor's products are seen on their way through torch. So a plan is what a GPU would be given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastrank.kernels.common.launch import Gpu, plan_launches, pretend
from fastrank.kernels.lowrank import core, triton_path

BF16, F32 = torch.bfloat16, torch.float32
# adapters' dtype and autocast of PEFT's precision modes over a bf16 base
MODES = {"16-bit": (BF16, None), "autocast": (F32, BF16), "peft": (F32, None)}
_OUTPUTS = {
    "shrink": ("part_ptr",),
    "expand": ("out_ptr",),
    "gram": ("part_ptr",),
    "dual": ("shrunk_ptr", "gram_ptr"),
    "finish": ("out_ptr", "de_ptr"),
    "gemm": ("out_ptr",),
}
_PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1}


@dataclass
class Launch:
    """One kernel.

    Args:
        name: "shrink", "gemm" and so on; "product" and "sum" are the vendor's.
        phase: "forward" or "backward".
        grid: programs, () for the vendor's.
        read, written: bytes, each tensor counted once.
        flops: of its dots, padding of the rank included, by what multiplies: "half", "tf32",
            "tf32x3" or "ieee".
        kernel, arguments: of a Triton launch.
    """

    name: str
    phase: str
    grid: tuple[int, ...]
    read: int
    written: int
    flops: dict[str, float] = field(default_factory=dict)
    kernel: Any = None
    arguments: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """Name, grid, megabytes read + written."""
        grid = "x".join(map(str, self.grid)) or "-"
        return f"{self.name} {grid} {self.read / 1e6:.2f}+{self.written / 1e6:.2f}"


def step_plan(
    M: int, K: int, N: int, R: int, gpu: Gpu, *, dropout: float = 0.0, mode: str = "autocast"
) -> list[Launch]:
    """Forward and backward with gradients of x, A and B, as the choices in force have it."""
    adapters, autocast = MODES[mode]

    def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, weight, dy = empty(M, K), empty(N, K), empty(M, N)
    A, B = empty(R, K, dtype=adapters), empty(N, R, dtype=adapters)
    seed = empty(1, dtype=torch.int64) if dropout else None
    options = (0.5, dropout, "triton", autocast, "peft")
    branch, aux = core.prepare(A, None, None, seed, None, *options)
    plan: list[Launch] = []
    with pretend(gpu), torch.no_grad():
        with _recorded(plan, "forward"):
            _, S, keep = triton_path.linear(x, weight, None, A, B, None, branch, aux)
        needs = (True, True, True, False)
        with _recorded(plan, "backward"):
            triton_path.backward(dy, weight, x, A, B, None, S, keep, branch, aux, needs, BF16)
    return plan


@contextmanager
def _recorded(plan: list[Launch], phase: str) -> Iterator[None]:
    def note(kernel: Any, grid: tuple, arguments: dict[str, Any]) -> None:
        plan.append(_triton_launch(kernel, grid, arguments, phase))

    class Vendor(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = [t for t in args if isinstance(t, Tensor)]
            if function in _PRODUCTS:
                a, b = args[_PRODUCTS[function] :][:2]
                flops = {"half": 2.0 * a.shape[0] * a.shape[1] * b.shape[1]}
                plan.append(_vendor_launch("product", phase, tensors, result, flops))
            elif function is torch.ops.aten.sum.dim_IntList:
                plan.append(_vendor_launch("sum", phase, tensors, result, {}))
            return result

    with plan_launches(note), Vendor():
        yield


def _vendor_launch(
    name: str, phase: str, read: list[Tensor], result: Tensor, flops: dict[str, float]
) -> Launch:
    return Launch(name, phase, (), sum(map(_bytes, read)), _bytes(result), flops)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _triton_launch(kernel: Any, grid: tuple, arguments: dict[str, Any], phase: str) -> Launch:
    name = kernel.__name__.removeprefix("lowrank_").removesuffix("_kernel")
    tensors = {n: t for n, t in arguments.items() if isinstance(t, Tensor)}
    outputs = {id(tensors[n]): tensors[n] for n in _OUTPUTS[name] if n in tensors}
    inputs = {id(t): t for t in tensors.values() if id(t) not in outputs}
    read = sum(map(_bytes, inputs.values()))
    written = sum(map(_bytes, outputs.values()))
    if arguments.get("ADD"):
        read += written
    flops = _flops(name, arguments)
    return Launch(name, phase, tuple(grid), read, written, flops, kernel, arguments)


def _flops(name: str, a: dict[str, Any]) -> dict[str, float]:
    if name == "finish":
        return {}
    ranks = math.ceil(a["R"] / a["BLOCK_R"]) * a["BLOCK_R"]
    skinny = 2.0 * a["M"] * a["W"] * ranks * (2 if name == "dual" else 1)
    kind = "half" if str(a["DOT"]) != "fp32" else a["PRECISION"]
    found = {kind: skinny}
    if name == "gemm":
        found["half"] = found.get("half", 0.0) + 2.0 * a["M"] * a["W"] * a["C"]
    return found
