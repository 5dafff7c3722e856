"""`fastrank bench svd` on small matrices: its rows, and results that are not what they claim."""

import importlib.util
import json
import sys
import time

import numpy
import pytest
import torch

from fastrank import cli
from fastrank.bench import gpu_steps, harness, svd, svd_cases, svd_merge, svd_peers, timing
from fastrank.bench.results_file import check_row
from fastrank.bench.svd_cases import SvdCase, SvdCell, builders
from fastrank.bench.svd_merge import BUILDERS, MergeCase, MergeCell

CPU = torch.device("cpu")
CASE = SvdCase("sparse", 2, 64, 64, 3)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "quick.json"
    words = f"bench svd --quick --threads 1 --seconds 0.2 --out {path}"
    return cli.main(words.split()), json.loads(path.read_text())["rows"]


def test_quick_grid_has_every_comparison_of_every_case(quick):
    status, rows = quick
    assert status == 0
    names = [case.name for case in svd_cases.cases(CPU, quick=True)]
    assert names == ["sparse-3x96-r4", "factored-3x96-q24-r4", "dense-2x96x64-r4"]
    wanted = [(name, b) for name in names for b in builders(CASE, CPU) if b != "fastrank"]
    wanted.append(("merge-tiny-3", "peft-merge"))
    assert [(r["case"]["name"], r["baseline"]) for r in rows] == wanted
    for row in rows:
        check_row(row)
        assert row["bench"] == "svd"
        assert row["variant"] == "fastrank"
        if "skipped" in row:  # a peer that isn't installed
            assert row["baseline"] in svd_peers.ON_CPU
            assert "not installed" in row["skipped"]
            continue
        assert row["speedup"] == pytest.approx(row["baseline_median_s"] / row["median_s"])
        assert row["error"] < 1e-3


def test_names_that_goals_rely_on():
    names = {case.name for case in [*svd_cases.cases(CPU, False), *svd_merge.cases(CPU, False)]}
    names |= {case.name for case in svd_cases.cases(torch.device("cuda"), False)}
    assert {case for case, _ in svd.GOALS} <= names
    assert {"sparse-24x768-r16", "factored-24x768-q160-r16", "merge-bert-base-10"} <= names


def test_summary_states_goals_and_misses():
    row = {"bench": "svd", "case": {"name": "sparse-24x768-r16"}, "mode": "full",
           "variant": "fastrank", "baseline": "torch.linalg.svd", "speedup": 9.0, "error": 1e-4,
           "baseline_error": 0.0}  # fmt: skip
    (line,) = svd.summary([row])
    assert "9.0 times" in line
    assert "goal 10" in line


def claims_too_much(given):
    run = svd_cases.fastrank(given)

    def more():
        U, S, Vh = run()
        return U, S * 1.05, Vh

    return more


def other_matrices(given):
    run = svd_cases.fastrank(given)

    def rolled():
        return tuple(part.roll(1, 0) for part in run())

    return rolled


@pytest.mark.parametrize("build", [claims_too_much, other_matrices])
def test_a_wrong_variant_is_not_timed(build, capsys):
    cell = SvdCell(CASE, builders(CASE, CPU) | {"fastrank": build}, CPU)
    cell.prepare()
    found = cell.measure("full", timing.clock_for(CPU), 0.0)
    (row,) = harness.rows("svd", CASE.as_dict(), "full", found, [("fastrank", "plain-torch")])
    assert row["skipped"].startswith("fastrank: failed: WrongResult")


def test_errors_are_shares_of_the_best_energy():
    case = SvdCase("sparse", 2, 256, 256, 4)
    cell = SvdCell(case, builders(case, CPU), CPU)
    cell.prepare()
    error = {name: entry.error for name, entry in cell.found.items()}
    assert error["torch.linalg.svd"] < 1e-5
    assert error["fastrank"] < 1e-3
    assert 0.02 < error["svd_lowrank"] < 0.3  # the known loss on flat spectra


@pytest.mark.parametrize("kind", ["sparse", "factored", "dense"])
def test_other_libraries_find_the_best_energy(kind):
    case = SvdCase(kind, 2, 64, 48, 3, 12 if kind == "factored" else 0)
    cell = SvdCell(case, {"fastrank": svd_cases.fastrank, **svd_peers.ON_CPU}, CPU)
    cell.prepare()
    for name in svd_peers.ON_CPU:
        entry = cell.found[name]
        if entry.skipped is not None:
            assert "not installed" in entry.skipped
            continue
        assert entry.error < (0.05 if name == "sklearn" else 1e-5)
        assert entry.memory is None  # torch doesn't see what they allocate
    assert cell.found["fastrank"].memory.peak_bytes > 0


def test_cupys_way_by_numpy_which_has_the_same_functions(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", numpy)
    numpy_spec = importlib.util.find_spec("numpy")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: numpy_spec)
    cell = SvdCell(CASE, svd_peers.ON_GPU, CPU)
    cell.prepare()
    assert cell.found["cupy"].error < 1e-5


def test_what_the_host_waits_for_is_in_no_graph(monkeypatch):
    monkeypatch.setattr(timing, "captured", lambda step, device: step)
    cell = SvdCell(CASE, builders(CASE, CPU), CPU)
    cell.prepare()
    eager = cell.measure("full", timing.clock_for(CPU), 0.0)
    graph = cell.measure("full-graph", timing.clock_for(CPU), 0.0)
    assert eager["torch.linalg.svd"].timing is not None
    assert graph["torch.linalg.svd"].skipped.startswith("the host waits")
    assert graph["fastrank"].timing is not None
    assert cell.steps.keys() == {name for name, e in eager.items() if e.skipped is None}


def test_a_merge_of_other_weights_is_not_timed(capsys):
    def wrong(case, model):
        from fastrank.merging import merge_adapters

        names = [f"adapter{i}" for i in range(case.adapters)]
        weights = [1.0, *[0.0] * (case.adapters - 1)]
        return lambda: merge_adapters(names, weights, case.R, model=model)

    case = MergeCase("tiny", 1, 64, 3, 2)
    cell = MergeCell(case, BUILDERS | {"fastrank": wrong}, CPU)
    cell.prepare()
    assert "WrongResult" in cell.found["fastrank"].skipped
    assert cell.found["peft-merge"].skipped is None
    assert cell.found["peft-merge"].error < 1e-5


def test_the_gpu_commands_step_resumes(tmp_path, capsys):
    setting = gpu_steps.Setting("cpu", 100.0)
    step = gpu_steps.STEPS["svd"]
    assert step(tmp_path, setting, time.monotonic() - 1) is False
    assert step(tmp_path, setting, time.monotonic() + 100) is True
    rows = json.loads((tmp_path / "svd.json").read_text())["rows"]
    assert step(tmp_path, setting, time.monotonic() - 1) is True
    assert json.loads((tmp_path / "svd.json").read_text())["rows"] == rows


@pytest.mark.parametrize(
    ("words", "message"),
    [("--threads 0", "--threads is 0"), ("--seconds 0", "--seconds is 0")],
)
def test_bad_options(words, message, capsys):
    assert cli.main(["bench", "svd", *words.split()]) == 2
    assert message in capsys.readouterr().err
