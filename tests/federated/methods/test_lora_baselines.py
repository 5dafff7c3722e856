"""LoRA baselines on the server: closed forms in dense float64, noise, bytes, known bugs.

Each listed bug of a public re-implementation (FederatedScope, FederatedLLM, FedLLM-Factory,
Fed-HeLLo) fails one of these tests.
"""

import dataclasses
import json

import pytest
import torch
from lora_cases import (
    HEAD,
    SHAPES,
    WIDE,
    close,
    everything,
    factors_of,
    mean_product,
    norm,
    product,
    started,
    update_of,
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
from fastrank.federated.methods import _base_change as base_change
from fastrank.federated.methods._factors import pair_names, pairs
from fastrank.federated.methods._ranks import client_rank
from fastrank.federated.wire import Payload

ALL = (FedIT, FFALoRA, FedSALoRA, HetLoRA, FlexLoRA, FLoRA, FedExLoRA, FedSVD)
COHORT = (0, 2, 3)  # of 6 clients; with i + 1 examples each
MIXED = (1, 2, 4)


def whole(method, state):
    """module -> what the global model adds to the first weights, dense float64."""
    if isinstance(method, FLoRA):
        return {m: c.double() for m, c in base_change.changes(state).items()}
    found = product(method, everything(method, state))
    if isinstance(method, FedExLoRA):
        found = {m: d + base_change.changes(state)[m] for m, d in found.items()}
    return found


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


# -- HetLoRA ---------------------------------------------------------------------------------------


def plain_het(**options):
    return started(HetLoRA, **{"weighting": "samples", "lam": 0.0, "prune": False, **options})


def test_hetlora_of_equal_ranks_without_its_ideas_is_fedit():
    method, state = plain_het()
    fedit, start = started(FedIT)
    updates = [update_of(method, state, i) for i in COHORT]
    ours, noted = method.aggregate(state, updates, 0)
    theirs, wanted = fedit.aggregate(start, updates, 0)
    for name, value in theirs.tensors.items():
        torch.testing.assert_close(ours.tensors[name], value, rtol=1e-6, atol=1e-6)
    assert noted["agg_noise"] == pytest.approx(wanted["agg_noise"], rel=1e-4)


def test_hetlora_pads_with_zeros():
    """Rank j is the sum over the clients that have it, divided by all clients' weights."""
    method, state = plain_het(client_ranks=MIXED)
    updates = [update_of(method, state, i) for i in range(6)]
    after, _ = method.aggregate(state, updates, 0)
    total = sum(u.num_examples for u in updates)
    for m, mean in pairs(everything(method, after)).items():
        B, A = torch.zeros(mean.B.shape).double(), torch.zeros(mean.A.shape).double()
        for u in updates:
            rank = client_rank(u.client, MIXED, method.run)
            own_B, own_A = factors_of(u, method, state)[m]
            assert own_B.shape[1] == rank
            B[:, :rank] += u.num_examples / total * own_B
            A[:rank] += u.num_examples / total * own_A
        torch.testing.assert_close(mean.B, B.float())
        torch.testing.assert_close(mean.A, A.float())
        assert mean.B[:, 2:].any()  # the tail is there: some client has rank 4


def test_hetlora_keeps_ranks_that_no_client_of_the_round_has():
    """Zeros in A and B at once would be dead for good."""
    method, state = plain_het(client_ranks=(1, 4))
    low = [i for i in range(6) if client_rank(i, (1, 4), method.run) == 1]
    updates = [update_of(method, state, i) for i in low]
    after, _ = method.aggregate(state, updates, 0)
    for m, pair in pairs(everything(method, after)).items():
        before = pairs(everything(method, state))[m]
        assert torch.equal(pair.A[1:], before.A[1:])
        assert torch.equal(pair.B[:, 1:], before.B[:, 1:])
        assert not torch.equal(pair.A[:1], before.A[:1])


def test_hetlora_weighs_clients_by_the_norm_of_their_update():
    """‖B A‖_F of the update itself, all modules together; the head goes by samples."""
    method, state = plain_het(weighting="norm", client_ranks=MIXED)
    updates = [update_of(method, state, i) for i in COHORT]
    norms = [norm(B @ A for B, A in factors_of(u, method, state).values()) for u in updates]
    clients = [pairs({n: v for n, v in u.payload.tensors.items() if n != HEAD}) for u in updates]
    weights = method.weights(updates, clients)
    assert weights == pytest.approx([n / sum(norms) for n in norms], rel=1e-5)
    after, _ = method.aggregate(state, updates, 0)
    name = next(n for n in after.tensors if ".lora_B." in n)
    wanted = sum(w * u.payload.tensors[name][:, 0] for w, u in zip(weights, updates, strict=True))
    torch.testing.assert_close(after.tensors[name][:, 0], wanted)
    counts = [u.num_examples for u in updates]
    head = sum(c * u.payload.tensors[HEAD] for c, u in zip(counts, updates, strict=True))
    torch.testing.assert_close(after.tensors[HEAD], head / sum(counts))
    zero = {n: torch.zeros_like(v) for n, v in updates[0].payload.tensors.items()}
    still = [dataclasses.replace(u, payload=Payload(zero)) for u in updates]
    after, _ = method.aggregate(state, still, 0)
    assert all(torch.isfinite(v).all() for v in after.tensors.values())


@pytest.mark.parametrize(
    ("rank", "gamma", "start"),
    [(8, 0.99, 7), (50, 0.99, 49), (100, 0.99, 99), (1, 0.99, 0), (8, 1.0, 7), (8, 0.5, 4),
     (100, 0.29, 29)],
)  # fmt: skip
def test_hetloras_tail_is_never_empty(rank, gamma, start):
    from fastrank.federated.methods.hetlora import tail_start

    assert tail_start(rank, gamma) == start


def test_hetloras_penalty_is_the_tails_product():
    method, state = started(HetLoRA, r=8, lam=0.5, gamma=0.99, shapes=WIDE)
    plan = method.local(state, None, 0, 0)
    live = {
        n: torch.randn(v.shape, dtype=torch.float64).requires_grad_()
        for n, v in state.tensors.items()
    }
    value = plan.penalty(live)
    wanted = sum(
        0.5 * live[B][:, 7:].norm() * live[A][7:].norm()
        for B, A in pair_names(n for n in live if n != HEAD).values()
    )
    torch.testing.assert_close(value, wanted)
    assert value > 0
    value.backward()
    for name, p in live.items():
        if ".lora_A." in name:
            assert not p.grad[:7].any()
            assert p.grad[7:].any()
    # B = 0 at first: the norm's kink must not give NaN
    first = {n: v.clone().requires_grad_() for n, v in state.tensors.items()}
    plan.penalty(first).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in first.values())


def test_hetlora_prunes_a_tail_that_shrank_and_sends_less_from_then_on():
    method, state = started(
        HetLoRA, weighting="samples", client_ranks=(2, 4), gamma=0.5, min_rank=2
    )
    ranks = {i: client_rank(i, (2, 4), method.run) for i in range(6)}
    wide = [i for i, rank in ranks.items() if rank == 4]
    (narrow, *_) = [i for i, rank in ranks.items() if rank == 2]
    updates = [update_of(method, state, i) for i in (*wide[:2], narrow)]
    state, metrics = method.aggregate(state, updates, 0)
    assert metrics["pruned"] == 0  # tails grew from B = 0
    assert metrics["mean_client_rank"] == pytest.approx(10 / 3)
    before = {n: v.clone() for n, v in state.tensors.items()}

    updates = [update_of(method, state, i, round=1) for i in (*wide[:2], narrow)]
    for i, factor in ((0, 1e-3), (1, 1e3), (2, 1e-3)):
        for name, value in updates[i].payload.tensors.items():
            if ".lora_B." in name:
                value[:, value.shape[1] // 2 :] *= factor
    after, metrics = method.aggregate(state, updates, 1)
    assert metrics["pruned"] == 1  # the narrow client is at min_rank
    assert after.extra["ranks"] == {str(wide[0]): 2}
    expected_noise = norm(
        method.scale * (before[B][:, 2:].double() @ before[A][2:].double())
        for B, A in pair_names(n for n in before if n != HEAD).values()
    )
    assert metrics["init_noise_function"] == pytest.approx(expected_noise / 3, rel=1e-5)
    # what was dropped is out of the mean already
    total = sum(u.num_examples for u in updates)
    name = next(n for n in before if ".lora_B." in n)
    share = updates[1].num_examples / total
    wanted = share * updates[1].payload.tensors[name][:, 2:]
    torch.testing.assert_close(after.tensors[name][:, 2:], wanted)
    # and the client is smaller, after a checkpoint too
    after = dataclasses.replace(after, extra=json.loads(json.dumps(after.extra)))
    for client, rank in ((wide[0], 2), (wide[1], 4), (narrow, 2)):
        sent = method.downlink(after, client, 2).tensors
        spec = method.uplink_spec(after, client, 2)
        for B, A in pair_names(n for n in sent if n != HEAD).values():
            assert sent[A].shape[0] == sent[B].shape[1] == rank
            assert spec[A][0] == tuple(sent[A].shape)
            assert spec[B][0] == tuple(sent[B].shape)
            assert torch.equal(sent[A], after.tensors[A][:rank])
    never, start = started(HetLoRA, client_ranks=(2, 4), gamma=0.5, prune=False)
    for t in range(2):
        start, metrics = never.aggregate(start, updates[:1], t)
        assert metrics["pruned"] == 0


# -- FLoRA and FedEx-LoRA: the base changes --------------------------------------------------------


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
@pytest.mark.parametrize("cls", [*ALL, FeDeRA], ids=lambda cls: cls.name)
def test_payload_bytes_equal_the_table(cls, dtype, e):
    """Up and down of every client, after a round in which nothing of the base was missed."""
    mixed = cls in (HetLoRA, FlexLoRA, FLoRA)
    options = {"client_ranks": MIXED} if mixed else {}
    if cls is FeDeRA:  # as FedIT, whose state it shares but for the start
        cls = FedIT
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
    """RoBERTa-large, q and v: 3.15 / 6.29 / 12.58 / 25.17 MB by rank; FLoRA's stack is dense."""
    shapes = {f"roberta.{i}.{p}": (1024, 1024) for i in range(24) for p in "qv"}
    P, D = sum(map(sum, shapes.values())), sum(N * K for N, K in shapes.values())
    assert [round(4 * r * P / 1e6, 2) for r in (8, 16, 32, 64)] == [3.15, 6.29, 12.58, 25.17]
    assert round(4 * min(600 * P, D) / 1e6, 1) == 201.3
    assert round(4 * 600 * P / 1e6, 1) == 235.9


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
