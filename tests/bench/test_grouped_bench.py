"""`fastrank bench grouped` on small layers: its rows, its float64 loop, its plan."""

import json
import time

import pytest
import torch

from fastrank import cli
from fastrank.bench import gpu_steps, grouped, grouped_cases, harness, timing
from fastrank.bench.grouped_cases import BUILDERS, GroupedCase, GroupedCell, GroupedOperands
from fastrank.bench.results_file import check_row

CPU = torch.device("cpu")
RAGGED = GroupedCase((5, 0, 12, 1), (3, 2, 8, 1), 24, 20)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "quick.json"
    words = f"bench grouped --quick --threads 1 --seconds 0.2 --out {path}"
    return cli.main(words.split()), json.loads(path.read_text())["rows"]


def test_quick_grid_has_every_comparison_of_every_case(quick):
    status, rows = quick
    assert status == 0
    cases = grouped_cases.cases(CPU, quick=True)
    assert [c.name for c in cases] == ["M64-d96-G4-R4", "M64-K96-N64-G4-R2to8-ragged"]
    found = [(r["case"]["name"], r["variant"], r["baseline"]) for r in rows]
    assert found == [(case.name, *pair) for case in cases for pair in grouped.PAIRS]
    for row in rows:
        check_row(row)
        assert "skipped" not in row
        assert row["bench"] == "grouped"
        assert row["case"]["M"] == sum(row["case"]["rows"])
        assert row["speedup"] == pytest.approx(row["baseline_median_s"] / row["median_s"])
        assert 1e-9 < row["error"] < 1e-5
        assert 1e-9 < row["baseline_error"] < 1e-5


@pytest.mark.parametrize("precision", ["16-bit", "autocast", "peft"])
def test_every_kind_of_adapters_runs_in_16_bits(precision):
    case = GroupedCase((6, 6), (4, 2), 32, 32, "bfloat16", precision)
    cell = GroupedCell(case, BUILDERS, CPU)
    cell.prepare()
    for name, entry in cell.found.items():
        assert entry.skipped is None, name
        assert 1e-4 < entry.error < 3e-2


def wrong_scale(case, operands):
    step = BUILDERS["grouped"](case, operands)
    layer = step.layer
    step.layer = lambda x: layer(x) * 1.01
    return step


def swapped_groups(case, operands):
    A = [operands.A[g] for g in (0, 3, 2, 1)]
    return BUILDERS["loop"](case, GroupedOperands(**(vars(operands) | {"A": A})))


@pytest.mark.parametrize("build", [wrong_scale, swapped_groups])
def test_a_wrong_variant_is_not_timed(build, capsys):
    case = GroupedCase((5, 2, 12, 1), (3, 2, 8, 2), 24, 20)
    cell = GroupedCell(case, BUILDERS | {"grouped": build}, CPU)
    cell.prepare()
    found = cell.measure("full", timing.clock_for(CPU), 0.0)
    rows = harness.rows("grouped", case.as_dict(), "full", found, grouped.PAIRS)
    assert rows[0]["skipped"].startswith("grouped: failed: WrongResult: relative error")
    assert "skipped" not in rows[2]


def test_groups_without_rows_are_measured():
    cell = GroupedCell(RAGGED, BUILDERS, CPU)
    cell.prepare()
    assert all(entry.error < 1e-5 for entry in cell.found.values())
    assert cell.found["loop"].memory.peak_bytes > cell.found["frozen"].memory.peak_bytes


def test_the_grids():
    cpu = grouped_cases.cases(CPU, quick=False)
    assert len({case.name for case in cpu}) == len(cpu) == 7
    assert {len(set(case.rows)) == 1 for case in cpu} == {True, False}
    gpu = grouped_cases.cases(torch.device("cuda"), quick=False)
    assert len({case.name for case in gpu}) == len(gpu)
    goal = gpu[0]
    assert grouped.GOALS.keys() == {goal.name}
    assert (sum(goal.rows), goal.K, goal.N, len(goal.rows)) == (8192, 4096, 4096, 64)
    assert (min(goal.ranks), max(goal.ranks), goal.dtype) == (4, 64, "bfloat16")
    assert {case.precision for case in gpu} == {"16-bit", "autocast", "peft"}


def test_the_goals_line():
    case = grouped_cases.cases(torch.device("cuda"), quick=False)[0].as_dict()
    taken = {
        "grouped": harness.Measured(timing.Timing(1.1, 1.0, 1.2, 3)),
        "frozen": harness.Measured(timing.Timing(1.0, 1.0, 1.0, 3)),
        "loop": harness.Measured(skipped="failed: no"),
    }
    rows = harness.rows("grouped", case, "full-graph", taken, grouped.PAIRS)
    first, last = grouped.summary(rows)
    assert "full-graph: +10.0% over the frozen layer, goal at most +15%" in first
    assert last == "2 rows failed"


def test_the_step_stops_at_the_deadline_and_resumes(tmp_path, capsys):
    setting = gpu_steps.Setting("cpu", 100.0)
    step = gpu_steps.STEPS["grouped"]
    assert step(tmp_path, setting, time.monotonic() - 1) is False
    assert step(tmp_path, setting, time.monotonic() + 100) is True
    rows = json.loads((tmp_path / "grouped.json").read_text())["rows"]
    assert step(tmp_path, setting, time.monotonic() - 1) is True
    assert json.loads((tmp_path / "grouped.json").read_text())["rows"] == rows
