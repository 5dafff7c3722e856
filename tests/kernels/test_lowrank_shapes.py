"""lowrank_linear on the CPU: any shape, strides and subset of gradients."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank_cases import F64, NAMES, Case, assert_any_dy, errors, make, run, truth

from fastrank.kernels.lowrank import addmm, lowrank_linear

pytestmark = pytest.mark.usefixtures("poisoned_empty")

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
    assert_any_dy(y, leaves)


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
