"""Options as Flower carries them, and which clients a node serves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fastrank.errors import UsageError
from fastrank.federated.config import read_assignment, read_toml

# what the apps read themselves; every other key is an option of fastrank's
RUN_KEYS = ("config", "set", "resume", "reply_timeout", "start_timeout")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")


def options_of(run_config: Mapping[str, Any]) -> dict[str, Any]:
    """fastrank's options in a run configuration of Flower's.

    Keys are options with dashes or underscores; an empty string leaves one at its default. Flower
    only lets a run override keys that its app has, so two more take any option there is:
    ``config``, the path of a TOML file as for ``fastrank simulate --config``, and ``set``, pairs
    ``key=value`` with spaces between them. The later of config, single keys and set wins.

    Several clients of a node are run one by one unless ``executor`` says otherwise, so that no
    result depends on who shares a node.
    """
    given = {key.replace("-", "_"): value for key, value in run_config.items()}
    options: dict[str, Any] = {"executor": "sequential"}
    if path := given.get("config"):
        options |= read_toml(path)
    options |= {k: v for k, v in given.items() if k not in RUN_KEYS and v != ""}
    options |= dict(read_assignment(pair) for pair in str(given.get("set") or "").split())
    if options["executor"] == "auto":  # would depend on how many clients a node serves
        options["executor"] = "sequential"
    return options


def clients_of(node_config: Mapping[str, Any], num_clients: int) -> list[int]:
    """Clients that a node serves, ascending.

    ``clients`` names them ("0-4,7"). Else ``partition-id`` p of ``num-partitions`` P takes the
    p-th of P equal runs of the clients: one each where there are as many nodes as clients, which
    is what Flower's simulation engine sets.

    Raises:
        UsageError: a node that says neither, or something impossible.
    """
    if "clients" in node_config:
        return read_ranges(str(node_config["clients"]), num_clients)
    try:
        node, nodes = (int(node_config[key]) for key in ("partition-id", "num-partitions"))
    except (KeyError, ValueError) as error:
        raise UsageError(
            "this node does not say which clients it serves; start it with --node-config "
            "'partition-id=0 num-partitions=2', or 'clients=\"0-4\"'"
        ) from error
    if not 0 <= node < nodes:
        raise UsageError(
            f"partition-id is {node} but num-partitions is {nodes}; ids go from 0 to {nodes - 1}"
        )
    return [int(client) for client in np.array_split(np.arange(num_clients), nodes)[node]]


def read_ranges(text: str, num_clients: int) -> list[int]:
    """ "0-4, 7" as a list of clients below ``num_clients``; "none" for none of them."""
    found: set[int] = set()
    for part in () if text == "none" else text.replace(" ", "").split(","):
        ends = _RANGE.fullmatch(part)
        if ends is None:
            raise UsageError(f"clients must read like 0-4,7; got {text[:80]!r}")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if not first <= last < num_clients:
            raise UsageError(
                f"clients {part} of {text[:80]!r} are not among the run's, 0 to {num_clients - 1}"
            )
        found.update(range(first, last + 1))
    return sorted(found)


def words_of(clients: Iterable[int]) -> str:
    """Clients as `read_ranges` reads them: short for a node that serves many."""
    runs: list[list[int]] = []
    for client in sorted(clients):
        if runs and client == runs[-1][1] + 1:
            runs[-1][1] = client
        else:
            runs.append([client, client])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs) or "none"
