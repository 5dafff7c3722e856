"""Partitions are those of flwr-datasets, index for index: pinned lists, and its own classes."""

import pytest
from partition_cases import LABELS, assert_partition, digest, labels_of, lists

from fastrank.errors import UsageError
from fastrank.federated import dirichlet
from fastrank.federated.partition import (
    dirichlet_partition,
    iid_partition,
    make_partition,
    natural_partition,
    pathological_partition,
    shard_partition,
)

# made with flwr-datasets 0.6.1, datasets 4.8.5, numpy 2.4.6 on labels_of(n, classes):
# DirichletPartitioner(clients, "label", alpha, min_size, self_balancing=balance, seed=seed)
DIRICHLET = [
    # n, classes, clients, alpha, seed, min_size, balance, sha256 of the lists as JSON
    (60, 5, 4, 0.5, 7, 3, False, "fa3896309ab3f0f5"),
    (2000, 10, 10, 0.1, 3, 10, False, "94c97b4c2bb854b1"),
    (2000, 10, 10, 0.1, 9, 10, True, "08e996f591c9a0ca"),
    (5819, 20, 40, 100.0, 42, 10, False, "31498284f1b86e34"),
    (2000, 10, 20, 0.3, 37, 10, False, "422041a17f32fb12"),
]
DIRICHLET_60 = [
    [8, 18, 23, 11, 33, 39, 28, 34, 14, 5, 0, 32, 30, 12, 40, 26, 2, 27],
    [52, 54, 43, 48, 15, 7, 4, 51, 17, 47, 53, 19, 3, 16],
    [31, 25, 22, 36, 50, 21, 1],
    [42, 20, 24, 41, 29, 13, 38, 10, 59, 9, 56, 44, 49, 57, 58, 37, 45, 46, 6, 55, 35],
]
# PathologicalPartitioner(12, "label", 3, mode, seed=4) on labels_of(2000, 10)
PATHOLOGICAL = {
    "random": "83e004ba5f18d642",
    "first-deterministic": "2fc0530c1b48634c",
    "deterministic": "8340e72d46a0f6de",
}
# ShardPartitioner(13, "label", seed=6, ...) on labels_of(2000, 10)
SHARD = [
    ({"shards_per_client": 2}, "92d5fcdf92451e7e"),
    ({"shards_per_client": 3, "keep_incomplete_shard": True}, "396eabeb1c6c76d4"),
    ({"shard_size": 33}, "683b1dbab5abad5f"),
    ({"shard_size": 33, "keep_incomplete_shard": True}, "a8f6aa3f47c99df7"),
    ({"shards_per_client": 2, "shard_size": 20}, "c147a982106a0135"),
    ({"shards_per_client": 2, "shard_size": 20, "keep_incomplete_shard": True}, "c147a982106a0135"),
    ({"shards_per_client": 7, "keep_incomplete_shard": True}, "8a91f94a9d13d9d6"),
]


@pytest.mark.parametrize("case", DIRICHLET, ids=lambda c: f"n{c[0]}-k{c[2]}-a{c[3]}-s{c[4]}")
def test_dirichlet_goldens(case):
    n, classes, clients, alpha, seed, min_size, balance, expected = case
    parts = dirichlet_partition(labels_of(n, classes), clients, alpha, seed, min_size, balance)
    assert_partition(parts, n)
    assert min(map(len, parts)) >= min_size
    assert digest(parts) == expected
    if n == 60:
        assert lists(parts) == DIRICHLET_60


def test_a_golden_needs_redraws(monkeypatch):
    # else the goldens would not show that a redraw goes on with the same generator
    monkeypatch.setattr(dirichlet, "MAX_DRAWS", 1)
    n, classes, clients, alpha, seed, min_size, _, _ = DIRICHLET[-1]
    with pytest.raises(UsageError, match="in 1 draws"):
        dirichlet_partition(labels_of(n, classes), clients, alpha, seed, min_size)


@pytest.mark.parametrize("mode", PATHOLOGICAL)
def test_pathological_goldens(mode):
    assert digest(pathological_partition(LABELS, 12, 3, 4, mode)) == PATHOLOGICAL[mode]
    # names sort as the numbers do: the same split
    names = [f"class-{label}" for label in LABELS]
    assert digest(pathological_partition(names, 12, 3, 4, mode)) == PATHOLOGICAL[mode]


@pytest.mark.parametrize(("options", "expected"), SHARD, ids=str)
def test_shard_goldens(options, expected):
    assert digest(shard_partition(LABELS, 13, 6, **options)) == expected


def test_iid_and_natural_goldens():
    # Dataset.shuffle(seed=42) then IidPartitioner(7); NaturalIdPartitioner
    assert digest(iid_partition(100, 7, 42)) == "61aed273ffa896e8"
    assert digest(natural_partition([f"u{i * i % 7}" for i in range(50)])) == "19541ad9dc6e02f0"


def test_flwr_datasets_gives_the_same_lists_and_is_accepted_as_an_object():
    theirs = pytest.importorskip(
        "flwr_datasets.partitioner",
        reason="flwr-datasets is not installed; goldens pin it",
    )
    pairs = [
        (theirs.PathologicalPartitioner(12, "label", 3, seed=1), "pathological", {}),
        (theirs.ShardPartitioner(12, "label", 2, seed=1), "shard", {}),
        (theirs.NaturalIdPartitioner("group"), "natural", {}),
        *(
            (
                theirs.DirichletPartitioner(12, "label", a, self_balancing=b, seed=1),
                "dirichlet",
                {"alpha": a, "balance": b},
            )
            for a in (0.3, 0.5, 5.0)
            for b in (False, True)
        ),
    ]
    data = {
        "labels": LABELS,
        "groups": [i % 12 for i in range(2000)],
        "num_examples": 2000,
        "num_clients": 12,
        "seed": 1,
        "classes_per_client": 3,
    }
    for partitioner, name, options in pairs:
        ours = make_partition(name, **data, **options)
        assert lists(make_partition(partitioner, **data)) == lists(ours), (name, options)
