"""How one data set is split over clients: pure functions of labels or counts and a seed.

Each returns a list with one int64 index array per client: disjoint, in range, none empty (for
clients by the million, who share examples, see population.py). Names and meaning are those of
flwr-datasets (index for index those of version 0.6.1), whose classes stay usable through
`make_partition`. "Dirichlet" is not one thing in the literature; a result should name the dialect,
alpha, the seed and the minimum size.

    parts = dirichlet_partition(labels, num_clients=100, alpha=0.1, seed=0)
    parts[3]                                    # int64 [n_3], client 3's rows of the data set

Only `numpy.random.default_rng(seed)` is drawn from, never a global generator.
"""

import logging
from typing import Any

import numpy as np

from fastrank.errors import UsageError
from fastrank.federated.dirichlet import dirichlet_partition
from fastrank.federated.foreign_partition import partition_by_object
from fastrank.federated.grouping import (
    as_partition,
    check_clients,
    check_positive_int,
    generator,
    label_codes,
    natural_order,
    strings_or_numbers,
)
from fastrank.federated.population import Population, SampledPopulation, build_index

__all__ = [
    "PARTITIONS",
    "dirichlet_partition",
    "iid_partition",
    "make_partition",
    "natural_partition",
    "pathological_partition",
    "shard_partition",
]

PARTITIONS = (
    "iid", "dirichlet", "pathological", "shard", "natural", "sampled", "sampled-dirichlet",
)  # fmt: skip
ASSIGNMENT_MODES = ("random", "first-deterministic", "deterministic")

logger = logging.getLogger("fastrank")


def iid_partition(num_examples: int, num_clients: int, seed: int) -> list[np.ndarray]:
    """Shuffle, then cut into contiguous shares whose sizes differ by at most one.

    Equal to Flower's `FederatedDataset(shuffle=True, seed=seed)` with `IidPartitioner`.

    Raises:
        UsageError: no client, or more clients than examples.
    """
    check_clients(num_clients, num_examples)
    order = generator(seed).permutation(num_examples)
    return as_partition(np.array_split(order, num_clients))


def pathological_partition(
    labels: Any,
    num_clients: int,
    classes_per_client: int,
    seed: int,
    class_assignment_mode: str = "random",
) -> list[np.ndarray]:
    """Every client holds `classes_per_client` classes; the holders of a class share it equally.

    Args:
        labels: one int, bool or str label per example, `[n]`.
        class_assignment_mode: `random` draws the classes of each client without replacement;
            `first-deterministic` gives client i class i mod C first and draws the rest (Li et al.
            2022); `deterministic` gives client i classes i, i+1, ... mod C.

    A class that no client was given is left out, with one logged warning naming it. The lists are
    those of flwr-datasets' `PathologicalPartitioner(shuffle=True)`.

    Raises:
        UsageError: invalid arguments, or a class with fewer examples than clients that hold it.
    """
    codes, counts = label_codes(labels, "pathological")
    check_clients(num_clients, len(codes))
    check_positive_int("classes_per_client", classes_per_client)
    if classes_per_client > len(counts):
        raise UsageError(
            f"classes_per_client is {classes_per_client}, but the labels have {len(counts)} "
            f"classes; lower it to at most {len(counts)}"
        )
    rng = generator(seed)
    held = _assign_classes(rng, num_clients, len(counts), classes_per_client, class_assignment_mode)
    parts: list[list[int]] = [[] for _ in range(num_clients)]
    names = np.unique(np.asarray(labels))
    for label, count in enumerate(counts):
        holders = [client for client in range(num_clients) if label in held[client]]
        if not holders:
            logger.warning(
                "pathological partition: class %s (%d examples) was given to no client and is "
                "left out; class_assignment_mode='first-deterministic' uses every class once "
                "there are as many clients as classes",
                names[label],
                count,
            )
            continue
        if len(holders) > count:
            raise UsageError(
                f"class {names[label]} has {count} examples but {len(holders)} clients are to "
                "hold it; lower num_clients or classes_per_client, or set "
                "class_assignment_mode='deterministic'"
            )
        shares = np.array_split(np.flatnonzero(codes == label), len(holders))
        for client, share in zip(holders, shares, strict=True):
            parts[client].extend(share.tolist())
    for part in parts:
        rng.shuffle(part)
    return as_partition(parts)


def shard_partition(
    labels: Any,
    num_clients: int,
    seed: int,
    *,
    shards_per_client: int | None = None,
    shard_size: int | None = None,
    keep_incomplete_shard: bool = False,
) -> list[np.ndarray]:
    """Sort by label, cut into shards of equal size, deal shards to clients (McMahan et al. 2017).

    Args:
        labels: one int, bool or str label per example, `[n]`.
        shards_per_client: shards of each client. Without it, every complete shard of `shard_size`
            is dealt and the first clients get one more.
        shard_size: examples in a shard. Without it, n // (num_clients * shards_per_client).
        keep_incomplete_shard: whether a shorter last shard takes part. No effect when both
            `shards_per_client` and `shard_size` are given.

    Examples that fill no shard are left out. The lists are those of flwr-datasets'
    `ShardPartitioner(shuffle=True)`.

    Raises:
        UsageError: invalid arguments, or fewer shards than the clients need.
    """
    codes, _ = label_codes(labels, "shard")
    num_examples = len(codes)
    check_clients(num_clients, num_examples)
    if shards_per_client is None and shard_size is None:
        raise UsageError("partition 'shard' needs shards_per_client or shard_size; give one")
    whole_only = not keep_incomplete_shard
    if shard_size is not None:
        check_positive_int("shard_size", shard_size)
    if shards_per_client is not None:
        check_positive_int("shards_per_client", shards_per_client)
        wanted = num_clients * shards_per_client
        if shard_size is None:
            shard_size = num_examples // wanted
        else:
            whole_only = True
        if shard_size * wanted > num_examples or shard_size == 0:
            raise UsageError(
                f"{num_clients} clients with {shards_per_client} shards of {max(shard_size, 1)} "
                f"examples each need {wanted * max(shard_size, 1)}, but there are {num_examples}; "
                "lower num_clients, shards_per_client or shard_size"
            )
    usable = num_examples // shard_size if whole_only else -(-num_examples // shard_size)
    if shards_per_client is None:
        wanted = usable
    if usable < num_clients:
        raise UsageError(
            f"{num_examples} examples give {usable} shards of {shard_size}, fewer than the "
            f"{num_clients} clients; lower shard_size or num_clients"
        )
    per_client = np.full(num_clients, wanted // num_clients)
    per_client[: wanted % num_clients] += 1

    rng = generator(seed)
    by_label = np.argsort(codes, kind="stable")
    dealt = np.split(rng.permutation(usable)[:wanted], np.cumsum(per_client)[:-1])
    parts = []
    for shards in dealt:
        rows = [row for s in shards for row in by_label[s * shard_size : (s + 1) * shard_size]]
        rng.shuffle(rows)
        parts.append(rows)
    return as_partition(parts)


def natural_partition(groups: Any, num_clients: int | None = None) -> list[np.ndarray]:
    """One client per distinct value of a column (author, user, package), in sorted order.

    Args:
        groups: one int, bool or str group id per example, `[n]`.
        num_clients: None for one client per group. A smaller number puts neighbours of the sorted
            order together, never splitting a group (Flower's `GroupedNaturalIdPartitioner`, mode
            "allow-bigger"). A larger number is refused.

    Raises:
        UsageError: no groups, or fewer groups than clients.
    """
    order, offsets = natural_order(groups, num_clients)
    return as_partition(np.split(order, offsets[1:-1]))


def make_partition(
    name: Any,
    *,
    num_examples: int,
    num_clients: int | None,
    seed: int,
    labels: Any = None,
    groups: Any = None,
    alpha: float = 0.5,
    min_partition_size: int = 10,
    balance: bool = False,
    dialect: str = "flower",
    classes_per_client: int = 2,
    class_assignment_mode: str = "random",
    shards_per_client: int | None = 2,
    shard_size: int | None = None,
    keep_incomplete_shard: bool = False,
    examples_per_client: int = 32,
    partition_index: str | None = None,
) -> list[np.ndarray] | Population:
    """The partition called `name`, or the one an object brings; options of other names are unused.

    Args:
        name: one of `PARTITIONS`, or an object with `num_partitions` and `load_partition(i)`, where
            `load_partition` returns row numbers (list, array or tensor of integers) or a data set
            with an integer column `index`. A flwr-datasets partitioner that has no data set yet is
            given one with the columns `index`, `label` and `group`: write `partition_by="label"`.
            A `Population` is used as it is; an object with more than 20,000 partitions, or one that
            says `lazy = True`, is asked for a client when that client is drawn.
        num_examples: rows of the training set; labels and groups, where given, have as many.
        num_clients: may be None for `natural` and for an object, which know it themselves.

    Raises:
        UsageError: whatever is wrong, before any training.
    """
    check_positive_int("the number of training examples", num_examples)
    for column, values in (("labels", labels), ("groups", groups)):
        if values is not None and len(values) != num_examples:
            raise UsageError(f"{len(values)} {column} for {num_examples} examples; give one each")
    if isinstance(name, Population):
        return _fitting(name, num_examples, num_clients)
    if not isinstance(name, str):
        return partition_by_object(name, num_examples, num_clients, labels, groups)
    if name not in PARTITIONS:
        raise UsageError(f"unknown partition {name!r}; choose one of {', '.join(PARTITIONS)}")
    if name == "natural":
        if partition_index is not None and groups is not None:
            return build_index(strings_or_numbers(groups, "groups"), partition_index, num_clients)
        return natural_partition(groups, num_clients)
    if num_clients is None:
        raise UsageError(f"partition {name!r} needs num_clients; only 'natural' finds it itself")
    if name == "iid":
        return iid_partition(num_examples, num_clients, seed)
    if name == "dirichlet":
        return dirichlet_partition(
            labels, num_clients, alpha, seed, min_partition_size, balance, dialect
        )
    if name == "pathological":
        return pathological_partition(
            labels, num_clients, classes_per_client, seed, class_assignment_mode
        )
    if name.startswith("sampled"):
        skewed = name == "sampled-dirichlet"
        if skewed:
            label_codes(labels, name)
        return SampledPopulation(
            num_examples,
            num_clients,
            examples_per_client,
            seed,
            labels if skewed else None,
            alpha if skewed else None,
        )
    return shard_partition(
        labels,
        num_clients,
        seed,
        shards_per_client=shards_per_client,
        shard_size=shard_size,
        keep_incomplete_shard=keep_incomplete_shard,
    )


def _fitting(people: Population, num_examples: int, num_clients: int | None) -> Population:
    """A population that has as many clients as asked for, and examples that are there."""
    if num_clients is not None and len(people) != num_clients:
        kind = type(people).__name__
        raise UsageError(f"{kind} has {len(people)} clients, but num_clients is {num_clients}")
    made_for = getattr(people, "about", vars(people)).get("num_examples", num_examples)
    if made_for != num_examples:
        raise UsageError(
            f"{type(people).__name__} was made for {made_for} training examples, but there are "
            f"{num_examples}; make it for these"
        )
    return people


def _assign_classes(
    rng: np.random.Generator, num_clients: int, num_classes: int, per_client: int, mode: str
) -> list[set[int]]:
    """The classes of each client, drawn in the order in which flwr-datasets draws them."""
    if mode == "deterministic":
        return [{(i + j) % num_classes for j in range(per_client)} for i in range(num_clients)]
    if mode == "random":
        return [
            set(rng.choice(num_classes, size=per_client, replace=False).tolist())
            for _ in range(num_clients)
        ]
    if mode == "first-deterministic":
        held = [{i % num_classes} for i in range(num_clients)]
        for classes in held:
            while len(classes) < per_client:
                classes.add(int(rng.choice(num_classes, size=1)[0]))
        return held
    raise UsageError(
        f"unknown class_assignment_mode {mode!r}; choose one of {', '.join(ASSIGNMENT_MODES)}"
    )
