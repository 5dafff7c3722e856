"""Clients side by side equal clients one after another: the update of every tensor."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from side_by_side import (
    F32,
    compare,
    lora_exchange,
    make_examples,
    make_model,
    partition,
)

from fastrank.federated.exchange import ClientError
from fastrank.federated.local import LocalOptions
from fastrank.federated.methods._factors import Pair, pair_names
from fastrank.federated.methods.base import LocalPlan
from fastrank.federated.methods.hetlora import tail_product
from fastrank.federated.parallel import ClientParallel
from fastrank.federated.ranks import is_factor

OPTIONS = LocalOptions(seed=1, batch_size=4, epochs=2, max_grad_norm=0.5, weight_decay=0.01)


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_equal_in_float64(kind):
    model = make_model(kind)
    compare(model, lora_exchange(model), OPTIONS, 1e-12)


def test_equal_with_unequal_ranks_and_scales():
    model = make_model()
    ranks, scales = (4, 1, 3, 3, 2), (2.0, 8.0, None, 2.5, 4.0)
    results = compare(model, lora_exchange(model, ranks=ranks, scales=scales), OPTIONS, 1e-12)
    name = model.lora_names()[0]
    assert [results[c].tensors[name].shape[0] for c in range(5)] == list(ranks)


@pytest.mark.parametrize(
    ("optimizer", "pace", "tolerance"),
    # SGD's steps are small, and next to the rounding of the values they would be nothing
    [("sgd", 50.0, 1e-5), ("adamw", 1.0, 1e-4)],
    ids=["sgd", "adamw"],
)
def test_equal_in_float32(optimizer, pace, tolerance):
    model = make_model(dtype=F32)
    options = LocalOptions(
        seed=1, batch_size=4, epochs=2, max_grad_norm=0.5, weight_decay=0.01, optimizer=optimizer
    )
    compare(model, lora_exchange(model, pace=pace), options, tolerance)


def test_equal_with_dropout():
    """Draws belong to client, example, token and column, so padding and company change nothing."""
    model = make_model(lora_dropout=0.3)
    dropped = compare(model, lora_exchange(model), OPTIONS, 1e-12)
    plain = make_model()
    kept = compare(plain, lora_exchange(plain), OPTIONS, 1e-12)
    name = model.lora_names()[0]
    assert not torch.allclose(dropped[0].tensors[name], kept[0].tensors[name], rtol=1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_each_client_follows_its_own_schedule(schedule):
    model = make_model()
    options = LocalOptions(
        seed=1, batch_size=4, epochs=2, lr_scheduler_type=schedule, warmup_ratio=0.3
    )
    compare(model, lora_exchange(model), options, 1e-12)


@pytest.mark.parametrize("trained", ["A", "B", "head", "norms and biases"])
def test_equal_for_whatever_is_trained(trained):
    model = make_model()
    every = [name for name, _ in model.model.named_parameters()]
    names = {
        "A": [n for n in model.lora_names() if ".lora_A." in n],
        "B": [n for n in model.lora_names() if ".lora_B." in n],
        "head": model.head_names(),
        "norms and biases": [n for n in every if "LayerNorm" in n and "encoder" in n],
    }[trained]
    compare(model, lora_exchange(model, names=names), OPTIONS, 1e-12)


def penalised(plans):
    """Plans with a penalty for all clients but one: HetLoRA's, on what each has of the tail."""

    def plan(client):
        made = plans(client)
        if client == 1:
            return made
        names = pair_names(made.trainable).values()

        def penalty(parameters):
            assert parameters.keys() == set(made.trainable)
            tail = tail_product((Pair(parameters[B], parameters[A]) for B, A in names), 0.5)
            head = sum(p.square().sum() for n, p in parameters.items() if not is_factor(n))
            return (client + 1) * tail + 0.1 * head

        return dataclasses.replace(made, penalty=penalty)

    return plan


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_each_client_has_its_own_penalty(kind):
    model, ranks = make_model(kind), (4, 1, 3, 3, 2)
    exchange = lora_exchange(model, ranks=ranks)
    plain = compare(model, exchange, OPTIONS, 1e-12)
    exchange.method.local = lambda state, own, client, round: penalised(exchange.plans)(client)
    exchange.results = {}
    results = compare(model, exchange, OPTIONS, 1e-12)
    for client, result in results.items():
        for name, value in result.tensors.items():
            assert torch.equal(value, plain[client].tensors[name]) == (client == 1), (client, name)


def test_a_penalty_gone_wrong_harms_no_other():
    model = make_model(dtype=F32)
    examples, parts, clients = make_examples(), partition(), list(range(5))
    clean, hurt = lora_exchange(model), lora_exchange(model)
    for exchange, factor in ((clean, 1.0), (hurt, float("nan"))):
        plans = penalised(exchange.plans)

        def local(state, own, client, round, plans=plans, factor=factor):
            plan = plans(client)
            if client != 3:
                return plan
            return dataclasses.replace(plan, penalty=lambda p: factor * plan.penalty(p))

        exchange.method.local = local
        list(ClientParallel(model, examples, parts, OPTIONS, 5).run(exchange, clients))
    for client in clients:
        for name, value in clean.results[client].tensors.items():
            same = torch.equal(value, hurt.results[client].tensors[name])
            assert same == (client != 3), (client, name)


def test_results_do_not_depend_on_who_shares_the_pass():
    model = make_model(dtype=F32)
    examples, parts = make_examples(), partition()
    exchange = lora_exchange(model)
    list(ClientParallel(model, examples, parts, OPTIONS, 5).run(exchange, [0, 1, 2, 3, 4]))
    all_five = exchange.results[2]
    exchange.results = {}
    list(ClientParallel(model, examples, parts, OPTIONS, 5).run(exchange, [2, 4]))
    for name, value in all_five.tensors.items():
        torch.testing.assert_close(exchange.results[2].tensors[name], value, rtol=1e-3, atol=1e-5)


def test_a_client_gone_wrong_harms_no_other():
    model = make_model(dtype=F32)
    examples, parts, clients = make_examples(), partition(), list(range(5))
    clean, hurt = lora_exchange(model), lora_exchange(model)
    start = hurt.start

    def poisoned(client):
        values = start(client)
        name = next(n for n in values if ".lora_A." in n)
        return values | {name: values[name] * float("nan")} if client == 3 else values

    hurt.start = poisoned
    for exchange in (clean, hurt):
        list(ClientParallel(model, examples, parts, OPTIONS, 5).run(exchange, clients))
    for client in clients:
        for name, value in clean.results[client].tensors.items():
            same = torch.equal(value, hurt.results[client].tensors[name])
            assert same or client == 3, (client, name)
    assert np.isnan(hurt.results[3].train_loss)


def test_the_model_is_left_as_it_was():
    model = make_model()
    exchange = lora_exchange(model)
    before = {n: p.clone() for n, p in model.model.named_parameters()}
    list(ClientParallel(model, make_examples(), partition(), OPTIONS, 5).run(exchange, [0, 1]))
    assert all(torch.equal(p, before[n]) for n, p in model.model.named_parameters())
    assert not any("forward" in vars(m) for m in model.model.modules())
    assert not any(p.requires_grad for p in model.model.parameters())
    assert not model.model.training


def test_a_client_without_examples_sits_out():
    model = make_model()
    sizes = (5, 0, 4)
    exchange = lora_exchange(model)
    compare(model, exchange, OPTIONS, 1e-12, sizes=sizes)
    assert exchange.skipped == {1: "it has no examples"}


def test_what_cannot_be_shared_runs_alone_and_says_so_once(caplog):
    model = make_model()
    embeddings = [n for n, _ in model.model.named_parameters() if "word_embeddings" in n]
    exchange = lora_exchange(model, names=[*model.lora_names(), *embeddings])
    executor = ClientParallel(model, make_examples(), partition(), OPTIONS, 2)
    with caplog.at_level(logging.WARNING, "fastrank"):
        list(executor.run(exchange, [0, 1, 2]))
        list(executor.run(exchange, [3]))
    assert sorted(exchange.results) == [0, 1, 2, 3]
    (record,) = caplog.records
    assert "one after another" in record.message
    assert "Embedding" in record.message
    changing = lora_exchange(model)
    changing.method.shares_base = lambda round: False
    caplog.clear()
    list(executor.run(changing, [0, 1]))
    assert "changes the base" in caplog.text


def test_a_model_that_mixes_its_examples_is_found_out(caplog):
    model = make_model()
    inner = model.model.base_model.model.bert.encoder

    def mixing(module, args, output):
        output.last_hidden_state += output.last_hidden_state.mean(0, keepdim=True)
        return output

    handle = inner.register_forward_hook(mixing)
    exchange = lora_exchange(model)
    executor = ClientParallel(model, make_examples(), partition(), OPTIONS, 3)
    with caplog.at_level(logging.WARNING, "fastrank"):
        list(executor.run(exchange, [0, 1]))
    handle.remove()
    assert "mixes the examples" in caplog.text
    assert sorted(exchange.results) == [0, 1]


def test_out_of_memory_halves_the_pass(caplog, monkeypatch):
    from fastrank.federated import parallel

    model = make_model(dtype=F32)
    calls = []

    def short_of_memory(model, jobs, *rest):
        calls.append(len(jobs))
        if len(jobs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, jobs, *rest)

    real = parallel.train_together
    monkeypatch.setattr(parallel, "train_together", short_of_memory)
    executor = ClientParallel(model, make_examples(), partition(), OPTIONS, 5)
    exchange = lora_exchange(model)
    with caplog.at_level(logging.WARNING, "fastrank"):
        done = [update.client for update in executor.run(exchange, [0, 1, 2, 3, 4])]
    assert done == [0, 1, 2, 3, 4]
    assert calls == [5, 3, 2, 2, 1]
    assert "3 clients a pass now" in caplog.text
    assert executor.facts() == {"clients_in_parallel": 2}
    other = ClientParallel(model, make_examples(), partition(), OPTIONS, 5)
    other.restore(executor.facts())
    assert other.clients_in_parallel == 2


def test_an_error_names_its_client():
    model = make_model()
    exchange = lora_exchange(model)

    def fails(client):
        if client == 2:
            raise RuntimeError("disk on fire")
        return LocalPlan((), {})

    exchange.method.local = lambda state, own, client, round: fails(client)
    executor = ClientParallel(model, make_examples(), partition(), OPTIONS, 5)
    with pytest.raises(ClientError, match="client 2 failed in round 3: RuntimeError: disk on fire"):
        list(executor.run(exchange, [0, 1, 2]))
