"""Federation over letters: equal to the simulator bit for bit, checked, resumable; and on Flower.

Most of it runs without Flower: nodes in this process, letters written out and read back. Tests of
the Flower parts skip where it is not installed. The runs on Flower's engine and on a SuperLink are
slow: ``pytest -m slow tests/federated/test_flower.py``.
"""

import csv
import importlib.util
import json
import logging
import math
import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from loopback import Loopback, connected, federated, plain
from staged_runs import Stop, StopAfter

from fastrank.errors import UsageError
from fastrank.federated.exchange import Exchange
from fastrank.federated.executors import Sequential
from fastrank.federated.flower import agreement
from fastrank.federated.flower import node as node_module
from fastrank.federated.flower.letters import Letter, LetterError, Silence, letter
from fastrank.federated.flower.remote import RemoteError
from fastrank.federated.flower.roster import Roster
from fastrank.federated.methods import METHODS, FedIT
from fastrank.federated.methods.base import ServerState
from fastrank.federated.wire import Payload, from_bytes, to_bytes

HAS_FLOWER = importlib.util.find_spec("flwr") is not None
needs_flower = pytest.mark.skipif(
    not HAS_FLOWER, reason="flwr is not installed: pip install 'fastrank[flower]'"
)


@pytest.fixture(scope="module")
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
    node_module._cached = None
    yield base
    node_module._cached = None


@pytest.fixture(scope="module")
def ready(base, tmp_path_factory):
    """A prepared server with six nodes of one client each, its first state, and its link."""
    folder = tmp_path_factory.mktemp("ready")
    link = Loopback(base, folder / "nodes", 6)
    server = connected(link, start_timeout=0.0)(**base, output_dir=str(folder / "run"))
    state = server.prepare()
    return server, state, link


@pytest.fixture
def round_of_six(ready, caplog):
    """Runs a round of all clients: which were dropped, and why; nodes by client."""
    server, state, link = ready

    def go(round=0):
        exchange = Exchange(server.method, state, round, {})
        went = [update.client for update in server.executor.run(exchange, range(6))]
        assert sorted([*went, *exchange.dropped]) == list(range(6))
        return exchange.dropped

    link.meddle, link.silent = (lambda kind, round, node, reply: reply), {}
    go.link, go.nodes = link, {c: server.executor.roster.seats[c] for c in range(6)}
    yield go
    link.meddle, link.silent = (lambda kind, round, node, reply: reply), {}


def rows_of(folder):
    with open(folder / "rounds.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for key in ("seconds", "peak_memory", "energy_j"):
            del row[key]
    return rows


def assert_same(tmp_path, *, result=True):
    """Every bit of ledger and result."""
    a, b = tmp_path / "plain", tmp_path / "remote"
    assert rows_of(a) == rows_of(b)
    assert len(rows_of(a)) > 0
    if result:
        kind = "adapter" if (a / "adapter").exists() else "model"
        for path in (a / kind).glob("*.safetensors"):
            assert path.read_bytes() == (b / kind / path.name).read_bytes(), path.name


def crossed(tmp_path):
    return [json.loads(line) for line in (tmp_path / "remote/transport.jsonl").open()]


# -- equal to the simulator -----------------------------------------------------------------------

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


# -- accidents ------------------------------------------------------------------------------------


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
    node_module._cached = None
    kind.resume(folder)
    assert [line["round"] for line in crossed(tmp_path)] == [1, 2, 3, 4]
    assert_same(tmp_path, result=False)


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
    try:
        link.absent = set(link.nodes_) - {first}
        assert round_of_six() == dict.fromkeys(range(1, 6), "no node serves it now")
        link.absent = set(link.nodes_)
        with pytest.raises(RemoteError, match=r"none of the 6 clients .*no node serves it now"):
            round_of_six()
    finally:
        link.absent = set()
    assert round_of_six() == {}


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


def test_too_few_nodes_are_named(small, tmp_path):
    link = Loopback(small, tmp_path / "nodes", 3)
    link.absent.add(sorted(link.nodes_)[0])  # the last of them
    with pytest.raises(UsageError, match="none of them serves clients 4-5; start more nodes"):
        federated(small, tmp_path, link=link)
    assert not (tmp_path / "remote").exists()


def test_two_nodes_for_one_client_are_refused(small, tmp_path):
    link = Loopback(small, tmp_path / "nodes", 2)
    for node in link.nodes_.values():
        node.clients = lambda n: list(range(n))
    with pytest.raises(UsageError, match=r"it serves clients 0-5, and node \d+ does, too"):
        federated(small, tmp_path, link=link)


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"learning_rate": 0.5}, "options.learning_rate is 0.002 on the server, 0.5 on the node"),
        ({"method": "ffa-lora"}, 'options.method is "fedit" on the server, "ffa-lora" on the'),
        ({"max_examples": 100, "num_clients": 7}, "data_fingerprint is .* on the node; options.max_"
         "examples is null .* resolved.clients is 6 on the server, 7 on the node"),
    ],
)  # fmt: skip
def test_another_configuration_is_refused_with_the_difference(theirs, words, ready, tmp_path):
    server, _, link = ready
    other = Loopback(base_of(link) | theirs, tmp_path, 1)
    roster = Roster(other, agreement_of(server), 6, timeout=0.0, reply_timeout=1.0)
    with pytest.raises(UsageError, match=rf"node \d+: .*another configuration.*: .*{words}"):
        roster.gather()


def test_what_each_side_decides_for_itself_may_differ(ready, tmp_path):
    server, _, link = ready
    theirs = {"eval_every": 7, "checkpoint_every": 3, "charge_initial": True}
    other = Loopback(base_of(link) | theirs, tmp_path, 1)
    Roster(other, agreement_of(server), 6, timeout=0.0, reply_timeout=1.0).gather()


def test_too_few_nodes_and_two_for_one_client_are_named(ready):
    server, _, link = ready
    roster = Roster(link, agreement_of(server), 6, timeout=0.0, reply_timeout=1.0)
    last = server.executor.roster.seats[5]
    try:
        link.absent.add(last)
        with pytest.raises(UsageError, match="none of them serves clients 5; start more nodes"):
            roster.gather()
        link.absent.clear()
        link.meddle = lambda kind, round, node, reply: (
            letter("hello", **without(reply, clients=[[0, 4]])) if node == last else reply
        )
        with pytest.raises(UsageError, match=r"it serves clients 0-4, and node \d+ does, too"):
            roster.gather()
    finally:
        link.absent.clear()
        link.meddle = lambda kind, round, node, reply: reply


def base_of(link):
    return next(iter(link.nodes_.values())).options


def agreement_of(server):
    return server.executor.roster.description


def without(reply, **changed):
    return {k: v for k, v in reply.header.items() if k not in ("kind", "protocol")} | changed


def test_a_node_that_changed_its_configuration_trains_no_more(round_of_six):
    node = round_of_six.link.nodes_[round_of_six.nodes[2]]
    before = node.options
    try:
        node.options = before | {"learning_rate": 0.1}
        found = round_of_six()
    finally:
        node.options = before
    assert found.keys() == {2}
    assert "not the one agreed on" in found[2]


def test_models_are_told_apart_by_what_is_in_them(ready):
    server, _, _ = ready
    before = agreement.model_fingerprint(server.model)
    weight = next(p for n, p in server.model.model.named_parameters() if "base_layer" in n)
    old = weight.data.clone()
    weight.data += 0.01
    assert agreement.model_fingerprint(server.model) != before
    weight.data.copy_(old)
    assert agreement.model_fingerprint(server.model) == before


# -- hostile letters ------------------------------------------------------------------------------


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


@pytest.fixture
def asked(round_of_six):
    """A node and a letter that it trains after."""
    round_of_six()
    said = next(each for each in reversed(round_of_six.link.said) if each[0] == "train")
    return round_of_six.link.nodes_[said[2]], said[3]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h: h.update(run="../../etc"), "run must be 32 hexadecimal digits"),
        (lambda h: h.update(run="A" * 32), "run must be 32 hexadecimal digits"),
        (lambda h: h.update(threads=0), "threads must be from 1"),
        (lambda h: h.update(round=-1), "round must be at least 0"),
        (lambda h: h["clients"][0].update(client=77), r"not serve clients \[77\]"),
        (lambda h: h["clients"][0].update(payload="0"), "byte string '0' asked for"),
        (lambda h: h.update(kind="obey"), "no letters of the kind 'obey'"),
        (lambda h: h.update(sketch=[]), "sketch must be of type dict"),
        (lambda h: h["sketch"]["tensors"].update(x=["object", [1], None]), "sketch of x is mal"),
        (lambda h: h["sketch"]["tensors"].update(x=["float32", [2**40, 2**40], "0"]), "no model"),
        (lambda h: h.pop("agreed"), "agreed must be of type str"),
    ],
)
def test_a_node_refuses_letters_that_are_wrong(change, reason, asked):
    node, good = asked
    header = json.loads(good.text())
    change(header)
    reply = node.answer(Letter(header, good.blobs))
    assert reply.kind == "refused"
    assert re.search(reason, reply.header["reason"])
    assert node.answer(good).kind == "updates"


# -- what stays where it is ----------------------------------------------------------------------


def test_a_client_whose_state_is_lost_says_so(small, tmp_path, caplog):
    options = small | {"method": "fedsa-lora", "r": 2, "clients_per_round": 6}
    link = Loopback(options, tmp_path / "nodes", 2)
    ask = link.ask

    def lost(kind, letters, round, timeout):
        if kind == "train" and round == 1:
            for path in (tmp_path / "nodes").rglob("client_2/*"):
                path.unlink()
        return ask(kind, letters, round, timeout)

    link.ask = lost
    federated(options, tmp_path, link=link)
    assert [row["dropped"] for row in rows_of(tmp_path / "remote")] == ["0", "1"]
    assert "what client 2 kept after round 1 is not in" in caplog.text


@dataclass(frozen=True)
class Momentum(FedIT):
    """Keeps a tensor that no client may see."""

    name: ClassVar[str] = "momentum"

    def aggregate(self, state, updates, round):
        state, metrics = super().aggregate(state, updates, round)
        velocity = {"velocity": torch.full((3,), float(round + 1))}
        return ServerState(state.tensors, state.head, velocity, state.extra), metrics


def test_the_servers_own_tensors_stay_there(small, tmp_path):
    link = Loopback(small, tmp_path / "nodes", 2)
    for node in link.nodes_.values():
        node.own = {"method": Momentum}
    options = {k: v for k, v in small.items() if k != "method"}
    kind = connected(link, start_timeout=0.0)
    from fastrank.federated.config import resolve

    options |= {"method": "momentum", "output_dir": str(tmp_path / "remote")}
    for node in link.nodes_.values():
        node.options = {**node.options, "method": "momentum"}
    kind(*resolve(options, method=Momentum)).run()
    trained = [asked for kind_, _, _, asked, _ in link.said if kind_ == "train"]
    assert "velocity" in trained[-1].header["sketch"]["server"]
    assert not any(b"velocity" in blob for asked in trained for blob in asked.blobs)


# -- on Flower ------------------------------------------------------------------------------------


@needs_flower
def test_letters_cross_in_flowers_records():
    from fastrank.federated.flower.records import content_of, letter_of

    rng = np.random.default_rng(0)
    sent = letter("train", [rng.bytes(n) for n in (1, 1000, 0)], x=[1, "b"])
    got = letter_of(content_of(sent))
    assert (got.header, got.blobs) == (sent.header, sent.blobs)
    from flwr.app import ConfigRecord, RecordDict

    with pytest.raises(LetterError, match="not fastrank's"):
        letter_of(RecordDict({"config": ConfigRecord({"lr": 0.1})}))


@pytest.mark.skipif(HAS_FLOWER, reason="flwr is installed")
def test_without_flower_the_extra_is_named():
    import fastrank.federated.flower as flower

    with pytest.raises(ImportError, match=r"pip install 'fastrank\[flower\]'"):
        flower.Strategy  # noqa: B018
