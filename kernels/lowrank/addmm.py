"""The CPU path: vendor matrix products, in-place adds, nothing computed twice or without need.

Written for tensors of one device and any float dtype; masks are already compacted (op.py).
Sixteen-bit operands are widened to fp32 in row blocks, never whole: on CPUs the skinny products
run 3 to 20 times faster in fp32 than in bf16, and S, U and all gradients keep fp32 accuracy.

    S = xh Aᵀ   U = s dY B   G = s dYᵀ S   H = Uᵀ xh   c = e
    dB = G∘c    dA = c∘H     de = Σ_N B∘G = Σ_K A∘H    dx += D∘((U∘c) A)
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrank.kernels.common import dropout_keep
from fastrank.kernels.lowrank.arguments import Aux, Branch
from fastrank.kernels.lowrank.compaction import scatter, select

# elements of the widest fp32 temporary: 1 MiB, about the L2 cache of one core
_BLOCK_ELEMENTS = 1 << 18


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _widen(wide: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None or t.dtype == wide else t.to(wide) for t in tensors)


def _row_blocks(rows: int, columns: int, whole: bool) -> Iterator[slice]:
    step = rows if whole else max(32, _BLOCK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, max(step, 1)):
        yield slice(start, start + step)


def _keep_mask(rows: int, columns: int, branch: Branch, aux: Aux, device: torch.device) -> Tensor:
    """Kept elements as bool `[rows, columns]`.

    Drawn from a generator with the call's seed, 16 bits an element: several times faster than
    Bernoulli draws, and p is rounded to a multiple of 2**-16. Row ids need a draw that depends on
    nothing else, so they take the Philox words of the GPU path.
    """
    if aux.row_ids is not None:
        return dropout_keep(aux.seed, rows, columns, branch.dropout_p, aux.row_ids)
    generator = torch.Generator(device)
    generator.manual_seed(int(aux.seed))
    draws = torch.empty((rows * columns + 3) // 4, dtype=torch.int64, device=device)
    draws.random_(-(2**63), None, generator=generator)
    lanes = draws.view(torch.int16)[: rows * columns].view(rows, columns)
    return lanes >= _dropped_of_65536(branch.dropout_p) - 32768


def _dropped_of_65536(p: float) -> int:
    return min(round(p * 65536), 65535)


def _mean_factor(branch: Branch, aux: Aux) -> float:
    """1 / (1 - p), for the p that was drawn with."""
    if aux.row_ids is not None:
        return 1.0 / (1.0 - branch.dropout_p)
    return 65536.0 / (65536 - _dropped_of_65536(branch.dropout_p))


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    branch: Branch,
    aux: Aux,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Base and branch: y `[M, N]`, then what add_ returns."""
    y = F.linear(x, weight, bias)
    return y, *add_(y, x, A, B, e, branch, aux)


def add_(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    branch: Branch,
    aux: Aux,
) -> tuple[Tensor, Tensor | None]:
    """Add the branch to y `[M, N]` in place; return S `[M, kept]` and the kept elements or None.

    Args:
        y: contiguous, any float dtype.
        x: `[M, K]`.
        A, B, e: all ranks, `[R, K]`, `[N, R]`, `[R]`.
    """
    wide, t = _wide(x.dtype), branch.trained
    (rows, columns), (N, _) = x.shape, B.shape
    A, B, c = _widen(wide, *select(A, B, e, branch, aux))
    keep = None
    if branch.dropout_p > 0.0 and t > 0:
        keep = _keep_mask(rows, columns, branch, aux, x.device)

    if keep is None and x.dtype == wide:
        S = x @ A.t()
    else:
        S = torch.empty(rows, branch.kept, dtype=wide, device=x.device)
        for block in _row_blocks(rows, columns, whole=False):
            _shrink_block(S[block], x[block].to(wide), A, None if keep is None else keep[block], t)
    if keep is not None:
        S[:, :t].mul_(_mean_factor(branch, aux))

    T = S if c is None else S * c
    if y.dtype == wide:
        y.addmm_(T, B.t(), alpha=branch.scale)
    else:
        for block in _row_blocks(rows, N, whole=False):
            y[block].add_(T[block] @ B.t(), alpha=branch.scale)
    return S, keep


def _shrink_block(S: Tensor, x: Tensor, A: Tensor, keep: Tensor | None, trained: int) -> None:
    """S = x Aᵀ for one block of rows; trained ranks read the kept elements only."""
    if keep is None:
        torch.mm(x, A.t(), out=S)
        return
    S[:, :trained] = (x * keep) @ A[:trained].t()
    if trained < S.shape[1]:
        S[:, trained:] = x @ A[trained:].t()


def backward(
    dy: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    S: Tensor | None,
    keep: Tensor | None,
    branch: Branch,
    aux: Aux,
    needs: tuple[bool, bool, bool, bool],
    dx_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA, dB and de; None where not needed.

    Args:
        dy: `[M, N]`.
        weight: `[N, K]`; None for no base.
        x: `[M, K]`; needed for dA.
        S: from linear or add_; needed for dB, and for de where neither dA nor dB is asked for.
        keep: from linear or add_.
        needs: which of dx, dA, dB, de are wanted.
        dx_dtype: of a dx that is made here.
    """
    need_dx, need_dA, need_dB, need_de = needs
    wide, t = _wide(dy.dtype if x is None else x.dtype), branch.trained
    like = (A, B, e)
    A, B, c = _widen(wide, *select(A, B, e, branch, aux))
    factor = 1.0 if keep is None else _mean_factor(branch, aux)
    need_dA, need_dB, need_de = (need and t > 0 for need in (need_dA, need_dB, need_de))
    from_rows = need_de and not (need_dA or need_dB)
    need_U = need_dx or need_dA or from_rows

    add = weight is not None
    dx = dy @ weight if need_dx and add else None
    if need_dx and not add:
        dx = torch.empty(dy.shape[0], A.shape[1], dtype=dx_dtype, device=dy.device)
    G = torch.zeros(B.shape[0], t, dtype=wide, device=dy.device) if need_dB else None
    H = torch.zeros(t, A.shape[1], dtype=wide, device=dy.device) if need_dA else None
    de = torch.zeros(t, dtype=wide, device=dy.device) if need_de else None
    whole = keep is None and all(v is None or v.dtype == wide for v in (dy, dx, x))
    for block in _row_blocks(dy.shape[0], max(A.shape[1], B.shape[0]), whole):
        dy_block = dy[block].to(wide)
        if need_dB:
            G.addmm_(dy_block.t(), S[block, :t], alpha=branch.scale)
        if not need_U:
            continue
        U = (dy_block @ B).mul_(branch.scale)  # (rows, kept)
        if from_rows:
            de += (U[:, :t] * S[block, :t]).sum(0)
        if need_dA:
            x_block = x[block].to(wide)
            if keep is not None:
                x_block = x_block * keep[block]
            H.addmm_(U[:, :t].t(), x_block, alpha=factor)
        if need_dx:
            V = U if c is None else U.mul_(c)
            _write_dx(dx[block], V, A, None if keep is None else keep[block], factor, t, add)

    if need_de and need_dB:
        de = (B[:, :t] * G).sum(0)
    elif need_de and need_dA:
        de = (A[:t] * H).sum(1)
    if c is not None:
        G = None if G is None else G.mul_(c[:t])
        H = None if H is None else H.mul_(c[:t, None])
    grads = (
        scatter(grad, dim, of, aux) if wanted else None
        for wanted, grad, dim, of in zip(needs[1:], (H, G, de), (0, 1, 0), like, strict=True)
    )
    return dx, *grads


def _write_dx(
    dx: Tensor,
    V: Tensor,
    A: Tensor,
    keep: Tensor | None,
    factor: float,
    trained: int,
    add: bool,
) -> None:
    """dx (+)= D∘(V_t A_t) + V_f A_f for one block of rows."""
    if keep is None and dx.dtype == V.dtype:
        torch.addmm(dx, V, A, beta=int(add), out=dx)
        return
    if keep is None:
        share = V @ A
    else:
        share = (V[:, :trained] @ A[:trained]).mul_(keep).mul_(factor)
        if trained < V.shape[1]:
            share.addmm_(V[:, trained:], A[trained:])
    dx.add_(share) if add else dx.copy_(share)
