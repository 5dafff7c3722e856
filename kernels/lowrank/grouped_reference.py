"""The definition of grouped_lowrank_linear: a loop over groups of the single op's reference."""

import torch
from torch import Tensor

from fastrank.kernels.lowrank import reference
from fastrank.kernels.lowrank.grouped_arguments import GroupedAux, Layout


def _part(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]


def grouped_lowrank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    layout: Layout,
    dropout_p: float,
    aux: GroupedAux,
) -> Tensor:
    """y `[M, N]` for x `[M, K]`; every gradient is autograd's own."""
    row_starts, rank_starts = layout.row_starts.tolist(), layout.rank_starts.tolist()
    scales = aux.scale.tolist()
    ys = []
    for group, scale in enumerate(scales):
        own = slice(row_starts[group], row_starts[group + 1])
        ranks = slice(rank_starts[group], rank_starts[group + 1])
        ys.append(
            reference.lowrank_linear(
                x[own],
                weight,
                bias,
                A[ranks],
                B[ranks].t(),
                scale=scale,
                e=_part(e, ranks),
                active=_part(aux.active, ranks),
                trainable=_part(aux.trainable, ranks),
                dropout_p=dropout_p,
                seed=None if aux.seeds is None else aux.seeds[group : group + 1],
                row_ids=_part(aux.row_ids, own),
            )
        )
    rest = x[row_starts[-1] :]  # rows that clamped counts leave to no group
    ys.append(torch.nn.functional.linear(rest, weight, bias))
    return torch.cat(ys)
