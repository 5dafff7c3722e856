"""Dealt work, sums of shares that are the mean of all, and a world of one process."""

import numpy as np
import pytest
import torch

from fastrank.federated.averaging import Summed, WeightedSum, weighted_mean
from fastrank.federated.methods.base import Update
from fastrank.federated.torchrun import deal
from fastrank.federated.wire import Payload
from fastrank.federated.world import World


def test_work_is_dealt_to_the_least_busy():
    assert deal([1, 1, 1, 1], 2) == [[0, 2], [1, 3]]
    assert deal([9, 1, 1, 1], 2) == [[0], [1, 2, 3]]
    assert deal([5, 4, 3, 2], 3) == [[0], [1], [2, 3]]
    assert deal([0, 0], 3) == [[0], [1], []]
    rng = np.random.default_rng(0)
    for hands in (1, 2, 5):
        work = [int(w) for w in rng.integers(1, 100, size=23)]
        dealt = deal(work, hands)
        assert sorted(i for each in dealt for i in each) == list(range(23))
        loads = [sum(work[i] for i in each) for each in dealt]
        assert max(loads) - min(loads) <= max(work)


def updates_of(seed, clients=7):
    generator = torch.Generator().manual_seed(seed)
    return [
        Update(i, Payload({"w": torch.randn(50, generator=generator)}), 11 * i + 3, 1, 0.5)
        for i in range(clients)
    ]


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_sums_of_shares_are_the_mean_of_all(weighting):
    """However the cohort is split: float64 sums of fp32 values round once."""
    for seed in range(20):
        updates = updates_of(seed)
        whole = weighted_mean(updates, weighting)["w"]
        for at in range(len(updates) + 1):
            parts = [WeightedSum(weighting), WeightedSum(weighting)]
            for i, update in enumerate(updates):
                parts[i >= at].add(update)
            flat = torch.full((50,), -0.0, dtype=torch.float64)
            for part in parts:
                flat += part.totals.get("w", torch.full((50,), -0.0, dtype=torch.float64))
            total = WeightedSum(weighting, {"w": flat})
            total.weight = parts[0].weight + parts[1].weight
            summed = Summed("fedavg", total, [(0.5, 1)])
            assert torch.equal(weighted_mean([summed], weighting)["w"], whole)


def test_negative_zeros_stay():
    update = Update(0, Payload({"w": torch.tensor([-0.0, 0.0])}), 3, 1, 0.0)
    total = WeightedSum("samples", {"w": torch.full((2,), -0.0, dtype=torch.float64)})
    total.add(update)
    assert torch.signbit(total.mean()["w"]).tolist() == [True, False]


def test_what_a_sum_has_lost_is_not_made_up():
    total = WeightedSum("samples", {"w": torch.ones(2, dtype=torch.float64)})
    total.weight = 2.0
    summed = Summed("mine", total, [(0.5, 2)])
    with pytest.raises(RuntimeError, match=r"mine reads 'payload' of single updates.*'gather'"):
        _ = summed.payload
    with pytest.raises(RuntimeError, match="averages by 'uniform' what was summed"):
        weighted_mean([summed], "uniform")


def test_one_process_is_a_world_of_its_own():
    world = World()
    assert world.first
    assert world.map(lambda a, b: a + b, [1, 2], [3, 4]) == [4, 6]
    assert world.share({"a": 1}) == {"a": 1}
    assert world.begin("here", torch.device("cpu"), 1.0, 1) == "here"
    with pytest.raises(ZeroDivisionError), world.together():
        _ = 1 / 0
