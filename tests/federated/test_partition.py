"""Partitions: disjoint covers, pure functions of a seed, skewed as they are meant to be."""

import logging
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_cases import LABELS, assert_partition, class_counts, lists

from fastrank.errors import UsageError
from fastrank.federated import dirichlet, partition
from fastrank.federated.partition import (
    dirichlet_partition,
    iid_partition,
    make_partition,
    natural_partition,
    pathological_partition,
    shard_partition,
)

ALL = {
    "iid": lambda seed: iid_partition(2000, 12, seed),
    "dirichlet": lambda seed: dirichlet_partition(LABELS, 12, 0.5, seed),
    "inner": lambda seed: dirichlet_partition(LABELS, 12, 0.5, seed, dialect="inner"),
    "pathological": lambda seed: pathological_partition(LABELS, 12, 3, seed),
    "shard": lambda seed: shard_partition(LABELS, 12, seed, shards_per_client=2),
}


@pytest.mark.parametrize("name", ALL)
def test_a_pure_function_of_its_seed(name):
    first = lists(ALL[name](0))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert lists(ALL[name](0)) == first
    assert lists(ALL[name](1)) != first
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == states


def test_iid_sizes_and_shuffling():
    parts = iid_partition(103, 10, 0)
    assert_partition(parts, 103)
    assert [len(part) for part in parts] == [11, 11, 11] + [10] * 7
    # not Flower's unshuffled shards: a data set sorted by label must still be mixed
    assert all(np.ptp(part) > 50 for part in parts)


def test_alpha_sets_the_skew():
    def top_share(alpha):
        """Mean share of a client's largest class, over seeds."""
        shares = []
        for seed in range(8):
            counts = class_counts(LABELS, dirichlet_partition(LABELS, 8, alpha, seed, 1))
            assert (counts.sum(axis=1) > 0).all()
            shares += (counts.max(axis=1) / counts.sum(axis=1)).tolist()
        return float(np.mean(shares))

    small, middle, large = top_share(0.1), top_share(1.0), top_share(1000.0)
    whole = max(np.bincount(LABELS)) / 2000
    assert small > 0.55
    assert 0.25 < middle < 0.5
    assert large < whole + 0.04


def test_mean_class_shares_are_even():
    counts = sum(
        class_counts(LABELS, dirichlet_partition(LABELS, 5, 1.0, seed, 1)) for seed in range(200)
    )
    shares = counts / counts.sum(axis=0)
    # a share has variance 0.2 * 0.8 / 6, so the mean of 200 a standard error of 0.012
    assert np.abs(shares - 0.2).max() < 0.05


@pytest.mark.parametrize("alpha", [1e-9, 0.05, 1.0, 1e6])
def test_inner_dialect_has_equal_sizes_and_no_zero_rows(alpha):
    parts = dirichlet_partition(LABELS, 7, alpha, 0, dialect="inner")
    assert_partition(parts, 2000)
    assert sorted(len(part) for part in parts) == [285] * 2 + [286] * 5
    counts = class_counts(LABELS, parts)
    assert (counts.sum(axis=1) > 0).all()
    if alpha == 1e6:
        expected = np.bincount(LABELS) / 2000
        assert np.abs(counts / counts.sum(axis=1, keepdims=True) - expected).max() < 0.1
    if alpha == 0.05:
        # until a class runs out, clients stay with few classes
        assert (counts.max(axis=1) / counts.sum(axis=1)).mean() > 0.4


def test_balance_survives_all_the_mass_on_full_clients():
    # with tiny alpha every class goes to one client as a whole; the plain rule then divides 0 by 0
    labels = np.repeat(np.arange(40), 25)
    parts = dirichlet_partition(labels, 4, 1e-6, 0, min_size=100, balance=True)
    assert_partition(parts, 1000)
    assert min(map(len, parts)) >= 100


def test_retries_are_bounded(monkeypatch):
    draws = []

    class Counting:
        def __init__(self, rng):
            self.rng = rng

        def dirichlet(self, concentration):
            draws.append(len(concentration))
            return self.rng.dirichlet(concentration)

    monkeypatch.setattr(dirichlet, "generator", lambda seed: Counting(np.random.default_rng(seed)))
    with pytest.raises(
        UsageError,
        match=r"alpha=0.01 over 20 clients: in 11 draws the smallest client never got more than "
        r"\d+ of 2000 examples, and min_partition_size is 50; raise alpha, or lower num_clients",
    ):
        dirichlet_partition(LABELS, 20, 0.01, 0, min_size=50)
    assert len(draws) == 11 * 10


@pytest.mark.parametrize("mode", partition.ASSIGNMENT_MODES)
@pytest.mark.parametrize("classes", [1, 4, 10])
def test_pathological_class_counts(mode, classes):
    parts = pathological_partition(LABELS, 15, classes, 3, mode)
    counts = class_counts(LABELS, parts)
    assert ((counts > 0).sum(axis=1) == classes).all()
    used = counts.sum(axis=0) > 0
    assert_partition(parts, 2000, covers=bool(used.all()))
    assert (counts.sum(axis=0)[used] == np.bincount(LABELS)[used]).all()
    for column in counts.T[used]:
        assert np.ptp(column[column > 0]) <= 1  # equal shares
    if mode == "deterministic":
        for client, row in enumerate(counts):
            wanted = {(client + j) % 10 for j in range(classes)}
            assert set(np.flatnonzero(row)) == wanted
    elif mode == "first-deterministic":
        assert all(row[client % 10] > 0 for client, row in enumerate(counts))


def test_pathological_names_classes_left_out(caplog):
    with caplog.at_level(logging.WARNING, logger="fastrank"):
        parts = pathological_partition(LABELS, 3, 2, 0, "deterministic")
    assert_partition(parts, 2000, covers=False)
    left_out = [record.args[0] for record in caplog.records]
    assert left_out == [4, 5, 6, 7, 8, 9]


def test_shards_hold_neighbouring_classes():
    labels = np.repeat(np.arange(10), 200)
    counts = class_counts(labels, shard_partition(labels, 10, 0, shards_per_client=2))
    assert (counts.sum(axis=1) == 200).all()
    assert ((counts > 0).sum(axis=1) <= 2).all()
    uneven = shard_partition(labels, 9, 0, shard_size=100)
    assert [len(part) for part in uneven] == [300, 300] + [200] * 7


def test_natural_keeps_groups_whole():
    groups = ["b", "a", "c", "a", "b", "d", "a"]
    assert lists(natural_partition(groups)) == [[1, 3, 6], [0, 4], [2], [5]]
    assert lists(natural_partition(groups, 4)) == lists(natural_partition(groups))
    assert lists(natural_partition(groups, 2)) == [[1, 3, 6, 0, 4], [2, 5]]
    assert lists(natural_partition(np.array([7, -1, 7]))) == [[1], [0, 2]]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_partition_is_a_disjoint_cover_or_a_usage_error(data):
    labels = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=60))
    disjoint = [name for name in partition.PARTITIONS if not name.startswith("sampled")]
    name = data.draw(st.sampled_from([*disjoint, "inner"]))
    options = {
        "num_clients": data.draw(st.integers(1, 12)),
        "seed": data.draw(st.integers(0, 2**63)),
        "alpha": data.draw(st.floats(1e-3, 1e3)),
        "min_partition_size": data.draw(st.integers(1, 3)),
        "classes_per_client": data.draw(st.integers(1, 5)),
        "shards_per_client": data.draw(st.none() | st.integers(1, 3)),
        "shard_size": data.draw(st.none() | st.integers(1, 9)),
        "keep_incomplete_shard": data.draw(st.booleans()),
        "dialect": "inner" if name == "inner" else "flower",
    }
    call = {"num_examples": len(labels), "labels": labels, "groups": labels, **options}
    try:
        parts = make_partition("dirichlet" if name == "inner" else name, **call)
    except UsageError:
        return
    assert len(parts) == options["num_clients"]
    assert_partition(parts, len(labels), covers=name in ("iid", "dirichlet", "inner", "natural"))
    if name in ("dirichlet", "inner"):
        assert min(map(len, parts)) >= options["min_partition_size"]
