"""The CPU path: vendor matrix products, in-place adds, nothing computed twice or without need.

Masks are already compacted (op.py). Three classes of operands, by what is right and fast for them:

- wide: x and the branch in fp32 or fp64. Whole vendor products.
- mixed: 16-bit x, fp32 branch. Products that read x or dY widen it in row blocks, never whole, so
  S, U and all gradients have fp32 accuracy; products that write y or dX go through `add_product`.
- half: bf16 all through (autocast, bf16 adapters, precision="compute") on a CPU with bf16 matrix
  units. Elsewhere those calls are mixed: skinny bf16 products run 3 to 20 times slower than fp32
  ones on CPUs without such units.

    S = xh Aᵀ   U = dY B   G = dYᵀ S   H = Uᵀ xh   c = e
    dB = s G∘c    dA = s c∘H     de = s Σ_N B∘G = s Σ_K A∘H    dx = dY W + s D∘((U∘c) A)
"""

import torch
from torch import Tensor

from fastrank.kernels.common import products
from fastrank.kernels.common.products import bf16_tiles, bf16_units
from fastrank.kernels.common.scratch import BLOCK, row_blocks, scratch, widened
from fastrank.kernels.lowrank.arguments import Aux, Branch
from fastrank.kernels.lowrank.compaction import scatter, select
from fastrank.kernels.lowrank.cpu_dropout import Dropout, Mask, mean_factor

# a result smaller than this, or than this many times its factors, is widened, added to and rounded:
# splitting the factors costs more (measured, x86 with AMX); without its tiles three bf16 products
# cost more than one in fp32 and two copies from 33 ranks on (AMD Zen 4, AVX512-BF16)
_SPLIT_ELEMENTS = 3 << 17
_SPLIT_RATIO = 4
_SPLIT_RANKS = 32
_TALL_ELEMENTS = 1 << 18
# what addmm adds nothing of
_NOTHING = {dtype: torch.zeros((), dtype=dtype) for dtype in (torch.float32, torch.float64)}


def compute_dtype(x: torch.dtype, adapters: torch.dtype, branch: Branch) -> torch.dtype:
    """What the products of the branch are computed in."""
    if x in (torch.float32, torch.float64):
        return x
    same = branch.autocast is not None or branch.precision == "compute" or x == adapters
    return x if same and x == torch.bfloat16 and bf16_units() else torch.float32


def _selected(
    A: Tensor, B: Tensor, e: Tensor | None, dtype: torch.dtype, branch: Branch, aux: Aux
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A, B and e, compacted; e in fp32 (fp64 for fp64 products), so that it never rounds."""
    if aux.index is not None or branch.kept < A.shape[0]:
        A, B, e = select(A, B, e, branch, aux)
    wide = _wide(dtype)
    return A, B, e if e is None or e.dtype == wide else e.to(wide)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


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
    y = products.linear(x, weight, bias)
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
    dtype = compute_dtype(x.dtype, A.dtype, branch)
    A, B, c = _selected(A, B, e, dtype, branch, aux)
    A = _cast(A, dtype)
    keep = None
    if branch.dropout_p > 0.0 and branch.trained > 0:
        S, keep = _shrink_dropped(x, A, branch, aux)
    else:
        S = shrink(x, A)
    T = S if c is None else S * c
    add_product(y, _cast(T, dtype), _cast(B, dtype).t(), branch.scale)
    return S, keep


def shrink(x: Tensor, A: Tensor) -> Tensor:
    """S = x Aᵀ `[M, R]`."""
    if x.dtype == A.dtype:
        return _cast(products.mm(x, A.t()), _wide(A.dtype))
    S = torch.empty(x.shape[0], A.shape[0], dtype=A.dtype)
    for block in row_blocks(*x.shape):
        _mm_to(S[block], widened(x[block], A.dtype), A.t())
    return S


def _mm_to(out: Tensor, P: Tensor, Q: Tensor) -> None:
    if products.suits(P, Q):
        out.copy_(products.mm(P, Q))
    else:
        torch.mm(P, Q, out=out)


def _shrink_dropped(x: Tensor, A: Tensor, branch: Branch, aux: Aux) -> tuple[Tensor, Tensor]:
    """S = drop(x) Aᵀ for trained ranks and x Aᵀ for the others; the kept elements int8 `[M, K]`."""
    (rows, columns), t = x.shape, branch.trained
    dropout = Dropout(branch.dropout_p, rows, columns, aux)
    S = torch.empty(rows, A.shape[0], dtype=_wide(A.dtype))
    for block in row_blocks(rows, columns):
        kept = widened(dropout.draw(block).of(x[block]), A.dtype)
        if t == A.shape[0] and S.dtype == A.dtype:
            _mm_to(S[block], kept, A.t())
            continue
        S[block, :t] = kept @ A[:t].t()
        if t < A.shape[0]:
            S[block, t:] = widened(x[block], A.dtype) @ A[t:].t()
    S[:, :t].mul_(mean_factor(branch.dropout_p, aux.row_ids is not None))
    return S, dropout.keep


def add_product(out: Tensor, P: Tensor, Q: Tensor, alpha: float) -> None:
    """out += alpha P Q in place; P `[M, R]` and Q `[R, W]` of one dtype, out of any.

    Into bf16, fp32 factors become three bf16 products in one: each factor is split into a high and
    a low half, P Q = Ph Qh + Pl Qh + Ph Ql + O(2**-16), and the sum is rounded once.
    """
    if out.dtype == P.dtype:
        products.add_mm_(out, P, Q, alpha)
    elif out.dtype.itemsize > P.dtype.itemsize:
        # a wider base keeps its digits: the product is rounded, not the sum
        for block in row_blocks(*out.shape):
            out[block].add_(torch.mm(P[block], Q), alpha=alpha)
    elif _pays_to_split(out, P, Q):
        out.addmm_(*_split(P, Q), alpha=alpha)
    elif out.numel() <= BLOCK:
        out.copy_(products.add_mm_(out.to(P.dtype), P, Q, alpha))
    else:
        for block in row_blocks(*out.shape):
            rows = out[block]
            rows.copy_(products.add_mm_(widened(rows, P.dtype), P[block], Q, alpha))


def _pays_to_split(out: Tensor, P: Tensor, Q: Tensor) -> bool:
    elements = out.numel()
    return (
        elements >= _SPLIT_ELEMENTS
        and elements >= _SPLIT_RATIO * (P.numel() + Q.numel())
        and out.dtype is torch.bfloat16
        and P.dtype is torch.float32
        and bf16_units()
        and (P.shape[1] <= _SPLIT_RANKS or bf16_tiles())
    )


def _split(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 `[M, 3R]` and `[3R, W]` whose product is P Q up to 2**-16 of its terms."""
    P_high, Q_high = P.bfloat16(), Q.bfloat16()
    P_low, Q_low = (P - P_high).bfloat16(), (Q - Q_high).bfloat16()
    return torch.cat((P_high, P_low, P_high), 1), torch.cat((Q_high, Q_high, Q_low), 0)


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
    like, t = (A, B, e), branch.trained
    x_dtype = (branch.autocast or dx_dtype) if x is None else x.dtype
    dtype = compute_dtype(x_dtype, A.dtype, branch)
    A, B, c = _selected(A, B, e, dtype, branch, aux)
    if t == 0:
        need_dA = need_dB = need_de = False
    from_rows = need_de and not (need_dA or need_dB)
    whole = t == A.shape[0]
    factor = (
        branch.scale
        if keep is None
        else branch.scale * mean_factor(branch.dropout_p, aux.row_ids is not None)
    )

    S_trained = S if S is None or whole else S[:, :t]
    need_U = need_dx or need_dA or from_rows
    U, G = read_dy(dy, B if need_U else None, S_trained if need_dB else None, dtype)
    U_trained = U if U is None or whole else U[:, :t]
    dx = dA = dB = de = None
    if need_dB:
        if need_de and not need_dA:
            de = (B[:, :t].t() * G).sum(1).mul_(branch.scale)
        dB = torch.empty(B.shape[0], t, dtype=like[1].dtype)
        torch.mul(G.t(), branch.scale if c is None else c[:t] * branch.scale, out=dB)
    if need_dx:
        dx = (
            torch.zeros(dy.shape[0], A.shape[1], dtype=dx_dtype)
            if weight is None
            else products.mm(dy, weight)
        )
        # c goes with A, where it rounds once for bf16 products, as in PEFT
        Ac = A if c is None else A * c[:, None]
    if keep is not None:
        # A of 16 bits must not round before a wide product
        A_trained = _cast(_cast(Ac[:t], _wide(dtype)) * factor, dtype) if need_dx else None
        dA = _backward_dropped(U_trained, x if need_dA else None, keep, dx, A_trained)
        if need_dx and not whole:
            add_product(dx, U[:, t:], _cast(Ac[t:], dtype), branch.scale)
    else:
        dA = gram_x(U_trained, x, dtype) if need_dA else None
        if need_dx:
            add_product(dx, U, _cast(Ac, dtype), branch.scale)
    if need_dA:
        if need_de:  # as PEFT forms it, so that bf16 products spoil it no more
            de = (dA * A[:t]).sum(1).mul_(factor)
        dA.mul_(factor if c is None else (c[:t] * factor)[:, None])
    if from_rows:
        de = (U_trained * S_trained).sum(0).mul_(branch.scale)
    return (
        dx,
        scatter(dA, 0, like[0], aux) if needs[1] else None,
        scatter(dB, 1, like[1], aux) if needs[2] else None,
        scatter(de, 0, like[2], aux) if needs[3] else None,
    )


def scaled_product(P: Tensor, Q: Tensor, alpha: float) -> Tensor:
    """alpha P Q, fp32 or fp64."""
    if products.suits(P, Q):
        return products.mm(P, Q).mul_(alpha)
    return torch.addmm(_NOTHING[P.dtype], P, Q, beta=0, alpha=alpha)


def gram_dy(dy: Tensor, S: Tensor, scale: float) -> Tensor:
    """scale dYᵀ S `[N, R]`, contiguous.

    From a vendor product with a wide result where that pays for the transposed copy: it runs up to
    three times faster than the tall one.
    """
    St = S.t()
    if dy.numel() <= _TALL_ELEMENTS and not products.suits(St, dy):
        return scaled_product(dy.t(), S, scale)
    G = torch.empty(dy.shape[1], S.shape[1], dtype=S.dtype)
    return torch.mul(products.mm(St, dy).t(), scale, out=G)


def read_dy(
    dy: Tensor, B: Tensor | None, S: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """U = dY B `[M, R]` and Gᵀ = Sᵀ dY `[R, N]` without the scale, from one read of dY.

    Gᵀ because vendor products with a wide result run up to three times faster than with a tall one.
    """
    B = None if B is None else _cast(B, dtype)
    S = None if S is None else _cast(S, dtype)
    if dtype == torch.bfloat16:
        dy = _cast(dy, dtype)
    if dy.dtype == dtype:
        U = None if B is None else products.mm(dy, B)
        return U, None if S is None else _cast(products.mm(S.t(), dy), _wide(dtype))
    rows, columns = dy.shape
    U = None if B is None else torch.empty(rows, B.shape[1], dtype=dtype)
    G = None if S is None else torch.zeros(S.shape[1], columns, dtype=dtype)
    for block in row_blocks(rows, columns):
        dy_block = widened(dy[block], dtype)
        if U is not None:
            _mm_to(U[block], dy_block, B)
        if G is not None:
            products.add_mm_(G, S[block].t(), dy_block)
    return U, G


def gram_x(U: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """H = Uᵀ x `[R, K]`, without the scale."""
    if x.dtype == dtype:
        return _cast(products.mm(U.t(), x), _wide(dtype))
    H = torch.zeros(U.shape[1], x.shape[1], dtype=dtype)
    for block in row_blocks(*x.shape):
        products.add_mm_(H, U[block].t(), widened(x[block], dtype))
    return H


def _backward_dropped(
    U: Tensor, x: Tensor | None, keep: Tensor, dx: Tensor | None, A: Tensor | None
) -> Tensor | None:
    """H = Uᵀ xh `[R, K]` without the scale, for x given; dx += keep∘(U A) in place, for dx given.

    Every factor of dx is in A already: a 16-bit add rounds its alpha times the other operand.
    """
    H, V = None, U
    if x is not None:
        H = torch.zeros(U.shape[1], x.shape[1], dtype=_wide(U.dtype))
    if dx is not None and dx.dtype == torch.bfloat16 and U.dtype == torch.float32 and bf16_units():
        V, A = _split(U, A)
    for block in row_blocks(*keep.shape):
        mask = Mask(keep[block])
        if H is not None:
            kept = mask.of(x[block])
            if U.dtype == H.dtype:
                products.add_mm_(H, U[block].t(), widened(kept, U.dtype))
            else:
                H.add_(torch.mm(U[block].t(), kept))
        if dx is not None:
            rows = dx[block]
            rows.add_(mask.on_(torch.mm(V[block], A, out=scratch(rows, V.dtype, slot=0))))
    return H
