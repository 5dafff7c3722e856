"""Robust rules: medians and trimmed means by hand, what two of seven can do, what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from lora_cases import started
from robust_cases import fedara, updates_of

from fastrank.errors import UsageError
from fastrank.federated.conditions import Conditions
from fastrank.federated.config import resolve
from fastrank.federated.methods import METHODS, FedARA, FedIT, FedSVD, FFALoRA
from fastrank.federated.robust import Coordinates, Krum, median, trimmed, trimmed_mean

# -- coordinate by coordinate ---------------------------------------------------------------------


def test_median_by_hand():
    odd = torch.tensor([[1.0, 9.0], [5.0, -1e30], [2.0, 3.0]])
    assert median(odd).tolist() == [2.0, 3.0]
    even = torch.tensor([[1.0], [100.0], [2.0], [4.0]])
    assert median(even).tolist() == [3.0]  # numpy's convention: the middle two's mean


@pytest.mark.parametrize("n", [1, 2, 7, 10])
def test_median_is_numpys(n):
    values = torch.randn(n, 3, 4, generator=torch.Generator().manual_seed(n))
    assert np.array_equal(median(values).numpy(), np.median(values.double().numpy(), axis=0))


def test_trimmed_mean_by_hand():
    values = torch.tensor([[100.0], [1.0], [2.0], [3.0], [-50.0]])
    assert trimmed(0.2, 5) == 1
    assert trimmed_mean(values, 1).tolist() == [2.0]
    assert trimmed_mean(values, 0).item() == pytest.approx(11.2)
    assert [trimmed(0.29, 100), trimmed(0.2, 4), trimmed(0.45, 10)] == [29, 0, 4]


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_rules_ignore_order_and_sample_counts(rule):
    method, state = started(FedIT)
    method = dataclasses.replace(method, rule=Coordinates(rule))
    updates = updates_of(method, state)
    forward = method.combine(state, updates, 0)
    changed = [dataclasses.replace(u, num_examples=1000 * u.client + 1) for u in updates[::-1]]
    backward = method.combine(state, changed, 0)
    for name, value in forward.items():
        assert torch.equal(value, backward[name]), name
        stack = np.stack([u.payload.tensors[name].double().numpy() for u in updates])
        wanted = np.median(stack, 0) if rule == "median" else np.sort(stack, 0)[1:-1].mean(0)
        assert np.allclose(value.numpy(), wanted, rtol=1e-6, atol=0)


RULES = (
    Coordinates("median"), Coordinates("trimmed-mean", 0.3), Krum(), Krum(many=True),
    Krum(on="products"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "cls"),
    [
        pytest.param(rule, cls, id=f"{cls.name}-{rule}")
        for cls in (FedIT, FedSVD, FFALoRA, FedARA)
        for rule in RULES
        if cls.sends_products or getattr(rule, "on", "") != "products"
    ],
)
def test_two_of_seven_cannot_steer(rule, cls):
    method, state = fedara() if cls is FedARA else started(cls, clients=9)
    method = dataclasses.replace(method, rule=rule)
    updates = updates_of(method, state, range(7))
    for hostile in (1, 4):
        tensors = updates[hostile].payload.tensors
        for value in tensors.values():
            if value.is_floating_point():
                value.fill_(1e15 if hostile == 1 else -1e15)
    chosen, noted = rule.select(method, state, updates, 0)
    new, _ = method.aggregate(state, chosen, 0)
    if isinstance(rule, Krum):
        assert not {1, 4} & {update.client for update in chosen}
        assert noted == {"chosen": [u.client for u in chosen], "byzantine": 2}
        assert len(chosen) == (5 if rule.many else 1)
    assert max(float(value.abs().max()) for value in new.tensors.values() if value.numel()) < 30
    plain, _ = dataclasses.replace(method, rule=None).aggregate(state, updates, 0)
    if cls is not FedSVD:  # whose two opposite outliers cancel in the mean
        assert max(float(v.abs().max()) for v in plain.tensors.values() if v.numel()) > 1e13


# -- what makes no sense --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"aggregation": "medain"}, "did you mean 'median'"),
        ({"method": "flora", "aggregation": "median"}, "possible are mean, krum, multi-krum"),
        ({"method": "hetlora", "aggregation": "trimmed-mean"}, "no sense for hetlora"),
        ({"aggregation": "median", "robust_on": "products"}, "possible on products are krum"),
        ({"robust_on": "products"}, "needs something to measure"),
        ({"method": "ffa-lora", "aggregation": "krum", "clients_per_round": 5,
          "robust_on": "products"}, "ffa-lora sends one or none"),
        ({"aggregation": "krum", "clients_per_round": 5, "krum_byzantine": 2},
         r"at least 2 f \+ 3 = 7; clients_per_round is 5: raise it, or lower krum_byzantine to 1"),
        ({"aggregation": "krum", "clients_per_round": 2}, "clients_per_round is 2"),
        ({"krum_byzantine": 1}, "aggregation is mean"),
        ({"aggregation": "trimmed-mean"}, "0.2 of 4 clients trims nobody; give at least 0.25"),
        ({"aggregation": "median", "drop_nonfinite": False}, "leave drop_nonfinite on"),
        ({"attackers": 0.2}, "there is no attack"),
        ({"attack": "nan"}, "needs attackers"),
        ({"attack": "nan", "attackers": 0.2, "attack_scale": 2}, "means nothing to attack nan"),
        ({"attackers": 1.2, "attack": "nan"}, "attackers must be at most 1"),
        ({"clip_update_norm": 0}, "clip_update_norm must be above 0"),
        ({"trim_fraction": 0.5}, "trim_fraction must be below 0.5"),
        ({"method": "fedara", "uplink_ranks": "voted", "clip_update_norm": 1}, "alive"),
        ({"method": "fedara", "uplink_ranks": "voted", "attack": "scale", "attackers": 0.5},
         "leaves open"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(given, words):
    with pytest.raises(UsageError, match=words):
        Conditions.check(*resolve(given))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_the_rules_it_names(name):
    cls = METHODS[name]
    assert {"mean", "krum", "multi-krum"} <= set(cls.aggregations)
    for rule in cls.aggregations:
        given = {"aggregation": rule, "clients_per_round": 5}
        if cls.sends_products and "krum" in rule:
            given["robust_on"] = "products"
        Conditions.check(*resolve({"method": name, **given}))
