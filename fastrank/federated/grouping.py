"""What every partition begins and ends with: checked columns, counts and seeds; index arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastrank.errors import UsageError

__all__ = [
    "as_partition",
    "check_clients",
    "check_positive_int",
    "codes_of",
    "generator",
    "label_codes",
    "natural_order",
    "strings_or_numbers",
]


def natural_order(groups: Any, num_clients: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """`natural_partition` as two arrays: all rows, client by client, and where each client begins.

    Returns:
        int64 `[n]` and int64 `[clients + 1]`.
    """
    if groups is None:
        raise UsageError(
            "partition 'natural' needs a group column and the data set names none; "
            "set the group column, or choose --partition iid"
        )
    codes, counts = codes_of(groups, "groups")
    if num_clients is None:
        num_clients = len(counts)
    check_positive_int("num_clients", num_clients)
    if num_clients > len(counts):
        raise UsageError(
            f"num_clients is {num_clients}, but the group column has {len(counts)} distinct "
            f"values; lower num_clients to at most {len(counts)}"
        )
    by_group = np.argsort(codes, kind="stable")
    # how many groups each client has, as np.array_split deals them
    dealt = len(counts) // num_clients + (np.arange(num_clients) < len(counts) % num_clients)
    last = np.cumsum(dealt) - 1
    return by_group, np.concatenate([[0], np.cumsum(counts)[last]]).astype(np.int64)


def codes_of(values: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Values as 0..C-1 in sorted order `[n]`, and how often each occurs `[C]`."""
    array = strings_or_numbers(values, what)
    _, codes, counts = np.unique(array, return_inverse=True, return_counts=True)
    return codes, counts


def strings_or_numbers(values: Any, what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        raise UsageError(
            f"{what} have shape {list(array.shape)}; give a non-empty list, one entry per example"
        )
    if array.dtype.kind not in "biuU":
        raise UsageError(f"{what} have dtype {array.dtype}; give integers or strings, none missing")
    return array


def check_positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise UsageError(f"{name} is {value!r}; give a whole number of at least 1")


def label_codes(labels: Any, partition: str) -> tuple[np.ndarray, np.ndarray]:
    """`codes_of` the labels that a partition of this name needs."""
    if labels is None:
        raise UsageError(
            f"partition {partition!r} needs one label per example and this task has none "
            "(causal language modelling, for one); choose --partition iid, or natural with a group "
            "column"
        )
    return codes_of(labels, "labels")


def check_clients(num_clients: int, num_examples: int) -> None:
    """Refuse no clients, and more of them than examples."""
    check_positive_int("num_clients", num_clients)
    if num_clients > num_examples:
        raise UsageError(
            f"num_clients is {num_clients}, but there are only {num_examples} training examples; "
            f"lower num_clients to at most {num_examples}, or choose --partition sampled, whose "
            "clients share examples"
        )


def generator(seed: int) -> np.random.Generator:
    """The one that all of a partition is drawn from."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise UsageError(f"seed is {seed!r}; give a whole number of at least 0")
    return np.random.default_rng(seed)


def as_partition(parts: Sequence[Any]) -> list[np.ndarray]:
    """int64 arrays, none of them empty."""
    arrays = [np.asarray(part, dtype=np.int64) for part in parts]
    assert all(len(array) for array in arrays)  # each function has refused its empty clients
    return arrays
