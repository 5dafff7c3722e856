"""Launchers of truncated_svd's products with whole matrices, and of what prepares them.

A block of vectors is fp32 (G, rows, q), contiguous unless strides are passed on. Sizes, never
values, decide tiles and splits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrank.kernels.common.launch import cdiv, gpu_of, launch, launch_options, split_count
from fastrank.kernels.packing.draws import SKETCH
from fastrank.kernels.svd.fused import (
    svd_draw_kernel,
    svd_entries_kernel,
    svd_measure_kernel,
    svd_scale_kernel,
)
from fastrank.kernels.svd.fused_products import svd_product_kernel, svd_sparse_kernel
from fastrank.kernels.svd.operands import NONFINITE
from fastrank.kernels.svd.sparse import SparseBatch

# elements that a program measures or scales at a time
MEASURE_BLOCK = 1024
_MOST_CHUNKS = 64
# rows of a sparse product, by the width of the block: a row's vectors are read whole
SPARSE_TILES = {16: (16, 2), 32: (8, 2), 64: (8, 4), 128: (4, 4)}  # width: rows, warps
SPARSE_UNROLL = 4
# BLOCK_M, BLOCK_K, warps, stages by BLOCK_Q
PRODUCT_TILES = {32: (64, 32, 4, 2), 64: (64, 32, 8, 2)}


class Scales(NamedTuple):
    """Facts of each matrix, see svd_scale_kernel."""

    multiplier: Tensor  # fp32 (G); 0 where it isn't finite
    norm2: Tensor  # float64 (G)
    status: Tensor  # int32 (G)


class Combine(NamedTuple):
    """One step of a recurrence: out = α A X + β Y + γ Z, with (G, 4) coefficients."""

    coefficients: Tensor  # fp32 (G, 4), the last unused; rows may be apart
    y: Tensor
    z: Tensor
    out: Tensor  # may be z


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def launch_keywords(like: Tensor, warps: int, stages: int = 1) -> dict:
    """Keywords of a launch on the device that this tensor is on."""
    return launch_options(warps, stages, gpu_of(like.device).hip)


def precision(device: torch.device) -> str:
    """input_precision of fp32 dots: three tf32 products where there are such, else fp32."""
    gpu = gpu_of(device)
    return "tf32x3" if gpu.capability.startswith("sm_") else "ieee"


def seed_tensor(seed: int, device: torch.device) -> Tensor:
    """The 64-bit seed, int64 [1], filled on the device: a copy from the host would wait."""
    signed = (seed + 2**63) % 2**64 - 2**63
    return torch.full((1,), signed, dtype=torch.int64, device=device)


def measure(A: Tensor | SparseBatch) -> Scales:
    """Multiplier, norm and finiteness of each matrix of a dense [G, N, K] or sparse batch."""
    if isinstance(A, SparseBatch):
        (G, rows, columns), values = A.shape, A.values
        strides, starts, each = (0, 0, 0), A.row_starts, cdiv(values.shape[0], G)
    else:
        (G, rows, columns), values = A.shape, A
        strides, starts, each = A.stride(), None, rows * columns
    units = gpu_of(values.device).units
    chunks = split_count(G, cdiv(each, MEASURE_BLOCK), _MOST_CHUNKS, 8 * units)
    where = {"device": values.device}
    largest = torch.empty(G, chunks, dtype=torch.float32, **where)
    square = torch.empty(G, chunks, dtype=torch.float64, **where)
    launch(
        svd_measure_kernel,
        (G * chunks,),
        a_ptr=values,
        starts_ptr=starts,
        largest_ptr=largest,
        square_ptr=square,
        rows=rows,
        columns=columns,
        stride_g=strides[0],
        stride_n=strides[1],
        stride_k=strides[2],
        chunks=chunks,
        BLOCK=MEASURE_BLOCK,
        SPARSE=starts is not None,
        **launch_keywords(values, 4),
    )
    found = Scales(
        torch.empty(G, dtype=torch.float32, **where),
        torch.empty(G, dtype=torch.float64, **where),
        torch.empty(G, dtype=torch.int32, **where),
    )
    launch(
        svd_scale_kernel,
        (G,),
        largest_ptr=largest,
        square_ptr=square,
        multiplier_ptr=found.multiplier,
        norm2_ptr=found.norm2,
        status_ptr=found.status,
        chunks=chunks,
        nonfinite=NONFINITE,
        BLOCK=_MOST_CHUNKS,
        **launch_keywords(values, 1),
    )
    return found


def entries(batch: SparseBatch, scales: Scales) -> tuple[Tensor, Tensor]:
    """values times their matrix's multiplier: by rows, and in the order by columns."""
    G, rows, _ = batch.shape
    each = cdiv(batch.values.shape[0], G)
    units = gpu_of(batch.values.device).units
    chunks = split_count(G, cdiv(each, MEASURE_BLOCK), _MOST_CHUNKS, 8 * units)
    by_row, by_column = torch.empty_like(batch.values), torch.empty_like(batch.values)
    launch(
        svd_entries_kernel,
        (G * chunks,),
        values_ptr=batch.values,
        order_ptr=batch.order,
        starts_ptr=batch.row_starts,
        multiplier_ptr=scales.multiplier,
        by_row_ptr=by_row,
        by_column_ptr=by_column,
        rows=rows,
        chunks=chunks,
        BLOCK=MEASURE_BLOCK,
        **launch_keywords(by_row, 4),
    )
    return by_row, by_column


def draw(seed: Tensor, rows: int, q: int) -> Tensor:
    """The sketch Ω, fp32 (rows, q)."""
    out = torch.empty(rows, q, dtype=torch.float32, device=seed.device)
    launch(
        svd_draw_kernel,
        (cdiv(rows, 32), cdiv(q, 32)),
        out_ptr=out,
        seed_ptr=seed,
        rows=rows,
        q=q,
        purpose=SKETCH << 24,
        BLOCK_M=32,
        BLOCK_Q=32,
        **launch_keywords(out, 4),
    )
    return out


class Sparse:
    """The matrices of a sparse batch times their multipliers, as two products."""

    def __init__(self, batch: SparseBatch, scales: Scales) -> None:
        self.shape, self.device = batch.shape, batch.values.device
        by_row, by_column = entries(batch, scales)
        self._rows = (batch.row_starts, batch.columns, by_row)
        self._columns = (batch.column_starts, batch.rows, by_column)

    def apply(self, X: Tensor, combine: Combine | None = None) -> Tensor:
        """A X (G, N, q) for X (G, K, q) or (K, q); or a recurrence's step."""
        return self._product(self._rows, self.shape[1], X, combine, None)

    def apply_t(self, Y: Tensor, gate: Tensor | None = None) -> Tensor:
        """Aᵀ Y (G, K, q); not written where gate[g, 0] is 0."""
        return self._product(self._columns, self.shape[2], Y, None, gate)

    def _product(
        self,
        lines: tuple[Tensor, Tensor, Tensor],
        rows: int,
        X: Tensor,
        combine: Combine | None,
        gate: Tensor | None,
    ) -> Tensor:
        G, q = self.shape[0], X.shape[-1]
        gate = combine.coefficients if combine else gate
        out = combine.out if combine else X.new_empty(G, rows, q)
        block_q = min(128, max(16, power_of_two(q)))
        block_m, warps = SPARSE_TILES[block_q]
        launch(
            svd_sparse_kernel,
            (G * cdiv(rows, block_m), cdiv(q, block_q)),
            out_ptr=out,
            x_ptr=X,
            y_ptr=combine.y if combine else None,
            z_ptr=combine.z if combine else None,
            starts_ptr=lines[0],
            indices_ptr=lines[1],
            values_ptr=lines[2],
            coefficients_ptr=gate,
            rows=rows,
            q=q,
            stride_xg=X.stride(0) if X.ndim == 3 else 0,
            stride_c=0 if gate is None else gate.stride(0),
            BLOCK_M=block_m,
            BLOCK_Q=block_q,
            UNROLL=SPARSE_UNROLL,
            GATED=gate is not None,
            COMBINE=combine is not None,
            **launch_keywords(X, warps),
        )
        return out


class Dense:
    """Dense matrices [G, N, K] of any strides times their multipliers, as two products."""

    def __init__(self, A: Tensor, scales: Scales) -> None:
        self.shape, self.device = tuple(A.shape), A.device
        self._A, self._multiplier = A, scales.multiplier

    def apply(self, X: Tensor, combine: Combine | None = None) -> Tensor:
        """As Sparse.apply."""
        return product(self._A, X, self._multiplier, combine)

    def apply_t(self, Y: Tensor, gate: Tensor | None = None) -> Tensor:
        """As Sparse.apply_t."""
        return product(self._A.mT, Y, self._multiplier, gate=gate)


def product(
    A: Tensor,
    X: Tensor,
    multiplier: Tensor | None = None,
    combine: Combine | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """A X (G, M, q) in fp32 for A [G, M, K] and X (G, K, q) or (K, q), any strides."""
    (G, M, K), q = A.shape, X.shape[-1]
    gate = combine.coefficients if combine else gate
    out = combine.out if combine else X.new_empty(G, M, q)
    block_q = 32 if q <= 32 else 64
    block_m, block_k, warps, stages = PRODUCT_TILES[block_q]
    launch(
        svd_product_kernel,
        (G * cdiv(M, block_m), cdiv(q, block_q)),
        out_ptr=out,
        a_ptr=A,
        x_ptr=X,
        y_ptr=combine.y if combine else None,
        z_ptr=combine.z if combine else None,
        multiplier_ptr=multiplier,
        coefficients_ptr=gate,
        M=M,
        K=K,
        q=q,
        stride_ag=A.stride(0),
        stride_am=A.stride(1),
        stride_ak=A.stride(2),
        stride_xg=X.stride(0) if X.ndim == 3 else 0,
        stride_xk=X.stride(-2),
        stride_xq=X.stride(-1),
        stride_c=0 if gate is None else gate.stride(0),
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_Q=block_q,
        SCALED=multiplier is not None,
        GATED=gate is not None,
        COMBINE=combine is not None,
        PRECISION=precision(X.device),
        **launch_keywords(X, warps, stages),
    )
    return out
