"""Every specialisation that the launchers select, to be compiled ahead of time.

Found by planning calls whose widths, dtypes and strides between them take each tile and flag, not
listed by hand: what is compiled is what would run. Sizes are multiples of 16 where Triton
specialises on that.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrank.kernels.common.aot import TARGETS, signature_of
from fastrank.kernels.common.launch import plan_launches, pretend
from fastrank.kernels.svd import triton_path
from fastrank.kernels.svd.presets import PRESETS
from fastrank.kernels.svd.sparse import SparseBatch

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# widths of the block that take every tile: 16 more than the rank
RANKS = (16, 48, 64, 240)
# inner sizes of factors, of which the last goes through the range finder
INNER = (16, 32, 64, 160, 640)
# pointer types beside those that signature_of knows
_MORE = {torch.float64: "*fp64", torch.int32: "*i32"}


class Variant(NamedTuple):
    """One kernel with what is fixed at compile time."""

    kernel: Any
    types: dict[str, str]  # see common.aot.compile_kernel
    constants: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        parts = [self.kernel.__name__.removeprefix("svd_").removesuffix("_kernel")]
        blocks = [str(v) for n, v in self.constants.items() if n.startswith(("BLOCK", "ROWS"))]
        parts += ["x".join([*blocks, str(self.options["num_warps"])])]
        parts += [t[1:] for n, t in self.types.items() if n in ("a_ptr", "x_ptr")]
        parts += [n.lower() for n, v in self.constants.items() if v is True]
        ones = (n for n, v in self.constants.items() if n.startswith("stride_") and v == 1)
        parts += [n.removeprefix("stride_") for n in ones]
        return "-".join(parts)


def sparse_batch(G: int, N: int, K: int, nnz: int) -> SparseBatch:
    """Of the right shapes and types, for planning."""
    long, int_ = {"dtype": torch.int64}, {"dtype": torch.int32}
    return SparseBatch(
        shape=(G, N, K),
        values=torch.zeros(nnz),
        columns=torch.zeros(nnz, **int_),
        row_starts=torch.zeros(G * N + 1, **long),
        order=torch.zeros(nnz, **long),
        rows=torch.zeros(nnz, **int_),
        column_starts=torch.zeros(G * K + 1, **long),
    )


def variants(target: str) -> dict[str, Variant]:
    """name -> variant, of all that is launched on a key of TARGETS."""
    found: dict[str, Variant] = {}

    def note(kernel: Any, grid: tuple, arguments: dict) -> None:
        options = {n: arguments.pop(n) for n in OPTIONS if n in arguments}
        variant = Variant(kernel, *_signature(kernel, arguments), options)
        found[variant.name] = variant

    with plan_launches(note), pretend(TARGETS[target][1]):
        for _ in _calls():
            pass
    return found


def _calls() -> Iterator[None]:
    preset = PRESETS["default"]
    for rank in RANKS:
        yield triton_path.sparse(sparse_batch(2, 768, 768, 11808), rank, preset, 0)
    yield triton_path.sparse(sparse_batch(2, 16, 768, 256), 4, preset, 0)
    for dtype in DTYPES.values():
        A = torch.zeros(2, 768, 768, dtype=dtype)
        for rank in RANKS:
            for each in (A, A.mT):
                yield triton_path.dense(each, rank, preset, 0)
        for Q in INNER:
            B, A = torch.zeros(2, 1024, Q, dtype=dtype), torch.zeros(2, Q, 1024, dtype=dtype)
            yield triton_path.factored(B, A, None, 16, preset, 0)
            yield triton_path.factored(A.mT, B.mT, None, 16, preset, 0)
        B, A = torch.zeros(2, 64, 128, dtype=dtype), torch.zeros(2, 128, 1024, dtype=dtype)
        yield triton_path.factored(B, A, None, 16, preset, 0)


def _signature(kernel: Any, arguments: Mapping[str, Any]) -> tuple[dict, dict]:
    stands_in = torch.empty(0, dtype=torch.uint8)
    more = {
        name: _MORE[value.dtype]
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.dtype in _MORE
    }
    types, constants = signature_of(kernel, {**arguments, **dict.fromkeys(more, stands_in)})
    return types | more, constants
