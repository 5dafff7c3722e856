"""`fastrank bench simulate` on tiny models: its rows, its gate, its plan, its command line."""

import importlib.util
import json
import logging
import time
from dataclasses import asdict

import pytest
import torch

from fastrank import cli
from fastrank.bench import (
    gpu_steps,
    harness,
    simulate,
    simulate_cases,
    simulate_flower,
    simulate_memory,
    simulate_profile,
    timing,
)
from fastrank.bench.results_file import Results, check_row
from fastrank.bench.simulate_cases import Job, SimCase
from fastrank.bench.simulate_cell import PerStep, RoundCell
from fastrank.bench.simulate_rounds import Contest, Judge, WrongResult, in_float64
from fastrank.layers.fused import FusedLayer

CPU = torch.device("cpu")
TINY = SimCase("encoder-1x32", 3, 2, 8, local_steps=2)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "quick.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate_flower, "why_not", lambda: simulate_flower.NOT_INSTALLED)
        words = f"bench simulate --quick --threads 1 --seconds 0.1 --out {path}"
        status = cli.main(words.split())
    return status, json.loads(path.read_text())


@pytest.fixture(scope="module")
def contest():
    return Contest(Job(TINY, CPU))


@pytest.fixture(scope="module")
def judge(contest):
    return Judge(contest)


def by(rows, mode="full"):
    return {(r["case"]["name"], r["variant"], r["baseline"]): r for r in rows if r["mode"] == mode}


def test_quick_grid_has_every_comparison_of_every_case(quick):
    status, content = quick
    assert status == 0
    cases = simulate_cases.cases(CPU, quick=True)
    assert list(by(content["rows"])) == [(c.name, *pair) for c in cases for pair in simulate.PAIRS]
    for row in by(content["rows"]).values():
        check_row(row)
        assert "skipped" not in row
        assert row["bench"] == "simulate"
        assert row["q20_s"] <= row["median_s"] <= row["q80_s"]
        assert row["speedup"] == pytest.approx(row["baseline_median_s"] / row["median_s"])
        assert row["peak_bytes"] > 0
        assert row["baseline_peak_bytes"] > 0
        assert 0 < row["error"] < 2e-3
        assert 0 < row["baseline_error"] < 2e-3
        assert row["base_bytes"] > 10_000
        ours = row["variant"] == "fastrank"
        assert row["executor"] == ("client-parallel" if ours else "sequential")
        assert row["clients_in_parallel"] == (row["case"]["clients"] if ours else 1)


def test_flower_that_is_not_installed_leaves_its_reason(quick):
    for app in ("flower-ray", "flower-ray-examples"):
        row = by(quick[1]["rows"], "round")["encoder-1x32-4x2x8", "fastrank", app]
        check_row(row)
        assert row["skipped"] == "flwr is not installed (pip install 'fastrank[flower]')"
        if importlib.util.find_spec("flwr") is None:
            assert simulate_flower.why_not() == row["skipped"]


def test_a_failure_of_flowers_process_is_a_failed_row(monkeypatch, capsys):
    def broken(case, start, rounds, app):
        raise RuntimeError("no ray today\nsecond line")

    monkeypatch.setattr(simulate_flower, "why_not", lambda: None)
    monkeypatch.setattr(simulate_flower, "_by_flower", broken)
    results = Results(None, {"device": "-"})
    simulate_flower.measure(True, results)
    assert [row["skipped"] for row in results.rows] == [
        f"{app}: failed: RuntimeError: no ray today" for app in simulate_flower.BASELINES
    ]


def test_flower_is_timed_only_where_the_averages_agree(monkeypatch, capsys):
    def scripted(factor):
        def by_flower(case, start, rounds, app):
            ours = simulate_flower._by_fastrank(case, 1)[1]
            moved = {name: start[name] + factor * (ours[name] - start[name]) for name in ours}
            return moved, [2.0] * (rounds - 1)

        return by_flower

    monkeypatch.setattr(simulate_flower, "why_not", lambda: None)
    monkeypatch.setattr(simulate_flower, "_by_flower", scripted(1.0))
    found, executor = simulate_flower.measure_case(TINY, 3)
    assert executor == "client-parallel"
    assert all(found[app].timing.median_s == 2.0 for app in simulate_flower.BASELINES)
    assert found["fastrank"].timing.samples == 2
    monkeypatch.setattr(simulate_flower, "_by_flower", scripted(1.01))
    found, _ = simulate_flower.measure_case(TINY, 3)
    for app in simulate_flower.BASELINES:
        assert "WrongResult: averages are 0.01 apart" in found[app].skipped


def test_a_model_built_for_a_message_trains_as_the_kept_one(tmp_path):
    job = Job(TINY, torch.device("cpu"))
    job.base().save_pretrained(tmp_path)
    start = job.resident()[1].tensors
    case = json.dumps(asdict(TINY))
    built = simulate_flower._built(case, str(tmp_path), 1)
    assert list(built.batches) == [1]
    kept = simulate_flower._kept(case).train(1, start)
    found = built.train(1, start)
    assert all(torch.equal(found[name], kept[name]) for name in kept)
    assert any(not torch.equal(found[name], start[name]) for name in kept)


def test_the_gate_passes_every_engine(contest, judge):
    rounds = {name: contest.executor(name, steps=judge.steps) for name in ("auto", "sequential")}
    assert [simulate.executor_name(e) for e in rounds.values()] == ["client-parallel", "sequential"]
    for executor in rounds.values():
        assert 0 < judge.check(contest.by(executor)()) < 1e-3
    assert 0 < judge.baseline_error < 1e-3


@pytest.mark.parametrize("spoiled", ["one client", "a bias", "the wrong client", "a NaN"])
def test_the_gate_fails_when_one_side_is_spoiled(contest, judge, spoiled):
    found = contest.by(contest.executor("auto", steps=judge.steps))()
    start = contest.state.tensors
    if spoiled == "one client":
        name = contest.resident.lora_names()[0]
        found[1][name] = found[1][name] + 0.1 * (found[1][name] - start[name])
    elif spoiled == "a bias":  # 20 of 8,000 numbers
        name = next(n for n in start if n.endswith("classifier.modules_to_save.default.bias"))
        found[2][name] = start[name]
    elif spoiled == "the wrong client":
        found[0], found[1] = found[1], found[0]
    else:
        found[0][next(iter(start))].view(-1)[0] = float("nan")
    with pytest.raises(WrongResult, match="off PEFT's"):
        judge.check(found)


def test_a_spoiled_variant_leaves_its_reason_and_the_others_their_rows(monkeypatch, capsys):
    def lazy(contest, steps):
        return lambda: {client: dict(contest.state.tensors) for client in contest.job.clients}

    builders = {**simulate.BUILDERS, "fastrank": lazy}
    cell = RoundCell(TINY, builders, CPU)
    cell.prepare()
    found = cell.measure("full", timing.clock_for(CPU), 0.0)
    rows = harness.rows("simulate", TINY.as_dict(), "full", found, simulate.PAIRS)
    reasons = [row.get("skipped", "") for row in rows]
    assert reasons[0].startswith("fastrank: failed: WrongResult: updates are 1 off PEFT's")
    assert reasons[2] == ""


def test_what_falls_back_is_not_measured_as_client_parallel(contest, caplog):
    executor = contest.executor("client-parallel")
    executor._round_reason = lambda exchange: "for a test"
    with caplog.at_level(logging.ERROR), pytest.raises(RuntimeError, match="one after another"):
        contest.by(executor)()


def test_the_baseline_is_stock_peft(contest):
    from peft.tuners.lora import Linear

    assert not any(isinstance(m, FusedLayer) for m in contest.peft.model.modules())
    stock = [m for m in contest.peft.model.modules() if isinstance(m, Linear)]
    ours = [m for m in contest.resident.model.modules() if isinstance(m, FusedLayer)]
    assert len(stock) == len(ours) == 6
    assert all(type(m) is Linear for m in stock)


def test_float64_and_back_leaves_every_bit(contest):
    model = contest.peft.model
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with in_float64(model):
        assert all(p.dtype == torch.float64 for p in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in before.items())


def test_a_16_bit_base_is_judged_by_its_own_error():
    contest = Contest(Job(SimCase("encoder-1x32", 2, 2, 8, "bfloat16", local_steps=1), CPU))
    judge = Judge(contest)
    assert 1e-3 < judge.baseline_error < 0.5
    found = contest.by(contest.executor("auto", steps=judge.steps))()
    judge.check(found)
    found[1] = found[0]
    with pytest.raises(WrongResult, match="off float64's"):
        judge.check(found)


def test_a_time_is_that_of_one_step():
    class Clock:
        def seconds(self, step, calls):
            return 3.0

    assert PerStep(Clock(), 10).seconds(lambda: None, 2) == pytest.approx(0.3)


def test_the_grids():
    cpu = [case.name for case in simulate_cases.cases(CPU, quick=False)]
    assert cpu[:2] == ["encoder-6x384-8x4x32", "encoder-2x128-16x4x16"]
    assert set(cpu[2:]) == {
        "encoder-2x128-8x4x32",
        "encoder-2x128-8x4x16",
        "encoder-6x384-8x32x32",
        "encoder-6x384-4x16x128",
        "encoder-6x384-4x8x64",
        "llama-4x256-8x4x32",
    }
    gpu = simulate_cases.cases(torch.device("cuda"), quick=False)
    assert [case.name for case in gpu] == [
        "encoder-12x768-32x4x128-bf16",
        "llama-16x2048-8x4x256-bf16",
    ]
    assert simulate.GOALS.keys() == {*cpu[:2], *(case.name for case in gpu)}


def test_memory_grows_with_clients_in_parallel_and_the_base_does_not(monkeypatch, capsys):
    case = SimCase("encoder-1x32", 4, 2, 8, local_steps=1)
    monkeypatch.setattr(simulate_memory, "TOGETHER", (1, 4))
    monkeypatch.setattr(simulate_memory, "cases", lambda device, quick: [case])
    results = Results(None, {"device": "-"})
    for _ in range(2):  # the second time it is all there
        simulate_memory.measure(CPU, True, results, 0.0)
    one, four = results.rows
    for row in (one, four):
        check_row(row)
        assert row["mode"] == "memory"
    assert [r["case"]["clients_in_parallel"] for r in (one, four)] == [1, 4]
    assert one["base_bytes"] == four["base_bytes"]
    assert one["peak_bytes"] < four["peak_bytes"] < 4 * one["peak_bytes"]


def test_the_profile_adds_up_to_the_step(monkeypatch):
    monkeypatch.setattr(simulate_profile, "_ROUNDS", 1)
    rows = simulate_profile.profile_case(TINY, CPU)
    for row in rows:
        check_row(row)
        assert row["executor"] == "client-parallel"
    shares = {row["variant"]: row["share"] for row in rows}
    assert tuple(shares) == simulate_profile.KINDS
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-3)
    assert all(share > 1e-4 for share in shares.values())


def test_the_profiles_names_are_taken_back():
    from fastrank.federated.stacked_optimizer import StackedOptimizer
    from fastrank.kernels.common import products

    places = [(products, "linear"), (products, "mm"), (StackedOptimizer, "step")]
    before = [getattr(owner, name) for owner, name in places]
    with simulate_profile._scopes(8):
        assert products.linear is not before[0]
    assert [getattr(owner, name) for owner, name in places] == before


def test_nothing_is_begun_after_the_deadline_and_what_is_done_stays(tmp_path, capsys):
    where = {"device": "-", "threads": 1, "torch": "", "peft": "", "fastrank": ""}
    results = Results(None, where)
    assert not simulate.measure_cases([TINY], CPU, results, 0.1, deadline=0.0)
    assert results.rows == []
    setting = gpu_steps.Setting("cpu", 100.0)
    assert gpu_steps.STEPS["simulate"](tmp_path, setting, time.monotonic() - 1) is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--threads 0", "--threads is 0"),
        ("--seconds -1", "--seconds is -1.0"),
        ("--memory --profile", "one at a time"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert cli.main(["bench", "simulate", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
