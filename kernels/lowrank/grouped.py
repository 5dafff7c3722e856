"""grouped_lowrank_linear: one frozen base, G adapters, one pass.

    y_g = x_g Wᵀ + bias + s_g ((drop(x_g) A_gᵀ) ⊙ e_g ⊙ active_g) B_g

The base is one product over all rows; the branches are grouped (grouped_torch.py on CPUs,
grouped_triton.py on GPUs).
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrank.kernels.common import choose_backend, products
from fastrank.kernels.lowrank import grouped_reference
from fastrank.kernels.lowrank.arguments import PRECISIONS, check_base_dtypes, plainly_right
from fastrank.kernels.lowrank.core import no_autocast, operands
from fastrank.kernels.lowrank.grouped_arguments import (
    GroupedAux,
    GroupedBranch,
    Layout,
    check_mask,
    check_operands,
    make_layout,
    make_scale,
    make_seeds,
    one_scale,
)
from fastrank.kernels.lowrank.op import autocast_dtype


def grouped_lowrank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    *,
    rows: Sequence[int] | Tensor,
    ranks: Sequence[int] | Tensor,
    scale: float | Sequence[float] | Tensor,
    e: Tensor | None = None,
    active: Tensor | None = None,
    trainable: Tensor | None = None,
    dropout_p: float = 0.0,
    seeds: Sequence[int] | Tensor | None = None,
    row_ids: Tensor | None = None,
    backend: str = "auto",
    precision: str = "peft",
    packed: list[Tensor] | None = None,
) -> Tensor:
    """A loop over groups of lowrank_linear in one pass, differentiable once.

        >>> from fastrank.kernels.lowrank import grouped_lowrank_linear
        >>> x, weight = torch.randn(10, 32), torch.randn(16, 32)
        >>> A, B = torch.randn(8 + 4, 32), torch.randn(8 + 4, 16)  # of ranks 8 and 4, B rank-major
        >>> adapters = {"rows": [6, 4], "ranks": [8, 4], "scale": [2.0, 4.0]}
        >>> y = grouped_lowrank_linear(x, weight, None, A, B, **adapters)
        >>> torch.allclose(y[6:], x[6:] @ weight.T + 4.0 * (x[6:] @ A[8:].T @ B[8:]), atol=1e-2)
        True

    Args:
        x: `[..., K]`, rows sorted by group.
        weight: `[N, K]`, any strides, frozen or not, in x's dtype unless autocast is on.
        bias: `[N]` or None.
        A: the groups' factors behind each other, `[ΣR, K]`.
        B: likewise and rank-major, `[ΣR, N]`, in A's dtype.
        rows: rows of each group, `[G]`; their sum is the number of rows of x. Any may be 0.
        ranks: ranks of each group, `[G]`; their sum is ΣR. Any may be 0.
        scale: of each group's branch, `[G]`, or one number.
        e: `[ΣR]`, or None for ones.
        active: ranks that exist, bool `[ΣR]`: the others add nothing and get exactly zero
            gradients, whatever they hold. A mask on the CPU is compacted.
        trainable: ranks that get gradients, bool `[ΣR]`; the others read x without dropout.
        dropout_p: in [0, 1), on the branches' input.
        seeds: a group's seed for its draws, int64 `[G]`; None draws them from torch's generator.
        row_ids: int64 `[M]`, the identity of each row within its group; None for its index there.
            A draw depends on seed, row id and column alone, not on the other groups. On a GPU and
            in the reference it is Philox's, as in lowrank_linear; on a CPU another generator's.
        backend: "auto", "triton" or "reference".
        precision: "peft" computes the branch in the adapters' dtype where no autocast is on,
            "compute" in x's (on a CPU always at least fp32).
        packed: what ``kernels.common.products.pack(weight)`` made, to spare a CPU making it.

    rows, ranks and scale are host sequences or CPU tensors, which are checked, or tensors on x's
    device, which are trusted, clamped and cost no sync. torch.compile does not capture the
    call: put it in a function under ``torch.compiler.disable``.

    Returns:
        `[..., N]`, in the dtype of `F.linear(x, weight, bias)`.

    Raises:
        ValueError, TypeError: arguments that don't fit, naming the group where one is wrong.
    """
    packed_B = B.t() if isinstance(B, Tensor) and B.dim() == 2 else B
    if not plainly_right(x, weight, bias, A, packed_B, e):
        check_operands(x, weight, bias, A, B, e)
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; pass one of {', '.join(PRECISIONS)}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; pass a probability in [0, 1)")
    autocast = autocast_dtype(x)
    if autocast is None:
        check_base_dtypes(x, weight, bias)
    device, total = x.device, A.shape[0]
    M = x.numel() // x.shape[-1]
    for name, mask in (("active", active), ("trainable", trainable)):
        check_mask(name, mask, total)
    layout = make_layout(rows, ranks, M, total, device)
    groups = layout.row_starts.shape[0] - 1
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    chosen = choose_backend(backend, device, autocast or x.dtype)
    if row_ids is not None and (
        not isinstance(row_ids, Tensor)
        or row_ids.dtype != torch.int64
        or row_ids.shape != (M,)
        or row_ids.device != device
    ):
        raise ValueError(f"row_ids must be int64 [{M}] on {device}, one for each row of x")
    if active is not None and layout.ranks is not None and active.device.type == "cpu":
        index, layout = _compact(active, layout, device)
        A, B = A.index_select(0, index), B.index_select(0, index)
        e = None if e is None else e.index_select(0, index)
        if trainable is not None:
            trainable = trainable.to(device, non_blocking=True).index_select(0, index)
        active = None
    aux = GroupedAux(
        scale=make_scale(scale, groups, wide, device),
        seeds=make_seeds(seeds, groups, device) if dropout_p > 0.0 else None,
        row_ids=row_ids if dropout_p > 0.0 else None,
        active=None if active is None else active.to(device, non_blocking=True),
        trainable=None if trainable is None else trainable.to(device, non_blocking=True),
    )
    flat = x if x.dim() == 2 else x.reshape(M, x.shape[-1])
    if chosen == "reference":
        y = grouped_reference.grouped_lowrank_linear(
            flat, weight, bias, A, B, e, layout, dropout_p, aux
        )
    else:
        plain = (float(dropout_p), chosen, autocast, precision, one_scale(scale))
        branch = GroupedBranch(*plain)
        y = _Grouped.apply(flat, weight, bias, A, B, e, layout, branch, aux, packed)
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[1]])


def _compact(active: Tensor, layout: Layout, device: torch.device) -> tuple[Tensor, Layout]:
    """Indices of the ranks that exist, and the layout without the others."""
    kept = [int(part.sum()) for part in active.split(layout.ranks)]
    starts = torch.tensor([0, *kept], dtype=torch.int64).cumsum(0).to(device)
    index = active.nonzero()[:, 0].to(device)
    layout = layout._replace(ranks=tuple(kept), rank_starts=starts, max_rank=max(kept, default=0))
    return index, layout


def _path(backend: str) -> ModuleType:
    if backend == "torch":
        from fastrank.kernels.lowrank import grouped_torch as path
    else:
        # imported on first use: nobody without a GPU pays for loading Triton
        from fastrank.kernels.lowrank import grouped_triton as path
    return path


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, A, B, e, layout: Layout, branch: GroupedBranch, aux, packed):
        x_flat, weight_cast, bias_cast = operands(x, weight, bias, branch)
        ctx.works = x.shape[0] > 0 and layout.max_rank > 0
        S = keep = None
        with no_autocast(x):
            if ctx.works:
                extra = (packed,) if branch.backend == "torch" else ()
                y, S, keep = _path(branch.backend).forward(
                    x_flat, weight_cast, bias_cast, A, B, e, layout, branch, aux, *extra
                )
            else:
                y = products.linear(x_flat, weight_cast, bias_cast, packed)
        need_x, need_weight, _, need_A, need_B, need_e = ctx.needs_input_grad[:6]
        ctx.save_for_backward(
            x_flat if need_weight or need_A or need_e else None,
            weight_cast if need_x else None,
            A,
            B,
            e,
            S if need_B else None,
            keep if need_x or need_A or need_e else None,
            layout.row_starts,
            layout.rank_starts,
            *aux,
        )
        dtypes = tuple(None if t is None else t.dtype for t in (weight, bias))
        ctx.plain = layout.rows, layout.ranks, layout.max_rank, branch, x.dtype, dtypes
        return y

    @staticmethod
    def backward(ctx, dy):
        # grad mode is on only under create_graph, which is refused
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, A, B, e, S, keep, row_starts, rank_starts, *aux = ctx.saved_tensors
    rows, ranks, max_rank, branch, x_dtype, (weight_dtype, bias_dtype) = ctx.plain
    layout = Layout(rows, ranks, row_starts, rank_starts, max_rank)
    need_x, need_weight, need_bias, *need_factors = ctx.needs_input_grad[:6]
    if 0 in dy.stride() and dy.numel() > 1:
        dy = dy.contiguous()  # what .sum() sends back
    grads = [None] * 6
    with no_autocast(dy):
        if need_weight:
            grads[1] = products.mm(dy.t(), x).to(weight_dtype)
        if need_bias:
            grads[2] = dy.sum(0).to(bias_dtype)
        if ctx.works and (need_x or any(need_factors)):
            needs = (need_x, *need_factors)
            grads[0], *grads[3:] = _path(branch.backend).backward(
                dy,
                weight,
                x,
                A,
                B,
                e,
                S,
                keep,
                layout,
                branch,
                GroupedAux(*aux),
                needs,
                x_dtype,
            )
        elif not ctx.works:
            grads[0] = products.mm(dy, weight) if need_x else None
            for place, like in ((3, A), (4, B), (5, e)):
                if ctx.needs_input_grad[place]:
                    grads[place] = torch.zeros_like(like)
        if need_x:
            grads[0] = grads[0].to(x_dtype)
    return *grads, None, None, None, None


_backward_once = once_differentiable(_backward)
