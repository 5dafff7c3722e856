"""Hostile uploads: what an attack makes of them, and what the server's validation says."""

import pytest
import torch
from lora_cases import started, update_of
from robust_cases import attacked

from fastrank.errors import UsageError
from fastrank.federated.attacks import Attack
from fastrank.federated.config import resolve
from fastrank.federated.exchange import Exchange
from fastrank.federated.methods import FedExLoRA, FedIT, FedPLoRA, FlexLoRA, FLoRA, HetLoRA
from fastrank.federated.methods.base import LocalResult
from fastrank.federated.wire import Payload


@pytest.mark.parametrize("cls", [FedIT, FlexLoRA, FLoRA, HetLoRA, FedPLoRA, FedExLoRA])
def test_origins_have_the_shapes_of_updates(cls):
    options = {"client_ranks": (1, 2)} if "client_ranks" in cls.__dataclass_fields__ else {}
    method, state = started(cls, **options)
    for round in (0, 3):
        for client in range(4):
            origin = method.origin(state, client, round)
            spec = method.uplink_spec(state, client, round)
            assert {n: tuple(origin[n].shape) for n in spec} == {n: s for n, (s, _) in spec.items()}


def received(attack, method, state, round=1, client=2):
    """What becomes of an attacked upload: (update or None, honest tensors, exchange)."""
    honest = update_of(method, state, client, round).payload.tensors
    exchange = Exchange(method, state, round, {}, attack=attack)
    result = LocalResult(client, round, dict(honest), 5, 1, 0.5)
    return exchange.receive(result), honest, exchange


@pytest.mark.parametrize(("kind", "factor"), [("sign-flip", -1.0), ("scale", 10.0)])
@pytest.mark.parametrize("scale", [None, 2.5])
def test_flipped_and_scaled_updates(kind, factor, scale):
    method, state = started(FedIT)
    update, honest, _ = received(attacked(kind, scale), method, state)
    factor = factor if scale is None else scale * (1 if factor > 0 else -1)
    for name, value in update.payload.tensors.items():
        start = state.tensors[name].double()
        wanted = start + factor * (honest[name].double() - start)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-6)


def test_gaussian_updates_depend_on_seed_round_and_client_alone():
    method, state = started(FedIT)
    attack = attacked("gaussian", 1.0)
    first, honest, _ = received(attack, method, state)
    again, _, _ = received(attack, method, state)
    name = "head.weight"
    assert torch.equal(first.payload.tensors[name], again.payload.tensors[name])
    other = received(attack, method, state, round=2)[0]
    assert not torch.equal(first.payload.tensors[name], other.payload.tensors[name])
    moved = first.payload.tensors[name] - state.tensors[name]
    size = (honest[name] - state.tensors[name]).norm()
    assert 0.3 * size < moved.norm() < 3 * size


@pytest.mark.parametrize(
    ("kind", "words"),
    [("nan", "NaN or Inf"), ("inf", "NaN or Inf"), ("wrong-shape", "expected torch.float32"),
     ("replay", "its message is of round 1, a replay or a late one: it is round 2")],
)  # fmt: skip
def test_crude_attacks_are_dropped_and_named(kind, words):
    method, state = started(FedIT)
    update, _, exchange = received(attacked(kind), method, state)
    assert update is None
    assert words in exchange.dropped[2]
    assert exchange.traffic.bytes_up > 0  # it was sent


def test_a_message_without_a_round_is_refused():
    method, state = started(FedIT)

    class Silent(FedIT):
        def pack(self, tensors, round):
            return Payload(dict(tensors), {})

    method = Silent(r=4, lora_alpha=12.0).in_run(method.run)
    update, _, exchange = received(None, method, state)
    assert update is None
    assert "of round None" in exchange.dropped[2]


def test_attackers_are_a_pure_function_of_the_seed():
    one = Attack("nan", 0.3, num_clients=50, seed=1)
    assert len(one.attackers) == 15
    assert one.attackers == Attack("inf", 0.3, num_clients=50, seed=1).attackers
    assert one.attackers != Attack("nan", 0.3, num_clients=50, seed=2).attackers
    assert Attack("nan", 0.1, num_clients=50, seed=1).attackers < one.attackers
    config, _ = resolve({"attack": "nan", "attackers": 0.01})
    with pytest.raises(UsageError, match=r"of 20 clients is none; give at least 0.05"):
        Attack.of(config, 20)


# -- whole runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["median", "krum"])
def test_nan_clients_are_dropped_before_the_rule_sees_them(options, rule):
    from fastrank.federated import Simulation

    options |= {"num_clients": 6, "clients_per_round": 6, "num_rounds": 1}
    options |= {"attack": "nan", "attackers": 0.34, "aggregation": rule}
    simulation = Simulation(**options)
    result = simulation.run()
    hostile = simulation.conditions.attack.attackers
    assert len(hostile) == 2
    assert result.rows[0]["dropped"] == 2
    values = result.model.read(result.model.lora_names())
    assert all(torch.isfinite(v).all() for v in values.values())
    lines = (result.output_dir / "metrics.jsonl").read_text()
    assert '"drop_reasons"' in lines
    if rule == "krum":
        assert '"chosen"' in lines
    else:
        assert "agg_noise" not in lines  # there is no mean to compare with
