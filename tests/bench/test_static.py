"""Launch plans, their bytes and the roofline, against figures made by hand."""

import importlib
import json
from pathlib import Path

import pytest

from fastrank.bench import static
from fastrank.bench.layer_plan import step_plan
from fastrank.bench.static import complaints, frozen, kernel_rows, page, seconds, shape_rows
from fastrank.bench.static_kernels import OPS, ROUTES, every_variant, layer_variants
from fastrank.bench.static_machine import MACHINES, PEAKS, occupancy, predicted
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
    rows = list(kernel_rows(layer_variants("sm_80", ((K, N),), (R,), ("16-bit",))))
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
    row = {"op": "svd", "target": "sm_90", "kernel": "gram", "registers": 40, "shared": 1}
    row |= {"instructions": {}, "occupancy": 8, "flops": {}, "read": 1, "written": 1}
    row |= {"predicted_us": 1.0, "bound": "bytes", "problem": "none"}
    monkeypatch.setattr(static, "every_variant", list)
    monkeypatch.setattr(static, "kernel_rows", lambda variants: [row | {"spills": 0}])
    assert static.main(["--out", str(tmp_path / "new")]) == 0
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"static.json", "README.md"}
    found = json.loads((tmp_path / "new" / "static.json").read_text())
    assert len(found["shapes"]) == 9
    assert found["kernels"][0]["registers"] == 40
    monkeypatch.setattr(static, "kernel_rows", lambda variants: [row | {"spills": 8}])
    assert static.main(["--out", str(tmp_path / "new")]) == 1
    assert (tmp_path / "new" / "README.md").read_text().count("| sm_90 | gram | 40 | 8 | 1 |") == 1


def test_one_op_is_made_anew(tmp_path, monkeypatch, capsys):
    """The others' rows stay; not those of another version of Triton."""
    row = {"target": "sm_90", "kernel": "gram", "shared": 1, "spills": 0}
    row |= {"instructions": {}, "occupancy": 8, "flops": {}, "read": 1, "written": 1}
    row |= {"predicted_us": 1.0, "bound": "bytes", "problem": "none"}
    monkeypatch.setattr(static, "shape_rows", lambda: [])
    monkeypatch.setattr(static, "every_variant", list)

    def make(registers, *only):
        rows = [row | {"op": op, "registers": registers} for op in only or ("lowrank", "svd")]
        monkeypatch.setattr(static, "kernel_rows", lambda variants: rows)
        arguments = ["--out", str(tmp_path)] + (["--only", *only] if only else [])
        assert static.main(arguments) == 0
        return json.loads((tmp_path / "static.json").read_text())

    with pytest.raises(SystemExit):
        make(1, "svd")
    assert "which isn't there; go without --only" in capsys.readouterr().err
    make(1)
    found = make(2, "svd")
    registers = [(r["op"], r["registers"]) for r in found["kernels"]]
    assert registers == [("lowrank", 1), ("svd", 2)]
    found["environment"]["triton"] = "1.0"
    (tmp_path / "static.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit):
        make(3, "svd")
    assert "was made with Triton 1.0, here is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spills": 4}, "spills registers"),
        ({"shared": (227 << 10) + 1}, "takes more shared memory"),
        ({"occupancy": 0}, "does not fit"),
        ({"instructions": {"LDGSTS": 3}}, "multiplies without matrix units"),
    ],
)
def test_what_is_wrong_with_a_kernel_is_said(change, words):
    row = {"op": "svd", "target": "sm_90", "kernel": "product", "spills": 0, "shared": 227 << 10}
    row |= {"occupancy": 8, "flops": {"tf32x3": 1.0}, "instructions": {"HGMMA": 1}}
    assert complaints(row) == []
    assert [words in said for said in complaints(row | change)] == [True]
    # outside of NVIDIA's matrix units there is nothing to count
    assert complaints(row | {"flops": {"ieee": 1.0}, "instructions": {}}) == []


def test_every_kernel_is_in_the_report():
    """Everything that launchers could launch: each @triton.jit function named a kernel."""
    import triton

    modules = [
        importlib.import_module(f"fastrank.kernels.{path.parent.name}.{path.stem}")
        for path in Path(__file__).parents[2].glob("kernels/*/*.py")
        if "@triton.jit" in path.read_text()
    ]
    kernels = {
        name.removesuffix("_kernel")
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, triton.JITFunction)
    }
    assert len(kernels) >= 30
    variants = list(every_variant(["sm_90"]))
    assert {variant.function for variant in variants} == kernels
    names = [(variant.op, variant.name) for variant in variants]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "expected"),
    [
        # the occupancy calculator's: 4 floor(16384 / 256 / ceil(32 registers / 256)) warps
        ("sm_80", 32, 0, 4, 64),
        ("sm_80", 33, 0, 4, 48),
        ("sm_80", 168, 0, 8, 8),
        ("sm_90", 255, 0, 8, 8),
        ("sm_90", 128, 0, 16, 16),
        # one warp a block: 32 blocks at most
        ("sm_90", 16, 0, 1, 32),
        # 1 KiB of each block is the driver's: 227 KiB fit once, 113 twice, 114 not twice
        ("sm_90", 64, 227 << 10, 4, 4),
        ("sm_90", 64, 113 << 10, 4, 8),
        ("sm_90", 64, 114 << 10, 4, 4),
        ("sm_80", 64, 81 << 10, 4, 8),
        ("sm_80", 64, 227 << 10, 4, 0),
        # 512 registers a SIMD, in eights; 8 waves at most
        ("gfx942", 64, 0, 4, 8),
        ("gfx942", 65, 0, 4, 7),
        ("gfx942", 150, 0, 4, 3),
        ("gfx942", 512, 0, 4, 1),
        # 3 waves a SIMD are 12 of a unit: one workgroup of 8
        ("gfx942", 150, 0, 8, 2),
        ("gfx942", 16, 32 << 10, 4, 2),
        ("gfx942", 16, (32 << 10) + 1, 4, 1),
    ],
)
def test_occupancy(target, registers, shared, warps, expected):
    assert occupancy(target, registers, shared, warps) == expected


def test_a_time_is_that_of_what_binds():
    name, machine = PEAKS["sm_90"]
    assert name == "H200"
    second = 0.85 * machine.bytes_per_second
    assert predicted(second, {"half": 1e9}, machine) == (pytest.approx(1.0), "bytes")
    flops = {"half": 0.36 * 989e12, "tf32x3": 0.06 * 989e12, "fma": 0.72 * 67e12}
    assert predicted(1e9, flops, machine) == (pytest.approx(0.5 + 0.5 + 1.0), "flops")


def work_of(variants, function, problem):
    return next(v.work for v in variants if (v.function, v.problem) == (function, problem))


def test_work_by_hand():
    """The published sizes' bytes and flops."""
    variants = [v for op in ("grouped", "svd", "packing") for v in OPS[op]("sm_90")]
    ranks, d = [4 + round(60 * i / 63) for i in range(64)], 4096
    total, rows = sum(ranks), 8192
    plain = work_of(variants, "grouped_shrink", "8192x4096x4096 r4-64 bf16 p0")
    # padded to blocks of 64; x, A, the table and two lists of starts; two splits of S
    assert plain.flops == {"half": 2.0 * rows * 64 * d}
    assert plain.read == 2 * rows * d + 2 * total * d + 16 * 128 + 2 * 8 * 65
    assert plain.written == 2 * 4 * rows * 64
    nnz = 4096 * 4096 // 100 + 1
    packed = work_of(variants, "packing_pack", "pack 16.8M int8")
    blocks = -(-nnz // 256)
    assert packed == (32 * nnz, nnz + 4 * blocks + 16, {})
    summed = work_of(variants, "packing_aggregate", "64 clients bfloat16")
    assert summed == (64 * nnz * 2 + 64 * 6 * 8, 4 * nnz, {})
    spread = work_of(variants, "packing_aggregate_masks", "64 clients int8 own masks")
    assert spread.written == 4 * 4096 * 4096
    gradient = work_of(variants, "masked_gradient", "weight gradient 4096 bfloat16")
    assert gradient == (2 * 2 * 4096**2, 4 * nnz, {"half": 2.0 * 4096**3})
    G, Q = 72, 160
    core = work_of(variants, "svd_jacobi_memory", "factored 72x4096x4096 Q160 r16")
    assert core.flops == {"fma": G * (Q * (Q - 1) / 2) * 12 * Q}
    gram = work_of(variants, "svd_gram", "sparse 72x768x768 r64")
    assert gram.flops == {"fp64": 2.0 * G * 768 * 80**2}
    assert gram.read == G * 768 * 80 * 4
