"""Nodes that are late, gone or broken, and replies that are wrong: what they cost, and who."""

import math

import pytest
from loopback import Loopback, federated, rows_of

from fastrank.federated.executors import Sequential
from fastrank.federated.flower.letters import Letter, Silence
from fastrank.federated.flower.remote import RemoteError
from fastrank.federated.wire import Payload, from_bytes, to_bytes


def test_late_and_failed_nodes_cost_their_clients_alone(round_of_six):
    go = round_of_six
    go.link.silent["train", 0, go.nodes[0]] = "no reply within 5 s"
    go.link.silent["train", 0, go.nodes[4]] = Silence("Flower's error 2: boom", broken=True)
    assert go() == {
        0: f"node {go.nodes[0]}: no reply within 5 s",
        4: f"node {go.nodes[4]}: Flower's error 2: boom",
    }


def test_a_client_that_fails_is_named_with_its_reason(round_of_six, monkeypatch):
    def fails(self, client, *rest):
        if client == 3:
            raise ZeroDivisionError("no data today")
        return trains(self, client, *rest)

    trains = Sequential.train
    monkeypatch.setattr(Sequential, "train", fails)
    found = round_of_six()
    assert found.keys() == {3}
    assert "ZeroDivisionError: no data today" in found[3]


def test_a_round_that_nobody_answers_ends_the_run(round_of_six):
    for node in round_of_six.nodes.values():
        round_of_six.link.silent["train", 0, node] = "no reply within 5 s"
    with pytest.raises(
        RemoteError, match=r"clients of round 1 answered .*no reply within 5 s.*res"
    ):
        round_of_six()


def test_nodes_that_all_left_end_the_run_and_may_come_back(round_of_six):
    link, first = round_of_six.link, round_of_six.nodes[0]
    link.absent = set(link.nodes_) - {first}
    assert round_of_six() == dict.fromkeys(range(1, 6), "no node serves it now")
    link.absent = set(link.nodes_)
    with pytest.raises(RemoteError, match=r"none of the 6 clients .*no node serves it now"):
        round_of_six()
    link.absent = set()
    assert round_of_six() == {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r["results"][0].update(num_examples=10**9), "it says it has 1000000000 examp"),
        (lambda r: r["results"][0].update(client=5), "client 5, which it was not asked for"),
        (lambda r: r["results"][0].update(payload=7), "byte string 7 asked for"),
        (lambda r: r["results"][0].update(train_loss="a lot"), "train_loss is no number"),
        (lambda r: r["results"][0].pop("num_steps"), "num_steps must be of type int"),
        (lambda r: r.update(results="all"), "results must be of type list"),
        (lambda r: r.update(kind="thanks"), "its reply is of the kind 'thanks'"),
        (lambda r: r.update(kind="need", names=["server:velocity"]), "is not for clients"),
    ],
)
def test_a_reply_that_is_wrong_costs_its_client(change, reason, round_of_six):
    def meddle(kind, round, node, reply):
        if kind == "train" and node == round_of_six.nodes[0]:
            change(reply.header)
        return reply

    round_of_six.link.meddle = meddle
    found = round_of_six()
    assert found.keys() == {0}
    assert reason in found[0]


def test_payloads_of_a_wrong_shape_or_with_nan_are_dropped_as_ever(round_of_six):
    def meddle(kind, round, node, reply):
        if kind != "train" or node not in (bad := [round_of_six.nodes[c] for c in range(3)]):
            return reply
        payload = from_bytes(reply.blobs[0])
        name = sorted(payload.tensors)[0]
        value = payload.tensors[name]
        changed = [value * math.nan, value[:1], None][bad.index(node)]
        tensors = {**payload.tensors, name: changed}
        blob = b"torn" if changed is None else to_bytes(Payload(tensors, payload.metadata))
        return Letter(reply.header, [blob])

    round_of_six.link.meddle = meddle
    found = round_of_six()
    assert found.keys() == {0, 1, 2}
    assert "hold NaN or Inf" in found[0]
    assert "expected torch.float32" in found[1]
    assert "is cut off" in found[2]


def test_a_client_whose_state_is_lost_says_so_and_a_score_that_is_none_counts_not(
    small, tmp_path, caplog
):
    options = small | {"method": "fedsa-lora", "r": 2, "clients_per_round": 6}
    link = Loopback(options, tmp_path / "nodes", 2)
    ask = link.ask

    def lost(kind, letters, round, timeout):
        if kind == "train" and round == 1:
            for path in (tmp_path / "nodes").rglob("client_2/*"):
                path.unlink()
        return ask(kind, letters, round, timeout)

    def boasts(kind, round, node, reply):
        if kind == "evaluate" and round == 1:
            reply.header["scores"][0]["score"]["accuracy"] = (1.5).hex()
        return reply

    link.ask, link.meddle = lost, boasts
    federated(options, tmp_path, link=link)
    rows = rows_of(tmp_path / "remote")
    assert [row["dropped"] for row in rows] == ["0", "1"]
    assert all(0 < float(row["accuracy"]) <= 1 for row in rows)
    assert "what client 2 kept after round 1 is not in" in caplog.text
    assert "the model of client 0 could not be judged: accuracy must be in [0, 1]" in caplog.text
