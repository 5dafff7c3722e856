"""Before the first round: nodes are found, and refused where they differ from the server."""

import pytest
from loopback import Loopback, federated
from transformers import AutoTokenizer

from fastrank.errors import UsageError
from fastrank.federated.flower import agreement
from fastrank.federated.flower.letters import letter
from fastrank.federated.flower.roster import Roster


def base_of(link):
    return next(iter(link.nodes_.values())).options


def roster_of(link, server):
    return Roster(link, server.executor.roster.description, server.partition, timeout=0.0)


def without(reply, **changed):
    return {k: v for k, v in reply.header.items() if k not in ("kind", "protocol")} | changed


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
    with pytest.raises(UsageError, match=rf"node \d+: .*another configuration.*: .*{words}"):
        roster_of(other, server).gather()


def test_what_each_side_decides_for_itself_may_differ(ready, tmp_path):
    server, _, link = ready
    theirs = {"eval_every": 7, "checkpoint_every": 3, "charge_initial": True}
    other = Loopback(base_of(link) | theirs, tmp_path, 1)
    roster_of(other, server).gather()


def test_too_few_nodes_and_two_for_one_client_are_named(ready):
    server, _, link = ready
    roster = roster_of(link, server)
    last = server.executor.roster.seats[5]
    link.absent.add(last)
    with pytest.raises(UsageError, match="none of them serves clients 5; start more nodes"):
        roster.gather()
    link.absent.clear()
    link.meddle = lambda kind, round, node, reply: (
        letter("hello", **without(reply, clients="0-4")) if node == last else reply
    )
    with pytest.raises(UsageError, match=r"it serves clients 0-4, and node \d+ does, too"):
        roster.gather()


def test_a_node_that_serves_clients_there_are_none_of_is_refused(ready):
    server, _, link = ready
    link.meddle = lambda kind, round, node, reply: letter(
        "hello", **without(reply, clients="0-999999999999")
    )
    with pytest.raises(UsageError, match="not among the run's, 0 to 5"):
        roster_of(link, server).gather()


def test_too_few_nodes_end_a_run_before_it_has_a_folder(small, tmp_path):
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


def test_tokenizers_are_told_apart_by_what_they_make_of_words(tiny_bert):
    one, other = (AutoTokenizer.from_pretrained(tiny_bert) for _ in range(2))
    first = agreement.reader_fingerprint(one)
    one(["w1 w2"], truncation=True, max_length=3, padding=True)  # leaves traces in it
    assert agreement.reader_fingerprint(one) == first
    other.add_tokens(["w1w2"])
    assert agreement.reader_fingerprint(other) != first
    one.chat_template = "{{ messages }}"
    assert agreement.reader_fingerprint(one) != first


def test_differences_name_paths():
    a = {"x": {"y": 1, "z": [1]}, "w": 1}
    b = {"x": {"y": 2, "z": [1]}, "v": None}
    assert agreement.differences(a, b) == [
        'v is "not there" on the server, null on the node',
        'w is 1 on the server, "not there" on the node',
        "x.y is 1 on the server, 2 on the node",
    ]
    assert agreement.differences(a, a) == []


def test_fingerprints_of_equal_facts_are_equal():
    assert agreement.fingerprint({"a": 1, "b": [2]}) == agreement.fingerprint({"b": [2], "a": 1})
    assert agreement.fingerprint({"a": 1}) != agreement.fingerprint({"a": 2})
