"""The Triton path of truncated_svd in the interpreter, against float64 LAPACK.

Small shapes, and mostly a narrow block and a short filter: at its default width a matrix costs the
interpreter seconds. The tiles of the sparse product are taller here, which changes no sum.
"""

import pytest
import torch
from svd_cases import (
    MOST,
    MOST_SIGMA,
    energy_ratio,
    hard,
    masked,
    orthogonal,
    ratios,
    with_values,
)

from fastrank.kernels.common.philox import philox4x32
from fastrank.kernels.svd import (
    NONFINITE,
    NOT_CONVERGED,
    FactoredSum,
    PackedSparse,
    TruncatedSVD,
    launch_products,
    launchers,
    triton_path,
    truncated_svd,
)
from fastrank.kernels.svd.presets import PRESETS, Preset
from fastrank.kernels.svd.reference import materialise
from fastrank.kernels.svd.sketch import REFILL, sketch
from fastrank.kernels.svd.sparse import SparseBatch

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_empty")]

F32, F64 = torch.float32, torch.float64
ENERGY = {"fast": 0.98, "default": 0.999, "tight": 0.99999}
# rank 4 in a block of 16: wider ones are for the slow tests
NARROW = Preset(2, 3, 12, 1e-3)


@pytest.fixture(autouse=True)
def tall_tiles(monkeypatch):
    monkeypatch.setattr(launch_products, "SPARSE_TILES", dict.fromkeys((16, 32, 64, 128), (64, 4)))
    monkeypatch.setattr(launch_products, "SPARSE_UNROLL", 1)


def run(operand, rank, accuracy="default", seed=0) -> TruncatedSVD:
    return truncated_svd(operand, rank, accuracy=accuracy, seed=seed, backend="triton")


def narrow(operand, rank=4, seed=0) -> TruncatedSVD:
    if isinstance(operand, PackedSparse):
        return triton_path.sparse(SparseBatch.of(operand), rank, NARROW, seed)
    return triton_path.dense(operand, rank, NARROW, seed)


def check(A, found, exact=True):
    """Within LAPACK's bounds, in order, signs canonical. A: float64, what was decomposed."""
    assert not found.status.any()
    assert {part.dtype for part in found[:4]} == {F32}
    got = ratios(A, found)
    assert max(got["residual"], got["orthogonal"], got["excess"]) < MOST, got
    assert not exact or got["sigma"] < MOST_SIGMA, got
    U, S = found.U, found.S
    assert (S >= 0).all()
    assert (S[:, 1:] <= S[:, :-1]).all()
    at = U.abs().argmax(1, keepdim=True)  # the first where several are largest
    assert (U.gather(1, at) > 0).all()
    held = found.S.double() / A.abs().amax((1, 2)).clamp_min(1e-300)[:, None]
    whole = (A / A.abs().amax((1, 2), keepdim=True).clamp_min(1e-300)).square().sum((1, 2))
    share = torch.where(whole > 0, held.square().sum(1) / whole.clamp_min(1e-300), 1.0)
    torch.testing.assert_close(found.energy.double(), share, atol=1e-6, rtol=0)


def same_bits(left, right, which=slice(None)):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a[which].view(torch.int32), b[which].view(torch.int32))


def test_a_falling_spectrum_through_the_filter():
    A = hard(24, 40)["graded to 1e-7"].float()[None]
    check(A.double(), narrow(A))


def test_a_random_matrix_at_the_default_accuracy():
    A = 1e30 * hard(56, 40)["random"].float()[None]
    check(A.double(), run(A, 4))


@pytest.mark.parametrize("shape", [(8, 12), (10, 6)], ids=["wide", "tall"])
def test_hard_matrices_as_wide_as_the_block(shape):
    several = hard(*shape)
    names = ("zero", "rank 1", "two repeated values", "denormal", "kahan")
    A = torch.stack([several[name].float() for name in names[: 5 if shape[0] == 8 else 2]])
    found = run(A, 8 if shape[0] == 8 else 4)
    check(A.double(), found)
    assert not found.S[0].any()
    assert found.energy[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(40, 60), (60, 40)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("rank", [1, 7, "all"])
def test_every_hard_matrix(shape, rank):
    rank = min(shape) if rank == "all" else rank
    A = torch.stack([m.float() for m in hard(*shape).values()])
    # 7 of 48: a block of 32, through the filter
    found = run(A, rank)
    check(A.double(), found)


@pytest.mark.slow
@pytest.mark.parametrize("accuracy", PRESETS)
def test_energy_of_packed_sparse(accuracy):
    operand = PackedSparse(*masked(2, 128, 96, 0.03))
    found = run(operand, 5, accuracy)
    A = materialise(operand)
    check(A, found, exact=accuracy == "tight")
    assert energy_ratio(A, found).min() >= ENERGY[accuracy]


def test_the_filter_finds_more_on_flat_spectra():
    operand = PackedSparse(*masked(1, 64, 56, 0.06))
    batch, A = SparseBatch.of(operand), materialise(operand)
    plain, filtered = (
        triton_path.sparse(batch, 4, Preset(passes, 4, 12, 1e-3), 0) for passes in (0, 2)
    )
    assert not filtered.status.any()
    missing, before = 1 - energy_ratio(A, filtered).item(), 1 - energy_ratio(A, plain).item()
    assert missing < 0.02
    assert missing < before / 20


def test_sparse_is_dense_and_seeds_count():
    operand = PackedSparse(*masked(1, 12, 10, 0.5))
    found = run(operand, 3)
    same_bits(found, run(operand, 3))
    dense = run(materialise(operand).float(), 3)
    torch.testing.assert_close(found.S, dense.S, atol=0, rtol=1e-5)
    other = run(operand, 3, seed=2**63 + 1)
    assert not torch.equal(found.U, other.U)
    torch.testing.assert_close(found.S, other.S, atol=0, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "sparse", "factored"])
def test_a_bad_matrix_spoils_itself_alone(kind):
    def both(bad):
        """Two matrices, the second with this entry."""
        generator = torch.Generator().manual_seed(3)
        if kind == "sparse":
            values, masks = masked(2, 10, 7, 0.5)
            values[1][5] = bad
            return run(PackedSparse(values, masks), 2)
        A = torch.randn(2, 6, 7, generator=generator)
        if kind == "dense":
            A[1, 2, 3] = bad
            return run(A, 2)
        B = torch.randn(2, 8, 6, generator=generator)
        B[1, 2, 3] = bad
        return run(FactoredSum(B, A), 2)

    good, bad = both(0.5), both(float("-inf") if kind == "dense" else float("nan"))
    assert not good.status.any()
    assert bad.status.tolist() == [0, NONFINITE]
    for part in bad[:4]:
        assert part[1].isnan().all()
    same_bits(bad, good, slice(0, 1))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_dtypes_and_strides(dtype):
    A = torch.randn(1, 9, 6).to(dtype)
    found = run(A.float(), 3)
    check(A.double(), found)
    wide = torch.zeros(6, 1, 18, dtype=dtype)
    wide[:, :, ::2] = A.permute(2, 0, 1)
    same_bits(found, run(wide[:, :, ::2].permute(1, 2, 0), 3))


@pytest.mark.parametrize("shape", [(1, 1), (7, 1)], ids=str)
def test_smallest_shapes(shape):
    A = torch.randn(1, *shape)
    check(A.double(), run(A, 1))
    B, A = torch.randn(1, shape[0], 2), torch.randn(1, 2, shape[1])
    check(B.double() @ A.double(), run(FactoredSum(B, A), 1))


def factors(name):
    """(B, A, weights) of a hard sum."""
    generator = torch.Generator().manual_seed(11)
    B = torch.randn(1, 14, 8, generator=generator)
    A = torch.randn(1, 8, 11, generator=generator)
    weights = None
    if name == "B is zero":
        B = 0 * B
    elif name == "graded":
        B = B * torch.logspace(0, -12, 8)
    elif name == "identical clients":
        B, A = torch.cat([B[..., :4]] * 2, 2), torch.cat([A[:, :4]] * 2, 1)
    elif name == "nearly equal clients":
        B = torch.cat([B[..., :4], B[..., :4] * (1 + 1e-6 * B[..., 4:])], 2)
    elif name == "small B beside A":
        B, A = 1e-20 * B, 1e15 * A
    elif name == "huge":
        B, A = 1e20 * B, 1e15 * A
    elif name == "weights of any sign":
        weights = torch.linspace(-1, 1.2, 8)
        weights[3] = 0
    elif name == "weights of each":
        weights = torch.rand(1, 8, generator=generator)
    elif name == "more than columns":
        A = A[..., :7]
    elif name == "more than rows and columns":
        B, A = B[:, :6], A[..., :7]
    return B, A, weights


QUICK = (
    "B is zero",
    "graded",
    "identical clients",
    "weights of any sign",
    "more than rows and columns",
)
OTHERS = (
    "random",
    "nearly equal clients",
    "small B beside A",
    "huge",
    "weights of each",
    "more than columns",
)


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_sums_of_factors(name):
    B, A, weights = factors(name)
    exact = B.double() @ A.double()
    if weights is not None:
        exact = (B.double() * weights.double().reshape(1, 1, -1)) @ A.double()
    check(exact, run(FactoredSum(B, A, weights), 4))


def test_a_sum_that_cancels_is_small():
    B, A, _ = factors("identical clients")
    weights = torch.ones(8)
    weights[4:] = -1
    found = run(FactoredSum(B, A, weights), 4)
    eye = torch.eye(4)
    most = 50 * 2.0**-23 * B.norm() * A.norm()
    assert found.S.max() <= most
    torch.testing.assert_close(found.U[0].mT @ found.U[0], eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.Vh[0] @ found.Vh[0].mT, eye, atol=1e-5, rtol=0)


def test_large_cores_go_through_the_range_finder(monkeypatch):
    monkeypatch.setattr(triton_path, "DIRECT", 8)
    monkeypatch.setattr(triton_path, "CORE", Preset(2, 8, 2, 0.0))
    B, A = torch.randn(1, 24, 20), torch.randn(1, 20, 22)
    check(B.double() @ A.double(), run(FactoredSum(B, A), 3))


def test_sketch_is_the_documented_one():
    seed = -(2**62) + 7
    found = launch_products.draw(launch_products.seed_tensor(seed, torch.device("cpu")), 37, 21)
    assert torch.equal(found, sketch(seed, 37, 21))


def test_factor_and_refilled_columns():
    """Three blocks of the factor kernel, split rows, and columns that depend on others."""
    generator = torch.Generator().manual_seed(5)
    X = torch.randn(1, 150, 70, generator=generator)
    X[..., 40] = X[..., 3] - 2 * X[..., 11]
    X[..., 69] = 0
    X[..., 5] *= 1e-20
    by = launchers.factor(X, launchers.GUARD, launchers.FINE)
    assert by.dropped[0].nonzero().flatten().tolist() == [40, 69]
    assert by.again.tolist() == [1]
    torch.testing.assert_close(by.length, X.double().norm(dim=1), atol=0, rtol=1e-14)
    kept = by.dropped[0] == 0
    R = by.R[0].double()
    G = X[0].double().T @ X[0].double()
    size = G.diagonal().sqrt().clamp_min(1e-30)
    error = (R.T @ R - G) / size[:, None] / size
    assert error.abs().max() < 1e-6
    assert torch.equal(R, R.triu())
    inverse = by.inverse[0].double()
    eye = ((inverse * size[:, None]) @ (R / size))[kept][:, kept]
    torch.testing.assert_close(eye, torch.eye(68, dtype=F64), atol=1e-5, rtol=0)

    orthonormal = triton_path.Orthonormal(launch_products.seed_tensor(9, X.device))
    Q = orthonormal.once(X, by)
    row, zero = torch.arange(150), torch.zeros(1, dtype=torch.int64)
    words = philox4x32((row, zero + 40 // 4, zero, zero + (REFILL << 24) + 1), zero + 9)
    drawn = (words[0].double() * 2.0**-31 - 1) * (3 / 150) ** 0.5
    torch.testing.assert_close(Q[0, :, 40].double(), drawn, atol=1e-7, rtol=0)
    Q, by = orthonormal.basis(X, launchers.FINE, 2)
    assert by[-1].again.tolist() == [0]
    error = Q[0].double().T @ Q[0].double() - torch.eye(70)
    assert error.norm() < 150 * 2.0**-23
    total = by[2].R.double() @ by[1].R.double() @ by[0].R.double()
    torch.testing.assert_close(Q[0].double() @ total[0], X[0].double(), atol=1e-5, rtol=0)


def test_filter_coefficients():
    """Of a flat, a falling and a deficient block."""
    values = torch.stack(
        [torch.linspace(1.5, 1.0, 20), torch.logspace(0, -0.5, 20), torch.logspace(0, -5, 20)]
    )
    several = [with_values(v, 32, 20, seed=g) for g, v in enumerate(values)]
    B = torch.stack([*several, 0 * several[0]]).float()
    seed = launch_products.seed_tensor(0, B.device)
    by = launchers.factor(B, launchers.GUARD)
    found, mode = launchers.filter_steps(by, seed, 8, 16.0)
    assert mode.tolist() == [0, 0, 1, 1]
    growth = [torch.acosh(2 * (v[0] / v[-1]) ** 2 - 1).item() for v in values[:2]]
    for g, each in enumerate(growth):
        degree = min(8, int(16 / each))
        assert degree == (8, 4)[g]
        c = 4 / found[g, 1, 0].item()  # the later steps' α is 2 / (c / 2)
        assert 1.0 <= c / values[g, -1].item() ** 2 < 1.15
        assert found[g, 0, :3].tolist() == [found[g, 1, 0] / 2, -1, 0]
        assert (found[g, 1:degree, 1:3] == torch.tensor([-2.0, -1.0])).all()
    for g, degree in enumerate((8, 4, 1, 1)):
        assert (found[g, degree:, :3] == torch.tensor([0.0, 1.0, 0.0])).all()
    assert (found[2:, 0, :3] == torch.tensor([1.0, 0.0, 0.0])).all()


def test_jacobi_in_memory_has_the_same_bits_and_caps_are_told(monkeypatch):
    R = torch.linalg.qr(torch.randn(2, 9, 9))[1].contiguous()
    R[1] = torch.diag(torch.linspace(2, 1, 9))
    u, status = launchers.jacobi(R, 5)
    in_memory, again = launchers.jacobi(R, 5, in_memory=True)
    assert torch.equal(u, in_memory)
    assert status.tolist() == again.tolist() == [0, 0]
    values = torch.linalg.svdvals(R.double())[:, :5]
    torch.testing.assert_close((u.double() @ R.double().mT).norm(dim=2), values)
    monkeypatch.setattr(launchers, "MOST_SWEEPS", 1)
    for in_memory in (False, True):
        _, status = launchers.jacobi(R, 5, in_memory=in_memory)
        assert status.tolist() == [NOT_CONVERGED, 0]


def test_the_bounds_can_fail():
    """What the checks compare, moved by little, is told from what is right."""
    A = hard(8, 12)["random"].float()[None]
    found = run(A, 6)
    check(A.double(), found)
    with pytest.raises(AssertionError):
        check(A.double(), found._replace(S=found.S * (1 + 1e-5)))
    with pytest.raises(AssertionError):
        check(A.double(), found._replace(U=found.U + 1e-3 * torch.randn_like(found.U)))
    turned = found.Vh @ orthogonal(12, 12, 5).float()
    with pytest.raises(AssertionError):
        check(A.double(), found._replace(Vh=turned))
