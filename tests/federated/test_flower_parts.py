"""The parts of a federation that need neither nodes nor Flower: letters, settings, replicas."""

import json
import math

import pytest
import torch

from fastrank.errors import UsageError
from fastrank.federated.flower import agreement, letters, options_of, replica
from fastrank.federated.flower.keep import Keep
from fastrank.federated.flower.letters import LetterError, letter, read_letter
from fastrank.federated.flower.settings import clients_of, ranges_of, read_ranges, words_of
from fastrank.federated.methods.base import ServerState
from fastrank.federated.wire import Payload


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
     "num-partitions": 2}],
)  # fmt: skip
def test_impossible_node_configurations(config):
    with pytest.raises(UsageError):
        clients_of(config, 6)


def test_ranges():
    assert ranges_of([5, 0, 1, 2]) == [[0, 2], [5, 5]]
    assert words_of([[0, 2], [5, 5]]) == "0-2, 5"
    assert words_of([]) == "none"
    assert read_ranges("0-2,5", 6) == [0, 1, 2, 5]


def test_options_of_a_run_configuration(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[federation]\nnum_rounds = 5\nseed = 1\n")
    found = options_of(
        {"config": str(path), "num-rounds": 7, "model": "", "set": "r=4 seed=3", "resume": ""}
    )
    assert found == {"executor": "sequential", "num_rounds": 7, "seed": "3", "r": "4"}
    assert options_of({"executor": "auto"}) == {"executor": "sequential"}
    assert options_of({"executor": "client-parallel"}) == {"executor": "client-parallel"}


def test_differences_name_paths():
    a = {"x": {"y": 1, "z": [1]}, "w": 1}
    b = {"x": {"y": 2, "z": [1]}, "v": None}
    assert agreement.differences(a, b) == [
        'v is "not there" on the server, null on the node',
        'w is 1 on the server, "not there" on the node',
        "x.y is 1 on the server, 2 on the node",
    ]
    assert agreement.differences(a, a) == []


def test_values_are_taken_by_digest_only():
    first = {("tensors", "a"): torch.ones(2), ("server", "s"): torch.zeros(3)}
    state = ServerState(
        {"a": torch.ones(2), "b": torch.full((2,), 0.1), "c": torch.ones(4, 2)},
        ("b",),
        {"s": torch.zeros(3), "moved": torch.ones(1), "open/x": torch.ones(2)},
        {"stage": 2},
    )
    payload = Payload({"b": torch.full((2,), 0.1, dtype=torch.bfloat16), "c": torch.ones(2, 2)})
    sketched = json.loads(
        json.dumps(replica.sketch(state, [payload], replica.Digests(), state.extra))
    )
    found, missing = replica.fill(sketched, [payload], [first.get], ("open/",))
    assert torch.equal(found.tensors["a"], torch.ones(2))
    assert torch.equal(found.tensors["b"], payload.tensors["b"].float())  # as it came
    assert found.tensors["c"].is_meta  # cut to the client's rank: shape alone
    assert found.tensors["c"].shape == (4, 2)
    assert torch.equal(found.server["s"], torch.zeros(3))
    assert found.server["moved"].is_meta  # never leaves the server
    assert missing == ["server:open/x"]
    assert (found.head, found.extra) == (("b",), {"stage": 2})
    wrong = {("tensors", "a"): torch.zeros(2), ("server", "s"): torch.zeros(3)}
    assert replica.fill(sketched, [payload], [wrong.get], ())[1] == ["tensors:a"]
    with pytest.raises(NotImplementedError, match="meta tensor"):  # torch's own words
        torch.ones(4, 2).copy_(found.tensors["c"])


def test_digests_see_dtype_shape_and_bits():
    x = torch.tensor([1.0, -0.0])
    seen = {replica.digest_of(t) for t in (x, x.bfloat16(), x[None], torch.tensor([1.0, 0.0]))}
    assert len(seen) == 4
    assert replica.digest_of(x) == replica.digest_of(torch.stack([x, x], 1)[:, 0])


def test_what_clients_keep_is_kept_for_as_long_as_a_checkpoint_can_ask(tmp_path):
    keep = Keep(tmp_path, "0" * 32, "0")
    assert keep.client(3, None) is None
    for round in range(8):
        keep.keep_client(3, round, {"b": torch.tensor([float(round)])}, floor=max(0, round - 2))
    # a server at round 5 (its oldest checkpoint) asks for round 4 or older, and later ones
    assert float(keep.client(3, 4)["b"]) == 4.0
    assert float(keep.client(3, 7)["b"]) == 7.0
    with pytest.raises(LookupError, match=r"client 3 kept after round 3 is not in"):
        keep.client(3, 2)
    assert len(list((tmp_path / ("0" * 32) / "client_3").iterdir())) == 4
