"""The matrix product with the low-rank term in its accumulator, in the interpreter."""

import pytest
import torch
from lowrank_cases import (
    BF16,
    F32,
    F64,
    FP16,
    Case,
    assert_as_good_as,
    bits_equal,
    errors,
    peft,
    run,
    truth,
)

from fastrank.kernels.lowrank import core, lowrank_linear
from fastrank.kernels.lowrank.choices import override

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_empty", "everywhere")]

EVERYWHERE = {
    "routes": {
        step: {operands: [{"use": "gemm"}] for operands in ("half", "mixed")}
        for step in ("forward", "forward_any", "dx", "dx_any")
    },
    # tiles that small shapes fill several of
    "tiles": {
        kernel: {
            operands: {"16": [{"tile": [16, 32, 16, 2, 4, 2]}]} for operands in ("half", "mixed")
        }
        for kernel in ("gemm", "gemm_any")
    },
}


@pytest.fixture
def everywhere():
    with override(EVERYWHERE):
        yield


@pytest.fixture
def device_masks(monkeypatch):
    """Masks as they arrive on a GPU, where the host can't read them: not compacted."""

    def resolve(active, trainable, ranks, device):
        return ranks, ranks, None, active, trainable

    monkeypatch.setattr(core, "resolve_masks", resolve)


def fused(*arguments, **keywords):
    return lowrank_linear(*arguments, backend="triton", **keywords)


def small(**changes) -> Case:
    return Case(**({"M": 37, "K": 24, "N": 43, "R": 5, "dtype": FP16} | changes))


MODES = {"half": FP16, "mixed": F32}


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["p0", "p0.3"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("R", [5, 40], ids=["r5", "r40"])
def test_error_is_at_most_pefts(mode, p, R, launches):
    """With a rank that needs several blocks, odd shapes, bias and e."""
    keywords = {"scale": 1.7} | ({"dropout_p": p, "seed": 12} if p else {})
    case = small(R=R, adapters=MODES[mode], with_e=True, keywords=keywords)
    assert_as_good_as(run(fused, case), run(peft, case), truth(case))
    assert launches.count("gemm") == 2
    assert "expand" not in launches


@pytest.mark.parametrize("mode", MODES)
def test_aligned_shapes(mode, launches):
    """No masks along C, no bias, several groups of rows."""
    case = small(M=80, K=64, N=64, adapters=MODES[mode], with_bias=False)
    assert_as_good_as(run(fused, case), run(peft, case), truth(case))
    assert launches.count("gemm") == 2


def test_bf16():
    """Within the interpreter's truncation of bf16: 2**-7 instead of 2**-8."""
    case = small(dtype=BF16, adapters=F32, with_e=True)
    exact, got = truth(case), run(fused, case)
    for name, value in got.items():
        assert errors(value, exact[name])[0] < 1.6e-2, name


def test_nothing_rounds_before_the_store(launches):
    """B is zero where y would be: then y is the product alone, rounded once."""
    case = small(M=20, K=32, N=32, with_bias=False)
    given = case.inputs()
    with torch.no_grad():
        given["B"].zero_()
    y = run(fused, case, **given)["y"]
    x, weight = given["x"].detach(), given["weight"].detach()
    exact = (x.to(F64) @ weight.to(F64).T).to(FP16)
    assert (y != exact).float().mean() < 0.01  # fp32 sums that round the other way
    assert "gemm" in launches


ON = torch.tensor([1, 0, 1, 1, 0], dtype=torch.bool)
TRAINED = torch.tensor([0, 1, 1, 0, 1], dtype=torch.bool)


@pytest.mark.parametrize("p", [0.0, 0.4], ids=["p0", "p0.4"])
@pytest.mark.parametrize("where", ["host", "device"])
def test_masks(where, p, request):
    """Frozen ranks read x without dropout; ranks that are off never show."""
    if where == "device":
        request.getfixturevalue("device_masks")
    keywords = {"active": ON, "trainable": TRAINED, "dropout_p": p, "seed": 3}
    case = small(adapters=F32, with_e=True, keywords=keywords)
    clean, exact, given = run(fused, case), truth(case), case.inputs()
    for name, value in clean.items():
        assert errors(value, exact[name])[0] < (1e-6 if value.dtype == F32 else 1e-3), name
    with torch.no_grad():
        given["A"][~ON] = float("nan")
        given["B"][:, ~ON] = float("inf")
        given["e"][~ON] = float("nan")
    spoiled = run(fused, case, **given)
    assert all(bits_equal(spoiled[name], clean[name]) for name in clean)


def test_any_strides_of_x_and_weight():
    """Conv1D's transposed view, a slice of columns, a transposed x, odd strides of both."""
    case = small()
    given = case.inputs()
    expected = run(fused, case)
    x, weight = given["x"].detach(), given["weight"].detach()
    for changes in (
        {"weight": weight.T.contiguous().T},
        {"weight": torch.cat([weight, weight], 1)[:, :24]},
        {"x": x.T.contiguous().T},
        {"x": torch.stack([x, x], -1)[..., 0], "weight": torch.stack([weight, weight], -1)[..., 0]},
    ):
        strided = {n: t.requires_grad_() for n, t in changes.items()}
        got = run(fused, case, **strided)
        assert all(bits_equal(got[n], expected[n]) for n in ("y", "dx", "dA", "dB"))


def test_offsets_are_64_bit(tmp_path):
    """Rows and columns 2**30 elements apart, in a sparse file, beyond what int32 can count."""
    far = 2**30
    sparse = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * far + 64, dtype=FP16)
    given = {n: None if t is None else t.detach() for n, t in small(N=4).inputs().items()}
    rows = sparse.as_strided((4, 24), (far, 1))
    rows.copy_(given["x"][:4])
    tail = (given["bias"], given["A"], given["B"])
    assert bits_equal(
        fused(rows, given["weight"], *tail), fused(given["x"][:4], given["weight"], *tail)
    )
    rows.copy_(given["weight"])
    assert bits_equal(fused(given["x"], rows, *tail), fused(given["x"], given["weight"], *tail))
    columns = sparse.as_strided((24, 4), (1, far))
    columns.copy_(given["x"][:24, :4])
    narrow = (given["weight"][:, :4], given["bias"], given["A"][:, :4], given["B"])
    assert bits_equal(fused(columns, *narrow), fused(given["x"][:24, :4], *narrow))


def test_fp32_bases_take_the_vendors_product(launches):
    run(fused, small(dtype=F32))
    assert "gemm" not in launches
    assert launches.count("expand") == 2


def test_no_rank_left_is_the_base_alone(launches):
    case = small(keywords={"active": 0})
    given = case.inputs()
    y = run(fused, case)["y"]
    assert launches == []
    assert bits_equal(y, torch.nn.functional.linear(*(given[n] for n in ("x", "weight", "bias"))))
