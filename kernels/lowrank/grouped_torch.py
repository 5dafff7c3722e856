"""grouped_lowrank_linear on a CPU: whole base products, and the branches of like groups as batches.

    Sᵀ_g = A_g xh_gᵀ    y_g += (Sᵀ_g)ᵀ (s c∘B)_g     c = e
    Uᵀ_g = B_g dY_gᵀ    dB_g = s c∘(Sᵀ_g dY_g)        dA_g = s c∘(Uᵀ_g xh_g)
    dx_g = dY_g W + D∘((Uᵀ_g)ᵀ (s c∘A)_g)             de_g = s Σ_K A∘(Uᵀ_g xh_g)

Key decisions
- B is rank-major, so forward and backward are the same three products: shrink, expand, gram.
- A run of neighbours with equal rows and ranks is one batched product of each kind; S and U are
  kept as `[R, m]`, the layout in which MKL's batched products were fastest (measured: 1.5 to 3
  times faster than a loop at 64 to 128 rows a group, and than `[m, R]`).
- s c goes into the small factor, not into the rows.
- 16-bit rows are widened run by run in scratch memory; the branch is always fp32 or fp64.
- No product mixes groups, so a NaN stays in its own.
"""

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from fastrank.kernels.common import products
from fastrank.kernels.common.scratch import BLOCK, scratch, widened
from fastrank.kernels.lowrank.cpu_dropout import Mask, keyed_keep, mean_factor
from fastrank.kernels.lowrank.grouped_arguments import GroupedAux, GroupedBranch, Layout


class Run(NamedTuple):
    """Neighbouring groups of m rows and R ranks each."""

    groups: int
    m: int
    R: int
    first: int  # group
    rows: slice  # of x
    ranks: slice  # of A and B
    place: slice  # in the flat S


@functools.lru_cache(maxsize=256)
def _runs(rows: tuple[int, ...], ranks: tuple[int, ...], most_rows: int) -> list[Run]:
    """Groups with both rows and ranks, in runs of at most this many rows (or one group)."""
    found: list[Run] = []
    group = row = rank = place = 0
    for (m, R), like in itertools.groupby(zip(rows, ranks, strict=True)):
        left = sum(1 for _ in like)
        step = left if m == 0 or R == 0 else max(1, min(left, most_rows // m))
        while left:
            n = min(step, left)
            if m and R:
                found.append(
                    Run(
                        n,
                        m,
                        R,
                        group,
                        slice(row, row + n * m),
                        slice(rank, rank + n * R),
                        slice(place, place + n * m * R),
                    )
                )
                place += n * m * R
            group, row, rank, left = group + n, row + n * m, rank + n * R, left - n
    return found


def _plan(layout: Layout, x_dtype: torch.dtype, wide: torch.dtype, width: int) -> list[Run]:
    # what is widened is widened in scratch memory, a run at a time
    most = max(1, BLOCK // width) if x_dtype is not wide else 1 << 62
    return _runs(layout.rows, layout.ranks, most)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _wide(x: torch.dtype) -> torch.dtype:
    return torch.float64 if x == torch.float64 else torch.float32


def _shrink(P: Tensor, Q: Tensor, out: Tensor) -> None:
    """out `[g, R, m]` = Q `[g, R, W]` Pᵀ for P `[g, m, W]`."""
    if P.shape[0] == 1:
        out[0].copy_(products.mm(Q[0], P[0].t()))
    else:
        torch.bmm(Q, P.transpose(1, 2), out=out)


def _gram(S: Tensor, P: Tensor, c: Tensor | float, out: Tensor) -> None:
    """out `[g, R, W]` = c∘(S `[g, R, m]` P) for P `[g, m, W]`, c `[g, R, 1]` or a number."""
    alpha = c if isinstance(c, float) else 1.0
    if P.shape[0] == 1:
        torch.mul(products.mm(S[0], P[0]), alpha, out=out[0])
    else:
        torch.baddbmm(out, S, P, beta=0, alpha=alpha, out=out)
    if isinstance(c, Tensor):
        out.mul_(c)


def _expand_(out: Tensor, S: Tensor, Q: Tensor, c: Tensor | float) -> None:
    """out `[g, m, W]` += Sᵀ (c∘Q) for S `[g, R, m]`, Q `[g, R, W]`, c `[g, R, 1]` or a number."""
    alpha = 1.0
    if isinstance(c, float):
        alpha = c
    else:
        Q = Q * c
    if out.dtype is not Q.dtype:
        wide = widened(out, Q.dtype, slot=0)
        out.copy_(wide.baddbmm_(S.transpose(1, 2), Q, alpha=alpha))
    elif out.shape[0] == 1:
        out[0].addmm_(S[0].t(), Q[0], alpha=alpha)
    else:
        out.baddbmm_(S.transpose(1, 2), Q, alpha=alpha)


class _Call:
    """Factors in the branch's dtype, compared once with the layout's runs."""

    def __init__(
        self,
        x_dtype: torch.dtype,
        A: Tensor,
        B: Tensor,
        e: Tensor | None,
        layout: Layout,
        branch: GroupedBranch,
        aux: GroupedAux,
    ) -> None:
        self.wide = _wide(x_dtype)
        self.A, self.B = _cast(A, self.wide), _cast(B, self.wide)
        self.e = None if e is None else _cast(e, self.wide)
        self.runs = _plan(layout, x_dtype, self.wide, max(A.shape[1], B.shape[1]))
        self.size = sum(run.groups * run.m * run.R for run in self.runs)
        self.scale, self.one_scale = aux.scale, branch.one_scale
        self.drops = branch.dropout_p > 0.0
        self.factor = mean_factor(branch.dropout_p) if self.drops else 1.0
        # ranks that read x without dropout
        self.frozen = None
        if self.drops and aux.trainable is not None:
            self.frozen = ~aux.trainable

    def coefficients(self, run: Run, *, dropped: bool) -> Tensor | float:
        """s c of a run, `[g, R, 1]` or one number; with 1 / P(kept) where rows were dropped."""
        if self.one_scale is not None and self.e is None and self.frozen is None:
            return self.one_scale * self.factor if dropped else self.one_scale
        c = self.scale[run.first : run.first + run.groups, None].expand(-1, run.R)
        if self.e is not None:
            c = c * self.e[run.ranks].view(run.groups, run.R)
        if dropped and self.drops:
            if self.frozen is None:
                c = c * self.factor
            else:
                frozen = self.frozen[run.ranks].view(run.groups, run.R)
                c = torch.where(frozen, c, c * self.factor)
        return c[:, :, None]

    def factor_of(self, run: Run, tensor: Tensor) -> Tensor:
        """A `[g, R, K]` or B `[g, R, N]` of a run."""
        return tensor[run.ranks].view(run.groups, run.R, -1)

    def rows_of(self, run: Run, tensor: Tensor) -> Tensor:
        """x `[g, m, K]` or dy `[g, m, N]` of a run, widened in scratch memory."""
        return widened(tensor[run.rows], self.wide, slot=0).view(run.groups, run.m, -1)

    def wide_rows(self, run: Run, flat: Tensor) -> Tensor:
        """S or U `[g, R, m]` of a run, in the flat tensor that holds all of them."""
        return flat[run.place].view(run.groups, run.R, run.m)

    def frozen_of(self, run: Run) -> Tensor:
        return self.frozen[run.ranks].view(run.groups, run.R, 1)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    layout: Layout,
    branch: GroupedBranch,
    aux: GroupedAux,
    packed: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y `[M, N]`, S (flat, every group's `[R, m]` after another) and the kept elements or None.

    Args:
        x: `[M, K]`; as the others in the dtype that F.linear would compute in.
        A, B, e: all groups' ranks, `[ΣR, K]`, `[ΣR, N]`, `[ΣR]`.
        packed: from products.pack(weight), or None.
    """
    y = products.linear(x, weight, bias, packed)
    call = _Call(x.dtype, A, B, e, layout, branch, aux)
    S = torch.empty(call.size, dtype=call.wide)
    keep = _draw(x, call, branch, aux) if call.drops else None
    for run in call.runs:
        part = call.wide_rows(run, S)
        A_run = call.factor_of(run, call.A)
        if keep is None:
            _shrink(call.rows_of(run, x), A_run, part)
        else:
            kept = Mask(keep[run.rows]).of(x[run.rows])
            _shrink(widened(kept, call.wide).view(run.groups, run.m, -1), A_run, part)
            if call.frozen is not None:
                plain = torch.empty_like(part)
                _shrink(call.rows_of(run, x), A_run, plain)
                torch.where(call.frozen_of(run), plain, part, out=part)
        y_run = y[run.rows].view(run.groups, run.m, -1)
        c = call.coefficients(run, dropped=True)
        _expand_(y_run, part, call.factor_of(run, call.B), c)
    return y, S, keep


def _draw(x: Tensor, call: _Call, branch: GroupedBranch, aux: GroupedAux) -> Tensor:
    """Kept elements -1, dropped ones 0: int8 `[M, K]`, rows of groups without ranks left out."""
    keep, seeds = torch.empty(x.shape, dtype=torch.int8), aux.seeds.tolist()
    for run in call.runs:
        for i in range(run.groups):
            start = run.rows.start + i * run.m
            own = slice(start, start + run.m)
            ids = None if aux.row_ids is None else aux.row_ids[own]
            keyed_keep(seeds[run.first + i], ids, branch.dropout_p, keep[own])
    return keep


def backward(
    dy: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    S: Tensor | None,
    keep: Tensor | None,
    layout: Layout,
    branch: GroupedBranch,
    aux: GroupedAux,
    needs: tuple[bool, bool, bool, bool],
    dx_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA, dB and de; None where not needed.

    Args:
        dy: `[M, N]`.
        weight: `[N, K]`, needed for dx.
        x: `[M, K]`, needed for dA and de.
        S, keep: from forward; S is needed for dB.
        needs: which of dx, dA, dB, de are wanted.
        dx_dtype: not used here; the base's product decides.
    """
    need_dx, need_dA, need_dB, need_de = needs
    x_dtype = dy.dtype if x is None else x.dtype
    call = _Call(x_dtype, A, B, e, layout, branch, aux)
    dx = products.mm(dy, weight) if need_dx else None
    # a rank of a group without rows has a gradient too: zero
    covered = sum(run.groups * run.R for run in call.runs) == A.shape[0]
    room = torch.empty if covered else torch.zeros
    H = room(A.shape, dtype=call.wide) if need_dA or need_de else None
    G = room(B.shape, dtype=call.wide) if need_dB else None
    for run in call.runs:
        dy_run = call.rows_of(run, dy)
        if need_dB:
            c = call.coefficients(run, dropped=True)
            _gram(call.wide_rows(run, S), dy_run, c, call.factor_of(run, G))
        if H is None and dx is None:
            continue
        U = torch.empty(run.groups, run.R, run.m, dtype=call.wide)
        _shrink(dy_run, call.factor_of(run, call.B), U)
        if H is not None:
            # untrained ranks have no gradient, so their reading of x without dropout is not here
            rows = (
                call.rows_of(run, x)
                if keep is None
                else widened(Mask(keep[run.rows]).of(x[run.rows]), call.wide).view(
                    run.groups, run.m, -1
                )
            )
            # de needs H as it is
            c = 1.0 if need_de else call.coefficients(run, dropped=True)
            _gram(U, rows, c, call.factor_of(run, H))
        if dx is not None:
            _add_dx(call, run, dx, U, keep)
    dA, de = _finish(call, H, need_dA) if need_de else (H, None)
    return dx, *(_own(t, like, aux) for t, like in ((dA, A), (G, B), (de, e)))


def _add_dx(call: _Call, run: Run, dx: Tensor, U: Tensor, keep: Tensor | None) -> None:
    """dx += D∘(Uᵀ (s c∘A)) for the rows of a run, in place."""
    rows = dx[run.rows].view(run.groups, run.m, -1)
    A = call.factor_of(run, call.A)
    if keep is None:
        _expand_(rows, U, A, call.coefficients(run, dropped=True))
        return
    if call.frozen is not None:
        frozen = call.frozen_of(run)
        part = torch.where(frozen, A, 0.0)
        _expand_(rows, U, part, call.coefficients(run, dropped=False))
        A = torch.where(frozen, 0.0, A)
    share = scratch(rows, call.wide, slot=0)
    torch.bmm(U.transpose(1, 2), A * call.coefficients(run, dropped=True), out=share)
    rows.add_(Mask(keep[run.rows].view(rows.shape)).on_(share))


def _finish(call: _Call, H: Tensor, need_dA: bool) -> tuple[Tensor | None, Tensor]:
    """dA = s c∘H in place of H, and de = s Σ_K A∘H."""
    de = torch.zeros(H.shape[0], dtype=call.wide)
    for run in call.runs:
        part = call.factor_of(run, H)
        weights = (part * call.factor_of(run, call.A)).sum(2)
        scale = call.scale[run.first : run.first + run.groups, None] * call.factor
        de[run.ranks] = (weights * scale).flatten()
        if need_dA:
            part.mul_(call.coefficients(run, dropped=True))
    return H if need_dA else None, de


def _own(grad: Tensor | None, like: Tensor | None, aux: GroupedAux) -> Tensor | None:
    """The gradient in its parameter's dtype, zero where a rank is not trainable."""
    if grad is None:
        return None
    if aux.trainable is not None:
        grad[~aux.trainable] = 0.0
    return _cast(grad, like.dtype)
