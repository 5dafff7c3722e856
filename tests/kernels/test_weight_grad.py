"""masked_weight_grad on the CPU against the dense gradient in float64."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastrank.kernels.common import products, scratch
from fastrank.kernels.packing import SparseMask, weight_grad
from fastrank.kernels.packing.weight_grad import masked_weight_grad

F64, F32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# relative error in the 2-norm, of entries that are rounded once at most. Where entries of bf16
# operands are rounded to bf16, they keep 8 bits; otherwise 16-bit operands are exact in fp32.
TOLERANCE = {F64: 1e-14, F32: 1e-6, BF16: 4e-3, FP16: 1e-6}
MASKS = {
    "1 %": {"density": 0.01},
    "1/64": {"density": 1 / 64},
    "half": {"density": 0.5},
    "all": {"density": 1.0},
    "bernoulli": {"density": 0.03, "scheme": "bernoulli"},
    "bernoulli all": {"density": 1.0, "scheme": "bernoulli"},
}


@pytest.fixture(params=["by entries", "by blocks"])
def way(request, monkeypatch) -> str:
    """Which of the two a CPU takes, whatever the density and the work."""
    few = request.param == "by entries"
    for name in ("_MOST_DENSITY", "_MOST_DENSITY_BF16", "_MOST_DENSITY_AMX"):
        monkeypatch.setattr(weight_grad, name, 1.0 if few else -1.0)
    monkeypatch.setattr(weight_grad, "_LEAST_ENTRIES_WORK", 0)
    return request.param


def operands(M: int, N: int, K: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(M * 1000 + N * 100 + K)
    return tuple(torch.randn(M, n, generator=g, dtype=F64).to(dtype) for n in (N, K))


def dense(dy: Tensor, x: Tensor, mask: SparseMask) -> Tensor:
    """The dense gradient in float64, gathered."""
    full = dy.to(F64).reshape(-1, dy.shape[-1]).t() @ x.to(F64).reshape(-1, x.shape[-1])
    return full.reshape(-1)[mask.positions()]


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.to(F64) - exact).norm() / exact.norm())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("fields", MASKS.values(), ids=MASKS)
def test_equals_the_dense_gradient_at_the_mask(fields, dtype, backend, way):
    mask = SparseMask((123, 63), seed=5, tensor_id="w", **fields)
    dy, x = operands(431, 123, 63, dtype)
    got = masked_weight_grad(dy, x, mask, backend=backend)
    assert got.dtype == (F64 if dtype == F64 else F32)
    assert got.shape == (mask.nnz,)
    rounds = dtype == BF16 and backend == "auto" and way == "by blocks"
    tolerance = TOLERANCE[dtype if rounds or dtype != BF16 else F32]
    assert error(got, dense(dy, x, mask)) < tolerance
    # the tolerance can fail
    assert error(got.roll(1), dense(dy, x, mask)) > 0.1


@pytest.mark.parametrize("dtype", [F32, FP16], ids=["fp32", "fp16"])
def test_few_rows(dtype, way):
    mask = SparseMask((30, 20), density=0.1)
    dy, x = operands(50, 30, 20, dtype)
    assert error(masked_weight_grad(dy, x, mask), dense(dy, x, mask)) < 1e-6


@pytest.mark.parametrize("onednn", [False, True], ids=["mkl", "onednn"])
@pytest.mark.parametrize(
    ("M", "N", "K"), [(700, 300, 520), (257, 1, 4099), (30, 515, 1), (1, 7, 5)]
)
def test_blocks_and_chunks(M, N, K, onednn, way, monkeypatch):
    """Several blocks of rows of dW and several chunks of rows of x, the last ones ragged."""
    if onednn and not products.prefers_onednn():
        pytest.skip("fp32 products of this CPU are MKL's")
    monkeypatch.setattr(products, "prefers_onednn", lambda: onednn)
    monkeypatch.setattr(weight_grad, "_LEAST_BYTES", 1 << 16)
    monkeypatch.setattr(weight_grad, "_MOST_BLOCK", 1 << 16)
    monkeypatch.setattr(weight_grad, "_LEAST_WORK", 1)
    monkeypatch.setattr(weight_grad, "_LEAST_ROWS", 96)
    mask = SparseMask((N, K), density=0.02, seed=1)
    dy, x = operands(M, N, K)
    assert error(masked_weight_grad(dy, x, mask), dense(dy, x, mask)) < 1e-6


@pytest.mark.parametrize("dtype", [F32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
def test_any_strides(dtype, way):
    mask = SparseMask((60, 44), density=0.05)
    dy, x = operands(300, 60, 44, dtype)
    exact = dense(dy, x, mask)
    layouts = {
        "by column": lambda t: t.t().contiguous().t(),
        "part of wider rows": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
        "every other column": lambda t: torch.stack([t, -t], -1)[..., 0],
        "every other row": lambda t: torch.stack([t, -t], 1).flatten(0, 1)[::2],
        "three dimensions": lambda t: t.view(3, 100, -1),
        "turned": lambda t: t.view(3, 100, -1).transpose(0, 1).contiguous().transpose(0, 1),
    }
    for name, layout in layouts.items():
        first = layout(dy)
        assert torch.equal(first.reshape(dy.shape), dy)
        other = x.view(3, 100, -1) if first.dim() == 3 else x
        assert error(masked_weight_grad(first, other, mask), exact) < TOLERANCE[dtype], name
        other = dy.view(3, 100, -1) if first.dim() == 3 else dy
        assert error(masked_weight_grad(other, layout(x), mask), exact) < TOLERANCE[dtype], name
    ones = torch.ones((), dtype=dtype).expand(300, 60)
    assert error(masked_weight_grad(ones, x, mask), dense(ones, x, mask)) < TOLERANCE[dtype]


def test_nothing_to_add_up_and_nothing_kept(way):
    mask = SparseMask((20, 30), density=0.01)
    got = masked_weight_grad(torch.empty(0, 20), torch.empty(0, 30), mask)
    assert got.tolist() == [0.0] * mask.nnz
    empty = SparseMask((3, 3), density=1e-6, scheme="bernoulli")
    assert empty.nnz == 0
    assert masked_weight_grad(torch.ones(4, 3), torch.ones(4, 3), empty).shape == (0,)


def test_twice_gives_the_same_bits_and_a_nan_stays_in_its_row_and_column(way):
    mask = SparseMask((300, 200), density=0.1)
    dy, x = operands(600, 300, 200)
    clean = masked_weight_grad(dy, x, mask)
    assert torch.equal(clean, masked_weight_grad(dy, x, mask))
    dy[7, 3] = torch.nan
    row = mask.positions() // 200
    got = masked_weight_grad(dy, x, mask)
    assert got[row == 3].isnan().all()
    assert torch.equal(got[row != 3], clean[row != 3])


def test_autocast_rounds_nothing(way):
    mask = SparseMask((40, 50), density=0.1)
    dy, x = operands(100, 40, 50)
    with torch.autocast("cpu", torch.bfloat16):
        got = masked_weight_grad(dy, x, mask)
    assert torch.equal(got, masked_weight_grad(dy, x, mask))


@pytest.mark.parametrize("dtype", [F32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_no_buffer_of_the_weights_size(dtype, way):
    """The most that is allocated at a time is less than an eighth of the dense fp32 gradient."""
    N, K, M = 4096, 1024, 64
    mask = SparseMask((N, K), density=0.01)
    dy, x = operands(M, N, K, dtype)
    scratch._memory.slots.clear()  # so that scratch memory counts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        masked_weight_grad(dy, x, mask)
    held, most = 0, 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert mask.nnz * 4 < most < N * K * 4 / 8


def test_the_way_follows_density_work_and_dtype(monkeypatch):
    seen = []
    for name in ("_by_entries", "_by_blocks"):
        monkeypatch.setattr(weight_grad, name, lambda *_, name=name: seen.append(name))
    monkeypatch.setattr(weight_grad, "bf16_units", lambda: True)
    cases = [(200, 0.01, F32), (200, 0.2, F32), (2, 0.01, F32), (200, 0.01, FP16)]
    cases += [(200, 0.05, F64), (200, 0.05, BF16), (200, 0.003, BF16)]
    for M, density, dtype in cases:
        dy, x = operands(M, 150, 100, dtype)
        masked_weight_grad(dy, x, SparseMask((150, 100), density))
    entries, blocks = "_by_entries", "_by_blocks"
    assert seen == [entries, blocks, blocks, entries, entries, blocks, entries]


def test_torch_does_not_warn_of_its_sparse_tensors():
    """Once a process, so in one of its own."""
    code = (
        "import torch\n"
        "from fastrank.kernels.packing import SparseMask\n"
        "from fastrank.kernels.packing.weight_grad import masked_weight_grad\n"
        "mask = SparseMask((256, 256))\n"
        "masked_weight_grad(torch.ones(64, 256), torch.ones(64, 256), mask)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"dy": torch.ones(4, 9)}, ValueError, r"mask's shape is \(8, 6\) but .* \(9, 6\)"),
        ({"x": torch.ones(5, 6)}, ValueError, "all but the last must agree"),
        ({"x": torch.ones(4, 6).double()}, ValueError, "float32 on cpu but x torch.float64"),
        ({"x": torch.ones(4, 6).int(), "dy": torch.ones(4, 8).int()}, TypeError, "int32; cast"),
        ({"dy": torch.ones(()), "x": torch.ones(())}, ValueError, "0-d"),
        ({"dy": [1.0]}, TypeError, "dy has type list"),
        ({"mask": (8, 6)}, TypeError, "mask has type tuple; pass a SparseMask"),
        ({"backend": "cuda"}, ValueError, "unknown backend"),
        ({"backend": "triton"}, ValueError, "tensors are on cpu"),
    ],
)
def test_bad_arguments_say_what_came_and_what_was_wanted(change, kind, message):
    good = {"dy": torch.ones(4, 8), "x": torch.ones(4, 6), "mask": SparseMask((8, 6), 0.1)}
    assert masked_weight_grad(**good).shape == (good["mask"].nnz,)
    with pytest.raises(kind, match=message):
        masked_weight_grad(**(good | change))
