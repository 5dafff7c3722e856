"""lowrank_linear and lowrank_add on the CPU: every output and gradient, and the op's identities.

"CPU path" is backend="auto" here; "reference" is the definition it is compared with.
"""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank_cases import (
    BF16,
    F32,
    F64,
    FLOOR,
    FP16,
    NAMES,
    RATIO,
    Case,
    assert_as_good_as,
    bits_equal,
    errors,
    peft,
    run,
    truth,
)

from fastrank.kernels.lowrank import addmm, lowrank_add, lowrank_linear
from fastrank.kernels.lowrank.reference import lowrank_linear as definition

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# (x and weight, adapters, autocast): PEFT's precision modes
MODES = {
    "fp32": (F32, F32, None),
    "bf16": (BF16, BF16, None),
    "fp16": (FP16, FP16, None),
    "bf16-fp32-adapters": (BF16, F32, None),
    "fp16-fp32-adapters": (FP16, F32, None),
    "autocast-bf16": (F32, F32, BF16),
    "autocast-bf16-model": (BF16, F32, BF16),
    "fp64": (F64, F64, None),
}


def make(mode: str, **changes) -> Case:
    dtype, adapters, autocast = MODES[mode]
    return Case(dtype=dtype, adapters=adapters, autocast=autocast, **changes)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("with_e", [False, True], ids=["plain", "e"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["p0", "p0.3"])
@pytest.mark.parametrize("mode", MODES)
def test_error_is_at_most_pefts(mode, p, with_e, backend):
    """y and all gradients against float64; row ids make every path draw the same elements."""
    keywords = {"scale": 1.7, "dropout_p": p}
    if p:
        keywords |= {"seed": 12, "row_ids": torch.arange(150) * 3}
    case = make(mode, M=150, K=136, N=120, R=12, with_e=with_e, keywords=keywords)

    def ours(*arguments, **keywords):
        return lowrank_linear(*arguments, backend=backend, **keywords)

    assert_as_good_as(run(ours, case), run(peft, case), truth(case))


def test_the_comparison_can_fail():
    case = make("fp32")
    exact, baseline, spoiled = truth(case), run(peft, case), run(lowrank_linear, case)
    spoiled["dA"] = spoiled["dA"] * (1 + 1e-5)
    with pytest.raises(AssertionError, match="dA: Frobenius"):
        assert_as_good_as(spoiled, baseline, exact)


def test_a_rounded_branch_leaves_the_digits_of_a_wider_base():
    x, A = torch.randn(30, 16), torch.randn(3, 16)
    base, B = torch.randn(30, 20), torch.zeros(20, 3)
    B[:10] = torch.randn(10, 3)
    with torch.autocast("cpu", BF16):
        y = lowrank_add(base, x, A, B)
        branch = lowrank_add(torch.zeros(30, 20), x, A, B)
    assert torch.equal(y[:, 10:], base[:, 10:])
    assert torch.allclose(y - base, branch, atol=1e-5)


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


ON = torch.tensor([1, 0, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
TRAINED = torch.tensor([0, 1, 1, 1, 0, 1, 1, 1], dtype=torch.bool)


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


SUBSETS = [s for n in range(7) for s in itertools.combinations(NAMES, n)]


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["p0", "p0.3"])
def test_every_subset_of_gradients(p):
    """What is asked for equals what a full backward gives, for all 64 subsets."""
    case = Case(M=9, K=12, N=10, R=3, with_e=True, keywords={"dropout_p": p, "seed": 4})
    full = run(lowrank_linear, case)
    for subset in SUBSETS:
        given_ = {n: t.detach().requires_grad_(n in subset) for n, t in case.inputs().items()}
        if not subset:
            y = lowrank_linear(*(given_[n] for n in NAMES[:5]), e=given_["e"], **case.keywords)
            assert not y.requires_grad
            continue
        got = run(lowrank_linear, case, **given_)
        assert got.keys() == {"y", *(f"d{n}" for n in subset)}
        for name, value in got.items():
            assert errors(value, full[name].to(F64))[0] < 1e-6, (subset, name)


def test_strides_of_every_operand():
    """Transposed, sliced and overlapping operands, and dy as .sum() and slices send it."""
    case = Case(with_e=True, keywords={"scale": 0.5})
    given_, expected = case.inputs(), run(lowrank_linear, case)
    changes = {
        "x": torch.cat([given_["x"], given_["x"]], 1)[:, : case.K],
        "weight": given_["weight"].T.contiguous().T,
        "A": given_["A"].T.contiguous().T,
        "B": torch.stack([given_["B"], given_["B"]], -1)[..., 0],
        "e": torch.stack([given_["e"], given_["e"]], -1)[:, 0],
    }
    changes = {n: t.detach().requires_grad_() for n, t in changes.items()}
    assert not any(t.is_contiguous() for t in changes.values())
    for name, value in run(lowrank_linear, case, **changes).items():
        assert errors(value, expected[name].to(F64))[0] < 1e-6, name

    leaves = [given_[n] for n in NAMES]
    y = lowrank_linear(*leaves[:5], e=leaves[5], scale=0.5)
    dense = torch.arange(y.numel(), dtype=F32).view(y.shape).remainder(7.0)
    for dy in (
        torch.ones(()).expand(y.shape),
        dense.T.contiguous().T,
        torch.cat([dense, dense], 1)[:, : case.N],
    ):
        got = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        exact = torch.autograd.grad(y, leaves, dy.contiguous(), retain_graph=True)
        for name, a, b in zip(NAMES, got, exact, strict=True):
            assert errors(a, b.to(F64))[0] < 1e-6, name


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (2, 1, 3, 40), (0, 40), (2, 0, 40)])
@pytest.mark.parametrize("R", [0, 1, 5])
def test_dimensions_and_empty_inputs(shape, R):
    case = Case(R=R, with_e=True)
    given_ = case.inputs()
    x = torch.randn(*shape).requires_grad_()
    leaves = [x, *(given_[n] for n in NAMES[1:])]
    results = []
    for backend in ("auto", "reference"):
        y = lowrank_linear(*leaves[:5], e=leaves[5], dropout_p=0.2, seed=1, backend=backend)
        assert y.shape == (*shape[:-1], case.N)
        grads = torch.autograd.grad(y, leaves, torch.ones(()).expand(y.shape), allow_unused=True)
        results.append([y, *grads])
    for leaf, ours, exact in zip([y, *leaves], *results, strict=True):
        assert ours.shape == leaf.shape
        assert ours.isfinite().all()
        if R == 0 or x.numel() == 0:
            exact = torch.zeros(leaf.shape) if exact is None else exact
            assert errors(ours, exact.to(F64))[0] < 1e-6


@settings(max_examples=40, deadline=None)
@given(
    M=st.integers(1, 70),
    K=st.integers(1, 70),
    N=st.integers(1, 70),
    R=st.integers(1, 40),
    mode=st.sampled_from(["fp32", "bf16", "bf16-fp32-adapters", "autocast-bf16"]),
    with_e=st.booleans(),
    with_bias=st.booleans(),
    dropped=st.booleans(),
    data=st.data(),
)
def test_any_shape(M, K, N, R, mode, with_e, with_bias, dropped, data):
    """Against float64 at the coarsest dtype's rounding: no shape, mask or dtype is special."""
    keywords = {"scale": 0.9}
    if dropped:
        keywords |= {"dropout_p": 0.5, "seed": M, "row_ids": torch.arange(M) + K}
    if data.draw(st.booleans(), label="masked"):
        bits = data.draw(st.lists(st.booleans(), min_size=R, max_size=R), label="active")
        keywords["active"] = torch.tensor(bits)
        bits = data.draw(st.lists(st.booleans(), min_size=R, max_size=R), label="trainable")
        keywords["trainable"] = torch.tensor(bits)
    case = make(
        mode, M=M, K=K, N=N, R=R, with_e=with_e, with_bias=with_bias, keywords=keywords, seed=R
    )
    exact = truth(case)
    for name, value in run(lowrank_linear, case).items():
        bound = 1e-5 if mode == "fp32" else 2e-2
        difference = (value.to(F64) - exact[name]).norm()
        # measured against the gradient's own size, or a unit where cancellation leaves nothing
        unit = 1.0
        if name == "de" and mode in ("bf16", "autocast-bf16") and addmm.bf16_units():
            # of bf16 products: M terms of about (N / R) ** 0.5, each rounded
            unit = max((M * N / max(R, 1)) ** 0.5, 1.0)
        assert difference <= bound * max(exact[name].norm(), unit), name


def test_cpu_dropout_follows_its_mask():
    """The fast draw: deterministic in the seed, right in the mean, and what y is computed from."""
    M, K, N, R, p = 64, 50, 30, 6, 0.3
    case = Case(M=M, K=K, N=N, R=R, dtype=F64, adapters=F64, keywords={"dropout_p": p, "seed": 77})
    given_ = {n: t for n, t in case.inputs().items() if n != "e"}
    base = torch.nn.functional.linear(*(given_[n] for n in NAMES[:3]))
    x, A, B = given_["x"].detach(), given_["A"].detach(), given_["B"].detach()
    y = lowrank_linear(*given_.values(), **case.keywords)

    # the identity adapters show the dropped input itself
    probe = lowrank_add(
        torch.zeros(M, K, dtype=F64), x, torch.eye(K, dtype=F64), torch.eye(K, dtype=F64),
        dropout_p=p, seed=77,
    )  # fmt: skip
    kept = probe != 0.0
    assert abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
    factor = probe[kept] / x[kept]
    # p is rounded to a multiple of 2**-16 and the factor goes with it
    torch.testing.assert_close(factor, torch.full_like(factor, 1 / (1 - p)), rtol=2e-5, atol=0)
    torch.testing.assert_close(y - base, probe @ A.T @ B.T, rtol=1e-11, atol=1e-12)
    (dx,) = torch.autograd.grad(y - base, given_["x"], torch.ones(()).double().expand(M, N))
    dropped_share = (torch.ones(M, N, dtype=F64) @ B @ A) * kept * factor.mean()
    torch.testing.assert_close(dx, dropped_share, rtol=1e-9, atol=1e-12)
    other = lowrank_linear(*given_.values(), dropout_p=p, seed=78)
    assert not torch.equal(y, other)


def test_gradcheck_of_the_definition():
    case = Case(M=4, K=5, N=3, R=4, dtype=F64, adapters=F64)
    leaves = [t for n, t in case.inputs().items() if n != "e"]
    e = torch.randn(4, dtype=F64).requires_grad_()
    keywords = {
        "active": torch.tensor([1, 1, 0, 1], dtype=torch.bool),
        "dropout_p": 0.3,
        "seed": 3,
        "scale": 1.3,
    }
    assert torch.autograd.gradcheck(lambda *t: definition(*t[:5], e=t[5], **keywords), [*leaves, e])


def test_gradcheck_of_the_cpu_path():
    case = Case(M=4, K=5, N=3, R=4, dtype=F64, adapters=F64, with_e=True)
    leaves = list(case.inputs().values())
    keywords = {"active": torch.tensor([0, 1, 1, 1], dtype=torch.bool), "dropout_p": 0.3, "seed": 3}
    assert torch.autograd.gradcheck(lambda *t: lowrank_linear(*t[:5], e=t[5], **keywords), leaves)


@pytest.mark.parametrize("units", [True, False], ids=["bf16-units", "no-bf16-units"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["p0", "p0.3"])
@pytest.mark.parametrize("mode", ["bf16-fp32-adapters", "autocast-bf16"])
def test_both_kinds_of_cpu(mode, p, units, monkeypatch):
    """What this CPU lacks is right too: calls of several row blocks, factors split and not.

    Root mean squares over three draws: twelve values of de alone are too few to compare.
    """
    monkeypatch.setattr(addmm, "bf16_units", lambda: units)
    keywords = {"scale": 1.3, "dropout_p": p}
    if p:
        keywords |= {"seed": 12, "row_ids": torch.arange(1100) * 3}
    ours, theirs = Counter(), Counter()
    for seed in range(3):
        case = make(mode, M=1100, K=520, N=488, R=12, with_e=True, keywords=keywords, seed=seed)
        found, baseline, exact = run(lowrank_linear, case), run(peft, case), truth(case)
        for name, value in exact.items():
            ours[name] += errors(found[name], value)[0] ** 2
            theirs[name] += errors(baseline[name], value)[0] ** 2
    for name, square in theirs.items():
        assert ours[name] ** 0.5 <= RATIO * square**0.5 + FLOOR[BF16] * 3**0.5, name
