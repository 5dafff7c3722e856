"""Runs of half a second over nodes in this process, without Flower."""

import pytest
from loopback import Loopback

from fastrank.federated.exchange import Exchange
from fastrank.federated.flower import node as nodes
from fastrank.federated.flower.remote import connected


@pytest.fixture(scope="session")
def base(tiny_bert, csv_data):
    """Options of a run of half a second."""
    return {
        "model": str(tiny_bert),
        "dataset": str(csv_data),
        "num_clients": 6,
        "clients_per_round": 3,
        "num_rounds": 2,
        "partition": "iid",
        "max_length": 16,
        "local_steps": 1,
        "per_device_train_batch_size": 8,
        "num_threads": 1,
        "executor": "sequential",
    }


@pytest.fixture
def small(base):
    """The same, with no node left from another test."""
    nodes._cached = None
    yield base
    nodes._cached = None


@pytest.fixture(scope="session")
def made(base, tmp_path_factory):
    """A prepared server with six nodes of one client each, its first state, and its link."""
    folder = tmp_path_factory.mktemp("ready")
    link = Loopback(base, folder / "nodes", 6)
    server = connected(link, start_timeout=0.0)(**base, output_dir=str(folder / "run"))
    return server, server.prepare(), link


@pytest.fixture
def ready(made):
    """The same, with a link that does as it is told by one test alone."""
    made[2].behave()
    yield made
    made[2].behave()


@pytest.fixture
def round_of_six(ready):
    """Runs a round of all clients: which were dropped, and why; nodes by client."""
    server, state, link = ready

    def go(round=0):
        exchange = Exchange(server.method, state, round, {})
        went = [update.client for update in server.executor.run(exchange, range(6))]
        assert sorted([*went, *exchange.dropped]) == list(range(6))
        return exchange.dropped

    go.link, go.nodes = link, {c: server.executor.roster.seats[c] for c in range(6)}
    return go
