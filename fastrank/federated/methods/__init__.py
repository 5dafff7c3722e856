"""Federated methods by name; one short file each."""

import difflib

from fastrank.errors import UsageError
from fastrank.federated.methods.base import (
    LocalPlan,
    LocalResult,
    Method,
    ServerState,
    Update,
    weighted_mean,
)
from fastrank.federated.methods.fedavg import FedAvg
from fastrank.federated.methods.fedit import FedIT
from fastrank.federated.methods.head_only import HeadOnly

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (FedIT, FedAvg, HeadOnly)}

__all__ = [
    "METHODS",
    "FedAvg",
    "FedIT",
    "HeadOnly",
    "LocalPlan",
    "LocalResult",
    "Method",
    "ServerState",
    "Update",
    "find_method",
    "weighted_mean",
]


def find_method(name: str) -> type[Method]:
    """The method class of that name, or a UsageError that lists the names there are."""
    if name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UsageError(f"no method named {name!r}{hint}; the methods are {', '.join(METHODS)}")
    return METHODS[name]
