"""lowrank_linears: several layers of one x, against the layers one by one and against float64."""

import pytest
import torch
from lowrank_cases import BF16, F32, F64, bits_equal, errors

from fastrank.kernels.lowrank import Projection, addmm_shared, lowrank_linear, lowrank_linears

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SHAPES = ((24, 8), (16, 3), (24, 8))  # (N, R) of q, k and v


def make(dtype=F32, adapters=F32, with_e=False, with_bias=True, **options):
    """x `[6, 5, 40]` and the projections; every adapter needs gradients."""
    g = torch.Generator().manual_seed(3)

    def draw(*shape, dtype=dtype, gain=1.0):
        return (torch.randn(*shape, generator=g, dtype=F64) * gain).to(dtype)

    x = draw(6, 5, 40).requires_grad_()
    projections = [
        Projection(
            draw(N, 40, gain=0.16),
            draw(N) if with_bias else None,
            draw(R, 40, dtype=adapters, gain=0.16).requires_grad_(),
            draw(N, R, dtype=adapters, gain=0.3).requires_grad_(),
            0.5 + i,
            draw(R, dtype=adapters).requires_grad_() if with_e else None,
            **options,
        )
        for i, (N, R) in enumerate(SHAPES)
    ]
    return x, projections


def leaves(x, projections):
    return [x] + [t for p in projections for t in (p.A, p.B, p.e) if t is not None]


def step(function, x, projections, unused=()):
    ys = function(x, projections)
    g = torch.Generator().manual_seed(5)
    total = sum(
        (y.to(F64) * torch.randn(y.shape, generator=g, dtype=F64)).sum()
        for i, y in enumerate(ys)
        if i not in unused
    )
    return ys, torch.autograd.grad(total, leaves(x, projections), allow_unused=True)


def one_by_one(x, projections):
    return [
        lowrank_linear(x, *p[:4], **dict(zip(p._fields[4:], p[4:], strict=True)))
        for p in projections
    ]


@pytest.fixture
def joined(monkeypatch):
    """How often the layers really went through one call."""
    calls = []
    whole = addmm_shared.linears

    def count(x, layers):
        calls.append(len(layers))
        return whole(x, layers)

    monkeypatch.setattr(addmm_shared, "linears", count)
    return calls


@pytest.mark.parametrize("with_e", [False, True], ids=["plain", "e"])
@pytest.mark.parametrize(
    ("dtype", "adapters", "autocast"),
    [(F32, F32, None), (BF16, F32, None), (BF16, BF16, None), (F32, F32, BF16), (F64, F64, None)],
)
def test_equals_the_layers_one_by_one(dtype, adapters, autocast, with_e, joined):
    given = make(dtype, adapters, with_e)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        ys, grads = step(lowrank_linears, *given)
        assert joined == [3]
        expected_ys, expected = step(one_by_one, *given)
    assert joined == [3]
    tolerance = 1e-14 if dtype == F64 else 3e-6 if (dtype, autocast) == (F32, None) else 1.5e-2
    for found, wanted in zip([*ys, *grads], [*expected_ys, *expected], strict=True):
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        assert errors(found.detach(), wanted.detach().to(F64))[0] <= tolerance


def test_fp32_branches_of_a_16_bit_base_stay_fp32():
    """Against float64: gradients of the adapters have fp32's error, not bf16's."""
    x, projections = make(BF16, F32)
    grads = step(lowrank_linears, x, projections)[1][1:]
    wide = [Projection(*(t.detach().to(F64) if isinstance(t, torch.Tensor) else t for t in p))
            for p in projections]  # fmt: skip
    wide = [p._replace(A=p.A.requires_grad_(), B=p.B.requires_grad_()) for p in wide]
    g = torch.Generator().manual_seed(5)
    dys = [torch.randn(*x.shape[:2], N, generator=g, dtype=F64).to(BF16) for N, _ in SHAPES]
    exact_ys = one_by_one(x.detach().to(F64), wide)
    exact = torch.autograd.grad(
        exact_ys, [t for p in wide for t in (p.A, p.B)], [dy.to(F64) for dy in dys]
    )
    for found, wanted in zip(grads, exact, strict=True):
        assert errors(found, wanted)[0] < 1e-6


def test_dx_is_as_good_as_autograds_sum():
    """The sum over layers against float64, beside what autograd adds up."""
    x, projections = make(BF16, F32)
    wide = [Projection(*(t.detach().to(F64) if isinstance(t, torch.Tensor) else t for t in p))
            for p in projections]  # fmt: skip
    wide_x = x.detach().to(F64).requires_grad_()
    g = torch.Generator().manual_seed(5)
    dys = [torch.randn(*x.shape[:2], N, generator=g, dtype=F64).to(BF16) for N, _ in SHAPES]
    exact = torch.autograd.grad(one_by_one(wide_x, wide), wide_x, [dy.to(F64) for dy in dys])[0]
    ours = torch.autograd.grad(lowrank_linears(x, projections), x, dys)[0]
    theirs = torch.autograd.grad(one_by_one(x, projections), x, dys)[0]
    assert errors(ours, exact)[0] <= 1.2 * errors(theirs, exact)[0]


def test_an_output_that_nobody_uses(joined):
    given = make()
    _, grads = step(lowrank_linears, *given, unused=(1,))
    _, expected = step(one_by_one, *given, unused=(1,))
    assert joined == [3]
    for found, wanted in zip(grads, expected, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            assert errors(found, wanted.to(F64))[0] < 3e-6


def test_gradients_of_what_is_trained_alone(joined):
    x, projections = make(with_e=True)
    frozen = [
        projections[0]._replace(A=projections[0].A.detach()),
        projections[1]._replace(B=projections[1].B.detach(), e=projections[1].e.detach()),
        projections[2]._replace(A=projections[2].A.detach(), B=projections[2].B.detach()),
    ]
    wanted_leaves = [t for p in frozen for t in (p.A, p.B, p.e) if t.requires_grad]
    found = torch.autograd.grad(sum(y.sum() for y in lowrank_linears(x.detach(), frozen)),
                                wanted_leaves)  # fmt: skip
    wanted = torch.autograd.grad(sum(y.sum() for y in one_by_one(x.detach(), frozen)),
                                 wanted_leaves)  # fmt: skip
    assert joined == [3]
    for a, b in zip(found, wanted, strict=True):
        assert errors(a, b.to(F64))[0] < 3e-6


@pytest.mark.parametrize(
    "options", [{"dropout_p": 0.5, "seed": 4}, {"active": 2}, {"active": 0}], ids=str
)
def test_what_can_not_be_joined_is_looped(options, joined):
    given = make(**options)
    ys, grads = step(lowrank_linears, *given)
    expected_ys, expected = step(one_by_one, *given)
    assert joined == []
    for found, wanted in zip([*ys, *grads], [*expected_ys, *expected], strict=True):
        assert bits_equal(found.detach(), wanted.detach())


def test_trained_bases_are_looped(joined):
    x, projections = make()
    projections[1].weight.requires_grad_()
    ys = lowrank_linears(x, projections)
    grad = torch.autograd.grad(ys[1].sum(), projections[1].weight)[0]
    assert grad.norm() > 0
    assert joined == []


def test_same_bits_twice_and_without_grad(joined):
    x, projections = make(with_e=True)
    first, second = step(lowrank_linears, x, projections), step(lowrank_linears, x, projections)
    with torch.no_grad():
        plain = lowrank_linears(x, projections)
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert bits_equal(a.detach(), b.detach())
    assert all(bits_equal(a.detach(), b) for a, b in zip(first[0], plain, strict=True))
    assert joined == [3, 3, 3]


def test_compiled_in_one_graph():
    x, projections = make()
    compiled = torch.compile(lowrank_linears, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, projections), one_by_one(x, projections), strict=True):
        assert errors(a.detach(), b.detach().to(F64))[0] < 1e-6


def test_refused():
    x, projections = make()
    with pytest.raises(ValueError, match="projections is empty"):
        lowrank_linears(x, [])
    with pytest.raises(TypeError, match=r"projections\[1\] has type Tensor; pass a Projection"):
        lowrank_linears(x, [projections[0], projections[1].weight])
    bad = projections[1]._replace(A=torch.zeros(3, 41), weight=torch.zeros(16, 41))
    with pytest.raises(ValueError, match="x has 40 columns but A 41"):
        lowrank_linears(x, [projections[0], bad])
    with pytest.raises(ValueError, match=r"dropout_p is 1\.5"):
        lowrank_linears(x, [projections[0]._replace(dropout_p=1.5)])
