"""Launch plans, their bytes and the roofline, against figures made by hand."""

import json

import pytest

from fastrank.bench import static
from fastrank.bench.layer_plan import step_plan
from fastrank.bench.static import MACHINES, ROUTES, frozen, kernel_rows, page, seconds, shape_rows
from fastrank.kernels.common.aot import TARGETS
from fastrank.kernels.lowrank.choices import override

SM_90 = TARGETS["sm_90"][1]
M, K, N, R = 8192, 4096, 4096, 16
PASS = 2 * M * K  # bytes of x, y, dY and dX alike


def names(plan, phase):
    return [x.name for x in plan if x.phase == phase]


def test_the_shipped_route_is_vendor_products_and_adds():
    plan = step_plan(M, K, N, R, SM_90)
    assert names(plan, "forward") == ["shrink", "sum", "product", "expand"]
    assert names(plan, "backward") == [
        "dual", "sum", "finish", "gram", "finish", "product", "expand",
    ]  # fmt: skip
    expand = plan[3]
    assert expand.read == PASS + 4 * M * R + 4 * N * R  # y, S and B in fp32
    assert expand.written == PASS
    assert expand.grid == (M // 64, N // 128)


@pytest.mark.parametrize(("route", "passes"), [("shipped", 7), ("two-reads", 8), ("gemm", 3)])
def test_passes_are_those_of_the_design(route, passes):
    """Reads and writes of activations beyond the frozen layer's; what is narrow comes on top."""
    with override(ROUTES[route]):
        plan = step_plan(M, K, N, R, SM_90)
    moved = sum(x.read + x.written for x in plan) - sum(x.read + x.written for x in frozen(M, K, N))
    assert passes * PASS <= moved <= (passes + 0.6) * PASS


def test_dropout_moves_no_activation():
    dry, wet = (step_plan(M, K, N, R, SM_90, dropout=p) for p in (0.0, 0.1))
    extra = sum(x.read + x.written for x in wet) - sum(x.read + x.written for x in dry)
    assert 0 < extra < 100  # the seed
    assert [x.name for x in wet] == [x.name for x in dry]


def test_frozen_times_are_the_guides():
    """0.772 ms on an H100 and an H200, 2.447 ms on an A100."""
    found = {name: seconds(frozen(M, K, N), machine) for name, machine in MACHINES.items()}
    assert found["H100"] == found["H200"] == pytest.approx(0.772e-3, rel=1e-3)
    assert found["A100"] == pytest.approx(2.447e-3, rel=1e-3)


def test_predicted_overheads_are_near_the_guides():
    """+15 % for adds with one read of dY, +17 % with two, +6 % for a split into GEMMs, on H200;
    a little more, as S, its parts and dA's parts are counted.
    """
    rows = [r for r in shape_rows((M,), ((K, N),), (R,)) if r["machine"] == "H200"]
    found = {r["route"]: r["overhead"] for r in rows}
    assert 0.15 < found["shipped"] < 0.17
    assert 0.17 < found["two-reads"] < 0.19
    assert 0.06 < found["gemm"] < 0.085


def test_fp32_branches_cost_more_time_than_sixteen_bit_ones():
    times = [
        seconds(step_plan(M, K, N, R, SM_90, mode=mode), MACHINES["H200"])
        for mode in ("16-bit", "autocast", "peft")
    ]
    assert times[0] <= times[1] < times[2]


@pytest.mark.aot
def test_kernels_are_compiled_as_they_are_launched():
    rows = list(kernel_rows(("sm_80",), ((K, N),), (R,), ("16-bit",)))
    kinds = {row["kernel"].split()[0] for row in rows}
    assert kinds == {"shrink", "expand", "gram", "dual", "finish", "gemm"}
    assert all(row["spills"] == 0 and row["registers"] > 16 for row in rows)
    gemm = [row for row in rows if row["kernel"].startswith("gemm")]
    assert all(row["instructions"]["HMMA"] > 0 for row in gemm)
    text = page(rows, list(shape_rows((M,), ((K, N),), (R,))))
    assert text.count("| sm_80 | gemm ") == len(gemm)
    assert f"| {M} | {K} | {N} | {R} | gemm | 9 | 238.0 | +7.9%" in text


def test_a_report_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(static, "shape_rows", lambda: shape_rows((M,), ((K, N),), (R,)))
    row = {"target": "sm_90", "kernel": "gram", "registers": 40, "shared": 1, "instructions": {}}
    monkeypatch.setattr(static, "kernel_rows", lambda: [row | {"spills": 0}])
    assert static.main(["--out", str(tmp_path / "new")]) == 0
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"static.json", "README.md"}
    found = json.loads((tmp_path / "new" / "static.json").read_text())
    assert len(found["shapes"]) == 9
    assert found["kernels"][0]["registers"] == 40
    monkeypatch.setattr(static, "kernel_rows", lambda: [row | {"spills": 8}])
    assert static.main(["--out", str(tmp_path / "new")]) == 1
