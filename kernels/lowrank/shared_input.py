"""Several adapted layers that read one x (q, k and v; gate and up) on a GPU.

    S_i = drop_i(x) A_iᵀ and H_i = drop_i(x)ᵀ U_i    one launch each for all i: tiles of x come
                                                      from memory once, then from L2
    dx  = Σ dY_i W_i + s_i D_i∘((U_i∘e_i) A_i)        added up in place, not by autograd

Each layer keeps its own ranks, masks, seed and dropout draw: results are those of the layers one by
one, but for the order in which dx is added up. Layers whose operands or dropout differ are launched
in groups of those that agree.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastrank.kernels.lowrank import triton_path
from fastrank.kernels.lowrank.calls import Call, start
from fastrank.kernels.lowrank.launchers import Shared, gram, shrink
from fastrank.kernels.lowrank.shared_layer import Layer


@functools.lru_cache(maxsize=256)
def _placed(
    ranks: tuple[int, ...], trained: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    starts = [sum(ranks[:i]) for i in range(len(ranks) + 1)]
    # cached across calls, so they must not be born inference tensors
    with torch.inference_mode(False):
        return (
            torch.tensor(starts, dtype=torch.int32, device=device),
            torch.tensor(trained, dtype=torch.int32, device=device),
        )


def _join(calls: Sequence[Call], device: torch.device) -> tuple[Call, Shared]:
    """One call that stands for all: masks and seeds behind each other, the largest rank."""
    ranks = tuple(call.branch.kept for call in calls)
    trained = tuple(call.branch.trained for call in calls)
    masks = (None, None)
    if calls[0].masked:
        masks = tuple(torch.cat([call.masks[i] for call in calls]) for i in (0, 1))
    aux = calls[0].aux
    if calls[0].dropout:
        aux = aux._replace(seed=torch.cat([call.aux.seed for call in calls]))
    branch = calls[0].branch._replace(kept=max(ranks))
    joined = calls[0]._replace(branch=branch, aux=aux, masks=masks)
    return joined, Shared(ranks, *_placed(ranks, trained, device))


def _alike(calls: Sequence[Call]) -> list[list[int]]:
    """Places of the calls that one launch can serve together."""
    groups: dict[tuple, list[int]] = {}
    for i, call in enumerate(calls):
        p = call.branch.dropout_p if call.dropout else 0.0
        row_ids = None if not p or call.aux.row_ids is None else call.aux.row_ids.data_ptr()
        groups.setdefault((call.dot, call.precision, call.masked, p, row_ids), []).append(i)
    return list(groups.values())


def shrink_many(calls: Sequence[Call], x: Tensor, As: Sequence[Tensor]) -> list[Tensor]:
    """S_i = drop_i(x) A_iᵀ, fp32 (M, R_i), for adapters that start() has compacted."""
    found: list[Tensor] = [x] * len(calls)
    for group in _alike(calls):
        if len(group) == 1 or len({As[i].dtype for i in group}) > 1:
            for i in group:
                found[i] = shrink(calls[i], x, As[i], As[i].stride(), calls[i].dropout)
            continue
        call, shared = _join([calls[i] for i in group], x.device)
        q = torch.cat([As[i] for i in group])
        flat = shrink(call, x, q, q.stride(), call.dropout, shared)
        for i, S in zip(group, shared.parts(flat, x.shape[0]), strict=True):
            found[i] = S
    return found


def gram_many(calls: Sequence[Call], x: Tensor, Us: Sequence[Tensor]) -> list[Tensor]:
    """Parts of H_i = drop_i(x)ᵀ U_i, fp32 (splits, K, R_i), each to be added up."""
    found: list[Tensor] = [x] * len(calls)
    for group in _alike(calls):
        if len(group) == 1:
            (i,) = group
            found[i] = gram(calls[i], x, Us[i], calls[i].dropout)
            continue
        call, shared = _join([calls[i] for i in group], x.device)
        flat = torch.cat([Us[i].reshape(-1) for i in group])
        parts = gram(call, x, flat, call.dropout, shared)
        for i, H in zip(group, shared.parts(parts, x.shape[1]), strict=True):
            found[i] = H
    return found


def linears(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor]]:
    """y_i (M, N_i) and S_i of every layer, from one read of x (M, K) for all S_i.

    Every layer keeps at least one rank; one that keeps none is its base, and not for here.
    """
    calls, As, Bs, es = zip(
        *(start(x.dtype, layer.A, layer.B, layer.e, layer.branch, layer.aux) for layer in layers),
        strict=True,
    )
    Ss = shrink_many(calls, x, As)
    ys = [
        triton_path.base_and_branch(call, x, layer.weight, layer.bias, S, B, e)
        for call, layer, S, B, e in zip(calls, layers, Ss, Bs, es, strict=True)
    ]
    return ys, Ss


def backward(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    layers: Sequence[Layer],
    Ss: Sequence[Tensor | None],
    needs: Sequence[tuple[bool, bool, bool, bool]],
    dx_dtype: torch.dtype,
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None, Tensor | None]]]:
    """dx, summed over the layers, and (dA, dB, de) of each; None where not needed.

    Args:
        dys: `[M, N_i]`, in the dtype of the layer's y; None for a y that nobody used.
        x: `[M, K]`; may be None where no dA is needed.
        Ss: from linears().
        needs: for each layer which of dx, dA, dB and de; dx of all or of none.
        dx_dtype: of the result, where no layer has a gradient to give.
    """
    x_dtype = dx_dtype if x is None else x.dtype
    grads: list[tuple[Tensor | None, ...]] = []
    steps = {}
    for i, (dy, layer, need) in enumerate(zip(dys, layers, needs, strict=True)):
        weight, _, A, B, e, branch, aux = layer
        if dy is not None:
            forward_dtype = branch.autocast or x_dtype
            arguments = (dy, weight, A, B, e, Ss[i], branch, aux, need, forward_dtype)
            steps[i] = triton_path.Gradients(*arguments)
        zeros = zip((A, B, e), need[1:], strict=True)
        grads.append(tuple(torch.zeros_like(t) if wanted else None for t, wanted in zeros))
    for step in steps.values():
        step.read_dy()
    of_A = [step for step in steps.values() if step.need_dA]
    if of_A:
        parts = gram_many([step.call for step in of_A], x, [step.U for step in of_A])
        for step, H in zip(of_A, parts, strict=True):
            step.finish_dA(H)
    dx = None
    for i, step in steps.items():
        if needs[i][0]:
            dx = step.add_dx(dx, dx_dtype)
        grads[i] = step.grads()
    return dx, grads
