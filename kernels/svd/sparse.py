"""Packed values as compressed rows and columns, for products with a block of vectors.

The G matrices of a batch stand behind each other: matrix g's row n is row g N + n. Built without a
host sync: counts come from the masks, everything else from sorting on the values' device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrank.kernels.svd.operands import PackedSparse


class SparseBatch(NamedTuple):
    """G sparse matrices (N, K), by rows and by columns."""

    shape: tuple[int, int, int]  # G, N, K
    values: Tensor  # fp32 (float64 where the operand was) [nnz]
    columns: Tensor  # int32 [nnz], of each value
    row_starts: Tensor  # int64 [G N + 1], into values
    order: Tensor  # int64 [nnz]: values[order] is sorted by matrix, column, row
    rows: Tensor  # int32 [nnz], of values[order]
    column_starts: Tensor  # int64 [G K + 1], into order

    @classmethod
    def of(cls, operand: PackedSparse) -> "SparseBatch":
        G, N, K = operand.shape
        device = operand.device
        values = torch.cat(list(operand.values))
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        # flat positions of the whole batch ascend, as they do within each mask
        flat = torch.cat([m.positions(device) + g * N * K for g, m in enumerate(operand.masks)])
        row = torch.div(flat, K, rounding_mode="floor")  # g N + n
        column = flat - row * K
        matrix = torch.div(row, N, rounding_mode="floor")
        by_column = matrix * K + column
        if G * K < 2**31:
            by_column = by_column.int()  # sorts in half the time
        order = torch.argsort(by_column, stable=True)
        return cls(
            shape=(G, N, K),
            values=values,
            columns=column.int(),
            row_starts=torch.searchsorted(row, torch.arange(G * N + 1, device=device)),
            order=order,
            rows=(row - matrix * N)[order].int(),
            column_starts=torch.searchsorted(
                by_column[order], torch.arange(G * K + 1, device=device, dtype=by_column.dtype)
            ),
        )
