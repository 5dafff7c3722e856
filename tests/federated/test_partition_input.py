"""What make_partition is given: names and options, objects, and what can't be split."""

import numpy as np
import pytest
import torch
from partition_cases import LABELS, assert_partition, lists

from fastrank.errors import UsageError
from fastrank.federated.partition import (
    dirichlet_partition,
    iid_partition,
    make_partition,
    natural_partition,
    pathological_partition,
    shard_partition,
)


class Halves:
    num_partitions = 2

    def __init__(self, *parts):
        self.parts = parts

    def load_partition(self, i):
        return self.parts[i]


class Rows(dict):
    """Enough of datasets.Dataset to be read."""

    @property
    def column_names(self):
        return list(self)


def test_any_object_with_load_partition():
    data = {"num_examples": 4, "num_clients": None, "seed": 0}
    halves = Halves([0, 2], torch.tensor([3, 1]))
    parts = make_partition(halves, **data)
    assert_partition(parts, 4)
    assert lists(parts) == [[0, 2], [3, 1]]
    columns = Halves(Rows(index=[1], text=["x"]), Rows(index=np.array([0, 3]), text=["y", "z"]))
    assert lists(make_partition(columns, **{**data, "num_clients": 2})) == [[1], [0, 3]]


@pytest.mark.parametrize(
    ("partitioner", "num_clients", "message"),
    [
        (Halves([0], [1]), 3, "Halves makes 2 partitions, but num_clients is 3"),
        (Halves([0], []), 2, "gives client 1 no examples"),
        (Halves([0], [4]), 2, "client 1 rows 4 to 4, but the data set has rows 0 to 3"),
        (Halves([0], [-1]), 2, "client 1 rows -1 to -1"),
        (Halves([0, 1], [1]), 2, "client 1 a row that is taken already"),
        (Halves([0, 0], [1]), 2, "client 0 a row that is taken already"),
        (Halves([0.5], [1]), 2, "returned float64 of 1 dimensions"),
        (Halves([[0]], [1]), 2, "of 2 dimensions"),
        (Halves(Rows(text=["x"]), [1]), 2, "columns text; it needs an integer column 'index'"),
        (object(), 2, "object lacks load_partition and num_partitions"),
        (None, 2, "NoneType lacks"),
    ],
)
def test_objects_are_checked(partitioner, num_clients, message):
    with pytest.raises(UsageError, match=message):
        make_partition(partitioner, num_examples=4, num_clients=num_clients, seed=0)


COMMON = {"num_examples": 2000, "num_clients": 10, "seed": 0, "labels": LABELS}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dirichelt", {}, "unknown partition 'dirichelt'; choose one of iid, dirichlet"),
        ("iid", {"num_clients": 2001}, "num_clients is 2001, but there are only 2000"),
        ("iid", {"num_clients": 0}, "num_clients is 0; give a whole number of at least 1"),
        ("iid", {"num_clients": 2.5}, "num_clients is 2.5; give a whole"),
        ("iid", {"num_clients": True}, "num_clients is True; give a whole"),
        ("iid", {"num_clients": None}, "'iid' needs num_clients"),
        ("iid", {"seed": -1}, "seed is -1; give a whole number of at least 0"),
        ("iid", {"num_examples": 0, "labels": None}, "training examples is 0"),
        ("iid", {"labels": LABELS[:-1]}, "1999 labels for 2000 examples"),
        ("dirichlet", {"alpha": 0}, "alpha is 0; give a finite number greater than 0"),
        ("dirichlet", {"alpha": -0.5}, "alpha is -0.5; give a finite"),
        ("dirichlet", {"alpha": float("nan")}, "alpha is nan; give a finite"),
        ("dirichlet", {"alpha": float("inf")}, "alpha is inf; give a finite"),
        ("dirichlet", {"alpha": "0.1"}, "alpha is '0.1'; give a number"),
        ("dirichlet", {"alpha": 1e308}, r"alpha is 1e\+308, too large"),
        ("dirichlet", {"alpha": 1e308, "dialect": "inner"}, r"alpha is 1e\+308, too large"),
        ("dirichlet", {"num_clients": 3000}, "num_clients is 3000, but there are only 2000"),
        ("dirichlet", {"min_partition_size": 0}, "min_partition_size is 0"),
        (
            "dirichlet",
            {"min_partition_size": 300},
            "10 clients with at least 300 examples each need 3000, but there are 2000; lower",
        ),
        ("dirichlet", {"labels": None}, "needs one label per example and this task has none"),
        ("dirichlet", {"labels": [0.5] * 2000}, "labels have dtype float64; give integers"),
        ("dirichlet", {"labels": [None] * 2000}, "labels have dtype object"),
        ("dirichlet", {"labels": [[0]] * 2000}, r"labels have shape \[2000, 1\]"),
        ("dirichlet", {"dialect": "lda"}, "unknown Dirichlet dialect 'lda'; choose one of flower"),
        ("dirichlet", {"dialect": "inner", "balance": True}, "balance=True belongs to"),
        ("pathological", {"labels": None}, "'pathological' needs one label per example"),
        ("pathological", {"classes_per_client": 11}, "is 11, but the labels have 10 classes"),
        ("pathological", {"classes_per_client": 0}, "classes_per_client is 0; give a whole"),
        ("pathological", {"class_assignment_mode": "x"}, "unknown class_assignment_mode 'x'"),
        (
            "pathological",
            {"num_clients": 500, "classes_per_client": 10},
            "class 0 has .* examples but 500 clients are to hold it; lower num_clients",
        ),
        ("shard", {"labels": None}, "'shard' needs one label per example"),
        ("shard", {"shards_per_client": None}, "needs shards_per_client or shard_size; give one"),
        ("shard", {"shards_per_client": 0}, "shards_per_client is 0; give a whole"),
        ("shard", {"shard_size": -1}, "shard_size is -1; give a whole"),
        ("shard", {"shards_per_client": 201}, "need 2010, but there are 2000; lower"),
        ("shard", {"shard_size": 101}, "with 2 shards of 101 examples each need 2020"),
        (
            "shard",
            {"shards_per_client": None, "shard_size": 300},
            "2000 examples give 6 shards of 300, fewer than the 10 clients; lower shard_size",
        ),
        ("natural", {}, "needs a group column and the data set names none"),
        (
            "natural",
            {"groups": [i % 4 for i in range(2000)]},
            "num_clients is 10, but the group column has 4 distinct values; lower num_clients",
        ),
        ("natural", {"groups": [1.5] * 2000}, "groups have dtype float64"),
    ],
)
def test_bad_input_is_one_clear_line(name, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        make_partition(name, **{**COMMON, **options})
    assert "\n" not in str(caught.value)


def test_dispatch_passes_every_option():
    groups = [i % 20 for i in range(2000)]
    pairs = [
        (("iid", {}), iid_partition(2000, 10, 0)),
        (("dirichlet", {"alpha": 0.7}), dirichlet_partition(LABELS, 10, 0.7, 0)),
        (
            ("dirichlet", {"alpha": 0.2, "min_partition_size": 3, "balance": True}),
            dirichlet_partition(LABELS, 10, 0.2, 0, 3, True),
        ),
        (
            ("dirichlet", {"dialect": "inner"}),
            dirichlet_partition(LABELS, 10, 0.5, 0, dialect="inner"),
        ),
        (
            ("pathological", {"classes_per_client": 4, "class_assignment_mode": "deterministic"}),
            pathological_partition(LABELS, 10, 4, 0, "deterministic"),
        ),
        (("shard", {}), shard_partition(LABELS, 10, 0, shards_per_client=2)),
        (
            (
                "shard",
                {"shards_per_client": None, "shard_size": 33, "keep_incomplete_shard": True},
            ),
            shard_partition(LABELS, 10, 0, shard_size=33, keep_incomplete_shard=True),
        ),
        (("natural", {"groups": groups, "num_clients": None}), natural_partition(groups)),
        (("natural", {"groups": groups}), natural_partition(groups, 10)),
    ]
    for (name, options), expected in pairs:
        assert lists(make_partition(name, **{**COMMON, **options})) == lists(expected), name
