"""Truncated SVD on the CPU: hard matrices, flat spectra, factors, packed values, bad input."""

import pytest
import torch
from svd_cases import MOST, MOST_SIGMA, energy_ratio, hard, masked, orthogonal, ratios, with_values

from fastrank.kernels.packing import SparseMask
from fastrank.kernels.svd import (
    NONFINITE,
    PRESETS,
    FactoredSum,
    PackedSparse,
    TruncatedSVD,
    truncated_svd,
    truncated_svd_many,
)
from fastrank.kernels.svd.operators import Dense, Factored, Sparse
from fastrank.kernels.svd.plain import _by_range
from fastrank.kernels.svd.reference import materialise
from fastrank.kernels.svd.sketch import sketch
from fastrank.kernels.svd.sparse import SparseBatch

SHAPES = [(96, 64), (64, 96), (40, 40)]
NAMES = list(hard(4, 4))
ENERGY = {"fast": 0.98, "default": 0.999, "tight": 0.99999}


def check(A, found, *, exact=True, dtype=torch.float32):
    """Within LAPACK's bounds. exact: also every singular value, not the energy alone."""
    assert not found.status.any()
    got = ratios(A, found, dtype)
    assert got["orthogonal"] < MOST
    assert got["residual"] < MOST
    assert got["excess"] < MOST
    if exact:
        assert got["sigma"] < MOST_SIGMA
    S = found.S
    assert (S >= 0).all()
    assert (S[:, 1:] <= S[:, :-1]).all()
    at = found.U.abs().argmax(1, keepdim=True)
    assert (found.U.gather(1, at) > 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("rank", [1, 6, "all"])
def test_hard_matrices_as_lapack_asks(shape, rank):
    rank = min(shape) if rank == "all" else rank
    A = torch.stack([m.float() for m in hard(*shape).values()])
    found = truncated_svd(A, rank, check=True)
    check(A.double(), found)
    energy = found.S.double().square().sum(1) / A.double().square().sum((1, 2)).clamp_min(1e-300)
    nonzero = A.double().abs().amax((1, 2)) > 1e-30  # squares of smaller ones underflow
    torch.testing.assert_close(found.energy.double()[nonzero], energy[nonzero], atol=0, rtol=1e-5)
    assert found.energy[NAMES.index("zero")] == 1


@pytest.mark.parametrize("name", NAMES)
def test_hard_matrices_through_the_range_finder(name):
    """160 x 240 at rank 6: the block is a small part, so nothing goes to LAPACK whole."""
    A = hard(160, 240)[name].float()[None]
    found = truncated_svd(A, 6, check=True)
    # values of a flat spectrum aren't resolved one by one, by design: their energy is
    check(A.double(), found, exact=name not in ("random", "tiny", "denormal", "huge",
                                                "empty rows and columns"))  # fmt: skip
    assert energy_ratio(A.double(), found).min() > 0.999 or name == "zero"


@pytest.mark.parametrize("accuracy", PRESETS)
def test_energy_of_packed_sparse(accuracy):
    values, masks = masked(3, 256, 192, 0.02)
    operand = PackedSparse(values, masks)
    found = truncated_svd(operand, 8, accuracy=accuracy, check=True)
    A = materialise(operand)
    check(A, found, exact=False)
    assert energy_ratio(A, found).min() >= ENERGY[accuracy]


def test_energy_levels_differ():
    """A level that reached the next one's energy anyway would only cost time."""
    values, masks = masked(2, 512, 512, 0.01, seed=4)
    operand = PackedSparse(values, masks)
    A = materialise(operand)
    missing = [
        float((1 - energy_ratio(A, truncated_svd(operand, 8, accuracy=a))).max()) for a in PRESETS
    ]
    assert missing[0] > 10 * missing[1]
    assert missing[1] > 3 * missing[2]


@pytest.mark.parametrize("Q", [4, 24, 64, 90])
@pytest.mark.parametrize("weights", [None, "shared", "each"])
def test_factored(Q, weights):
    """Also more columns than the matrix has (90 over 64)."""
    G, N, K = 3, 96, 64
    B, A = torch.randn(G, N, Q), torch.randn(G, Q, K)
    A[1] *= 1e-4
    w = {None: None, "shared": torch.randn(Q), "each": torch.randn(G, Q)}[weights]
    operand = FactoredSum(B, A, w)
    found = truncated_svd(operand, 8, check=True)
    check(materialise(operand), found, exact=Q <= 64)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, -0.5), (0.0, 0.0), (1e-12, 1.0)])
def test_factored_that_are_the_same_or_nothing(weights):
    """Exactly rank-deficient stacks."""
    B, A = torch.randn(48, 4), torch.randn(4, 40)
    operand = FactoredSum.of([(B, A), (B.clone(), A.clone())], weights)
    found = truncated_svd(operand, 12, check=True)
    A = materialise(operand)
    check(A, found)


def test_factored_that_cancel():
    """What is left of two equal clients, one subtracted, is rounding of float64."""
    B, A = torch.randn(48, 4), torch.randn(4, 40)
    found = truncated_svd(FactoredSum.of([(B, A), (B, A)], [1.0, -1.0]), 6, check=True)
    assert found.S.max() < 1e-12 * B.norm() * A.norm()
    for factor in (found.U[0], found.Vh[0].T):
        torch.testing.assert_close(factor.T @ factor, torch.eye(6))


def test_factored_with_B_zero_keeps_orthonormal_factors():
    """A LoRA before its first step."""
    operand = FactoredSum(torch.zeros(2, 32, 4), torch.randn(2, 4, 24))
    found = truncated_svd(operand, 6, check=True)
    assert (found.S == 0).all()
    assert (found.energy == 1).all()
    check(materialise(operand), found)
    B, A = found.factors()
    assert (B == 0).all()
    assert B.shape == (2, 32, 6)
    assert A.shape == (2, 6, 24)


def test_factored_graded_over_eighteen_decades():
    """Factors of very different size: products of their entries would underflow in fp32."""
    scale = 10.0 ** -torch.linspace(0, 9, 16)
    B, A = orthogonal(64, 16, 0)[None].float(), orthogonal(48, 16, 1).T[None].float()
    operand = FactoredSum(B * scale * 1e-9, A * scale[:, None] * 1e-9)
    check(materialise(operand), truncated_svd(operand, 16, check=True))


def test_factored_never_forms_the_matrix():
    """20,000 x 20,000 would be 3.2 GB in float64."""
    B, A = torch.randn(1, 20_000, 4), torch.randn(1, 4, 20_000)
    with torch.profiler.profile(profile_memory=True) as trace:
        found = truncated_svd(FactoredSum(B, A), 4)
    largest = max(abs(e.self_cpu_memory_usage) for e in trace.key_averages())
    assert largest < 64 << 20
    torch.testing.assert_close((found.U * found.S[:, None]) @ found.Vh[:, :, :7], B @ A[:, :, :7],
                               rtol=1e-4, atol=1e-4)  # fmt: skip


def test_of_pairs_with_different_ranks():
    pairs = [(torch.randn(20, r), torch.randn(r, 30)) for r in (2, 5, 0, 1)]
    operand = FactoredSum.of(pairs, [0.5, 2.0, 1.0, -1.0])
    wanted = sum(w * b @ a for w, (b, a) in zip([0.5, 2.0, 1.0, -1.0], pairs, strict=True))
    torch.testing.assert_close(materialise(operand)[0].float(), wanted)
    assert operand.shape == (1, 20, 30)


@pytest.mark.parametrize("scheme", ["stratified", "bernoulli"])
def test_products_of_packed_sparse(scheme):
    masks = [SparseMask((37, 53), 0.1, seed=g, scheme=scheme) for g in range(3)]
    operand = PackedSparse([torch.randn(m.nnz) for m in masks], masks)
    sparse, A = Sparse(SparseBatch.of(operand)), materialise(operand)
    A = A / sparse.scale[:, None, None]
    X, Y = torch.randn(3, 53, 5), torch.randn(3, 37, 5)
    torch.testing.assert_close(sparse.apply(X).double(), A @ X.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sparse.apply_t(Y).double(), A.mT @ Y.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sparse.norm2(), A.square().sum((1, 2)))


def test_products_of_a_factored_sum():
    operand = FactoredSum(torch.randn(2, 9, 30), torch.randn(2, 30, 7), torch.randn(30))
    factored, A = Factored(operand), materialise(operand)
    A = A / factored.scale[:, None, None]
    X, Y = torch.randn(2, 7, 3).double(), torch.randn(2, 9, 3).double()
    torch.testing.assert_close(factored.apply(X), A @ X)
    torch.testing.assert_close(factored.apply_t(Y), A.mT @ Y)
    torch.testing.assert_close(factored.norm2(), A.square().sum((1, 2)))


def test_packed_sparse_smaller_than_the_block():
    values, masks = masked(2, 10, 6, 0.25)
    operand = PackedSparse(values, masks)
    check(materialise(operand), truncated_svd(operand, 6, check=True))


@pytest.mark.parametrize("kind", ["dense", "whole", "factored", "packed"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_matrix_that_is_not_finite_spoils_itself_alone(kind, bad):
    G = 4

    def operand(spoiled: bool):
        torch.manual_seed(0)
        if kind in ("dense", "whole"):
            n = 40 if kind == "whole" else 160
            A = torch.randn(G, n, n)
            if spoiled:
                A[2, 3, 5] = bad
            return A
        if kind == "factored":
            B, A = torch.randn(G, 40, 6), torch.randn(G, 6, 30)
            if spoiled:
                B[2, 1, 1] = bad
            return FactoredSum(B, A)
        values, masks = masked(G, 160, 160, 0.05)
        if spoiled:
            values[2][7] = bad
        return PackedSparse(values, masks)

    clean, spoiled = truncated_svd(operand(False), 4), truncated_svd(operand(True), 4)
    assert spoiled.status.tolist() == [0, 0, NONFINITE, 0]
    for whole, part in zip(clean[:4], spoiled[:4], strict=True):
        assert part[2].isnan().all()
        rest = [0, 1, 3]
        assert torch.equal(part[rest], whole[rest])
    with pytest.raises(ArithmeticError, match="matrix 2 holds NaN or Inf"):
        truncated_svd(operand(True), 4, check=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["dense", "factored", "packed"])
def test_dtypes(kind, dtype):
    if kind == "dense":
        operand = torch.randn(2, 40, 30).to(dtype)
    elif kind == "factored":
        operand = FactoredSum(torch.randn(2, 40, 6).to(dtype), torch.randn(2, 6, 30).to(dtype))
    else:
        values, masks = masked(2, 40, 30, 0.25)
        operand = PackedSparse([v.to(dtype) for v in values], masks)
    found = truncated_svd(operand, 3, check=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {part.dtype for part in found[:4]} == {wide}
    assert found.status.dtype == torch.int32
    check(materialise(operand), found, exact=kind != "packed", dtype=wide)


def test_same_bits_twice_and_other_seeds():
    values, masks = masked(2, 200, 150, 0.03)
    operand = PackedSparse(values, masks)
    once, again = truncated_svd(operand, 5, seed=3), truncated_svd(operand, 5, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    other = truncated_svd(operand, 5, seed=4)
    assert not torch.equal(once.U, other.U)
    torch.testing.assert_close(once.S, other.S, rtol=1e-2, atol=0)


def test_a_matrix_does_not_depend_on_its_batch():
    values, masks = masked(3, 160, 160, 0.05)
    batch = truncated_svd(PackedSparse(values, masks), 5)
    for g in range(3):
        alone = truncated_svd(PackedSparse(values[g : g + 1], masks[g : g + 1]), 5)
        torch.testing.assert_close(alone.U[0], batch.U[g], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(alone.S[0], batch.S[g], rtol=1e-5, atol=0)


def test_strided_operands_are_read_not_changed():
    A = torch.randn(30, 2, 40).permute(1, 2, 0)
    before = A.clone()
    found = truncated_svd(A, 4)
    assert torch.equal(A, before)
    same = truncated_svd(A.contiguous(), 4)
    torch.testing.assert_close(found.S, same.S)


def test_many_equals_one_by_one():
    values, masks = masked(2, 32, 24, 0.25)
    operands = [
        torch.randn(20, 30),
        FactoredSum(torch.randn(1, 20, 4), torch.randn(1, 4, 30)),
        torch.randn(2, 20, 30),
        PackedSparse(values, masks),
        FactoredSum(torch.randn(2, 20, 4), torch.randn(2, 4, 30)),
        torch.randn(12, 9),
        FactoredSum(torch.randn(1, 20, 4), torch.randn(1, 4, 30), torch.randn(4)),
        FactoredSum(torch.randn(1, 20, 4), torch.randn(1, 4, 30), torch.randn(1, 4)),
    ]
    ranks = [3, 3, 3, 4, 3, 2, 3, 3]
    many = truncated_svd_many(operands, ranks, check=True)
    for operand, rank, found in zip(operands, ranks, many, strict=True):
        operand = (
            operand[None] if isinstance(operand, torch.Tensor) and operand.ndim == 2 else operand
        )
        alone = truncated_svd(operand, rank)
        for one, other in zip(alone[:4], found[:4], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert truncated_svd_many([], 3) == []


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0)])
def test_nothing_to_decompose(shape):
    found = truncated_svd(torch.zeros(shape), 3)
    rank = min(3, *shape[1:])
    assert [tuple(p.shape) for p in found] == [
        (shape[0], shape[1], rank), (shape[0], rank), (shape[0], rank, shape[2]), (shape[0],),
        (shape[0],),
    ]  # fmt: skip


def test_one_by_one_and_vectors():
    A = torch.tensor([[[-3.0]]])
    found = truncated_svd(A, 1, check=True)
    assert found.U.item() == 1
    assert found.S.item() == 3
    assert found.Vh.item() == -1
    row = torch.tensor([[[3.0, 0.0, -4.0]]])
    check(row.double(), truncated_svd(row, 1, check=True))
    check(row.mT.double(), truncated_svd(row.mT, 1, check=True))


def test_reference_is_lapacks():
    operand = FactoredSum(torch.randn(2, 30, 5), torch.randn(2, 5, 20))
    found = truncated_svd(operand, 5, backend="reference")
    S = torch.linalg.svdvals(materialise(operand))[:, :5]
    torch.testing.assert_close(found.S.double(), S, rtol=1e-6, atol=0)
    check(materialise(operand), found)


def test_sketch_words_are_philoxs():
    from fastrank.kernels.common import philox4x32

    omega = sketch(2**63 + 5, 6, 7)
    counter = tuple(torch.tensor(c) for c in (4, 1, 0, 3 << 24))
    words = philox4x32(counter, torch.tensor(5 - 2**63))
    assert omega[4, 5] == (words[1].double() * 2.0**-31 - 1).float()
    assert omega.shape == (6, 7)
    assert torch.equal(sketch(1, 9, 12)[:, :5], sketch(1, 9, 5))


def test_fast_decay_uses_a_small_degree_and_still_converges():
    """Half a decade a direction: a high degree would leave one direction in the block."""
    A = with_values(10.0 ** -torch.arange(60.0).mul(0.5), 300, 200)[None].float()
    found = _by_range_of(A, 12)
    check(A.double(), found)


def _by_range_of(A, rank) -> TruncatedSVD:
    found = _by_range(Dense(A), rank, PRESETS["default"], 0)
    return TruncatedSVD(*(p.float() for p in found[:4]), found.status)


BAD = [
    (lambda: truncated_svd(torch.randn(2, 5, 4), 5), ValueError, r"rank 5.*\[2, 5, 4\].*= 4"),
    (lambda: truncated_svd(torch.randn(2, 5, 4), 0), ValueError, "rank 0"),
    (lambda: truncated_svd(torch.randn(2, 5, 4), 2.0), TypeError, "rank is 2.0"),
    (lambda: truncated_svd(torch.randn(5, 4), 2), ValueError, r"\[5, 4\].*operand\[None\]"),
    (lambda: truncated_svd(torch.ones(2, 5, 4).int(), 2), TypeError, "int32"),
    (lambda: truncated_svd([1], 2), TypeError, "list"),
    (lambda: truncated_svd(torch.randn(2, 5, 4).requires_grad_(), 2), ValueError, "detach"),
    (lambda: truncated_svd(torch.randn(2, 5, 4), 2, accuracy="best"), ValueError, "'best'.*fast"),
    (lambda: truncated_svd(torch.randn(2, 5, 4), 2, seed=2**64), ValueError, "64 bits"),
    (lambda: truncated_svd(torch.randn(2, 5, 4), 2, backend="cuda"), ValueError, "unknown backend"),
    (lambda: FactoredSum(torch.randn(1, 5, 3), torch.randn(1, 2, 4)), ValueError,
     r"\[1, 5, 3\].*Q = 3.*\[1, 2, 4\].*2"),
    (lambda: FactoredSum(torch.randn(5, 3), torch.randn(3, 4)), ValueError, r"B\[None\]"),
    (lambda: FactoredSum(torch.randn(2, 5, 3), torch.randn(1, 3, 4)), ValueError, "2 matrices"),
    (lambda: FactoredSum(torch.randn(1, 5, 3), torch.randn(1, 3, 4), torch.randn(4)), ValueError,
     r"\[4\].*\[3\]"),
    (lambda: FactoredSum(torch.randn(1, 5, 3), torch.randn(1, 3, 4).double()), TypeError,
     "float64"),
    (lambda: FactoredSum(torch.ones(1, 5, 3).int(), torch.ones(1, 3, 4).int()), TypeError, "int32"),
    (lambda: FactoredSum.of([]), ValueError, "at least one"),
    (lambda: FactoredSum.of([(torch.randn(5, 3), torch.randn(2, 4))]), ValueError, "pair 0"),
    (lambda: FactoredSum.of([(torch.randn(5, 3), torch.randn(3, 4))], [1, 2]), ValueError,
     "2 weights"),
    (lambda: PackedSparse([], []), ValueError, "at least one"),
    (lambda: PackedSparse([torch.randn(3)], [SparseMask((10, 10), 0.1)]), ValueError,
     r"values\[0\] has shape \[3\].*keeps 10"),
    (lambda: PackedSparse([torch.ones(10).int()], [SparseMask((10, 10), 0.1)]), TypeError, "int32"),
    (lambda: PackedSparse([torch.randn(10)] * 2,
                          [SparseMask((10, 10), 0.1), SparseMask((5, 20), 0.1)]), ValueError,
     "truncated_svd_many"),
    (lambda: PackedSparse([torch.randn(10)], [SparseMask((100,), 0.1)]), ValueError,
     "two dimensions"),
    (lambda: truncated_svd_many([torch.randn(5, 4), torch.randn(3, 3)], [2, 4]), ValueError,
     "operand 1"),
    (lambda: truncated_svd_many([torch.randn(5, 4)], [2, 2]), ValueError, "2 ranks for 1"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_says_what_is_wrong(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
