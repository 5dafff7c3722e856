"""What a node knows of the server's state, what stays on the server, and what on the node."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from loopback import assert_same, crossed, federated, plain

from fastrank.federated.flower import replica
from fastrank.federated.flower.keep import Keep
from fastrank.federated.methods import FedIT
from fastrank.federated.methods.base import ServerState
from fastrank.federated.ranks import is_factor
from fastrank.federated.wire import Payload


def test_values_are_taken_by_digest_only():
    first = {"tensors:a": torch.ones(2), "server:s": torch.zeros(3)}
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
    found, missing = replica.fill(sketched, [payload], [first], Open())
    assert torch.equal(found.tensors["a"], torch.ones(2))
    assert torch.equal(found.tensors["b"], payload.tensors["b"].float())  # as it came
    assert found.tensors["c"].is_meta  # cut to the client's rank: shape alone
    assert found.tensors["c"].shape == (4, 2)
    assert torch.equal(found.server["s"], torch.zeros(3))
    assert found.server["moved"].is_meta  # never leaves the server
    assert missing == ["server:open/x"]
    assert (found.head, found.extra) == (("b",), {"stage": 2})
    wrong = {"tensors:a": torch.zeros(2), "server:s": torch.zeros(3)}
    assert replica.fill(sketched, [payload], [wrong], FedIT())[1] == ["tensors:a"]
    # what stands in for values that never came has none that could be trained on by mistake
    with pytest.raises(NotImplementedError, match="meta tensor"):
        torch.ones(4, 2).copy_(found.tensors["c"])


@dataclass(frozen=True)
class Open(FedIT):
    name: ClassVar[str] = "open"
    public_server: ClassVar[tuple[str, ...]] = ("open/",)


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


@dataclass(frozen=True)
class Momentum(FedIT):
    """Keeps a tensor that no client may see."""

    name: ClassVar[str] = "momentum"

    def aggregate(self, state, updates, round):
        state, metrics = super().aggregate(state, updates, round)
        velocity = {"velocity": torch.full((3,), float(round + 1))}
        return ServerState(state.tensors, state.head, velocity, state.extra), metrics


def test_the_servers_own_tensors_stay_there(small, tmp_path):
    _, link = federated({**small, "method": "momentum"}, tmp_path, 2, method=Momentum)
    trained = [asked for kind, _, _, asked, _ in link.said if kind == "train"]
    assert "velocity" in trained[-1].header["sketch"]["server"]
    assert not any(b"velocity" in blob for asked in trained for blob in asked.blobs)


@dataclass(frozen=True)
class Drift(FedIT):
    """Moves every client's start by a sum that the server keeps and sends in steps.

    Nobody else's: what a method of a user's own needs so that its clients can be elsewhere.
    """

    name: ClassVar[str] = "drift"
    public_server: ClassVar[tuple[str, ...]] = ("drift/",)

    def init(self, model, seed):
        state = super().init(model, seed)
        drift = {f"drift/{n}": torch.zeros_like(v) for n, v in state.tensors.items()
                 if is_factor(n)}  # fmt: skip
        return replace(state, server=drift, extra={"secret": [1, 2, 3], "step": 0.0})

    def downlink(self, state, client, round):
        step = torch.tensor([state.extra["step"]])
        return self.pack({**state.tensors, f"step/{round}": step}, round)

    def received(self, payload):
        return {n: v for n, v in payload.tensors.items() if not n.startswith("step/")}

    def local(self, state, client_state, client, round):
        plan = super().local(state, client_state, client, round)
        moved = {n.removeprefix("drift/"): v for n, v in state.server.items()}
        return replace(plan, start={n: state.tensors[n] + v for n, v in moved.items()})

    def aggregate(self, state, updates, round):
        state, metrics = super().aggregate(state, updates, round)
        step = 0.01 * (round + 1)
        server = {n: v + step for n, v in state.server.items()}
        extra = {"secret": [*state.extra["secret"], round], "step": step}
        return replace(state, server=server, extra=extra), metrics

    def public_extra(self, extra, clients):
        return {"step": extra["step"]}


class Followed(Drift):
    def replay(self, known, received, since, extra):
        (now,) = (int(n.removeprefix("step/")) for n in received if n.startswith("step/"))
        if now != since + 1:  # all clients train in all rounds, so that nodes know the one before
            return {}
        return {n: v + extra["step"] for n, v in known.items() if n.startswith("drift/")}


@pytest.mark.parametrize("kind", [Drift, Followed])
def test_a_users_own_method_says_what_its_clients_may_know_and_how_it_follows(
    kind, small, tmp_path
):
    options = {**small, "method": "drift", "clients_per_round": 6, "num_rounds": 3}
    plain(options, tmp_path, method=kind)
    _, link = federated(options, tmp_path, 2, method=kind)
    assert_same(tmp_path)
    trained = [asked.header["sketch"] for kind_, *_, asked, _ in link.said if kind_ == "train"]
    assert [list(each["extra"]) for each in trained] == [["step"]] * len(trained)
    # asked for once a round and node, but for the first, or never
    factors = len(trained[0]["server"])
    times = 0 if kind is Followed else 2
    assert factors > 0
    assert [line["asked_for"] for line in crossed(tmp_path)] == [0] + [times * factors] * 2


def test_a_method_whose_clients_may_not_know_fails_with_its_reason(small, tmp_path):
    @dataclass(frozen=True)
    class Closed(Drift):
        public_server: ClassVar[tuple[str, ...]] = ()

    with pytest.raises(RuntimeError, match=r"none of the 6 clients of round 2 .*meta"):
        federated({**small, "method": "drift", "clients_per_round": 6}, tmp_path, method=Closed)
