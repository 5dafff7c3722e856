"""`fastrank bench packing` on small tensors: its rows, and results that are not what they claim."""

import json

import pytest
import torch

from fastrank import cli
from fastrank.bench import packing, packing_cases, packing_wire
from fastrank.bench.packing import GOALS, WORKS, Goal
from fastrank.bench.packing_cases import PackingCase, PackingCell, cases
from fastrank.bench.results_file import check_row
from fastrank.kernels.packing import Packed

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEFAULTS = {"density": 0.01, "device": "cpu", "N": 64, "K": 64}


def work_of(kind, **fields):
    return WORKS[kind](PackingCase(kind, kind, **{**DEFAULTS, **fields}), CPU)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "quick.json"
    words = f"bench packing --quick --threads 1 --seconds 0.2 --out {path}"
    return cli.main(words.split()), json.loads(path.read_text())["rows"]


def rows_of(rows, start):
    return [row for row in rows if row["case"]["name"].startswith(start) and "skipped" not in row]


def test_quick_grid_measures_every_case(quick):
    status, rows = quick
    assert status == 0
    assert list(dict.fromkeys(row["case"]["name"] for row in rows)) == [
        case.name for case in cases(CPU, quick=True)
    ]
    for row in rows:
        check_row(row)
        assert row["bench"] == "packing"
        if "skipped" in row:  # a peer that isn't installed, or can't take the dtype
            assert row["baseline"] in ("zstd-bitmap", "sampled_addmm")
            assert "no" in row["skipped"]
        else:
            assert row["speedup"] == pytest.approx(row["baseline_median_s"] / row["median_s"])


def test_figures_beside_time(quick):
    _, rows = quick
    for row in rows_of(rows, "topk-encode"):
        assert 8.0 < row["bits_per_index"] <= 9.0 < row["baseline_bits_per_index"] < 20
    (model,) = rows_of(rows, "finetune")
    # weights that are not linear are many in a model this small
    assert model["state_bytes"] < 0.02 * model["baseline_state_bytes"]
    assert model["trained"] < 0.01 * model["baseline_trained"]
    assert model["state_bytes"] == pytest.approx(12 * model["trained"], rel=0.2)
    for row in rows_of(rows, "mask"):  # what NumPy allocates is seen
        assert 8 * 512 * 512 / 100 < row["peak_bytes"] < row["baseline_peak_bytes"]
    (backward,) = rows_of(rows, "backward")
    assert backward["baseline_peak_bytes"] >= 4 * 256 * 256


@pytest.mark.parametrize("kind", ["pack", "unpack"])
@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [("float32", 0, 1e-7), ("bfloat16", 1e-3, 4e-3), ("float16", 1e-5, 1e-3), ("int8", 2e-3, 2e-2)],
)
def test_errors_are_those_of_the_formats(kind, dtype, low, high):
    cell = PackingCell.of(work_of(kind, N=256, K=256, dtype=dtype))
    cell.prepare()
    assert low <= cell.found["fastrank"].error <= high
    assert cell.found["copy"].error is None


def test_names_that_others_rely_on():
    for device in (CPU, CUDA):
        named = {case.name: case for case in cases(device, False)}
        assert {"mask-16.8M", "aggregate-64", "weight-grad-4096"} <= named.keys()
        assert named["mask-16.8M"].N * named["mask-16.8M"].K == 2**24
        here = {goal.case for goal in GOALS if device.type in goal.devices}
        assert here <= named.keys()
        assert len(named) == len(cases(device, False))
        assert {case.kind for case in named.values()} == WORKS.keys()


@pytest.mark.parametrize("kind", ["mask", "topk", "topk-encode", "topk-decode"])
def test_goals_have_their_baselines(kind):
    variants = work_of(kind).variants()
    assert next(iter(variants)) == "fastrank"
    for goal in GOALS:
        if any(c.name == goal.case and c.kind == kind for c in cases(CPU, False)):
            assert goal.baseline in variants


def row(case, baseline, kind="mask", **changes):
    found = {"bench": "packing", "mode": "full", "variant": "fastrank", "baseline": baseline,
             "case": {"name": case, "kind": kind, "device": "cpu", "N": 4096, "K": 4096,
                      "density": 0.01},
             "median_s": 1.0, "baseline_median_s": 2.0, "speedup": 2.0,
             "peak_bytes": 10, "baseline_peak_bytes": 100}  # fmt: skip
    return found | changes


def test_summary_states_goals_and_misses():
    (line,) = packing.summary([row("mask-16.8M", "bernoulli-philox", speedup=49.0)])
    assert line.startswith("mask-16.8M: 49.00 times")
    assert "goal 50, missed" in line
    fast, small = packing.summary([row("weight-grad-4096", "dense")])
    assert "goal 0.95)" in fast
    assert "peak memory 10.00%" in small
    assert "goal at most 0.125)" in small
    states = {"state_bytes": 3, "baseline_state_bytes": 100}
    (line,) = packing.summary([row("finetune-bert-base", "dense", **states)])
    assert "3.00%" in line
    assert "missed" in line
    bits = {"bits_per_index": 8.5, "baseline_bits_per_index": 12.0}
    goal, codec = packing.summary([row("topk-encode-16.8M", "zlib-bitmap", **bits)])
    assert "8.50 bits an index (goal at most 9)" in goal
    assert "zlib-bitmap 12.00 bits" in codec
    skipped = row("aggregate-64", "dense", skipped="dense: failed: no memory")
    assert packing.summary([skipped]) == [
        "aggregate-64: skipped: dense: failed: no memory",
        "1 rows failed",
    ]


def test_gpu_goals_are_not_judged_on_a_cpu():
    goal = Goal("weight-grad-4096-bfloat16", "dense", "speedup", 1.5, ("cuda",))
    assert goal in GOALS
    one = row(goal.case, goal.baseline, "weight-grad")
    assert packing.goals_of(one) == []
    one["case"]["device"] = "cuda"
    assert packing.goals_of(one) == []
    assert packing.goals_of(one | {"mode": "full-graph"}) == [goal]
    drawn = row("mask-16.8M", "bernoulli-philox", mode="full")  # it waits for a count: no graph
    drawn["case"]["device"] = "cuda"
    assert len(packing.goals_of(drawn)) == 1


def shifted(result):
    if isinstance(result, Packed):
        return Packed(result.values.roll(1), result.scale, result.status, result.mask)
    if isinstance(result, torch.Tensor):
        # an encoded position, or a value in another place
        return result.view(-1).roll(1).view(result.shape)
    return result[:-1]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("mask", {}),
        ("pack", {}),
        ("aggregate", {"clients": 2}),
        ("topk-encode", {}),
        ("topk-decode", {}),
        ("weight-grad", {"M": 16}),
        ("backward", {"M": 16}),
    ],
)
def test_a_wrong_variant_is_not_timed(kind, fields, capsys):
    cell = PackingCell.of(work_of(kind, **fields))
    right = cell.builders["fastrank"]

    def wrong():
        step = right()
        return lambda: shifted(step())

    cell.builders = {**cell.builders, "fastrank": wrong}
    cell.prepare()
    other = next(name for name in cell.builders if name != "fastrank")
    assert cell.found["fastrank"].skipped.startswith("failed: ")
    assert cell.found[other].skipped is None
    assert "fastrank" not in cell.steps
    assert other in cell.steps


def test_unpack_that_writes_elsewhere_is_not_timed(capsys):
    work = work_of("unpack")
    cell = PackingCell.of(work)
    right = cell.builders["fastrank"]

    def wrong():
        step = right()
        return lambda: step().add_(1.0)

    cell.builders = {**cell.builders, "fastrank": wrong}
    cell.prepare()
    assert "outside the mask" in cell.found["fastrank"].skipped
    assert cell.found["index_add"].skipped is None


def test_memory_counts_scratch_that_a_thread_keeps():
    from fastrank.kernels.common.scratch import scratch

    like = torch.empty(1000)
    for _ in range(2):
        _, taken = packing_cases.result_and_memory(
            lambda: scratch(like, torch.float32, "bench") is None, CPU
        )
        assert taken.peak_bytes >= 4000


def test_zstd_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(packing_wire, "_module", lambda name: None)
    with pytest.raises(packing_wire.Unavailable, match="pip install zstandard"):
        packing_wire.zstd()


@pytest.mark.parametrize(
    ("words", "message"),
    [("--threads 0", "--threads is 0"), ("--seconds 0", "--seconds is 0")],
)
def test_bad_options(words, message, capsys):
    assert cli.main(["bench", "packing", *words.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_every_small_case_runs_on_a_gpu(tmp_path):
    path = tmp_path / "gpu.json"
    words = f"bench packing --device cuda --quick --seconds 5 --out {path}"
    assert cli.main(words.split()) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {r["mode"] for r in rows} == {"full", "full-graph"}
    for one in rows:
        assert "failed" not in one.get("skipped", ""), one
