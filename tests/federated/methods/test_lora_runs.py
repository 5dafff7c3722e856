"""LoRA baselines and FedProx in whole runs: side by side, resumed, saved, and the ledger."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from staged_runs import Stop, StopAfter
from transformers import AutoModelForSequenceClassification

from fastrank.errors import UsageError
from fastrank.federated import Simulation
from fastrank.federated.exchange import Exchange
from fastrank.federated.executors import Sequential
from fastrank.federated.export import digest
from fastrank.federated.local import evaluate, evaluate_in_turn
from fastrank.federated.methods import FedAvg, FedProx
from fastrank.federated.methods._factors import pairs
from fastrank.federated.model import ResidentModel
from fastrank.federated.parallel import ClientParallel

# method -> options; ranks differ where they may
RUNS = {
    "ffa-lora": {},
    "fedsa-lora": {},
    # at 0 the penalty has a kink; a larger weight would throw B, which is small, to and fro over it
    "hetlora": {"client_ranks": (2, 4), "lam": 1e-3, "gamma": 0.5},
    "flexlora": {"client_ranks": (2, 4), "scaling": "rank"},
    "flora": {"client_ranks": (2, 4), "scaling": "rank"},
    "fedex-lora": {},
    "fedsvd": {},
    "federa": {},
}
N, K = 2 * (4 * 32 + 48 + 32), 2 * (4 * 32 + 32 + 48)  # sums over the adapted matrices
P, D, H = N + K, 2 * (4 * 32 * 32 + 2 * 32 * 48), 32 * 3 + 3


@pytest.fixture
def lora(options):
    return options | {"r": 4, "lora_alpha": 12.0, "local_steps": 2}


def logits(model, simulation):
    with torch.no_grad():
        return model.logits(model.collate(simulation.test, np.arange(12)))


# -- the same by every engine ----------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_clients_side_by_side_equal_clients_one_by_one(lora, name):
    """A second round, so that bases have changed and clients have states of their own."""
    simulation = Simulation(
        **lora, **RUNS[name], method=name, optimizer="sgd", learning_rate=0.5,
        head_learning_rate=0.5, executor="sequential",
    )  # fmt: skip
    state = simulation.prepare()
    method, model = simulation.method, simulation.model
    parts, options = simulation.partition, simulation.executor.options
    alone = Sequential(model, simulation.train, parts, options)
    beside = ClientParallel(model, simulation.train, parts, options, 4)
    beside.sequential.run = beside.sequential.train = None  # falling back would prove nothing
    clients = {}
    method.arrange(model, state, 0)
    exchange = Exchange(method, state, 0, clients)
    state, _ = method.aggregate(state, alone.run(exchange, [0, 1, 2]), 0)
    found = []
    for executor in (alone, beside):
        method.arrange(model, state, 1)
        exchange = Exchange(method, state, 1, dict(clients))
        updates = list(executor.run(exchange, [1, 2, 3, 4]))
        kept = {i: exchange.client_states.get(i, {}) for i in (1, 2, 3, 4)}
        found.append({u.client: {**u.payload.tensors, **kept[u.client]} for u in updates})
        assert not exchange.dropped
    one, two = found
    start = {**state.server, **state.tensors}
    for client, tensors in one.items():
        assert tensors.keys() == two[client].keys()
        for key, value in tensors.items():
            # where a client's ranks are cut, or its A drawn, the size of the values has to do
            same = key in start and start[key].shape == value.shape and name != "flora"
            scale = (value - start[key]).norm() if same else value.norm()
            assert (two[client][key] - value).norm() <= 1e-4 * scale + 1e-7, (client, key)


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_with_the_same_bits_and_peft_loads_it(lora, name, tmp_path):
    lora |= RUNS[name] | {"method": name, "num_rounds": 2}
    simulation = Simulation(**lora)
    result = simulation.run()
    folder = tmp_path / "stopped"
    with pytest.raises(Stop):
        Simulation(**{**lora, "output_dir": str(folder)}, callbacks=[StopAfter(1)]).run()
    resumed = Simulation.resume(folder)
    weights = "adapter_model.safetensors"
    assert digest(folder / "adapter")[weights] == digest(result.output_dir / "adapter")[weights]
    measured = ("seconds", "peak_memory", "energy_j")
    for a, b in zip(result.rows, resumed.rows, strict=True):
        assert {k: v for k, v in a.items() if k not in measured} == {
            k: v for k, v in b.items() if k not in measured
        }
    changed = name in ("flora", "fedex-lora", "federa")
    assert (result.output_dir / "base").exists() == changed
    if changed:
        first, second = (digest(f / "base") for f in (folder, result.output_dir))
        assert first["model.safetensors"] == second["model.safetensors"]
    peft = AutoPeftModelForSequenceClassification.from_pretrained(result.output_dir / "adapter")
    batch = result.model.collate(simulation.test, np.arange(12))
    with torch.no_grad():
        theirs = peft.eval()(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
    torch.testing.assert_close(logits(result.model, simulation), theirs, rtol=1e-5, atol=1e-5)
    if name != "fedsa-lora":  # its accuracy is that of the clients' own models
        score = evaluate(result.model, simulation.test, 64)
        assert score["accuracy"] == result.summary["accuracy"]
        assert result.summary["accuracy_without_adapters"] is not None


# -- the ledger ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "up", "down"),
    [
        ("ffa-lora", 4 * N + H, 4 * N + H),
        ("fedsa-lora", 4 * K, 4 * K),
        ("fedsvd", 4 * N + H, 4 * P + H),
        ("federa", 4 * P + H, 4 * P + H),
        ("flora", 4 * P + H, min(3 * 4 * P, D) + H),
        ("fedex-lora", 4 * P + H, 4 * P + min(3 * 4 * P, D) + H),
        ("fedprox", None, None),
    ],
)
def test_ledger_rows_equal_the_table(lora, name, up, down):
    """Everyone takes part, so nobody has missed anything; round 1's downlink is free."""
    lora |= {"num_clients": 3, "num_rounds": 2, "method": name, "local_steps": 1}
    if name == "fedprox":
        del lora["r"], lora["lora_alpha"]
    result = Simulation(**lora).run()
    if name == "fedprox":
        up = down = sum(p.numel() for p in result.model.model.parameters())
    assert [row["payload_up"] for row in result.rows] == [3 * 4 * up] * 2
    assert [row["payload_down"] for row in result.rows] == [0, 3 * 4 * down]


# -- bases that change -----------------------------------------------------------------------------


def test_a_change_of_base_is_the_adapter_merged_and_leaves_no_trace(lora):
    """In the fused layers too, and from the loaded weights however often it is called."""
    simulation = Simulation(**lora, method="fedit")
    state = simulation.prepare()
    model = simulation.model
    base = {m: w.clone() for m, w in model.base_weights().items()}
    plain = logits(model, simulation)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        n: torch.randn(v.shape, generator=generator) if ".lora_B." in n else v
        for n, v in state.tensors.items()
    }
    model.load(tensors)
    adapted = logits(model, simulation)
    assert (adapted - plain).abs().max() > 1e-2
    factors = {n: v for n, v in tensors.items() if ".lora_" in n}
    changes = {m: 3.0 * (p.B.double() @ p.A.double()) for m, p in pairs(factors).items()}
    model.load(state.tensors)
    for _ in range(3):
        model.change_base(changes)
    torch.testing.assert_close(logits(model, simulation), adapted, rtol=1e-4, atol=1e-5)
    first = next(iter(changes))
    model.change_base({first: changes[first]})
    now = model.base_weights()
    assert not torch.equal(now[first], base[first])
    assert all(torch.equal(now[m], w) for m, w in base.items() if m != first)
    model.change_base({})
    assert all(torch.equal(w, base[m]) for m, w in model.base_weights().items())
    assert torch.equal(logits(model, simulation), plain)


def test_a_change_reaches_weights_that_are_stored_transposed():
    """GPT-2's Conv1D keeps `[K, N]`."""
    from types import SimpleNamespace

    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_positions=20, n_embd=16, n_layer=1, n_head=2, n_inner=24)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    resident = ResidentModel(
        model, SimpleNamespace(pad_token_id=0), "causal-lm", (), torch.device("cpu")
    )
    resident.add_lora(r=2, lora_alpha=4.0)
    factors = resident.read(resident.lora_names())
    tensors = {n: torch.randn(v.shape) if ".lora_B." in n else v for n, v in factors.items()}
    batch = {"input_ids": torch.arange(12)[None], "attention_mask": torch.ones(1, 12).long()}
    with torch.no_grad():
        resident.load(tensors)
        adapted = resident.logits(batch)
        resident.load(factors)
        plain = resident.logits(batch)
        shapes = {m: tuple(w.shape) for m, w in resident.base_weights().items()}
        changes = {m: 2.0 * p.B @ p.A for m, p in pairs(tensors).items()}
        assert {m: tuple(c.shape) for m, c in changes.items()} == shapes
        assert (16, 24) in shapes.values()
        resident.change_base(changes)
        torch.testing.assert_close(resident.logits(batch), adapted, rtol=1e-4, atol=1e-4)
        assert (adapted - plain).abs().max() > 1e-2


def test_federas_rank_must_fit_the_weights(lora):
    with pytest.raises(UsageError, match=r"federa: r must be from 1 to 32, .*; got 33"):
        Simulation(**{**lora, "method": "federa", "r": 33}).run()
    assert not Path(lora["output_dir"]).exists()


def test_federa_starts_at_the_base_model(lora):
    simulation = Simulation(**lora, method="federa")
    state = simulation.prepare()
    model = simulation.model
    started = logits(model, simulation)
    residual = {m: w.clone() for m, w in model.base_weights().items()}
    model.change_base({})
    lora_B = [n for n in model.lora_names() if ".lora_B." in n]
    model.load({n: torch.zeros_like(state.tensors[n]) for n in lora_B})
    torch.testing.assert_close(started, logits(model, simulation), rtol=1e-5, atol=1e-5)
    factors = {n: v for n, v in state.tensors.items() if ".lora_" in n}
    for m, weight in model.base_weights().items():
        U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        pair = pairs(factors)[m]
        leading = (U[:, :4] * S[:4]) @ Vh[:4]
        # nearly equal singular values mix their directions: what counts is how much is taken out
        taken = 3.0 * (pair.B.double() @ pair.A.double())
        assert float((weight - taken).norm()) <= 1.00001 * float((weight - leading).norm())
        torch.testing.assert_close(residual[m], (weight - taken).float(), rtol=1e-5, atol=1e-6)
        norms = [pair.B.norm(dim=0) / pair.A.norm(dim=1)]
        torch.testing.assert_close(norms[0], torch.ones(4), rtol=1e-4, atol=0)  # balanced


# -- models of the clients' own --------------------------------------------------------------------


def test_fedsa_judges_the_clients_own_models(lora):
    """Each example by one model in turn; what is saved is their mean."""
    simulation = Simulation(**lora, method="fedsa-lora")
    result = simulation.run()
    from fastrank.federated.checkpoint import load_latest

    checkpoint = load_latest(result.output_dir)
    assert set(checkpoint.client_states) >= {0}
    names = {n for kept in checkpoint.client_states.values() for n in kept}
    assert any(".lora_B." in n for n in names)
    assert not any(".lora_A." in n for n in names)
    assert not any(".lora_B." in n for n in checkpoint.state.tensors)
    assert all(
        not v.any() for n, v in checkpoint.state.server.items() if ".lora_B." in n
    )  # zeros it knows from the seed
    views = simulation.method.personal(checkpoint.state, checkpoint.client_states)
    assert len(views) == len(checkpoint.client_states)
    saved = result.model.read(views[0])
    for name, value in saved.items():
        torch.testing.assert_close(value, torch.stack([v[name] for v in views]).mean(0))
    score = evaluate_in_turn(result.model, views, simulation.test, 64)
    assert score["accuracy"] == result.summary["accuracy"]
    assert score["count"] == 60
    each = []
    for view in views:
        result.model.load(view)
        each.append(evaluate(result.model, simulation.test, 64)["accuracy"])
    assert abs(np.mean(each) - score["accuracy"]) < 0.15  # an estimate of it
    row = result.rows[-1]
    assert row["trainable_params"] == 4 * P + H
    assert row["head_up"] == row["head_down"] == 0


# -- FedProx ---------------------------------------------------------------------------------------


def prox_run(options, name, folder, **more):
    options = {k: v for k, v in options.items() if k not in ("r", "lora_alpha")}
    return Simulation(
        **{
            **options,
            "num_rounds": 1,
            "local_steps": 8,
            "method": name,
            "output_dir": str(folder),
            **more,
        }
    ).run()


def test_fedprox_without_its_term_is_fedavg_and_with_it_stays_nearer(lora, tmp_path):
    plain = prox_run(lora, "fedavg", tmp_path / "avg")
    none = prox_run(lora, "fedprox", tmp_path / "none", mu=0.0)
    held = prox_run(lora, "fedprox", tmp_path / "held", mu=100.0)
    weights = "model.safetensors"
    assert digest(plain.output_dir / "model")[weights] == digest(none.output_dir / "model")[weights]
    first = AutoModelForSequenceClassification.from_pretrained(lora["model"]).state_dict()
    names = [n for n in first if "encoder" in n]

    def moved(result):
        now = result.model.read(names)
        return sum(float((now[n] - first[n]).norm() ** 2) for n in names) ** 0.5

    assert 0 < moved(held) < 0.8 * moved(plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fedproxs_penalty_is_half_mu_times_the_squared_distance(dtype):
    from fastrank.federated.methods import ServerState

    method = FedProx(mu=0.3, wire_dtype=dtype)
    there = {"a": torch.randn(4, 3), "b": torch.randn(5)}
    plan = method.local(ServerState(tensors=there), None, 0, 0)
    received = {n: v.to(getattr(torch, dtype)).float() for n, v in there.items()}
    live = {n: (v + 1).requires_grad_() for n, v in received.items()}
    value = plan.penalty(live)
    assert float(value) == pytest.approx(0.15 * 17, rel=1e-5)
    value.backward()
    for p in live.values():
        torch.testing.assert_close(p.grad, torch.full_like(p, 0.3))
    assert plan.penalty(received) == 0
    assert isinstance(method, FedAvg)
    assert not method.shares_base(0)
