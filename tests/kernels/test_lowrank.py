"""lowrank_linear and lowrank_add on the CPU: every output and gradient, and the op's identities.

"CPU path" is backend="auto" here; "reference" is the definition it is compared with.
"""

from collections import Counter

import pytest
import torch
from lowrank_cases import (
    BF16,
    F64,
    FLOOR,
    MODES,
    NAMES,
    RATIO,
    Case,
    assert_as_good_as,
    errors,
    make,
    peft,
    run,
    truth,
)

from fastrank.kernels.lowrank import addmm, lowrank_add, lowrank_linear
from fastrank.kernels.lowrank.reference import lowrank_linear as definition

pytestmark = pytest.mark.usefixtures("poisoned_empty")


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
