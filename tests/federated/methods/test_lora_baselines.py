"""LoRA baselines on the server: closed forms in dense float64, noise, bytes, known bugs.

Each listed bug of a public re-implementation (FederatedScope, FederatedLLM, FedLLM-Factory,
Fed-HeLLo) fails a test here, in test_hetlora.py or in test_base_change.py.
"""

import dataclasses
import json

import pytest
import torch
from lora_cases import (
    COHORT,
    HEAD,
    MIXED,
    SHAPES,
    close,
    everything,
    mean_product,
    norm,
    product,
    started,
    update_of,
    whole,
)

from fastrank.errors import UsageError
from fastrank.federated.methods import (
    FeDeRA,
    FedExLoRA,
    FedIT,
    FedSALoRA,
    FedSVD,
    FFALoRA,
    FlexLoRA,
    FLoRA,
    HetLoRA,
)
from fastrank.federated.methods._factors import pair_names, pairs
from fastrank.federated.methods._ranks import client_rank
from fastrank.federated.wire import Payload

ALL = (FedIT, FFALoRA, FedSALoRA, HetLoRA, FlexLoRA, FLoRA, FedExLoRA, FedSVD)


def scales_of(method, state, updates):
    rank_of = getattr(method, "rank_of", lambda state, client: method.r)
    scale_of = getattr(method, "scale_of", lambda rank: method.scale)
    return [scale_of(rank_of(state, u.client)) for u in updates]


# -- what the server computes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (FFALoRA, {}),
        (FedSVD, {}),
        (FedExLoRA, {}),
        (FlexLoRA, {"r": 4, "client_ranks": (1, 2)}),  # sums of rank 4 at most
        (FlexLoRA, {"r": 4, "client_ranks": (1, 2), "scaling": "rank"}),
        (FLoRA, {}),
        (FLoRA, {"client_ranks": MIXED}),
        (FLoRA, {"client_ranks": MIXED, "scaling": "rank", "weighting": "uniform"}),
    ],
    ids=str,
)
def test_exact_methods_hold_the_mean_of_the_clients_products(cls, options):
    """s is not 1, clients are unequal, and only some of them take part: sum p_i s_i B_i A_i."""
    method, state = started(cls, **options)
    before = whole(method, state)
    assert norm(before.values()) == 0
    cohort = COHORT if cls is not FlexLoRA else (0, 3)
    updates = [update_of(method, state, i) for i in cohort]
    if method.weighting == "uniform":
        updates = [dataclasses.replace(u, num_examples=1) for u in updates]
    wanted = mean_product(method, state, updates, scales_of(method, state, updates))
    after, metrics = method.aggregate(state, iter(updates), 0)
    close(whole(method, after), wanted)
    assert metrics["agg_noise"] <= 1e-5 * norm(wanted.values())
    head = sum(u.num_examples * u.payload.tensors[HEAD].double() for u in updates)
    torch.testing.assert_close(
        after.tensors[HEAD], (head / sum(u.num_examples for u in updates)).float()
    )


def test_fedit_is_the_mean_of_factors_and_says_what_that_costs():
    method, state = started(FedIT)
    updates = [update_of(method, state, i) for i in COHORT]
    after, metrics = method.aggregate(state, iter(updates), 0)
    total = sum(u.num_examples for u in updates)
    for name, value in after.tensors.items():
        wanted = sum(u.num_examples / total * u.payload.tensors[name].double() for u in updates)
        torch.testing.assert_close(value, wanted.float())
    exact, found = mean_product(method, state, updates), product(method, after.tensors)
    noise = norm(found[m] - exact[m] for m in exact)
    assert noise > 0.5 * norm(exact.values())
    assert metrics["agg_noise"] == pytest.approx(noise, rel=1e-5)
    json.dumps(metrics)


def test_identical_clients_make_every_method_agree():
    """From one start; the server's change is the client's, whatever ranks are padded or stacked."""
    merged = {}
    for cls in (FedIT, FLoRA, FlexLoRA, FedExLoRA, HetLoRA):
        method, state = started(cls)
        updates = [update_of(method, state, i, seed=7) for i in COHORT]
        after, metrics = method.aggregate(state, iter(updates), 0)
        merged[cls.name] = whole(method, after)
        own = mean_product(method, state, updates[:1])
        close(merged[cls.name], own)
        assert metrics["agg_noise"] < 1e-5 * norm(own.values())
    for name in merged:
        close(merged[name], merged["fedit"])


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.name)
def test_order_of_tensors_in_a_message_means_nothing(cls):
    method, state = started(cls)
    updates = [update_of(method, state, i) for i in COHORT]
    turned = [
        dataclasses.replace(
            u, payload=Payload(dict(reversed(u.payload.tensors.items())), u.payload.metadata)
        )
        for u in updates
    ]
    (one, noted), (two, again) = (method.aggregate(state, us, 0) for us in (updates, turned))
    assert noted == again
    for a, b in ((one.tensors, two.tensors), (one.server, two.server)):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.name)
def test_state_is_json_and_tensors_and_shapes_stay(cls):
    """Rank 4 equals a side of two matrices: nothing may be told apart by shape."""
    method, state = started(cls)
    updates = [update_of(method, state, i) for i in COHORT]
    after, metrics = method.aggregate(state, iter(updates), 0)
    assert json.loads(json.dumps(after.extra)) == after.extra
    json.dumps(metrics)
    assert {n: v.shape for n, v in after.tensors.items()} == {
        n: v.shape for n, v in state.tensors.items()
    }
    assert all(v.dtype == torch.float32 for v in after.tensors.values())
    for name, value in after.tensors.items():
        changed = not torch.equal(value, state.tensors[name])
        assert changed == (not (cls is FLoRA and name != HEAD)), name


# -- FlexLoRA --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["global", "rank"])
def test_flexlora_is_the_best_of_its_rank_and_every_clients_too(scaling):
    """ΔW's own SVD, dense: truncated where it says so, σ and not its root, scaled back."""
    method, state = started(FlexLoRA, r=3, client_ranks=(1, 2, 3), scaling=scaling)
    updates = [update_of(method, state, i) for i in range(5)]
    exact = mean_product(method, state, updates, scales_of(method, state, updates))
    after, metrics = method.aggregate(state, iter(updates), 0)
    best, spectra = {}, {}
    for m, delta in exact.items():
        U, S, Vh = torch.linalg.svd(delta)
        best[m] = {r: (U[:, :r] * S[:r]) @ Vh[:r] for r in (1, 2, 3)}
        spectra[m] = S
    close(whole(method, after), {m: best[m][3] for m in exact})
    for m, delta in whole(method, after).items():
        assert torch.linalg.matrix_rank(delta, rtol=1e-5) == 3, m
    lost = sum(float(S[3:].square().sum()) for S in spectra.values()) ** 0.5
    assert metrics["agg_noise"] == pytest.approx(lost, rel=1e-4)
    assert metrics["init_noise_function"] == 0
    for client in range(6):
        rank = client_rank(client, (1, 2, 3), method.run)
        sent = method.downlink(after, client, 1).tensors
        scale = method.local(after, None, client, 1).scale or method.scale
        assert scale == pytest.approx(12.0 / (rank if scaling == "rank" else 3))
        mine = {m: scale * (p.B.double() @ p.A.double()) for m, p in pairs(sent).items()}
        assert all(p.A.shape[0] == rank for p in pairs(sent).values())
        close(mine, {m: best[m][rank] for m in exact})
        for pair in pairs(sent).values():  # singular values are B's
            torch.testing.assert_close(pair.A @ pair.A.T, torch.eye(rank), atol=1e-5, rtol=0)
    again = [update_of(method, after, i, round=1) for i in (1, 4)]
    _, metrics = method.aggregate(after, again, 1)
    left = []
    for u in again:
        rank = client_rank(u.client, (1, 2, 3), method.run)
        left.append(sum(float(S[rank:3].square().sum()) for S in spectra.values()) ** 0.5)
    assert metrics["init_noise_function"] == pytest.approx(sum(left) / 2, rel=1e-4, abs=1e-5)


def test_flexlora_and_fedsvd_keep_seeded_rows_for_directions_that_are_missing():
    """A zero update must not leave A and B both zero, which would never train again."""
    for cls in (FlexLoRA, FedSVD):
        method, state = started(cls)
        updates = [update_of(method, state, i) for i in COHORT]
        for u in updates:
            for name, value in u.payload.tensors.items():
                if ".lora_B." in name:
                    value.zero_()
        after, _ = method.aggregate(state, updates, 0)
        first, left = ({**s.server, **s.tensors} for s in (state, after))
        for B, A in pair_names(n for n in first if n != HEAD).values():
            assert not left[B].any()
            assert torch.equal(left[A], first[A])


def test_fedsvd_turns_a_into_orthonormal_rows_without_changing_the_product():
    method, state = started(FedSVD)
    updates = [update_of(method, state, i) for i in COHORT]
    after, metrics = method.aggregate(state, updates, 0)
    close(whole(method, after), mean_product(method, state, updates))
    for m, pair in pairs(everything(method, after)).items():
        eye = torch.eye(4)
        torch.testing.assert_close(pair.A @ pair.A.T, eye, atol=1e-5, rtol=0, msg=m)
    assert metrics["agg_noise"] < 1e-5 * norm(whole(method, after).values())
    assert set(method.local(after, None, 0, 1).trainable) == set(after.tensors)
    assert not any(".lora_A." in n for n in after.tensors)


# -- FedSA-LoRA and FFA-LoRA: what stays where it is -----------------------------------------------


def test_fedsas_server_never_sees_b_or_the_head():
    from fastrank.federated.methods.base import LocalResult

    method, state = started(FedSALoRA)
    plan = method.local(state, None, 3, 0)
    assert len(plan.trainable) == len(plan.learning_rates) == 7
    assert sorted(plan.start) == sorted(n for n in plan.trainable if ".lora_A." not in n)
    assert all(not v.any() for n, v in plan.start.items() if ".lora_B." in n)
    own = {n: torch.full_like({**state.server, **state.tensors}[n], 3.0) for n in plan.trainable}
    payload, keeps = method.uplink(LocalResult(3, 0, own, 4, 1, 0.0))
    assert payload.tensors
    assert all(".lora_A." in n for n in payload.tensors)
    assert sorted(keeps) == sorted(plan.start)
    assert set(method.uplink_spec(state, 3, 0)) == set(payload.tensors)
    assert set(method.downlink(state, 3, 1).tensors) == set(payload.tensors)
    assert all(torch.equal(v, keeps[n]) for n, v in method.local(state, keeps, 3, 1).start.items())
    updates = [update_of(method, state, i) for i in COHORT]
    after, _ = method.aggregate(state, updates, 0)
    for name, value in after.server.items():  # still the seed's
        assert torch.equal(value, state.server[name])
    (view,) = method.personal(after, {3: keeps})
    assert view.keys() == own.keys()
    assert all(torch.equal(view[n], after.tensors[n]) for n in after.tensors)
    assert all((view[n] == 3).all() for n in keeps)
    assert method.trainable_params(state) == sum(v.numel() for v in own.values())


def test_ffas_a_never_crosses_the_network():
    method, state = started(FFALoRA)
    names = {*state.tensors, *method.downlink(state, 0, 1).tensors}
    names |= set(method.local(state, None, 0, 0).trainable) | set(method.uplink_spec(state, 0, 0))
    assert names == set(state.tensors)
    assert not any(".lora_A." in n for n in names)


# -- bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "e"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.name)
def test_payload_bytes_equal_the_table(cls, dtype, e):
    """Up and down of every client, after a round in which nothing of the base was missed."""
    mixed = cls in (HetLoRA, FlexLoRA, FLoRA)
    options = {"client_ranks": MIXED} if mixed else {}
    method, state = started(cls, wire_dtype=dtype, **options)
    updates = [update_of(method, state, i) for i in COHORT]
    state, _ = method.aggregate(state, updates, 0)
    sum_N, sum_K = (sum(shape[side] for shape in SHAPES.values()) for side in (0, 1))
    P, D, H = sum_N + sum_K, sum(N * K for N, K in SHAPES.values()), 15
    for client in range(6):
        r = client_rank(client, MIXED, method.run) if mixed else 4
        up = {FFALoRA: r * sum_N + H, FedSVD: r * sum_N + H, FedSALoRA: r * sum_K}
        stack = sum(client_rank(i, MIXED, method.run) for i in COHORT) if mixed else 4 * 3
        down = {
            FFALoRA: r * sum_N + H,
            FedSALoRA: r * sum_K,
            FLoRA: min(stack * P, D) + H,
            FedExLoRA: r * P + min(stack * P, D) + H,
        }
        assert method.downlink(state, client, 1).payload_bytes == e * down.get(cls, r * P + H)
        sent = update_of(method, state, client, round=1).payload
        assert sent.payload_bytes == e * up.get(cls, r * P + H)


def test_ledger_oracle_of_the_heterogeneous_recipe():
    """RoBERTa-large, q and v of 24 layers, 20 clients: MB a client and round (one layer x 24)."""
    shapes, ranks = {"l.q": (1024, 1024), "l.v": (1024, 1024)}, (8, 16, 32, 64)
    down = {}
    for cls in (HetLoRA, FlexLoRA, FLoRA):
        method, state = started(cls, shapes=shapes, clients=20, client_ranks=ranks, r=64)
        if cls is FLoRA:
            updates = [update_of(method, state, i) for i in range(20)]
            state, _ = method.aggregate(state, updates, 0)
            stack = sum(u.payload.payload_bytes - 60 for u in updates)
            assert round(24 * stack / 1e6, 1) == 235.9
        sizes = {method.downlink(state, i, 1).payload_bytes - 60 for i in range(20)}
        down[cls] = sorted(round(24 * size / 1e6, 2) for size in sizes)
    assert down == {
        HetLoRA: [3.15, 6.29, 12.58, 25.17],
        FlexLoRA: [3.15, 6.29, 12.58, 25.17],
        FLoRA: [201.33],
    }


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (HetLoRA, {"gamma": 0.0}, "gamma must be above 0 and at most 1"),
        (HetLoRA, {"lam": -1.0}, "lam must be at least 0"),
        (HetLoRA, {"min_rank": 9}, "min_rank must be from 1 to r = 8"),
        (HetLoRA, {"client_ranks": (4, 16)}, "client_ranks holds 16, above r = 8"),
        (FlexLoRA, {"client_ranks": ()}, "client_ranks must be a list of ranks"),
        (FlexLoRA, {"client_ranks": (0, 4)}, "client_ranks must be a list of ranks"),
        (FlexLoRA, {"scaling": "local"}, "scaling must be one of global, rank"),
        (FLoRA, {"catch_up": "never"}, "catch_up must be one of charge, ignore"),
        (FedExLoRA, {"catch_up": "never"}, "catch_up must be one of charge, ignore"),
        (FeDeRA, {"svd_split": "A"}, "svd_split must be one of balanced, B"),
        (FedIT, {"weighting": "norm"}, "weighting must be one of samples, uniform"),
        (HetLoRA, {"weighting": "size"}, "weighting must be one of norm, samples, uniform"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(cls, options, words):
    with pytest.raises(UsageError, match=words):
        cls(**options)


@pytest.mark.parametrize("cls", [FlexLoRA, FedSVD], ids=lambda cls: cls.name)
def test_ranks_beyond_a_matrix_are_refused(cls):
    with pytest.raises(UsageError, match=r"r must be from 1 to 4, the singular values of net.1.up"):
        started(cls, r=5)


def test_no_option_of_a_method_hides_one_of_the_run():
    """Both are given side by side, on the command line and in files."""
    from fastrank.federated.config import Config, method_options
    from fastrank.federated.methods import METHODS

    taken = {f.name for f in dataclasses.fields(Config)}
    assert not {(n, o) for n, cls in METHODS.items() for o in method_options(cls) if o in taken}
