"""Clients that fail, are late or raise: what the others' round comes to, and what is counted."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from staged_runs import Stop, StopAfter, assert_equal, prepared, recorded, run, values

from fastrank.errors import UsageError
from fastrank.federated import Simulation
from fastrank.federated.conditions import Conditions
from fastrank.federated.config import resolve
from fastrank.federated.exchange import ClientError
from fastrank.federated.local import LocalOptions
from fastrank.federated.methods import METHODS, FedIT
from fastrank.federated.parallel import ClientParallel
from fastrank.federated.participation import DROPPED_OUT, Fate, Participation, planned_steps


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    from fastrank.federated import rundir

    monkeypatch.setattr(rundir, "_draw_curve", lambda rows, path, title: False)


# -- who reports back -----------------------------------------------------------------------------


def test_deadline_by_hand():
    steps = {3: 4, 5: 4, 7: 9, 8: 0}  # the median of those with examples is 4
    at = Participation(seed=0, deadline=1.5)
    assert at.fates(0, steps) == {
        7: Fate("late: it needs 2.25 times the median, the deadline is 1.5")
    }
    partial = dataclasses.replace(at, on_deadline="partial")
    assert partial.fates(0, steps) == {7: Fate(max_steps=6)}
    assert dataclasses.replace(at, deadline=2.25).fates(0, steps) == {}
    assert Participation(seed=0).fates(0, steps) == {}


def test_stragglers_by_hand():
    at = Participation(seed=0, straggler_rate=1.0, straggler_slowdown=5.0, deadline=0.5)
    assert set(at.fates(0, {1: 4, 2: 4})) == {1, 2}  # all are slow: time is the cohort's own
    partial = dataclasses.replace(at, on_deadline="partial")
    assert partial.fates(0, {1: 4, 2: 4}) == {1: Fate(max_steps=2), 2: Fate(max_steps=2)}
    # not even one step: late, whatever is done on a deadline
    assert partial.fates(0, {1: 1, 2: 1})[1].max_steps is None
    some = Participation(seed=1, straggler_rate=0.3, straggler_slowdown=3.0, deadline=2.0)
    steps = dict.fromkeys(range(400), 4)
    late = some.fates(7, steps)
    assert 90 < len(late) < 150
    assert set(late) == {c for c in steps if some.slowdown(7, c) == 3.0}


def test_drop_outs_are_a_pure_function_of_seed_round_and_client():
    at = Participation(seed=4, dropout_rate=0.25)
    out = {(t, c) for t in range(20) for c in range(100) if at.drops_out(t, c)}
    assert 430 < len(out) < 570
    again = Participation(seed=4, dropout_rate=0.25)
    assert out == {(t, c) for t in range(20) for c in range(100) if again.drops_out(t, c)}
    other = Participation(seed=5, dropout_rate=0.25)
    assert out != {(t, c) for t in range(20) for c in range(100) if other.drops_out(t, c)}
    more = Participation(seed=4, dropout_rate=0.5)
    assert all(more.drops_out(t, c) for t, c in out)
    assert at.fates(3, dict.fromkeys(range(100), 2)) == {
        c: Fate(DROPPED_OUT) for t, c in out if t == 3
    }


def test_planned_steps_are_those_that_are_taken():
    from fastrank.federated.cohort import make_batches

    for examples in (0, 1, 8, 9, 23):
        for options in (LocalOptions(batch_size=8, epochs=3), LocalOptions(max_steps=5)):
            taken = make_batches(
                np.ones(examples, dtype=int), options.batch_size, seed=0, round=0, client=0,
                epochs=options.epochs, max_steps=options.max_steps,
            ) if examples else []  # fmt: skip
            assert planned_steps(examples, options) == len(taken)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dropout_rate": 1.5}, "dropout_rate must be at most 1"),
        ({"straggler_rate": 0.2}, "without a deadline nobody is late"),
        ({"straggler_slowdown": 0.5, "deadline": 1}, "straggler_slowdown must be at least 1"),
        ({"deadline": 0}, "deadline must be above 0"),
        ({"on_deadline": "wait"}, "on_deadline must be one of drop, partial"),
        ({"method": "slora", "client_sampling": "poisson"}, "cohorts of a fixed size"),
    ],
)
def test_what_can_not_work_is_refused(given, words):
    with pytest.raises(UsageError, match=words):
        Conditions.check(*resolve(given))


# -- rounds with some of the cohort ---------------------------------------------------------------

SMALL = {"num_rounds": 4, "max_eval_examples": 8}
# one of each way to aggregate, and the stages
SHOWN = ("fedit", "fedsa-lora", "flora", "hetlora", "fed-plora", "fedara", "slora", "sa-fedlora")
OPTIONS = {
    "fedara": {"r": 4, "rank_target": 2.0, "final": 0.5},
    "adalora": {"r": 4, "rank_target": 2.0, "final": 0.5},
    "fed-plora": {"client_ranks": (1, 2)},
    "hetlora": {"client_ranks": (2, 4), "r": 4},
    "flora": {"client_ranks": (2, 4), "r": 4},
    "flexlora": {"client_ranks": (2, 4), "r": 4},
    "slora": {"stage1": 0.5, "r": 2, "density": 0.1},
    "sa-fedlora": {"initiating": 0.25, "rank_max": 4, "rank_min": 2},
}


def of(name):
    return {"method": name, **OPTIONS.get(name, {})}


def round_of(simulation, state, cohort, fates):
    """One round's new state, exchange and metrics, from these of the clients."""
    method = simulation.method
    method.arrange(simulation.model, state, 1)
    kept = {}
    exchange = dataclasses.replace(
        simulation.conditions.exchange(method, state, 1, kept, cohort), fates=fates
    )
    updates = list(simulation.executor.run(exchange, cohort))
    new, metrics = simulation.conditions.aggregate(method, state, updates, 1)
    return new, exchange, metrics


def assert_partial_is_whole_of_fewer(options, name):
    """Who is lost leaves no trace but its downlink's bytes."""
    simulation, state = prepared(options, **of(name))
    if simulation.method.switches(1):
        state, _ = simulation.method.switch(simulation.model, state, 1)
    whole, fewer, _ = round_of(simulation, state, [0, 3], {})
    partial, exchange, _ = round_of(simulation, state, [0, 2, 3], {2: Fate(DROPPED_OUT)})
    assert exchange.dropped == {2: DROPPED_OUT}
    assert whole.extra == partial.extra
    assert_equal(whole.tensors, partial.tensors)
    assert any(not torch.equal(v, state.tensors[n]) for n, v in whole.tensors.items())
    assert set(whole.server) == set(partial.server)
    assert exchange.traffic.bytes_up == fewer.traffic.bytes_up > 0
    assert exchange.traffic.bytes_down > fewer.traffic.bytes_down > 0
    assert 2 not in exchange.client_states


def assert_survives_rounds_without_anyone(options, name, folder):
    """No update in any round: the model stays, schedules and switches go on."""
    result = run({**options, **SMALL, **of(name)}, folder, dropout_rate=1.0)
    assert [row["dropped"] for row in result.rows] == [3] * 4
    assert [row["bytes_up"] for row in result.rows] == [0] * 4
    assert all(row["bytes_down"] > 0 for row in result.rows[1:])
    assert all(row["train_loss"] is None for row in result.rows)
    if name != "fedsa-lora":  # it is judged by the clients' own models, of which there is none
        assert result.summary["accuracy"] == pytest.approx(result.summary["initial_accuracy"])


@pytest.mark.parametrize("name", SHOWN)
def test_partial_cohorts(options, name):
    assert_partial_is_whole_of_fewer(options, name)


@pytest.mark.parametrize("name", ["fedara", "sa-fedlora", "slora"])
def test_empty_rounds(options, name, tmp_path):
    assert_survives_rounds_without_anyone(options, name, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_with_part_of_its_cohort_or_none(options, name, tmp_path):
    assert_partial_is_whole_of_fewer(options, name)
    assert_survives_rounds_without_anyone(options, name, tmp_path / "none")
    some = run({**options, **SMALL, **of(name)}, tmp_path / "some", dropout_rate=0.5)
    assert 0 < some.summary["dropped"] < 12
    if name in ("fedara", "adalora"):
        budgets = [line["budget"] for line in recorded(some.output_dir) if "budget" in line]
        assert budgets == sorted(budgets, reverse=True)


def test_a_run_with_faults_counts_them_and_resumes(options, tmp_path):
    options |= {"num_rounds": 3, "dropout_rate": 0.3, "straggler_rate": 0.4, "deadline": 1.5,
                "on_deadline": "partial", "local_steps": 4, "clients_per_round": 4}  # fmt: skip
    whole = run(options, tmp_path / "whole")
    simulation = Simulation(**{**options, "output_dir": str(tmp_path / "stopped")},
                            callbacks=[StopAfter(1)])  # fmt: skip
    with pytest.raises(Stop):
        simulation.run()
    resumed = Simulation.resume(tmp_path / "stopped")
    assert_equal(values(whole), values(resumed))
    assert recorded(tmp_path / "stopped") == recorded(tmp_path / "whole")
    lost = cut = 0
    for t, (row, line) in enumerate(zip(whole.rows, recorded(whole.output_dir), strict=True)):
        cohort = simulation.conditions.cohort(t)
        fates = simulation.conditions.participation.fates(t, dict.fromkeys(cohort, 4))
        gone = {str(c): fate.reason for c, fate in fates.items() if fate.reason}
        late = {str(c): fate.max_steps for c, fate in fates.items() if fate.max_steps}
        assert row["dropped"] == len(gone)
        assert line.get("drop_reasons", {}) == gone
        assert line.get("steps_cut", {}) == late
        lost, cut = lost + len(gone), cut + len(late)
    assert lost
    assert cut


@pytest.mark.parametrize("executor", ["sequential", "client-parallel"])
def test_late_clients_stop_in_time(options, executor):
    simulation, state = prepared(options, executor=executor, local_steps=4)
    exchange = dataclasses.replace(
        simulation.conditions.exchange(simulation.method, state, 0, {}, [0, 1, 2]),
        fates={1: Fate(max_steps=1)},
    )
    found = list(simulation.executor.run(exchange, [0, 1, 2]))
    assert [update.num_steps for update in found] == [4, 1, 4]
    assert exchange.dropped == {}
    if executor == "client-parallel":
        assert isinstance(simulation.executor, ClientParallel)
    short, begin = prepared(options, executor="sequential", local_steps=1)
    alone = short.conditions.exchange(short.method, begin, 0, {}, [1])
    (one,) = short.executor.run(alone, [1])
    for name, value in one.payload.tensors.items():
        torch.testing.assert_close(found[1].payload.tensors[name], value, rtol=1e-4, atol=2e-5)


# -- a client's exception -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Breaks(FedIT):
    """Clients whose work raises: ``at`` says where, 7 stands for every client."""

    at: str = "uplink"
    broken: int = 2

    def local(self, state, client_state, client, round):
        plan = super().local(state, client_state, client, round)
        if self.at == "local":
            self._maybe(client)
        elif self.at == "training" and client == self.broken:

            def penalty(parameters):
                raise ZeroDivisionError("no")

            return dataclasses.replace(plan, penalty=penalty)
        return plan

    def uplink(self, result):
        if self.at == "uplink":
            self._maybe(result.client)
        return super().uplink(result)

    def _maybe(self, client):
        if client == self.broken or self.broken == 7:
            raise ZeroDivisionError("no")


def broken_round(options, **made):
    config, _ = resolve({**options, "num_clients": 3, "num_rounds": 1, "local_steps": 1})
    simulation = Simulation(config, Breaks(**made))
    return simulation, simulation.run


@pytest.mark.parametrize("executor", ["sequential", "client-parallel"])
@pytest.mark.parametrize("at", ["local", "training", "uplink"])
def test_an_exception_costs_its_client_alone(options, at, executor, caplog):
    simulation, go = broken_round({**options, "executor": executor}, at=at)
    result = go()
    assert result.rows[0]["dropped"] == 1
    line = json.loads((result.output_dir / "metrics.jsonl").read_text())
    assert line["drop_reasons"] == {"2": "failed: ZeroDivisionError: no"}
    assert "round 1: client 2 dropped: failed: ZeroDivisionError: no" in caplog.text
    assert "Traceback" in caplog.text
    assert result.summary["accuracy"] is not None
    assert simulation.executor.name == {
        "sequential": "Sequential", "client-parallel": "ClientParallel"
    }[executor]  # fmt: skip


def test_an_exception_ends_the_run_where_that_is_wanted(options):
    _, go = broken_round({**options, "on_client_error": "raise"})
    with pytest.raises(ClientError, match="client 2 failed in round 1: ZeroDivisionError: no"):
        go()


def test_a_round_of_nothing_but_exceptions_ends_the_run(options):
    _, go = broken_round(options, broken=7)
    with pytest.raises(ClientError, match=r"client 0 failed in round 1: .* \(and so did 2 more\)"):
        go()


def test_the_one_client_left_may_fail_like_any_other():
    config, method = resolve({"num_clients": 4})
    conditions = Conditions(config, [np.arange(3)] * 4, LocalOptions())
    state = object()
    exchange = conditions.exchange(method, state, 0, {}, [0, 1, 2])
    exchange.dropped.update({0: DROPPED_OUT, 1: "failed: ValueError: no", 2: DROPPED_OUT})
    assert conditions.nobody(method, state, exchange) == (state, {})
    exchange.dropped[2] = "failed: ValueError: no"
    with pytest.raises(ClientError, match=r"client 1 failed in round 1: ValueError: no \(and so"):
        conditions.nobody(method, state, exchange)


def test_a_bad_option_is_no_clients_fault(options):
    @dataclasses.dataclass(frozen=True)
    class Misused(FedIT):
        def uplink(self, result):
            raise UsageError("that can't work")

    config, _ = resolve({**options, "num_rounds": 1})
    with pytest.raises(ClientError, match="that can't work"):
        Simulation(config, Misused()).run()


# -- cohorts by coins -----------------------------------------------------------------------------


def test_poisson_cohorts_are_what_independent_coins_give():
    config, _ = resolve({"client_sampling": "poisson", "num_clients": 30, "clients_per_round": 6})
    conditions = Conditions(config, [np.arange(3)] * 30, LocalOptions())
    cohorts = [conditions.cohort(t) for t in range(2000)]
    assert cohorts == [conditions.cohort(t) for t in range(2000)]
    sizes = np.array([len(cohort) for cohort in cohorts])
    assert abs(sizes.mean() - 6) < 0.25  # 30 p = 6, deviation 2.2 / sqrt(2000)
    assert abs(sizes.var() - 4.8) < 0.7  # 30 p (1 - p)
    share = np.bincount([c for cohort in cohorts for c in cohort], minlength=30) / 2000
    assert abs(share - 0.2).max() < 0.04
    assert all(cohort == sorted(set(cohort)) for cohort in cohorts)
    fixed = Conditions(dataclasses.replace(config, client_sampling="fixed"),
                       [np.arange(3)] * 30, LocalOptions())  # fmt: skip
    assert {len(fixed.cohort(t)) for t in range(50)} == {6}


def test_a_round_without_a_cohort(options, tmp_path):
    few = {"num_clients": 6, "clients_per_round": 1, "client_sampling": "poisson", "num_rounds": 3}
    config, _ = resolve({**options, **few})
    sizes = {}
    for seed in range(30):  # a seed with an empty round and one with clients
        conditions = Conditions(
            dataclasses.replace(config, seed=seed), [np.arange(3)] * 6, LocalOptions()
        )
        sizes[seed] = [len(conditions.cohort(t)) for t in range(3)]
    seed = next(s for s, n in sizes.items() if n[1] == 0 and n[0] + n[2] > 0)
    result = run(options, tmp_path / "run", seed=seed, **few)
    assert [row["clients"] for row in result.rows] == sizes[seed]
    assert result.rows[1]["bytes_down"] == result.rows[1]["bytes_up"] == 0
