"""A federation over letters has the simulator's bits, whatever the method and whoever is late."""

import logging

import pytest
from loopback import Loopback, assert_same, connected, crossed, federated, plain, rows_of
from staged_runs import Stop, StopAfter

from fastrank.federated.flower import node as nodes
from fastrank.federated.methods import METHODS

# what makes each method show its client side: unequal ranks, switches, changes of the base
CASES = {
    "fedsa-lora": {"r": 2},
    "hetlora": {"r": 4, "client_ranks": "2,4", "wire_dtype": "bfloat16"},
    "sa-fedlora": {"initiating": 0.3, "shrink": "merge"},
    "flora": {"r": 4, "client_ranks": "2,4"},
    "flexlora": {"r": 4, "client_ranks": "2,4", "scaling": "rank"},
    "fedara": {"r": 4},
    "adalora": {"r": 4, "rank_target": 2.0},
    "fed-plora": {"client_ranks": "2,4", "fold": "weight"},
    "slora": {"r": 4, "stage1": 0.5, "keep_residual": True},
}


@pytest.mark.parametrize("name", ["fedsa-lora", "hetlora", "sa-fedlora"])
def test_equals_the_simulator_bit_for_bit(name, small, tmp_path):
    options = {**small, "method": name, **CASES[name], "num_rounds": 3}
    plain(options, tmp_path)
    _, link = federated(options, tmp_path)
    # what clients keep stays on their nodes, and is not in the saved mean
    assert_same(tmp_path, result=name != "fedsa-lora")
    asked = [kind for kind, *_ in link.said]
    assert ("evaluate" in asked) == (name == "fedsa-lora")
    if name != "hetlora":
        return
    # ranks and dtypes cross as the ledger says
    said = [(asked.blobs, reply.blobs) for kind, *_, asked, reply in link.said if kind == "train"]
    up = [blob for _, blobs in said for blob in blobs]
    assert sum(map(len, up)) == sum(int(row["bytes_up"]) for row in rows_of(tmp_path / "remote"))
    assert len({len(blob) for blob in up}) > 1
    assert all(b"BF16" in blob[:2000] for sent, got in said for blob in (*sent, *got))
    assert all(line["bytes_up"] > 0 == line["asked_for"] for line in crossed(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_equals_the_simulator_with_a_new_process_for_every_letter(
    name, small, tmp_path
):
    options = {**small, "method": name, **CASES.get(name, {}), "num_rounds": 4}
    plain(options, tmp_path)
    federated(options, tmp_path, forgetful=True)
    assert_same(tmp_path, result=name != "fedsa-lora")


def test_neither_nodes_nor_faults_change_a_bit(small, tmp_path):
    options = small | {
        "dropout_rate": 0.2,
        "straggler_rate": 0.5,
        "straggler_slowdown": 3,
        "deadline": 1,
        "on_deadline": "partial",
        "attack": "nan",
        "attackers": 0.2,
        "num_rounds": 3,
        "local_steps": 3,
    }
    plain(options, tmp_path)
    federated(options, tmp_path, 1)
    assert_same(tmp_path)
    rows = rows_of(tmp_path / "remote")
    assert 0 < sum(int(row["dropped"]) for row in rows) < 9


def test_a_base_that_changes_is_followed_and_asked_for_only_after_a_loss(small, tmp_path):
    options = small | {"method": "flora", "r": 1, "num_rounds": 4, "clients_per_round": 6}
    plain(options, tmp_path)
    link = Loopback(options, tmp_path / "nodes", 2, forgetful=True)
    ask = link.ask

    def with_a_fire(kind, letters, round, timeout):
        if kind == "train" and round == 3:
            for path in (tmp_path / "nodes").rglob("replica"):
                path.write_bytes(path.read_bytes()[:-9])
        return ask(kind, letters, round, timeout)

    link.ask = with_a_fire
    federated(options, tmp_path, link=link)
    assert_same(tmp_path)
    asked = [line["asked_for"] for line in crossed(tmp_path)]
    assert asked[3] > 0
    assert asked[:3] == [0, 0, 0]


def test_a_run_cut_short_goes_on_to_the_same_bits(small, tmp_path):
    options = {**small, "method": "fedsa-lora", "r": 2, "num_rounds": 4}
    plain(options, tmp_path)
    link = Loopback(options, tmp_path / "nodes", 2)
    kind = connected(link, start_timeout=0.0)
    folder = tmp_path / "remote"
    # the last checkpoint is of round 2; what clients kept after round 3 must not be used
    options["checkpoint_every"] = 2
    with pytest.raises(Stop):
        kind(callbacks=[StopAfter(3)], **options, output_dir=str(folder)).run()
    nodes._cached = None
    kind.resume(folder)
    assert [line["round"] for line in crossed(tmp_path)] == [1, 2, 3, 4]
    assert_same(tmp_path, result=False)


def test_a_node_that_leaves_is_replaced(small, tmp_path, caplog):
    plain(small, tmp_path)
    link = Loopback(small, tmp_path / "nodes", 2)
    old = sorted(link.nodes_)[0]
    ask = link.ask

    def moves(kind, letters, round, timeout):
        replies = ask(kind, letters, round, timeout)
        if kind == "train" and round == 0:
            link.nodes_[99] = link.nodes_.pop(old)
        return replies

    link.ask = moves
    with caplog.at_level(logging.WARNING):
        federated(small, tmp_path, link=link)
    assert_same(tmp_path)
    assert "1 nodes left" in caplog.text
