"""Runs of two processes: the bits of one."""

import json

import pytest
from rank_runs import assert_same_run, both
from two_ranks import Pair

from fastrank.federated.checkpoint import load_latest
from fastrank.federated.methods import METHODS


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        ("fedit", {"eval_every": 2}),  # gather: agg_noise needs every client's factors
        ("fedavg", {"partition": "dirichlet", "alpha": 0.3}),  # sum, of uneven clients
        ("fedsa-lora", {}),  # clients keep B: known where they train next, and saved
        ("slora", {"stage1": 0.5}),  # sum, then a switch, then gather
    ],
)
def test_two_ranks_are_one_process_bit_for_bit(pair, options, tmp_path, method, changed):
    two, one, ours, theirs = both(pair, {**options, "method": method, **changed}, tmp_path)
    assert_same_run(two, one, ours, theirs)
    # what was said is said once, by the first rank
    assert two[0]["said"] == one["said"]
    assert two[1]["said"] == ""
    saved = json.loads((ours / "config.json").read_text())["resolved"]
    assert (saved["world_size"], saved["clients_in_parallel"]) == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_gives_one_process_bits(pair, options, tmp_path, method):
    options = {**options, "method": method, "num_rounds": 4, "partition": "dirichlet", "alpha": 0.5}
    assert_same_run(*both(pair, options, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"method": "fedavg", "aggregation": "median", "attack": "sign-flip", "attackers": 0.3},
        {"method": "fedavg", "dropout_rate": 0.4, "clip_update_norm": 0.05},
        {"method": "fedit", "straggler_rate": 0.5, "deadline": 2.0, "on_deadline": "partial"},
        # cohorts of any size: some smaller than the number of ranks
        {
            "method": "ffa-lora",
            "client_sampling": "poisson",
            "clients_per_round": 2,
            "clients_in_parallel": 1,
        },
        {"method": "fedit", "wire_dtype": "bfloat16", "lora_dropout": 0.1},
    ],
)
def test_faults_and_rules_are_those_of_one_process(pair, options, tmp_path, changed):
    options = {**options, "num_rounds": 5, **changed}
    assert_same_run(*both(pair, options, tmp_path))


@pytest.mark.slow
def test_other_passes_differ_by_rounding_alone(pair, options, tmp_path):
    """By default two ranks cut passes of two clients where one process takes all four at once."""
    chosen = {**options, "method": "fedit", "clients_in_parallel": "auto", "num_rounds": 3}
    two, one, ours, theirs = both(pair, chosen, tmp_path)
    cut = [json.loads((f / "config.json").read_text())["resolved"] for f in (ours, theirs)]
    assert cut[0]["clients_in_parallel"] == 2 < cut[1]["clients_in_parallel"]
    for mine, other in zip(two[0]["rows"], one["rows"], strict=True):
        assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
        assert mine["bytes_up"] == other["bytes_up"]
    mine, other = (load_latest(folder).state.tensors for folder in (ours, theirs))
    for name, value in other.items():
        assert float((mine[name] - value).norm() / value.norm().clamp_min(1e-3)) <= 2e-4, name


@pytest.mark.slow
def test_three_ranks_of_uneven_shares(options, tmp_path):
    """One pass of two clients and two of one: a rank more than there are whole passes."""
    three = Pair(3)
    try:
        for method in ("fedit", "fedavg"):
            chosen = {**options, "method": method, "clients_per_round": 5, "num_rounds": 3}
            assert_same_run(*both(three, chosen, tmp_path / method))
    finally:
        three.close()


def test_dropped_clients_cost_what_they_cost_one_process(pair, options, tmp_path):
    """A NaN on either rank, then a rank without a valid update, then none at all."""
    from fastrank.federated.cohort import sample_cohort

    cohorts = [sample_cohort(6, 4, 0, t) for t in range(3)]
    nan = [(0, cohorts[0][1]), (1, cohorts[1][0]), (1, cohorts[1][1])]
    nan += [(2, client) for client in cohorts[2]]
    options = {**options, "method": "ffa-lora", "num_rounds": 3}
    two, one, ours, theirs = both(pair, options, tmp_path, {"nan": nan})
    assert [row["dropped"] for row in two[0]["rows"]] == [1, 2, 4]
    assert two[0]["rows"][2]["train_loss"] is None
    assert two[0]["said"].count("dropped:") == 7
    assert sorted(two[0]["said"].splitlines()) == sorted(one["said"].splitlines())
    assert_same_run(two, one, ours, theirs)
