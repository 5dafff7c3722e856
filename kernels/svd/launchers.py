"""Launchers of truncated_svd's small matrices: Gram matrices and factors, filters, cores, results.

A block of vectors is fp32 (G, rows, q), contiguous unless strides are passed on. Sizes, never
values, decide tiles and splits; what depends on values (a matrix's polynomial degree, whether it
needs another orthogonalisation) is read by the kernels from device memory.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrank.kernels.common.launch import cdiv, gpu_of, launch, split_count
from fastrank.kernels.packing.draws import REFILL, SKETCH
from fastrank.kernels.svd.fused import svd_finish_kernel
from fastrank.kernels.svd.fused_factor import svd_factor_kernel, svd_filter_kernel
from fastrank.kernels.svd.fused_jacobi import svd_jacobi_kernel, svd_jacobi_memory_kernel
from fastrank.kernels.svd.fused_products import svd_apply_kernel, svd_gram_kernel
from fastrank.kernels.svd.launch_products import (
    PRODUCT_TILES,
    Scales,
    launch_keywords,
    power_of_two,
    precision,
)
from fastrank.kernels.svd.operands import NOT_CONVERGED, TruncatedSVD

GRAM_TILE = (32, 32, 4)  # BLOCK_M, BLOCK_Q, warps
_MOST_SPLITS = 16
FACTOR_BLOCK = 32
# pairs, length, warps of Jacobi in registers; the first that fits
JACOBI_TILES = ((8, 16, 1), (16, 32, 2), (32, 64, 4), (64, 128, 8))
# elements of a tile of Jacobi in memory
JACOBI_MEMORY, JACOBI_MEMORY_WARPS = 4096, 16
MOST_SWEEPS = 20
# A sweep that met no larger |cos| leaves none above rounding: convergence is quadratic.
TOLERANCE = 1e-5
# A column keeps about the root of this of its length when those before it are taken away.
# The Gram matrix of fp32 columns is exact to some 1e-15.
GUARD = 1e-13
# the same where only R is wanted, not R⁻¹
CORE_GUARD = 1e-15
# Pivots below this, beside a diagonal of 1 to 4, call for another pass: X R⁻¹ is orthonormal to
# eps times X's condition, which filters don't mind up to 1e4, and results to 10.
LOOSE, FINE = 1e-8, 1e-2
# times that Ritz values' power iteration multiplies
_POWER_STEPS = 8


class Factor(NamedTuple):
    """Cholesky factors of Gram matrices, see svd_factor_kernel."""

    R: Tensor  # fp32 (G, q, q)
    inverse: Tensor  # fp32 (G, q, q)
    scale: Tensor  # float64 (G, q)
    length: Tensor  # float64 (G, q)
    dropped: Tensor  # int32 (G, q)
    again: Tensor  # int32 (G)


def factor(X: Tensor, guard: float, weak: float = 0.0, wanted: Tensor | None = None) -> Factor:
    """Cholesky factors of XᵀX for X [G, M, q], fp32, any strides; of `wanted` matrices only.

    Args:
        guard: a pivot below this, beside a diagonal of 1 to 4, drops its column.
        weak: one below this calls for another pass.
    """
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
        **launch_keywords(X, warps),
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
        weak=weak,
        BLOCK=FACTOR_BLOCK,
        OPTIONAL=wanted is not None,
        **launch_keywords(X, 4),
    )
    return found


def apply_inverse(
    X: Tensor, by: Factor, seed: Tensor, draw: int, wanted: Tensor | None = None
) -> Tensor:
    """X R⁻¹ (G, M, q), dropped columns drawn.

    Args:
        wanted: X, contiguous, is overwritten, and only where this isn't 0.
        draw: which draw of the refill vectors, below 2**24.
    """
    G, M, q = X.shape
    optional = wanted is not None
    out = X if optional else torch.empty(G, M, q, dtype=torch.float32, device=X.device)
    block_q = 32 if q <= 32 else 64
    block_m, block_k, warps, stages = PRODUCT_TILES[block_q]
    launch(
        svd_apply_kernel,
        (G * cdiv(M, block_m), 1 if optional else cdiv(q, block_q)),
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
        OPTIONAL=optional,
        PRECISION=precision(X.device),
        **launch_keywords(X, warps, 1 if optional else stages),
    )
    return out


def filter_steps(by: Factor, seed: Tensor, degree: int, growth: float) -> tuple[Tensor, Tensor]:
    """Coefficients (G, degree, 4) of a Chebyshev filter for B with this factor, and modes (G)."""
    G, q = by.dropped.shape
    coefficients = torch.empty(G, degree, 4, dtype=torch.float32, device=seed.device)
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
        **launch_keywords(seed, 4),
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
        block_l = max(128, power_of_two(q) // 2)
        padded = cdiv(q, 16) * 16
        launch(
            svd_jacobi_memory_kernel,
            (G,),
            line_ptr=torch.empty(G, 2 * pairs, padded, dtype=torch.float32, device=R.device),
            padded=padded,
            length_ptr=torch.empty(G, 2 * pairs, dtype=torch.float32, device=R.device),
            BLOCK_H=max(1, JACOBI_MEMORY // (2 * block_l)),
            BLOCK_L=block_l,
            **shared,
            **launch_keywords(R, JACOBI_MEMORY_WARPS),
        )
        return u, status
    block_h, block_l, warps = fitting[0]
    launch(
        svd_jacobi_kernel,
        (G,),
        BLOCK_H=block_h,
        BLOCK_L=block_l,
        **shared,
        **launch_keywords(R, warps),
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
    block_c = max(1, min(16, 2048 // block_r))
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
        **launch_keywords(U, 4),
    )
    return found
