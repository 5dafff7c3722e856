"""FLoRA and FedEx-LoRA: bases that change, and what clients are owed of them."""

import dataclasses
import json

import pytest
import torch
from lora_cases import (
    COHORT,
    HEAD,
    MIXED,
    SHAPES,
    WIDE,
    close,
    mean_product,
    started,
    update_of,
    whole,
)

from fastrank.federated.methods import FedExLoRA, FedIT, FLoRA
from fastrank.federated.methods import _base_change as base_change
from fastrank.federated.methods._factors import pair_names
from fastrank.federated.methods._ranks import client_rank


def test_flora_begins_every_round_anew():
    method, state = started(FLoRA, client_ranks=MIXED)
    starts = {(t, i): method.local(state, None, i, t).start for t in (0, 1, 2) for i in range(6)}
    for (t, i), start in starts.items():
        rank = client_rank(i, MIXED, method.run)
        for B, A in pair_names(start).values():
            assert start[A].shape[0] == start[B].shape[1] == rank
            assert not start[B].any()
            widest = next(s for (u, _), s in starts.items() if u == t and s[A].shape[0] == 4)
            assert torch.equal(start[A], widest[A][:rank])  # one draw for all clients of a round
            bound = start[A].shape[1] ** -0.5
            assert t == 0 or start[A].abs().max() <= bound
            if t == 0:
                assert torch.equal(start[A], state.tensors[A][:rank])
            else:
                assert not torch.equal(start[A], starts[t - 1, i][A])


@pytest.mark.parametrize("cls", [FLoRA, FedExLoRA], ids=lambda cls: cls.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_clients_build_the_base_from_what_they_receive(cls, dtype):
    """Nothing but payloads, whoever missed what; and the bytes are those of the smaller form."""
    method, state = started(cls, shapes=WIDE, wire_dtype=dtype, r=2)
    e = 4 if dtype == "float32" else 2
    D, P = sum(N * K for N, K in WIDE.values()), sum(N + K for N, K in WIDE.values())
    H = 15
    own = 2 * P if cls is FedExLoRA else 0
    cohorts = [(0, 1, 2), (0, 3, 4), (0, 1, 5), (0,), (0, 1), (2, 3, 4)]
    bases = {i: {m: torch.zeros(shape) for m, shape in WIDE.items()} for i in range(6)}
    missed = dict.fromkeys(range(6), 0)  # values of the rounds' factors since a client's last
    kinds = set()
    for t, cohort in enumerate(cohorts):
        for i in cohort:
            payload = method.downlink(state, i, t)
            assert payload.payload_bytes == e * (own + min(missed[i], D) + H)
            kinds.add("whole" if missed[i] >= D else "factors" if missed[i] else "none")
            bases[i] = base_change.applied(bases[i], payload.tensors)
            for m, change in base_change.changes(state).items():
                whole_sent = missed[i] >= D
                loose = {"rtol": 8e-3, "atol": 8e-3} if whole_sent and e == 2 else None
                if loose:
                    torch.testing.assert_close(bases[i][m], change, **loose)
                else:
                    assert torch.equal(bases[i][m], change)
            loaded = method.received(payload)
            assert not any(base_change.is_change(n) for n in loaded)
            assert set(loaded) == set(state.tensors if own else [HEAD])
            missed[i] = 0
        updates = [update_of(method, state, i, round=t) for i in cohort]
        state, _ = method.aggregate(state, updates, t)
        for i in missed:
            missed[i] += len(cohort) * 2 * P
        kept = sum(v.numel() for n, v in state.server.items() if n.startswith("update/"))
        assert kept < D
        state = dataclasses.replace(state, extra=json.loads(json.dumps(state.extra)))
    assert kinds == {"none", "factors", "whole"}


@pytest.mark.parametrize("cls", [FLoRA, FedExLoRA], ids=lambda cls: cls.name)
def test_without_catch_up_only_the_last_round_is_sent(cls):
    """e min(sum r_j P, D), the table's formula, for any list of ranks."""
    options = {"client_ranks": (2, 4, 8), "r": 8} if cls is FLoRA else {"r": 4}
    method, state = started(cls, shapes=WIDE, catch_up="ignore", **options)
    D, P = sum(N * K for N, K in WIDE.values()), sum(N + K for N, K in WIDE.values())
    own = 4 * P if cls is FedExLoRA else 0
    seen = set()
    for t, cohort in enumerate([(0, 1), range(6), (1,)]):
        updates = [update_of(method, state, i, round=t) for i in cohort]
        state, _ = method.aggregate(state, updates, t)
        ranks = [pairs_rank(u) for u in updates]
        size = min(sum(ranks) * P, D)
        seen.add(size == D)
        for client in range(6):
            assert method.downlink(state, client, t + 1).payload_bytes == 4 * (own + size + 15)
    assert seen == {True, False}


def pairs_rank(update):
    return next(v.shape[0] for n, v in update.payload.tensors.items() if ".lora_A." in n)


def test_fedexs_residual_is_what_fedit_loses_and_adds_up_over_rounds():
    method, state = started(FedExLoRA)
    fedit, plain = started(FedIT)
    total = {m: torch.zeros(shape).double() for m, shape in SHAPES.items()}
    for t in range(3):
        updates = [update_of(method, state, i, round=t) for i in COHORT]
        exact = mean_product(method, state, updates)
        wanted = {m: total[m] + exact[m] for m in exact}  # base so far, and the clients' mean
        state, metrics = method.aggregate(state, updates, t)
        plain, noise = fedit.aggregate(plain, updates, t)
        assert metrics["residual"] == pytest.approx(noise["agg_noise"], rel=1e-4)
        assert metrics["agg_noise"] == 0
        close(whole(method, state), wanted)
        for name, value in plain.tensors.items():
            assert torch.equal(state.tensors[name], value)
        total = {m: c.double() for m, c in base_change.changes(state).items()}
