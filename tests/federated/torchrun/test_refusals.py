"""Ranks that can't run together are told why, all of them."""

import logging

import numpy as np
import pytest
import torch
from rank_runs import into
from two_ranks import diverge, meet, simulate

from fastrank.errors import UsageError
from fastrank.federated.world import World, join


def test_ranks_started_differently_are_refused_with_the_difference(pair, options, tmp_path):
    folder = tmp_path / "two"
    rates = [into(options, folder, learning_rate=rate) for rate in (1e-3, 2e-3)]
    two = pair.run(simulate, each=rates)
    wanted = (
        "UsageError: the ranks' configurations differ: options.learning_rate is 0.001 on rank 0 "
        "and 0.002 on rank 1; start all ranks alike"
    )
    assert [answer["error"] for answer in two] == [wanted] * 2
    assert not folder.exists()


def test_what_only_one_rank_can_not_do_is_said_on_all(pair, options, tmp_path):
    chosen = [into(options, tmp_path / "two") for _ in range(2)]
    chosen[1]["dataset"] = str(tmp_path / "nothing.csv")
    two = pair.run(simulate, each=chosen)
    assert "nothing.csv" in two[1]["error"]
    assert two[0]["error"].startswith("UsageError: rank 1: ")
    assert "nothing.csv" in two[0]["error"]


def test_a_failure_is_told_once_and_leaves_ranks_in_step(pair):
    two = pair.run(meet, each=[False, True])
    assert two == [("rank 1: not here", [0, 1]), ("not here", [0, 1])]
    assert pair.run(meet, each=[True, True]) == [("not here", [0, 1])] * 2


def test_states_that_differ_in_one_bit_are_found(pair):
    """Ranks aggregate on their own: nothing is sent that would make their states equal."""
    assert pair.run(diverge, each=[3.0, 3.0]) == [(20, 1.0)] * 2
    for answer in pair.run(diverge, each=[3.0, float(np.nextafter(np.float32(3), np.float32(4)))]):
        assert "ranks computed different states from the same updates" in answer


def test_more_ranks_than_clients_are_refused(pair, options, tmp_path):
    two = pair.run(simulate, into(options, tmp_path / "two", clients_per_round=1))
    for answer in two:
        assert "2 ranks share rounds of 1 clients; raise clients_per_round" in answer["error"]


def test_processes_that_can_not_meet_are_told_how(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UsageError, match=r"can't meet .*MASTER_ADDR.*start them with torchrun"):
        join()


def test_ranks_need_gpus_of_their_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    # no filter stays behind on the real one
    monkeypatch.setattr("fastrank.federated.world._log", logging.getLogger("nobody's"))
    assert World(0, 1).place("cuda") == "cuda"
    assert World(0, 2, 0).place("auto") == "cuda:0"
    assert chosen == [0]
    with pytest.raises(UsageError, match="local rank 1 finds 1; start torchrun with"):
        World(1, 2, 1).place("cuda")
    with pytest.raises(UsageError, match="'cuda:0' can't be all ranks'"):
        World(1, 2, 1).place("cuda:0")
