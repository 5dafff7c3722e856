"""`fastrank bench lowrank` on the small grid: its rows, its errors, its command line."""

import functools
import json
import math

import bench_rows
import pytest
import torch

import fastrank.bench
from fastrank import cli
from fastrank.bench import grids, harness, lowrank, plan, rank_sweep, timing, train_step
from fastrank.bench.cases import Case, Operands, Unavailable
from fastrank.bench.results_file import Results, check_row
from fastrank.bench.variants import fastrank as fastrank_variant
from fastrank.errors import UsageError

CPU = torch.device("cpu")
SMALL = Case(32, 24, 40, 4, "float32")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "quick.json"
    few = functools.partial(timing.interleave, max_rounds=6)
    with pytest.MonkeyPatch.context() as patch:
        # time enough on the busiest machine, and few rounds on an idle one
        patch.setattr(timing, "interleave", few)
        status = cli.main(["bench", "lowrank", "--quick", "--seconds", "600", "--out", str(path)])
    return status, json.loads(path.read_text())


def test_quick_grid_has_every_comparison_of_every_case(quick):
    status, content = quick
    assert status == 0
    names = [case.name for case in grids.cases(CPU, quick=True)]
    assert len(names) == 10
    assert len(set(names)) == 10
    pairs = [("fastrank", "frozen"), ("fastrank", "peft"), ("peft", "frozen")]
    found = [(r["case"]["name"], r["variant"], r["baseline"]) for r in content["rows"]]
    assert found == [(name, *pair) for name in names for pair in pairs]


def test_rows_are_consistent(quick):
    for row in quick[1]["rows"]:
        check_row(row)
        assert "skipped" not in row
        assert row["q20_s"] <= row["median_s"] <= row["q80_s"]
        assert row["speedup"] == pytest.approx(row["baseline_median_s"] / row["median_s"])
        assert row["samples"] >= 5
        assert row["peak_bytes"] >= 2 * row["case"]["M"] * row["case"]["N"]  # y at least
        low, high = (1e-9, 1e-5) if row["case"]["dtype"] == "float32" else (1e-4, 2e-2)
        assert low < row["error"] < high
        assert low < row["baseline_error"] < high


def test_rows_of_a_case_come_from_one_run(quick):
    """The frozen and PEFT times that two rows of a case share are the same numbers."""
    by = {(r["case"]["name"], r["variant"], r["baseline"]): r for r in quick[1]["rows"]}
    for name in {key[0] for key in by}:
        over_frozen, over_peft = by[name, "fastrank", "frozen"], by[name, "fastrank", "peft"]
        peft = by[name, "peft", "frozen"]
        assert over_frozen["median_s"] == over_peft["median_s"]
        assert over_frozen["baseline_median_s"] == peft["baseline_median_s"]
        assert over_peft["baseline_median_s"] == peft["median_s"]


def test_saved_bytes_by_hand(quick):
    """fp32, no dropout: the base saves nothing new, fastrank S [M, R] alone."""
    for row in quick[1]["rows"]:
        case = row["case"]
        if case["dtype"] == "float32" and not case["dropout"] and row["variant"] == "fastrank":
            assert row["saved_bytes"] == 4 * case["M"] * case["R"]
            if row["baseline"] == "frozen":
                assert row["baseline_saved_bytes"] == 0


def test_environment(quick):
    environment = quick[1]["environment"]
    assert environment["device"]
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert {"triton", "peft", "transformers", "fastrank", "commit", "date"} <= environment.keys()


def test_the_full_grids():
    cpu = grids.cases(CPU, quick=False)
    assert len(cpu) == len({case.name for case in cpu}) == 148
    assert sum(case.precision == "peft" for case in cpu) == 144
    assert {case.precision for case in cpu[144:]} == {"autocast", "16-bit"}
    assert {case.M for case in cpu} == {128, 1024, 4096}
    assert {(case.K, case.N) for case in cpu} == {(384, 384), (768, 768), (768, 3072), (2048, 2048)}
    gpu = grids.cases(torch.device("cuda"), quick=False)
    assert len(gpu) == len({case.name for case in gpu})
    assert gpu[0].name == "M8192-K4096-N4096-R16-bf16-p0-autocast"
    assert {(case.M, case.R) for case in gpu} == {
        (M, R) for M in (2048, 8192, 32768) for R in (8, 16, 64)
    }
    assert {(4096, 14336), (14336, 4096)} <= {(case.K, case.N) for case in gpu}
    made = grids.builders(Case(1, 1, 1, 1, "bfloat16", precision="16-bit"), torch.device("cuda"))
    assert {"unsloth-schedule", "lorafusion-schedule"} <= made.keys()
    compiled = [c for c in gpu if "peft-compiled" in grids.builders(c, torch.device("cuda"))]
    assert {(c.precision, c.dropout) for c in compiled} == {
        (precision, p) for precision in ("peft", "autocast", "16-bit") for p in (0.0, 0.1)
    }
    assert len(compiled) == 6


def measured(builders, results, deadline=math.inf, monkeypatch=None):
    monkeypatch.setattr(grids, "builders", lambda case, device: builders)
    return lowrank.measure_cases([SMALL], CPU, results, 0.1, deadline)


def broken(case, operands):
    raise RuntimeError("broken on purpose\nsecond line")


def absent(case, operands):
    raise Unavailable("not on this machine")


def wrong(case, operands):
    step = fastrank_variant(case, operands)
    step.scale *= 2
    return step


@pytest.mark.parametrize(
    ("build", "reason", "bad"),
    [
        (broken, "peft: failed: RuntimeError: broken on purpose", 2),
        (absent, "peft: not on this machine", 0),
        (wrong, "peft: failed: WrongResult: relative error", 2),
    ],
)
def test_a_variant_that_cannot_run_leaves_its_reason(build, reason, bad, monkeypatch, capsys):
    results = Results(None, {"device": "-", "threads": 1, "torch": "", "peft": "", "fastrank": ""})
    builders = grids.builders(SMALL, CPU) | {"peft": build}
    assert measured(builders, results, monkeypatch=monkeypatch)
    by = {(row["variant"], row["baseline"]): row for row in results.rows}
    assert "skipped" not in by["fastrank", "frozen"]
    for pair in (("fastrank", "peft"), ("peft", "frozen")):
        assert by[pair]["skipped"].startswith(reason)
        assert "second line" not in by[pair]["skipped"]
    assert lowrank.failures(results.rows) == bad
    assert lowrank.summary(results.rows) == [f"2 rows skipped, {bad} of them failures"]


def test_a_graph_that_cannot_be_captured_leaves_the_eager_row(monkeypatch, capsys):
    cell = harness.Cell(SMALL, grids.builders(SMALL, CPU), CPU)
    cell.prepare()

    def captured(step, device):
        if step is cell.steps["peft"]:
            raise RuntimeError("not while capturing")
        return step

    monkeypatch.setattr(timing, "captured", captured)
    for mode in ("full-graph", "full"):
        found = cell.measure(mode, timing.clock_for(CPU), 0.1)
        rows = harness.rows("lowrank", SMALL.as_dict(), mode, found, grids.pairs(list(found)))
        reasons = [row.get("skipped") for row in rows]
        failed = "peft: failed: RuntimeError: not while capturing"
        assert reasons == ([None, failed, failed] if mode == "full-graph" else [None] * 3)


def test_a_failed_row_is_the_commands_status(monkeypatch, capsys):
    builders = grids.builders(SMALL, CPU) | {"fastrank": broken}
    monkeypatch.setattr(grids, "builders", lambda case, device: builders)
    monkeypatch.setattr(grids, "cases", lambda device, quick: [SMALL])
    assert cli.main(["bench", "lowrank", "--seconds", "0.1"]) == 1


def test_nothing_is_begun_after_the_deadline_and_what_is_done_stays(tmp_path, monkeypatch):
    environment = {"device": "-", "threads": 1, "torch": "", "peft": "", "fastrank": ""}
    path = tmp_path / "results.json"
    cases = [SMALL, Case(16, 24, 40, 4, "float32")]
    assert not lowrank.measure_cases(cases, CPU, Results(path, environment), 0.1, deadline=0.0)
    assert not path.exists()

    assert lowrank.measure_cases(cases[:1], CPU, Results(path, environment), 0.1)
    first = json.loads(path.read_text())["rows"]
    results = Results(path, environment, resume=True)
    assert lowrank.measure_cases(cases, CPU, results, 0.1)
    assert results.rows[: len(first)] == first
    assert [row["case"]["M"] for row in results.rows] == [32] * 3 + [16] * 3
    # all there: nothing is even built
    monkeypatch.setattr(harness, "Cell", None)
    assert lowrank.measure_cases(cases, CPU, results, 0.1)


def test_rank_sweep(tmp_path, capsys):
    path = tmp_path / "sweep.json"
    options = {"rank_sweep": True, "quick": True, "seconds": 1.0, "out": path}
    rows = fastrank.bench.run("lowrank", **options)["rows"]
    for dtype in ("float32", "bfloat16"):
        for kind in rank_sweep.KINDS:
            found = [r for r in rows if r["case"]["mask"] == kind and r["case"]["dtype"] == dtype]
            assert [r["case"]["active"] for r in found] == list(rank_sweep.POINTS)
            assert all(("skipped" in r) == kind.startswith("device") for r in found)
    timed = [r for r in rows if "skipped" not in r]
    assert {r["baseline"] for r in timed} == {"frozen"}
    limit = {"float32": 1e-5, "bfloat16": 2e-2}
    assert all(r["error"] < limit[r["case"]["dtype"]] for r in timed)
    pruned = [r for r in timed if r["case"]["active"] == 0]
    assert all(r["saved_bytes"] == 0 for r in pruned)
    assert "largest rise" in capsys.readouterr().out


def test_sweep_summary_names_the_largest_rise():
    rows = []
    for ranks, seconds in ((256, 4.0), (64, 2.0), (16, 2.5), (0, 1.0)):
        case = {"name": str(ranks), "dtype": "float32", "mask": "prefix", "active": ranks}
        timed = harness.Measured(timing.Timing(seconds, seconds, seconds, 3))
        frozen = harness.Measured(timing.Timing(1.0, 1.0, 1.0, 3))
        found = {"fastrank": timed, "frozen": frozen}
        rows += harness.rows("lowrank", case, "full", found, [("fastrank", "frozen")])
    (line,) = rank_sweep.summary(rows)
    assert "4000 ms at 256 ranks, 1000 at 0" in line
    assert "largest rise 25.0%" in line


def test_time_is_shared_by_weight_and_what_is_left_is_passed_on(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(plan.time, "monotonic", lambda: now[0])
    budget = plan.Budget(60.0, [1.0, 2.0, 3.0])
    assert budget.next() == pytest.approx(10.0)
    now[0] += 2.0  # instead of 10
    assert budget.next() == pytest.approx(58.0 * 2 / 5)
    now[0] += 100.0
    assert budget.next() == 0.0


def test_larger_cases_are_worth_more():
    cases = [Case(64, 64, 64, 4, "float32"), Case(4096, 2048, 2048, 4, "float32")]
    small, large = plan.seconds_per_round(cases, CPU)
    assert 0 < 100 * small < large
    weights = plan.weights([small, large])
    assert weights[0] < weights[1]
    assert plan.least([small, large]) == pytest.approx(10 * (small + large))


def test_memory_is_of_one_step(quick):
    """An fp32 layer's peak: y, dx and both gradients, plus the branch's temporaries."""
    from fastrank.bench import memory

    step = fastrank_variant(SMALL, Operands.of(SMALL, CPU))
    step()
    step.clear()
    first = memory.measure(step, step.held(), CPU)
    step.clear()
    assert memory.measure(step, step.held(), CPU) == first
    outputs = 4 * (SMALL.M * SMALL.K + SMALL.R * (SMALL.K + SMALL.N))
    assert outputs <= first.peak_bytes <= 20 * outputs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("bench lowrank --threads 0", "--threads is 0"),
        ("bench lowrank --seconds -1", "--seconds is -1.0"),
        ("bench lowrank --out nowhere/x.json", "nowhere is no folder"),
        ("bench lowrank --device tpu", "invalid choice"),
        ("bench nothing", "invalid choice: 'nothing'"),
        ("bench train-step --shape huge", "invalid choice"),
        ("bench train-step --batch 0", "batch is 0"),
        ("bench train-step --dropout 1", "dropout is 1.0"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize("name", ["lowrank", "train-step"])
def test_no_gpu_is_an_error_that_says_what_to_do(name, capsys):
    assert cli.main(["bench", name, "--device", "cuda"]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_python_options_are_checked():
    with pytest.raises(UsageError, match="no benchmark is called 'x'"):
        fastrank.bench.run("x")
    with pytest.raises(UsageError, match="lowrank has no option speed"):
        fastrank.bench.run("lowrank", speed=3)
    with pytest.raises(UsageError, match="device is 'tpu'"):
        fastrank.bench.run("lowrank", device="tpu")


def test_train_step_on_the_tiny_shape(capsys):
    content = fastrank.bench.run("train-step", quick=True, sequence=16, seconds=0.5)
    by = {row["baseline"]: row for row in content["rows"]}
    assert by["peft"]["variant"] == "fastrank"
    assert by["peft"]["peak_bytes"] > 0
    assert by["unsloth"]["skipped"].startswith("unsloth: ")
    assert by["liger+peft"]["skipped"].startswith("liger+peft: ")
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = [words for words in table if len(words) == 5]
    losses = {words[0]: float(words[-1]) for words in table if words[0] in ("peft", "fastrank")}
    # the second one starts where two steps of the first have led
    assert losses["peft"] == pytest.approx(losses["fastrank"], abs=1e-2)


@pytest.mark.parametrize("precision", ["autocast", "16-bit", "peft"])
def test_train_steps_gradients_are_judged(precision):
    case = train_step.Case("tiny", 4, 16, 2, 0.1, precision)
    steps, found = train_step.variants(case, CPU)
    train_step.judge(steps, found)
    assert 0 < found["fastrank"].error < train_step.WRONG / 2
    assert steps.keys() == {"peft", "fastrank"}
    assert steps["fastrank"].model.training


@pytest.mark.parametrize("spoiled", ["scale", "a layer", "PEFT"])
def test_a_wrong_train_step_is_not_timed(spoiled, monkeypatch, capsys):
    right = train_step.TrainStep.gradients

    def gradients(step):
        found = right(step)
        if spoiled == "PEFT":
            raise RuntimeError("no PEFT today")
        if step.prepare.__name__ == "patch":
            wrong = found if spoiled == "scale" else found[:6]
            for gradient in wrong:
                gradient *= 2 if spoiled == "scale" else 0
        return found

    monkeypatch.setattr(train_step.TrainStep, "gradients", gradients)
    content = fastrank.bench.run("train-step", quick=True, sequence=16, seconds=0.1)
    by = {row["baseline"]: row for row in content["rows"]}
    words = "RuntimeError: no PEFT" if spoiled == "PEFT" else "WrongResult: gradients are"
    assert by["peft"]["skipped"].startswith(f"fastrank: failed: {words}")
    assert lowrank.failures(content["rows"])


def test_train_step_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    path = tmp_path / "steps.json"
    options = {"quick": True, "sequence": 16, "seconds": 0.1, "out": path}
    first = fastrank.bench.run("train-step", **options)
    monkeypatch.setattr(train_step, "measure", None)
    assert fastrank.bench.run("train-step", **options, resume=True)["rows"] == first["rows"]


def test_all_runs_the_others_into_one_file(tmp_path, monkeypatch):
    given = []
    for name, module in fastrank.bench.BENCHES.items():
        if name != "all":
            made = {"rows": [bench_rows.row(name, bench=name)]}
            run = lambda made=made, **options: given.append(options) or made  # noqa: E731
            monkeypatch.setattr(f"{module}.run", run)
    path = tmp_path / "all.json"
    content = fastrank.bench.run("all", quick=True, out=path)
    names = [name for name in fastrank.bench.BENCHES if name != "all"]
    assert [row["bench"] for row in content["rows"]] == names
    assert json.loads(path.read_text()) == content
    assert all(options["quick"] and options["device"] == "cpu" for options in given)
    assert all(options["out"] is None for options in given)
