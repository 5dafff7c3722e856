"""Krum against hand-computed scores, and its distances against dense matrices."""

import dataclasses

import pytest
import torch
from lora_cases import MIXED, started, update_of
from robust_cases import dense, updates_of

from fastrank.federated.clipping import norm_of
from fastrank.federated.methods import FedIT, FedPLoRA, FlexLoRA
from fastrank.federated.methods.base import Update
from fastrank.federated.robust import (
    Krum,
    krum_scores,
    product_distances,
    products_of,
    squared_distances,
)
from fastrank.federated.wire import Payload


def numbers(values):
    """Clients that each send one scalar, as [n, 1]."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


def distances(values):
    return (numbers(values) - numbers(values).T).square()


def test_krum_scores_by_hand():
    # n = 5, f = 1: the two nearest others count
    scores = krum_scores(distances([0.0, 1.0, 3.0, 6.0, 100.0]), 1)
    assert scores.tolist() == [1 + 9, 1 + 4, 4 + 9, 9 + 25, 94**2 + 97**2]
    # n = 6, f = 0: four of five
    scores = krum_scores(distances([0.0, 1.0, 2.0, 3.0, 4.0, 50.0]), 0)
    assert scores.tolist()[:3] == [1 + 4 + 9 + 16, 1 + 1 + 4 + 9, 1 + 1 + 4 + 4]
    assert krum_scores(distances([3.0]), 0).tolist() == [0.0]
    assert krum_scores(distances([3.0, 5.0]), 0).tolist() == [4.0, 4.0]


def scalars(values):
    """Updates of FedIT's head alone, each a multiple of ones, over an adapter that stays."""
    method, state = started(FedIT, clients=len(values))
    found = []
    for client, value in enumerate(values):
        tensors = {n: v.clone() for n, v in state.tensors.items()}
        tensors["head.weight"] = torch.full((3, 5), value)
        found.append(Update(client, Payload(tensors, {"round": 0}), client + 1, 1, 0.0))
    return method, state, found


def test_krum_and_multi_krum_choose_by_hand():
    method, state, updates = scalars([0.0, 1.0, 3.0, 6.0, 100.0])
    chosen, noted = Krum(byzantine=1).select(method, state, updates, 0)
    assert [u.client for u in chosen] == [1]
    assert noted == {"chosen": [1], "byzantine": 1}
    chosen, _ = Krum(many=True, byzantine=1).select(method, state, updates, 0)
    assert [u.client for u in chosen] == [0, 1, 2, 3]
    method = dataclasses.replace(method, rule=Krum(many=True, byzantine=1))
    new, _ = method.aggregate(state, chosen, 0)  # by samples: 1, 2, 3, 4
    assert float(new.tensors["head.weight"][0, 0]) == pytest.approx((2 + 9 + 24) / 10)
    tied = [0.0, 0.0, 0.0, 50.0, 60.0]
    chosen, _ = Krum(byzantine=1).select(*scalars(tied), 0)
    assert [u.client for u in chosen] == [0]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_krum_with_few_updates_left_uses_what_they_withstand(n):
    method, state, updates = scalars([1.0, 2.0, 3.0, 80.0][:n])
    chosen, noted = Krum(byzantine=4).select(method, state, updates, 0)
    assert noted["byzantine"] == 0
    assert len(chosen) == 1
    assert chosen[0].client == (1 if n == 4 else 0)  # three in a row are all equally near


# -- distances -------------------------------------------------------------------------------------


def test_product_distances_are_the_dense_ones_for_mixed_ranks():
    method, state = started(FlexLoRA, client_ranks=MIXED, scaling="rank")
    updates = updates_of(method, state)
    scales = [method.scale_for(state, u.client) for u in updates]
    assert len(set(scales)) == 3
    clients = [u.payload.tensors for u in updates]
    products = [products_of(own) for own in clients]
    total = torch.zeros(5, 5, dtype=torch.float64)
    for module in products[0]:
        found = product_distances([p[module] for p in products], scales)
        full = torch.stack([dense(p[module], s) for p, s in zip(products, scales, strict=True)])
        wanted = (full[:, None] - full[None]).square().sum((2, 3))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-9)
        total += wanted
    heads = torch.stack([own["head.weight"].double() for own in clients])
    total += (heads[:, None] - heads[None]).square().sum((2, 3))
    torch.testing.assert_close(squared_distances(clients, scales), total, rtol=1e-10, atol=1e-9)


def test_factor_distances_pad_ranks_with_zeros():
    method, state = started(FlexLoRA, client_ranks=MIXED)
    clients = [u.payload.tensors for u in updates_of(method, state)]

    def flat(own):
        parts = []
        for name, value in sorted(own.items()):
            whole = torch.zeros(state.tensors[name].shape, dtype=torch.float64)
            whole[tuple(slice(0, s) for s in value.shape)] = value.double()
            parts.append(whole.flatten())
        return torch.cat(parts)

    vectors = torch.stack([flat(own) for own in clients])
    wanted = (vectors[:, None] - vectors[None]).square().sum(2)
    torch.testing.assert_close(squared_distances(clients), wanted, rtol=1e-12, atol=1e-12)


def test_equal_products_of_other_factors_are_far_apart_only_as_factors():
    method, state = started(FedIT)
    update = update_of(method, state, 0)
    turned = dict(update.payload.tensors)
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).double()
    for name, value in update.payload.tensors.items():
        if ".lora_B." in name:
            turned[name] = value.double() @ mix
        elif ".lora_A." in name:
            turned[name] = torch.linalg.inv(mix) @ value.double()
    clients = [update.payload.tensors, turned]
    size = norm_of(update.payload.tensors) ** 2
    assert squared_distances(clients)[0, 1] > 0.1 * size
    assert squared_distances(clients, [3.0, 3.0])[0, 1] < 1e-9 * size


def test_svd_form_counts_e_in_the_product():
    generator = torch.Generator().manual_seed(0)
    B, A, E = (torch.randn(*s, generator=generator) for s in ((6, 3), (3, 5), (3, 1)))
    names = {role: f"net.q.lora_{role}.default" for role in "ABE"}
    found = products_of({names["A"]: A, names["B"]: B, names["E"]: E})["net.q"]
    torch.testing.assert_close(dense(found), (B @ torch.diag(E[:, 0]) @ A).double())


def test_fed_ploras_partial_updates_stand_where_the_server_left_the_rest():
    method, state = started(FedPLoRA, client_ranks=(1, 2))
    update = update_of(method, state, 0)
    whole = method.whole(state, update, 0)
    chosen = method.chosen(0, 0, state.tensors)
    for name, value in whole.items():
        assert value.shape == state.tensors[name].shape
        if ".lora_A." in name:
            own = chosen[name.partition(".lora_A.")[0]]
            assert torch.equal(value[own], update.payload.tensors[name])
            rest = [j for j in range(method.r) if j not in own]
            assert torch.equal(value[rest], state.tensors[name][rest])
