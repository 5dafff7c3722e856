"""Rules on shapes: buckets by length, clients in a pass."""

import itertools

import pytest
import torch
from torch import nn

from fastrank.federated.passes import PassCost, buckets


def cost(division, lengths, sizes, overhead):
    return sum(
        overhead + max(lengths[i] for i in part) * sum(sizes[i] for i in part) for part in division
    )


def divisions(items):
    """Every way to divide a list."""
    if not items:
        yield []
        return
    first, *rest = items
    for other in divisions(rest):
        yield [[first], *other]
        for i in range(len(other)):
            yield [*other[:i], [first, *other[i]], *other[i + 1 :]]


@pytest.mark.parametrize("overhead", [0.0, 10.0, 60.0, 1e6])
@pytest.mark.parametrize("seed", range(4))
def test_buckets_are_the_cheapest_division(overhead, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (6,), generator=generator).tolist()
    sizes = torch.randint(1, 5, (6,), generator=generator).tolist()
    found = buckets(lengths, sizes, overhead)
    assert sorted(itertools.chain(*found)) == list(range(6))
    assert all(part == sorted(part) for part in found)
    best = min(cost(d, lengths, sizes, overhead) for d in divisions(list(range(6))))
    assert cost(found, lengths, sizes, overhead) == pytest.approx(best)


def test_dear_passes_are_few_and_free_ones_many():
    assert buckets([3, 30, 300], [1, 1, 1], 1e9) == [[0, 1, 2]]
    assert buckets([3, 30, 300], [1, 1, 1], 0.0) == [[0], [1], [2]]


def test_full_steps_go_one_by_one():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    rule = PassCost.of(model, torch.device("cpu"))
    assert rule.clients_in_parallel(100, rule.full_tokens) == 1
    assert rule.clients_in_parallel(100, rule.full_tokens, forced=True) > 1
    assert rule.clients_in_parallel(1, 16) == 1
    assert rule.clients_in_parallel(100, 16) == min(100, rule.most_tokens // 16)


def test_small_models_share_larger_passes():
    small = nn.Sequential(*[nn.Linear(128, 128) for _ in range(8)])
    large = nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])
    device = torch.device("cpu")
    assert PassCost.of(small, device).overhead > 10 * PassCost.of(large, device).overhead
