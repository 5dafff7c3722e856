"""Runs of two processes: an end that says why when something breaks."""

import time

import pytest
from rank_runs import assert_same_run, flags, into
from two_ranks import Pair, command, simulate

from fastrank.federated.checkpoint import load_latest


def test_an_exception_on_one_rank_ends_both_and_the_run_goes_on_from_there(pair, options, tmp_path):
    from fastrank.federated.cohort import sample_cohort

    options = {**options, "method": "fedsa-lora", "num_rounds": 3, "on_client_error": "raise"}
    last = sample_cohort(6, 4, 0, 1)[-1]  # its pass is the second rank's or the first's
    two = pair.run(simulate, into(options, tmp_path / "two"), {"raises": [(1, last)]})
    errors = [answer["error"] for answer in two]
    own = f"ClientError: client {last} failed in round 2: ArithmeticError: its disk is full of bees"
    assert own in errors
    other = errors[1 - errors.index(own)]
    assert other == f"RankError: round 2: rank {errors.index(own)}: {own}"
    assert load_latest(tmp_path / "two").rounds_done == 1

    # one process can't go on with the run of two
    alone = simulate(into(options, tmp_path / "two"), resume=True)
    assert "world_size was 2, is 1" in alone["error"]
    two = pair.run(simulate, into(options, tmp_path / "two"), None, None, True)
    one = simulate(into(options, tmp_path / "one"))
    assert_same_run(two, one, tmp_path / "two", tmp_path / "one")


def test_the_first_rank_failing_to_write_ends_the_others(pair, options, tmp_path):
    two = pair.run(simulate, into(options, tmp_path / "two", num_rounds=3), None, 1)
    assert [answer["error"] for answer in two] == [
        "Stop: enough",
        "RankError: round 2: rank 0: Stop: enough",
    ]


def test_a_killed_rank_ends_the_command_with_a_line_and_a_checkpoint(options, tmp_path):
    options = {**options, "method": "fedit", "num_rounds": 3}
    folder = tmp_path / "run"
    words = ["simulate", *flags(into(options, folder))]
    made = Pair()
    try:
        made.begin(command, words, {"kill": [1]}, str(tmp_path / "said"))
        deadline = time.time() + 200
        while any(process.is_alive() for process in made.processes):
            assert time.time() < deadline
            time.sleep(0.1)
        codes = [process.exitcode for process in made.processes]
    finally:
        made.close()
    assert codes == [1, -9]
    said = (tmp_path / "said.0").read_text()
    assert "fastrank: error: round 2: a rank died or did not answer in time" in said
    assert f"go on with: torchrun --nproc-per-node 2 -m fastrank resume {folder}" in said
    assert load_latest(folder).rounds_done == 1
    assert not (folder / "summary.json").exists()


@pytest.mark.slow
def test_a_rank_that_does_not_answer_ends_the_run(options, tmp_path):
    made = Pair()
    try:
        chosen = into(options, tmp_path / "run", method="fedit", collective_timeout=10)
        first, second = made.run(simulate, chosen, {"stall": [1]})
    finally:
        made.close()
    assert first["error"].startswith("RankError: round 2: a rank died or did not answer in time")
    assert "(collective_timeout is 10 s)" in first["error"]
    assert second["error"].startswith("RankError: round 2: ")
    assert load_latest(tmp_path / "run").rounds_done == 1
