"""Launchers of truncated_svd's kernels: tiles, grids, memory.

A block of vectors is fp32 (G, rows, q), contiguous unless strides are passed on. Sizes, never
values, decide tiles and splits; what depends on values (a matrix's polynomial degree, whether it
needs another orthogonalisation) is read by the kernels from device memory.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrank.kernels.common.launch import cdiv, gpu_of, launch, launch_options, split_count
from fastrank.kernels.svd.fused import (
    svd_draw_kernel,
    svd_entries_kernel,
    svd_finish_kernel,
    svd_measure_kernel,
    svd_scale_kernel,
)
from fastrank.kernels.svd.fused_factor import svd_factor_kernel, svd_filter_kernel
from fastrank.kernels.svd.fused_jacobi import svd_jacobi_kernel, svd_jacobi_memory_kernel
from fastrank.kernels.svd.fused_products import (
    svd_apply_kernel,
    svd_gram_kernel,
    svd_product_kernel,
    svd_sparse_kernel,
)
from fastrank.kernels.svd.operands import NONFINITE, NOT_CONVERGED, TruncatedSVD
from fastrank.kernels.svd.sparse import SparseBatch
from fastrank.kernels.packing.draws import REFILL, SKETCH

# elements that a program measures or scales at a time
MEASURE_BLOCK = 1024
_MOST_CHUNKS = 64
# rows of a sparse product, by the width of the block: a row's vectors are read whole
SPARSE_TILES = {16: (16, 2), 32: (8, 2), 64: (8, 4), 128: (4, 4)}  # width: rows, warps
SPARSE_UNROLL = 4
# BLOCK_M, BLOCK_K, warps, stages by BLOCK_Q
PRODUCT_TILES = {32: (64, 32, 4, 2), 64: (64, 32, 8, 2)}
GRAM_TILE = (32, 32, 4)  # BLOCK_M, BLOCK_Q, warps
_MOST_SPLITS = 16
FACTOR_BLOCK = 32
# pairs, length, warps of Jacobi in registers; the first that fits
JACOBI_TILES = ((8, 16, 1), (16, 32, 2), (32, 64, 4), (64, 128, 8))
# elements of a tile of Jacobi in memory
JACOBI_MEMORY = 4096
MOST_SWEEPS = 20
# a largest |cos| that later rounding can't be told from, in fp32
TOLERANCE = 1e-6
# A column keeps at least the root of this of its length when those before it are taken away.
# The Gram matrix of fp32 columns is exact to some 1e-15.
GUARD = 1e-13
# the same where only R is wanted, not R⁻¹
CORE_GUARD = 1e-15
# times that Ritz values' power iteration multiplies
_POWER_STEPS = 8


class Scales(NamedTuple):
    """Facts of each matrix, see svd_scale_kernel."""

    multiplier: Tensor  # fp32 (G); 0 where it isn't finite
    norm2: Tensor  # float64 (G)
    status: Tensor  # int32 (G)


class Factor(NamedTuple):
    """Cholesky factors of Gram matrices, see svd_factor_kernel."""

    R: Tensor  # fp32 (G, q, q)
    inverse: Tensor  # fp32 (G, q, q)
    scale: Tensor  # float64 (G, q)
    length: Tensor  # float64 (G, q)
    dropped: Tensor  # int32 (G, q)
    again: Tensor  # int32 (G)


class Combine(NamedTuple):
    """One step of a recurrence: out = α A X + β Y + γ Z, with (G, 3) coefficients."""

    coefficients: Tensor  # fp32 (G, 3), rows may be apart
    y: Tensor
    z: Tensor
    out: Tensor  # may be z


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _options(like: Tensor, warps: int, stages: int = 1) -> dict:
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
        **_options(values, 4),
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
        **_options(values, 1),
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
        **_options(by_row, 4),
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
        **_options(out, 4),
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
            **_options(X, warps),
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
        **_options(X, warps, stages),
    )
    return out


def factor(X: Tensor, guard: float, wanted: Tensor | None = None) -> Factor:
    """Cholesky factors of XᵀX for X [G, M, q], any strides and dtype; of `wanted` matrices only."""
    G, M, q = X.shape
    where = {"device": X.device}
    block_m, block_q, warps = GRAM_TILE
    tiles = cdiv(q, block_q) ** 2
    steps = cdiv(M, block_m)
    splits = split_count(G * tiles, steps, _MOST_SPLITS, 4 * gpu_of(X.device).units)
    chunk = cdiv(steps, splits)
    splits = cdiv(steps, chunk)
    parts = torch.empty(G, splits, q, q, dtype=torch.float64, **where)
    launch(
        svd_gram_kernel,
        (G * tiles, splits),
        part_ptr=parts,
        x_ptr=X,
        wanted_ptr=wanted,
        M=M,
        q=q,
        stride_xg=X.stride(0),
        stride_xm=X.stride(1),
        stride_xq=X.stride(2),
        chunk_tiles=chunk,
        splits=splits,
        BLOCK_M=block_m,
        BLOCK_Q=block_q,
        OPTIONAL=wanted is not None,
        **_options(X, warps),
    )
    padded = cdiv(q, FACTOR_BLOCK) * FACTOR_BLOCK
    work = torch.empty(2, G, padded, padded, dtype=torch.float64, **where)
    found = Factor(
        torch.empty(G, q, q, dtype=torch.float32, **where),
        torch.empty(G, q, q, dtype=torch.float32, **where),
        torch.empty(G, q, dtype=torch.float64, **where),
        torch.empty(G, q, dtype=torch.float64, **where),
        torch.empty(G, q, dtype=torch.int32, **where),
        torch.empty(G, dtype=torch.int32, **where),
    )
    launch(
        svd_factor_kernel,
        (G,),
        part_ptr=parts,
        wanted_ptr=wanted,
        lower_ptr=work[0],
        inverse_ptr=work[1],
        r_ptr=found.R,
        r_inverse_ptr=found.inverse,
        scale_ptr=found.scale,
        length_ptr=found.length,
        dropped_ptr=found.dropped,
        again_ptr=found.again,
        q=q,
        padded=padded,
        splits=splits,
        guard=guard,
        BLOCK=FACTOR_BLOCK,
        OPTIONAL=wanted is not None,
        **_options(X, 4),
    )
    return found


def apply_inverse(
    X: Tensor, by: Factor, seed: Tensor, draw: int, wanted: Tensor | None = None
) -> Tensor:
    """X R⁻¹ (G, M, q), dropped columns drawn; X itself where not wanted.

    Args:
        draw: which draw of the refill vectors, below 2**24.
    """
    G, M, q = X.shape
    out = torch.empty(G, M, q, dtype=torch.float32, device=X.device)
    block_q = 32 if q <= 32 else 64
    block_m, block_k, warps, stages = PRODUCT_TILES[block_q]
    launch(
        svd_apply_kernel,
        (G * cdiv(M, block_m), cdiv(q, block_q)),
        out_ptr=out,
        x_ptr=X,
        inverse_ptr=by.inverse,
        dropped_ptr=by.dropped,
        wanted_ptr=wanted,
        seed_ptr=seed,
        M=M,
        q=q,
        stride_xg=X.stride(0),
        stride_xm=X.stride(1),
        stride_xq=X.stride(2),
        purpose=(REFILL << 24) + draw,
        size=(3.0 / M) ** 0.5,  # columns of length about 1
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_Q=block_q,
        OPTIONAL=wanted is not None,
        PRECISION=precision(X.device),
        **_options(X, warps, stages),
    )
    return out


def filter_steps(by: Factor, seed: Tensor, degree: int, growth: float) -> tuple[Tensor, Tensor]:
    """Coefficients (G, degree, 3) of a Chebyshev filter for B with this factor, and modes (G)."""
    G, q = by.dropped.shape
    coefficients = torch.empty(G, degree, 3, dtype=torch.float32, device=seed.device)
    mode = torch.empty(G, dtype=torch.int32, device=seed.device)
    block_q = max(16, power_of_two(q))
    launch(
        svd_filter_kernel,
        (G,),
        coefficients_ptr=coefficients,
        mode_ptr=mode,
        r_ptr=by.R,
        r_inverse_ptr=by.inverse,
        dropped_ptr=by.dropped,
        seed_ptr=seed,
        q=q,
        purpose=SKETCH << 24,
        degree=degree,
        times=_POWER_STEPS,
        most_growth=growth,
        ROWS=max(1, 2048 // block_q),
        BLOCK_Q=block_q,
        **_options(seed, 4),
    )
    return coefficients, mode


def jacobi(R: Tensor, r: int, in_memory: bool | None = None) -> tuple[Tensor, Tensor]:
    """The leading r left singular vectors of Rᵀ as rows, fp32 (G, r, q), and status (G).

    A direction of no length is a row of zeros.

    Args:
        R: fp32 (G, q, q).
        in_memory: which kernel; None to choose by size.
    """
    G, q, _ = R.shape
    u = torch.empty(G, r, q, dtype=torch.float32, device=R.device)
    status = torch.empty(G, dtype=torch.int32, device=R.device)
    shared = {
        "u_ptr": u,
        "x_ptr": R,
        "status_ptr": status,
        "q": q,
        "r": r,
        "most_sweeps": MOST_SWEEPS,
        "tolerance": TOLERANCE,
        "not_converged": NOT_CONVERGED,
    }
    pairs = cdiv(q, 2)
    fitting = [tile for tile in JACOBI_TILES if tile[0] >= pairs]
    if in_memory or not fitting:
        block_l = max(32, power_of_two(q))
        launch(
            svd_jacobi_memory_kernel,
            (G,),
            line_ptr=torch.empty(G, 2 * pairs, q, dtype=torch.float32, device=R.device),
            length_ptr=torch.empty(G, 2 * pairs, dtype=torch.float32, device=R.device),
            BLOCK_H=max(1, JACOBI_MEMORY // block_l),
            BLOCK_L=block_l,
            **shared,
            **_options(R, 8),
        )
        return u, status
    block_h, block_l, warps = fitting[0]
    launch(
        svd_jacobi_kernel,
        (G,),
        BLOCK_H=block_h,
        BLOCK_L=block_l,
        **shared,
        **_options(R, warps),
    )
    return u, status


def finish(
    U: Tensor, V: Tensor, length: Tensor, multiplier: Tensor, scales: Scales, core: Tensor
) -> TruncatedSVD:
    """Results of columns U (G, N, r) and V (G, K, r) with values `length` (G, r).

    Args:
        multiplier: (G), what `length` was multiplied by.
        core: int32 (G), status of the core.
    """
    (G, N, r), K = U.shape, V.shape[1]
    found = TruncatedSVD(
        U.new_empty(G, N, r),
        U.new_empty(G, r),
        U.new_empty(G, r, K),
        U.new_empty(G),
        torch.empty_like(core),
    )
    block_r = max(16, power_of_two(r))
    block_c = max(1, min(16, 8192 // block_r))
    launch(
        svd_finish_kernel,
        (G * cdiv(r, block_c),),
        u_ptr=U,
        v_ptr=V,
        length_ptr=length,
        multiplier_ptr=multiplier,
        norm2_ptr=scales.norm2,
        finite_ptr=scales.status,
        core_ptr=core,
        out_u_ptr=found.U,
        out_s_ptr=found.S,
        out_vh_ptr=found.Vh,
        energy_ptr=found.energy,
        status_ptr=found.status,
        N=N,
        K=K,
        r=r,
        BLOCK_M=64,
        BLOCK_C=block_c,
        BLOCK_R=block_r,
        **_options(U, 4),
    )
    return found
