"""Identities of lowrank_linear and lowrank_add on the CPU: masks, folds, permutations."""

import pytest
import torch
from lowrank_cases import F64, NAMES, ON, TRAINED, Case, bits_equal, errors, make, run, truth

from fastrank.kernels.lowrank import lowrank_add, lowrank_linear
from fastrank.kernels.lowrank.reference import lowrank_linear as definition

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_add_is_the_branch_of_linear(p):
    case = make("bf16-fp32-adapters", keywords={"scale": 0.5, "dropout_p": p, "seed": 3})
    given_ = case.inputs()
    x, weight, bias, A, B = (given_[n] for n in NAMES[:5])
    base = torch.nn.functional.linear(x, weight, bias)
    for inplace in (False, True):
        y = lowrank_add(
            base.clone() if inplace else base, x, A, B, inplace=inplace, **case.keywords
        )
        expected = run(lowrank_linear, case)
        assert bits_equal(y.detach(), expected["y"])
        grads = torch.autograd.grad(
            y, [given_[n] for n in NAMES[:5]], case.dy().to(y.dtype), retain_graph=True
        )
        for name, grad in zip(NAMES, grads, strict=False):
            # dx is one rounded sum in linear, two parts that autograd adds here
            tolerance = 8e-3 if name == "x" else 0.0
            assert errors(grad, expected[f"d{name}"].to(F64))[0] <= tolerance, name


def compare_masks(case: Case, **changes):
    exact = truth(case)
    for name, value in run(lowrank_linear, case, **changes).items():
        assert errors(value, exact[name])[0] < 1e-6, name


@pytest.mark.parametrize("p", [0.0, 0.4], ids=["p0", "p0.4"])
@pytest.mark.parametrize("trainable", [None, TRAINED], ids=["all", "some"])
@pytest.mark.parametrize(
    "active",
    [None, ON, 0, 3, 8, torch.tensor(5), torch.zeros(8, dtype=torch.bool)],
    ids=["none", "mask", "prefix0", "prefix3", "prefix8", "tensor5", "off"],
)
def test_masks_against_float64(active, trainable, p):
    keywords = {"active": active, "trainable": trainable, "dropout_p": p}
    if p:
        keywords |= {"seed": 1, "row_ids": torch.arange(48) + 7}
    compare_masks(Case(with_e=True, keywords=keywords))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_ranks_that_are_off_never_show(backend, poison):
    case = Case(with_e=True, keywords={"active": ON, "backend": backend})
    clean, given_ = run(lowrank_linear, case), case.inputs()
    with torch.no_grad():
        given_["A"][~ON] = poison
        given_["B"][:, ~ON] = poison
        given_["e"][~ON] = poison
    spoiled = run(lowrank_linear, case, **given_)
    for name in clean:
        assert bits_equal(spoiled[name], clean[name]), name
    for grad in (spoiled["dA"][~ON], spoiled["dB"][:, ~ON], spoiled["de"][~ON]):
        assert grad.abs().sum() == 0.0


def test_identities_are_exact():
    plain = Case(with_e=True)
    expected = run(lowrank_linear, plain)
    for active in (torch.ones(8, dtype=torch.bool), 8, torch.tensor(8)):
        got = run(lowrank_linear, Case(with_e=True, keywords={"active": active}))
        assert all(bits_equal(got[n], expected[n]) for n in expected)

    # nothing on: the base's own bits
    given_ = plain.inputs()
    base = torch.nn.functional.linear(*(given_[n] for n in NAMES[:3]))
    off = run(lowrank_linear, Case(with_e=True, keywords={"active": 0}))
    assert bits_equal(off["y"], base.detach())
    zero_B = run(lowrank_linear, plain, B=torch.zeros_like(given_["B"]).requires_grad_())
    assert bits_equal(zero_B["y"], base.detach())


def test_same_bits_twice():
    for p in (0.0, 0.2):
        case = make("bf16-fp32-adapters", with_e=True, keywords={"dropout_p": p, "seed": 5})
        first, second = run(lowrank_linear, case), run(lowrank_linear, case)
        assert all(bits_equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_reference_free_identity(backend, p):
    """Σ_N B∘dB = Σ_K A∘dA = e∘de for every rank, whatever was dropped."""
    keywords = {"dropout_p": p, "seed": 8, "backend": backend, "scale": 0.6}
    case = Case(dtype=F64, adapters=F64, with_e=True, keywords=keywords)
    given_, got = case.inputs(), run(lowrank_linear, case)
    with torch.no_grad():
        from_B = (given_["B"] * got["dB"]).sum(0)
        from_A = (given_["A"] * got["dA"]).sum(1)
        from_e = given_["e"] * got["de"]
    torch.testing.assert_close(from_B, from_A, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(from_e, from_A, rtol=1e-11, atol=1e-12)


def test_zero_e_scores_a_rank():
    """Like no mask with e∘m, and de of a masked rank is what unmasking it would change."""
    case = Case(with_e=True)
    given_ = case.inputs()
    masked = (given_["e"].detach() * ON).requires_grad_()
    got = run(lowrank_linear, case, e=masked)
    off = run(lowrank_linear, Case(with_e=True, keywords={"active": ON}))
    assert errors(got["y"], off["y"].to(F64))[0] < 1e-6
    assert got["dA"][~ON].abs().sum() == 0.0
    assert got["dB"][:, ~ON].abs().sum() == 0.0
    assert (got["de"][~ON] != 0.0).all()
    exact = run(
        definition,
        Case(dtype=F64, adapters=F64, with_e=True),
        e=masked.detach().double().requires_grad_(),
    )
    assert errors(got["de"], exact["de"])[0] < 1e-6


def test_frozen_ranks_equal_a_folded_weight():
    """Trained ranks over W + s Σ b e a of the frozen ones, which read x without dropout."""
    ids = torch.arange(48)
    keywords = {"scale": 0.8, "dropout_p": 0.3, "seed": 2, "row_ids": ids}
    case = Case(dtype=F64, adapters=F64, with_e=True)
    given_ = case.inputs()
    A, B, e = (given_[n].detach() for n in ("A", "B", "e"))
    frozen = ~TRAINED
    delta = 0.8 * (B[:, frozen] * e[frozen]) @ A[frozen]
    folded = run(
        lowrank_linear,
        Case(dtype=F64, adapters=F64, with_e=True, keywords=keywords | {"active": TRAINED}),
        weight=(given_["weight"].detach() + delta).requires_grad_(),
    )
    got = run(
        lowrank_linear,
        Case(dtype=F64, adapters=F64, with_e=True, keywords=keywords | {"trainable": TRAINED}),
    )
    for name in ("y", "dx", "dA", "dB", "de", "dbias"):
        torch.testing.assert_close(got[name], folded[name], rtol=1e-11, atol=1e-11)


def test_permuting_ranks_permutes_gradients():
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    case = Case(dtype=F64, adapters=F64, with_e=True, keywords={"active": ON, "trainable": TRAINED})
    moved = Case(
        dtype=F64,
        adapters=F64,
        with_e=True,
        keywords={"active": ON[order], "trainable": TRAINED[order]},
    )
    given_ = case.inputs()
    changes = {
        "A": given_["A"].detach()[order].requires_grad_(),
        "B": given_["B"].detach()[:, order].requires_grad_(),
        "e": given_["e"].detach()[order].requires_grad_(),
    }
    plain, permuted = run(lowrank_linear, case), run(lowrank_linear, moved, **changes)
    for name, index in (("y", ...), ("dx", ...), ("dA", order), ("de", order)):
        torch.testing.assert_close(permuted[name], plain[name][index], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(permuted["dB"], plain["dB"][:, order], rtol=1e-11, atol=1e-12)
