"""The schedule that LoRAFusion published, as three Triton kernels of our own.

    X̂, mask = dropout(X)                 one kernel, both stored (p = 0: X itself, nothing stored)
    S = X̂ Aᵀ                             vendor product
    Y = s·S Bᵀ + X Wᵀ                    one GEMM, the low-rank product first, in its accumulator
    dS, dB                               one read of dY, float32 atomics over both
    dA = dSᵀ X̂                           vendor product
    dX = mask∘(dS A)/(1-p) + dY W        the same GEMM

Shapes as everywhere: X (M, K), W (N, K), A (R, K), B (N, R). Its atomics make dB and dS differ
between runs in their last bits; that is the schedule's, and why it is only measured here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_GEMM = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 8}
_SMALL_GEMM = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP_M": 8}
# shared memory a block may use from which on the large tile fits with three stages
_LARGE_SHARED = 160 * 1024


@triton.jit
def _dropout_kernel(p_x, p_out, p_mask, p_seed, p, size, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    keep = tl.rand(tl.load(p_seed), o) >= p
    x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    kept = tl.where(keep, x * (1.0 / (1.0 - p)), 0.0)
    tl.store(p_out + o, kept.to(p_out.dtype.element_ty), mask=m)
    tl.store(p_mask + o, keep.to(tl.int8), mask=m)


@triton.jit
def _gemm_kernel(
    p_x,
    p_w,
    p_l,
    p_r,
    p_mask,
    p_out,
    M,
    N,
    K,
    R,
    w_k,
    w_n,
    r_r,
    r_n,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out (M, N) = mask∘(scale · l (M, R) r (R, N)) + x (M, K) w (K, N); x, l, out contiguous."""
    i = tl.program_id(0)
    columns = tl.cdiv(N, BLOCK_N)
    first = i // (GROUP_M * columns) * GROUP_M
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP_M)
    within = i % (GROUP_M * columns)
    o_m = ((first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    o_n = ((within // height) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
    m_m, m_n = o_m < M, o_n < N
    o_r = tl.arange(0, BLOCK_R)

    b_l = tl.load(p_l + o_m * R + o_r[None, :], mask=m_m & (o_r[None, :] < R), other=0.0)
    b_r = tl.load(p_r + o_r[:, None] * r_r + o_n * r_n, mask=(o_r[:, None] < R) & m_n, other=0.0)
    acc = tl.dot(b_l, b_r, input_precision=PRECISION) * scale
    if MASKED:
        keep = tl.load(p_mask + o_m * N + o_n, mask=m_m & m_n, other=0)
        acc = tl.where(keep != 0, acc, 0.0)
    for start in range(0, K, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        b_x = tl.load(p_x + o_m * K + o_k[None, :], mask=m_m & (o_k[None, :] < K), other=0.0)
        m_w = (o_k[:, None] < K) & m_n
        b_w = tl.load(p_w + o_k[:, None] * w_k + o_n * w_n, mask=m_w, other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)
    tl.store(p_out + o_m * N + o_n, acc.to(p_out.dtype.element_ty), mask=m_m & m_n)


@triton.jit
def _ds_db_kernel(
    p_dy,
    p_b,
    p_s,
    p_ds,
    p_db,
    M,
    N,
    R,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dS (M, R) += scale · dY B and dB (N, R) += scale · dYᵀ S, for one tile of dY."""
    o_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    o_n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R)[None, :]
    m_m, m_r = o_m < M, o_r < R
    b_dy = tl.load(p_dy + o_m * N + o_n[None, :], mask=m_m & (o_n[None, :] < N), other=0.0)
    m_nr, m_mr = (o_n[:, None] < N) & m_r, m_m & m_r
    b_b = tl.load(p_b + o_n[:, None] * R + o_r, mask=m_nr, other=0.0)
    b_s = tl.load(p_s + o_m * R + o_r, mask=m_mr, other=0.0)
    b_ds = tl.dot(b_dy, b_b, input_precision=PRECISION) * scale
    b_db = tl.dot(tl.trans(b_dy), b_s, input_precision=PRECISION) * scale
    tl.atomic_add(p_ds + o_m * R + o_r, b_ds, mask=m_mr)
    tl.atomic_add(p_db + o_n[:, None] * R + o_r, b_db, mask=m_nr)


def _dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """X̂ and the kept elements, both as x lies in memory (contiguous)."""
    out, mask = torch.empty_like(x), torch.empty(x.shape, dtype=torch.int8, device=x.device)
    seed = torch.randint(2**31 - 1, (1,), dtype=torch.int32, device=x.device)
    block = 1024
    _dropout_kernel[(triton.cdiv(x.numel(), block),)](
        x, out, mask, seed, p, x.numel(), BLOCK=block, num_warps=4
    )
    return out, mask


def _gemm(x: Tensor, w: Tensor, l: Tensor, r: Tensor, scale: float, mask: Tensor | None) -> Tensor:  # noqa: E741
    """mask∘(scale · l r) + x w; w (K, N) and r (R, N) of any strides."""
    (M, K), N = x.shape, w.shape[1]
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    large = x.dtype.itemsize == 2 and _shared_memory(x.device) >= _LARGE_SHARED
    tile = _GEMM if large else _SMALL_GEMM
    grid = (triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"]),)
    strides = (*w.stride(), *r.stride())
    _gemm_kernel[grid](
        x, w, l, r, out if mask is None else mask, out, M, N, K, l.shape[1], *strides, scale,
        **tile, BLOCK_R=_rank_block(l.shape[1]), MASKED=mask is not None,
        PRECISION=_precision(x.dtype), num_warps=8 if large else 4, num_stages=3,
    )  # fmt: skip
    return out


def _ds_db(dy: Tensor, B: Tensor, S: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    (M, N), R = dy.shape, B.shape[1]
    dS, dB = (torch.zeros(rows, R, dtype=torch.float32, device=dy.device) for rows in (M, N))
    wide = dy.dtype.itemsize == 2
    tile = {"BLOCK_M": 128, "BLOCK_N": 128} if wide else {"BLOCK_M": 32, "BLOCK_N": 32}
    grid = (triton.cdiv(M, tile["BLOCK_M"]), triton.cdiv(N, tile["BLOCK_N"]))
    _ds_db_kernel[grid](
        dy, B, S, dS, dB, M, N, R, scale, **tile, BLOCK_R=_rank_block(R),
        PRECISION=_precision(dy.dtype), num_warps=8 if wide else 4,
    )  # fmt: skip
    return dS, dB


def _rank_block(R: int) -> int:
    return max(16, triton.next_power_of_2(R))


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


class LoraFusionSchedule(torch.autograd.Function):
    """x (M, K), weight (N, K), A (R, K), B (N, R) in one dtype; no bias."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale, p):
        kept, mask = (x, None) if p == 0.0 else _dropout(x, p)
        S = kept @ A.t()
        y = _gemm(x, weight.t(), S, B.t(), scale, None)
        ctx.save_for_backward(kept, mask, S, weight, A, B)
        ctx.scale, ctx.p = scale, p
        return y

    @staticmethod
    def backward(ctx, dy):
        kept, mask, S, weight, A, B = ctx.saved_tensors
        dy = dy.contiguous()
        dS, dB = _ds_db(dy, B, S, ctx.scale)
        dS = dS.to(dy.dtype)
        dA = dS.t() @ kept
        dx = _gemm(dy, weight, dS, A, 1.0 / (1.0 - ctx.p), mask)
        return dx, None, None, dA, dB.to(B.dtype), None, None
