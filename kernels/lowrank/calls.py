"""What every launch of one call shares: compacted adapters, masks, precision and choices."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrank.kernels.common.launch import Gpu, gpu_of
from fastrank.kernels.lowrank.arguments import Aux, Branch
from fastrank.kernels.lowrank.choices import Table, table_for
from fastrank.kernels.lowrank.compaction import select

HALVES = (torch.bfloat16, torch.float16)


class Call(NamedTuple):
    """One call of the op, as the launchers need it."""

    branch: Branch
    aux: Aux
    dot: torch.dtype  # operand dtype of the branch's dots
    precision: str  # input_precision of fp32 dots
    masks: tuple[Tensor | None, Tensor | None]  # active and trainable, one byte a rank, or Nones
    gpu: Gpu
    table: Table

    @property
    def operands(self) -> str:
        """What multiplies in the branch, as tables of choices name it."""
        if self.dot != torch.float32:
            return "half"
        return "ieee" if self.precision == "ieee" else "tf32"

    @property
    def gemm_operands(self) -> str:
        return "half" if self.dot != torch.float32 else "mixed"

    def tile(self, kernel: str, M: int, W: int) -> tuple[int, Any]:
        """(BLOCK_R, tile) for the ranks of this call."""
        operands = "any" if kernel == "finish" else self.operands
        return self.table.tile(kernel, operands, self.branch.kept, M, W)

    @property
    def dropout(self) -> bool:
        return self.branch.dropout_p > 0.0 and self.branch.trained > 0

    @property
    def masked(self) -> bool:
        return self.masks[0] is not None


def dot_dtype(x: torch.dtype, adapters: torch.dtype, branch: Branch) -> torch.dtype:
    """The dtype that operands are rounded to: x's, or fp32 for adapters that differ from it."""
    if branch.autocast is not None or branch.precision == "compute" or x == adapters:
        return x
    return torch.float32


def dot_precision(x: torch.dtype, dot: torch.dtype, hip: bool) -> str:
    """input_precision for dots of this operand dtype.

    Sixteen-bit x against fp32 adapters: three tf32 products, exact in x and to 2**-22 in the
    adapters. Pure fp32 follows torch's own switch. AMD matrix cores multiply fp32 as it is.
    """
    if dot != torch.float32 or hip:
        return "ieee"
    if x != torch.float32:
        return "tf32x3"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@functools.cache
def _ones(ranks: int, device: torch.device) -> Tensor:
    # cached across calls, so it must not be born an inference tensor
    with torch.inference_mode(False):
        return torch.ones(ranks, dtype=torch.uint8, device=device)


def start(
    x_dtype: torch.dtype, A: Tensor, B: Tensor, e: Tensor | None, branch: Branch, aux: Aux
) -> tuple[Call, Tensor, Tensor, Tensor | None]:
    """The call, and A, B, e compacted; A and B in fp32 or the dot's dtype, e in fp32."""
    gpu = gpu_of(A.device)
    dot = dot_dtype(x_dtype, A.dtype, branch)
    A, B, e = select(A, B, e, branch, aux)
    if A.dtype not in (dot, torch.float32):
        A, B = A.to(dot), B.to(dot)
    e = None if e is None else e.float().contiguous()
    active, trainable = (None if m is None else m.contiguous().view(torch.uint8) for m in aux[3:])
    frozen_by_host = branch.dropout_p > 0.0 and 0 < branch.trained < branch.kept
    if active is not None or trainable is not None or frozen_by_host:
        ones = _ones(branch.kept, A.device)
        active = ones if active is None else active
        trainable = ones if trainable is None else trainable
    if aux.row_ids is not None:
        aux = aux._replace(row_ids=aux.row_ids.contiguous())
    precision = dot_precision(x_dtype, dot, gpu.hip)
    call = Call(branch, aux, dot, precision, (active, trainable), gpu, table_for(gpu))
    return call, A, B, e
