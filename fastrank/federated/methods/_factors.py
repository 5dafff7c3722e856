"""A and B of many modules at once: their names, the clients' weights, and norms of products.

No norm here forms an N x K matrix: ‖sum_q w_q b_q a_q‖² needs only the Gram matrices BᵀB and AAᵀ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastrank.errors import UsageError
from fastrank.federated.methods.base import Update
from fastrank.federated.ranks import module_of
from fastrank.federated.wire import Payload


class Pair(NamedTuple):
    """One module's product B A, B `[N, Q]` and A `[Q, K]`; or the names of the two."""

    B: Tensor | str
    A: Tensor | str


def pair_names(names: Iterable[str]) -> dict[str, Pair]:
    """Adapted module -> names of its B and A, in the order of the names."""
    names = list(names)
    return {
        module_of(name): Pair(name.replace(".lora_A.", ".lora_B."), name)
        for name in names
        if ".lora_A." in name
    }


def pairs(tensors: Mapping[str, Tensor]) -> dict[str, Pair]:
    """Adapted module -> its B and A in fp32, by name, whatever the order of the mapping."""
    found = pair_names(sorted(tensors))
    return {m: Pair(tensors[p.B].float(), tensors[p.A].float()) for m, p in found.items()}


def shares(updates: Sequence[Update], weighting: str) -> list[float]:
    """p_i: the clients' weights in the mean, which sum to 1."""
    weights = [float(u.num_examples) if weighting == "samples" else 1.0 for u in updates]
    return [w / sum(weights) for w in weights]


def stacked(products: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """sum_i w_i B_i A_i as one product, the weights in A."""
    A = torch.cat([w * p.A for p, w in zip(products, weights, strict=True)])
    return Pair(torch.cat([p.B for p in products], dim=1), A)


def product_norm(pair: Pair) -> float:
    """‖B A‖_F, through Grams in float64."""
    B, A = pair.B.double(), pair.A.double()
    return float(((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt())


def whole_norm(products: Iterable[Pair]) -> float:
    """The Frobenius norm of several modules' products together."""
    return sum(product_norm(pair) ** 2 for pair in products) ** 0.5


def averaging_noise(
    clients: Sequence[Mapping[str, Pair]],
    weights: Sequence[float],
    mean: Mapping[str, Pair],
    scale: float,
) -> float:
    """‖sum_i p_i s B_i A_i - s B̄ Ā‖_F over all modules, in the weights' own units.

    What averaging A and B apart adds to the mean of the products. As a sum of centred products,
    p_i s (B_i - B̄)(A_i - Ā), it loses no digits where the clients are alike.

    Args:
        clients: each one's factors by module, of the mean's ranks.
        weights: p_i.
        mean: sum_i p_i B_i and sum_i p_i A_i.
        scale: what B A is multiplied by.
    """
    return whole_norm(
        stacked(
            [centred(client[module], middle) for client in clients],
            [scale * w for w in weights],
        )
        for module, middle in mean.items()
    )


def only(update: Update, names: Iterable[str]) -> Update:
    """An update with these of its tensors."""
    tensors = {name: update.payload.tensors[name] for name in names}
    return replace(update, payload=Payload(tensors, update.payload.metadata))


def centred(pair: Pair, middle: Pair) -> Pair:
    return Pair(pair.B - middle.B, pair.A - middle.A)


def check_rank_fits(r: int, shapes: Mapping[str, tuple[int, int]], method: str) -> None:
    """Raise a UsageError where a matrix `[N, K]` has fewer than r singular values."""
    for module, (N, K) in shapes.items():
        if r > min(N, K):
            raise UsageError(
                f"{method}: r must be from 1 to {min(N, K)}, the singular values of {module} "
                f"[{N}, {K}]; got {r}"
            )


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Adapted module -> (N, K), from its factors."""
    found = pair_names(tensors)
    return {m: (tensors[p.B].shape[0], tensors[p.A].shape[1]) for m, p in found.items()}
