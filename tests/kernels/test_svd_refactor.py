"""Servers' uses of the decomposition: new ranks, LoRAs from sparse updates, orthonormal factors."""

import pytest
import torch
from svd_cases import masked

from fastrank.kernels.packing import SparseMask
from fastrank.kernels.svd import FactoredSum, PackedSparse, refactor, reorthogonalise
from fastrank.kernels.svd.reference import materialise


def best(delta, rank):
    U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank], S[:rank].square().sum() / S.square().sum()


def sums(ranks=(3, 5, 2)):
    """Two modules, three clients of unequal rank."""
    shapes = {"q": (20, 16), "ffn": (30, 20)}
    pairs = {n: [(torch.randn(s[0], r), torch.randn(r, s[1])) for r in ranks]
             for n, s in shapes.items()}  # fmt: skip
    return {name: FactoredSum.of(pair, [0.5, 0.3, 0.2]) for name, pair in pairs.items()}


@pytest.mark.parametrize("split", ["B", "balanced"])
@pytest.mark.parametrize("scaling", [1.0, 2.5, -0.5])
def test_sums_at_a_new_rank(split, scaling):
    updates = sums()
    found = refactor(updates, {"q": 4, "ffn": 2}, scaling=scaling, split=split)
    for name, rank in (("q", 4), ("ffn", 2)):
        B, A, energy = found[name]
        wanted, share = best(materialise(updates[name])[0], rank)
        torch.testing.assert_close(scaling * (B @ A).double(), wanted, rtol=1e-5, atol=1e-5)
        assert float(energy) == pytest.approx(float(share), rel=1e-5)
        if split == "B":
            torch.testing.assert_close(A @ A.T, torch.eye(rank), atol=1e-5, rtol=0)
        else:
            torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1))


def test_a_sparse_update_as_a_lora():
    """SLoRA's switch: s B A is the truncation, and the energy it keeps is told."""
    values, masks = masked(1, 96, 64, 0.05)
    (low,) = refactor({"w": PackedSparse(values, masks)}, 8, scaling=2.0).values()
    delta = materialise(PackedSparse(values, masks))[0]
    wanted, share = best(delta, 8)
    got = 2.0 * (low.B @ low.A).double()
    assert float(low.energy) == pytest.approx(float(share), rel=1e-3)
    # the truncation itself: as near to the update as the best one is
    assert (delta - got).norm() <= (1 + 1e-3) * (delta - wanted).norm()


@pytest.mark.parametrize("split", ["B", "balanced"])
def test_nothing_learnt_keeps_a_module_alive(split):
    mask = SparseMask((24, 16), 0.1)
    kept = torch.randn(4, 16)
    update = {"w": PackedSparse([torch.zeros(mask.nnz)], [mask])}
    low = refactor(update, 4, split=split, keep={"w": kept})["w"]
    assert (low.B == 0).all()
    assert torch.equal(low.A, kept)
    low = refactor(update, 4, split=split)["w"]
    torch.testing.assert_close(low.A @ low.A.T, torch.eye(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("split", ["B", "balanced"])
def test_shrinking_from_rank_deficient_factors_keeps_seeded_rows(split):
    """B of rank 3: two rows of A stay as they were seeded, the others hold the product."""
    B, A = torch.randn(20, 3) @ torch.randn(3, 6), torch.randn(6, 16)
    update = {"w": FactoredSum(B[None], A[None])}
    low = refactor(update, 5, split=split, keep={"w": A[:5]})["w"]
    torch.testing.assert_close(low.B @ low.A, B @ A, rtol=1e-4, atol=1e-4)
    assert torch.equal(low.A[3:], A[3:5])
    assert (low.B[:, 3:] == 0).all()


def test_orthonormal_again_with_the_same_product():
    drifted = {f"m{i}": (torch.randn(20 + i, 5), torch.randn(5), torch.randn(5, 16))
               for i in range(3)}  # fmt: skip
    drifted["m1"][1][2] = 0.0
    for name, (B, e, A) in reorthogonalise(drifted).items():
        b, d, a = drifted[name]
        torch.testing.assert_close((B * e) @ A, (b * d) @ a, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(B.T @ B, torch.eye(5), atol=1e-5, rtol=0)
        torch.testing.assert_close(A @ A.T, torch.eye(5), atol=1e-5, rtol=0)
        assert (e >= 0).all()


def test_parameters_may_require_grad():
    B, e, A = (torch.randn(s).requires_grad_() for s in ((9, 3), (3,), (3, 8)))
    found = reorthogonalise({"m": (B, e, A)})["m"]
    assert not any(part.requires_grad for part in found)


BAD = [
    (lambda: refactor(sums(), 4, split="A"), ValueError, "'A'.*balanced"),
    (lambda: refactor(sums(), 4, scaling=0.0), ValueError, "scaling is 0.0"),
    (lambda: refactor(sums(), {"q": 4}), ValueError, "ffn"),
    (lambda: refactor(sums(), {"q": 4, "ffn": 21}), ValueError, "ffn: rank 21"),
    (lambda: refactor({"w": torch.randn(2, 5, 4)}, 2), ValueError, "w is a batch of 2"),
    (lambda: refactor({"w": torch.full((5, 4), torch.nan)}, 2), ArithmeticError, "w: .*NaN"),
    (lambda: refactor({"w": torch.zeros(5, 4)}, 2, keep={"w": torch.ones(2, 5)}), ValueError,
     r"\[2, 5\].*\[2, 4\]"),
    (lambda: reorthogonalise({"m": (torch.randn(5, 2), torch.randn(3), torch.randn(2, 4))}),
     ValueError, r"m: B \[5, 2\], e \[3\]"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
