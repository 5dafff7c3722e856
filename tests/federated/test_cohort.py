"""Cohorts, batches and seeds are pure functions of (seed, round, client)."""

import random

import numpy as np
import pytest
import torch

from fastrank.federated.cohort import derive_seed, make_batches, sample_cohort


def test_cohort_is_a_pure_function_of_seed_and_round():
    first = [sample_cohort(50, 8, seed=3, round=t) for t in range(5)]
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    assert first == [sample_cohort(50, 8, seed=3, round=t) for t in range(5)]
    assert first != [sample_cohort(50, 8, seed=4, round=t) for t in range(5)]
    assert len({tuple(c) for c in first}) == 5
    for cohort in first:
        assert len(set(cohort)) == 8
        assert set(cohort) <= set(range(50))
        assert cohort == sorted(cohort)


def test_every_client_gets_its_turn():
    counts = np.zeros(10)
    for t in range(400):
        counts[sample_cohort(10, 3, seed=0, round=t)] += 1
    # 120 expected; 5 standard deviations of a binomial(400, 0.3) are 46
    assert np.all(np.abs(counts - 120) < 46)


def test_seeds_of_different_purposes_and_ids_differ():
    seeds = {
        derive_seed(p, *ids)
        for p in ("cohort", "batch", "init", "step")
        for ids in [(0,), (1,), (0, 1), (1, 0), (0, 0, 1)]
    }
    assert len(seeds) == 20
    assert all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize("grouped", [True, False])
def test_batches_cover_each_example_once_an_epoch(grouped):
    lengths = np.random.default_rng(0).integers(3, 60, size=53)
    batches = make_batches(lengths, 8, seed=1, round=2, client=3, epochs=2, group_by_length=grouped)
    assert len(batches) == 14
    for epoch in (batches[:7], batches[7:]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(53))
    again = make_batches(lengths, 8, seed=1, round=2, client=3, epochs=2, group_by_length=grouped)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    other = make_batches(lengths, 8, seed=1, round=3, client=3, group_by_length=grouped)
    assert any(not np.array_equal(a, b) for a, b in zip(batches[:7], other, strict=True))


def test_length_groups_pad_less():
    lengths = np.random.default_rng(0).integers(3, 60, size=128)

    def padded(grouped: bool) -> int:
        batches = make_batches(lengths, 16, seed=0, round=0, client=0, group_by_length=grouped)
        return sum(int(lengths[b].max()) * len(b) for b in batches)

    assert padded(True) < 0.75 * padded(False)


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_max_steps_cuts_or_repeats(steps):
    batches = make_batches(np.full(30, 5), 8, seed=0, round=0, client=0, max_steps=steps)
    assert len(batches) == steps
