"""Label skew by Dirichlet(alpha), in two dialects; part of partition.py's `dirichlet`.

"flower" draws, per class, shares over clients; "inner", per client, shares over classes.
"""

import math
from typing import Any

import numpy as np

from fastrank.errors import UsageError
from fastrank.federated.grouping import (
    as_partition,
    check_clients,
    check_positive_int,
    generator,
    label_codes,
)

__all__ = ["dirichlet_partition"]

DIALECTS = ("flower", "inner")
MAX_DRAWS = 11  # flwr-datasets gives up after ten repetitions


def dirichlet_partition(
    labels: Any,
    num_clients: int,
    alpha: float,
    seed: int,
    min_size: int = 10,
    balance: bool = False,
    dialect: str = "flower",
) -> list[np.ndarray]:
    """Label skew by Dirichlet(alpha): small alpha, few classes per client.

    Args:
        labels: one int, bool or str label per example, `[n]`.
        alpha: concentration, > 0.
        min_size: every client gets at least this many examples.
        balance: `flower` only: a client that already holds more than n / num_clients examples gets
            nothing of the classes that follow (Flower's `self_balancing`, FederatedScope's `lda`,
            and with `min_size=40` the split of FedIT's code up to ties).
        dialect: `flower`: per class, shares over clients; sizes differ. `inner`: per client, shares
            over classes; sizes fixed and equal up to one (Reddi et al. 2021, appendix C.1), and
            a client whose classes are used up draws from whatever is left.

    With `flower` the lists are those of flwr-datasets' `DirichletPartitioner(shuffle=True)`.

    Raises:
        UsageError: invalid arguments, or `min_size` not met after 11 draws.
    """
    codes, counts = label_codes(labels, "dirichlet")
    check_clients(num_clients, len(codes))
    check_positive_int("min_partition_size", min_size)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise UsageError(f"alpha is {alpha!r}; give a number greater than 0")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise UsageError(f"alpha is {alpha}; give a finite number greater than 0, such as 0.5")
    if num_clients * min_size > len(codes):
        raise UsageError(
            f"{num_clients} clients with at least {min_size} examples each need "
            f"{num_clients * min_size}, but there are {len(codes)}; "
            "lower num_clients or min_partition_size"
        )
    if dialect == "flower":
        return _outer_dirichlet(codes, counts, num_clients, alpha, seed, min_size, balance)
    if dialect == "inner":
        if balance:
            raise UsageError("balance=True belongs to dialect 'flower'; 'inner' has equal sizes")
        return _inner_dirichlet(codes, counts, num_clients, alpha, seed)
    raise UsageError(f"unknown Dirichlet dialect {dialect!r}; choose one of {', '.join(DIALECTS)}")


def _outer_dirichlet(
    codes: np.ndarray,
    counts: np.ndarray,
    num_clients: int,
    alpha: float,
    seed: int,
    min_size: int,
    balance: bool,
) -> list[np.ndarray]:
    """Per class, shares over clients; everything is redrawn while a client is too small."""
    rng = generator(seed)
    rows_of = [np.flatnonzero(codes == label) for label in range(len(counts))]
    concentration = np.full(num_clients, float(alpha))
    smallest = 0
    for _ in range(MAX_DRAWS):
        parts: list[list[int]] = [[] for _ in range(num_clients)]
        for rows in rows_of:
            shares = rng.dirichlet(concentration)
            if not abs(shares.sum() - 1.0) < 1e-6:
                raise UsageError(f"alpha is {alpha}, too large to draw shares from; lower it")
            if balance:
                full = np.array([len(part) for part in parts]) > len(codes) / num_clients
                shares[full] = 0.0
                # tiny alpha: all the mass may sit on full clients, and 0 / 0 would follow
                shares = shares / sum(shares) if shares.any() else (~full) / (~full).sum()
            cuts = (np.cumsum(shares) * len(rows)).astype(int)[:-1]
            for part, piece in zip(parts, np.split(rows, cuts), strict=True):
                part.extend(piece.tolist())
        drawn = min(len(part) for part in parts)
        if drawn >= min_size:
            for part in parts:
                rng.shuffle(part)
            return as_partition(parts)
        smallest = max(smallest, drawn)
    raise UsageError(
        f"Dirichlet split with alpha={alpha} over {num_clients} clients: in {MAX_DRAWS} draws the "
        f"smallest client never got more than {smallest} of {len(codes)} examples, and "
        f"min_partition_size is {min_size}; raise alpha, or lower num_clients or min_partition_size"
    )


def _inner_dirichlet(
    codes: np.ndarray, counts: np.ndarray, num_clients: int, alpha: float, seed: int
) -> list[np.ndarray]:
    """Per client, shares over classes; clients take one example at a time, in mixed turns."""
    rng = generator(seed)
    num_examples, num_classes = len(codes), len(counts)
    priors = rng.dirichlet(np.full(num_classes, float(alpha)), size=num_clients)
    if not np.allclose(priors.sum(axis=1), 1.0):
        raise UsageError(f"alpha is {alpha}, too large to draw shares from; lower it")
    pools = [rng.permutation(np.flatnonzero(codes == k)).tolist() for k in range(num_classes)]
    sizes = [len(share) for share in np.array_split(np.arange(num_examples), num_clients)]
    turns = rng.permutation(np.repeat(np.arange(num_clients), sizes))
    draws = rng.random(num_examples)
    cumulative = np.cumsum(priors, axis=1)
    parts: list[list[int]] = [[] for _ in range(num_clients)]
    for client, draw in zip(turns.tolist(), draws.tolist(), strict=True):
        row = cumulative[client]
        label = int(np.searchsorted(row, draw * row[-1], side="right"))
        parts[client].append(pools[label].pop())
        if not pools[label] and any(pools):
            priors[:, label] = 0.0
            # a client all of whose classes are used up draws from what is left, by its amount
            left = np.array([len(pool) for pool in pools], dtype=float)
            priors[~priors.any(axis=1)] = left / left.sum()
            cumulative = np.cumsum(priors, axis=1)
    return as_partition(parts)
