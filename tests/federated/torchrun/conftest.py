"""Two ranks, and the smallest round that they share evenly."""

import pytest
from two_ranks import Pair


@pytest.fixture(scope="module")
def pair():
    made = Pair()
    yield made
    made.close()


@pytest.fixture
def options(options):
    """Four clients a round, in passes of two: the smallest round that two ranks share evenly."""
    return {**options, "clients_per_round": 4, "num_rounds": 2, "clients_in_parallel": 2}
