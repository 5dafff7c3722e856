"""Letters and settings: what is written, what is refused; with Flower installed, its records."""

import importlib.util
import json
import math
import re

import numpy as np
import pytest

from fastrank.errors import UsageError
from fastrank.federated.flower import letters, options_of
from fastrank.federated.flower.letters import Letter, LetterError, letter, read_letter
from fastrank.federated.flower.settings import clients_of, read_ranges, words_of

HAS_FLOWER = importlib.util.find_spec("flwr") is not None


def test_letters_come_back_as_they_went():
    sent = letter("train", [b"\x00\xff", b""], b={"z": 1, "a": [None, 1.5, "ä"]}, a=2)
    got = read_letter(sent.text(), sent.blobs)
    assert got.header == sent.header
    assert list(got.header["b"]) == ["z", "a"]  # methods go through dicts in their order
    assert got.num_bytes == len(sent.text()) + 2


@pytest.mark.parametrize(
    "text",
    [None, "", "[]", "{}", "{", '{"kind": 3, "protocol": 1}', '{"kind": "a", "protocol": 2}',
     '{"kind": "a", "protocol": 1, "x": NaN}', "[" * 100_000],
)  # fmt: skip
def test_other_texts_are_no_letters(text):
    with pytest.raises(LetterError):
        read_letter(text, [])


@pytest.mark.parametrize("value", [0.1, -1e-320, math.inf, 1e308])
def test_numbers_keep_every_bit(value):
    assert letters.take_number({"x": letters.write_number(value)}, "x") == value
    assert math.isnan(letters.take_number({"x": letters.write_number(math.nan)}, "x"))


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


@pytest.mark.parametrize(
    ("config", "clients"),
    [
        ({"partition-id": 2, "num-partitions": 6}, [2]),
        ({"partition-id": 0, "num-partitions": 2}, [0, 1, 2]),
        ({"partition-id": 3, "num-partitions": 4}, [5]),
        ({"partition-id": 7, "num-partitions": 9}, []),
        ({"clients": "0-2, 5", "partition-id": 0}, [0, 1, 2, 5]),
    ],
)
def test_clients_of_a_node(config, clients):
    assert clients_of(config, 6) == clients


@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 6, 8])
def test_all_nodes_together_serve_every_client_once(nodes):
    served = [clients_of({"partition-id": i, "num-partitions": nodes}, 6) for i in range(nodes)]
    assert [client for each in served for client in each] == list(range(6))


@pytest.mark.parametrize(
    "config",
    [{}, {"partition-id": 0}, {"partition-id": 2, "num-partitions": 2}, {"clients": "0-9"},
     {"clients": "-1"}, {"clients": "3-1"}, {"clients": ""}, {"partition-id": "x",
     "num-partitions": 2}, {"clients": "²"}, {"clients": "9" * 5000}],
)  # fmt: skip
def test_impossible_node_configurations(config):
    with pytest.raises(UsageError):
        clients_of(config, 6)


def test_clients_in_words_are_read_again():
    assert words_of([5, 0, 1, 2]) == "0-2, 5"
    assert words_of([]) == "none"
    assert read_ranges("0-2,5", 6) == [0, 1, 2, 5]
    for clients in ([0, 1, 2, 5], [3], []):
        assert read_ranges(words_of(clients), 6) == clients


def test_options_of_a_run_configuration(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[federation]\nnum_rounds = 5\nseed = 1\n")
    found = options_of(
        {"config": str(path), "num-rounds": 7, "model": "", "set": "r=4 seed=3", "resume": ""}
    )
    assert found == {"executor": "sequential", "num_rounds": 7, "seed": "3", "r": "4"}
    assert options_of({"executor": "auto"}) == {"executor": "sequential"}
    assert options_of({"executor": "client-parallel"}) == {"executor": "client-parallel"}


@pytest.mark.skipif(not HAS_FLOWER, reason="no flwr: pip install 'fastrank[flower]'")
def test_letters_cross_in_flowers_records():
    from flwr.app import ConfigRecord, RecordDict

    from fastrank.federated.flower.records import content_of, letter_of

    rng = np.random.default_rng(0)
    sent = letter("train", [rng.bytes(n) for n in (1, 1000, 0)], x=[1, "b"])
    got = letter_of(content_of(sent))
    assert (got.header, got.blobs) == (sent.header, sent.blobs)
    with pytest.raises(LetterError, match="not fastrank's"):
        letter_of(RecordDict({"config": ConfigRecord({"lr": 0.1})}))


@pytest.mark.skipif(HAS_FLOWER, reason="flwr is installed")
def test_without_flower_the_extra_is_named():
    import fastrank.federated.flower as flower

    with pytest.raises(ImportError, match=r"pip install 'fastrank\[flower\]'"):
        flower.Strategy  # noqa: B018
