"""The short CPU lane: as exact as PEFT, and the general route to rounding, whatever is asked of it.

`lane` fails where a call leaves the lane. It drops what Philox drops for a seed, so that PEFT's
steps, the definition and the general route can be given the same elements.
"""

import itertools

import pytest
import torch
from lowrank_cases import (
    BF16,
    F32,
    F64,
    FP16,
    NAMES,
    Case,
    assert_as_good_as,
    bits_equal,
    errors,
    peft,
    run,
    truth,
)
from torch import Tensor

from fastrank.kernels.common import dropout_keep
from fastrank.kernels.lowrank import lowrank_linear, op, plain

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# x and weight, adapters
MODES = {"fp32": (F32, F32), "bf16": (BF16, F32), "fp16": (FP16, F32), "fp64": (F64, F64)}
# 1 / P(kept) is the same for 15 random bits and for 32
P = 0.25
WITH_E = pytest.mark.parametrize("with_e", [False, True], ids=["plain", "e"])
DROPPED = pytest.mark.parametrize("p", [0.0, P], ids=["p0", "p0.25"])


def make(mode: str, **changes) -> Case:
    dtype, adapters = MODES[mode]
    return Case(dtype=dtype, adapters=adapters, frozen_base=True, **changes)


@pytest.fixture
def stay(monkeypatch):
    """Fail where a call goes on to the general route."""

    def left(*arguments):
        raise AssertionError("the call left the short lane")

    monkeypatch.setattr(op, "_run", left)


@pytest.fixture
def lane(monkeypatch):
    """lowrank_linear by the lane, with a seed."""
    general, seeds = op._run, []

    def draw(p: float, x: Tensor) -> Tensor:
        kept = dropout_keep(torch.tensor(seeds[-1:]), *x.shape, p, None)
        return -kept.to({4: torch.int32, 8: torch.int64}[x.itemsize])

    def call(*arguments, seed=0, row_ids=None, **keywords):
        seeds.append(seed)
        monkeypatch.setattr(op, "_run", None)
        try:
            return lowrank_linear(*arguments, **keywords)
        finally:
            monkeypatch.setattr(op, "_run", general)

    monkeypatch.setattr(plain, "draw_bits", draw)
    return call


def by_the_general_route(x, weight, bias, A, B, **keywords):
    rows = x.numel() // x.shape[-1]
    return lowrank_linear(
        x, weight, bias, A, B, active=A.shape[0], row_ids=torch.arange(rows), **keywords
    )


def test_leaving_the_lane_is_noticed(lane):
    given = Case().inputs()  # a base that is trained
    with pytest.raises(TypeError, match="NoneType"):
        lane(*(given[n] for n in NAMES[:5]))


@WITH_E
@DROPPED
@pytest.mark.parametrize("mode", MODES)
def test_error_is_at_most_pefts(lane, mode, p, with_e):
    keywords = {"scale": 1.7, "dropout_p": p}
    if p:
        keywords |= {"seed": 12, "row_ids": torch.arange(150)}
    case = make(mode, M=150, K=136, N=120, R=12, with_e=with_e, keywords=keywords)
    assert_as_good_as(run(lane, case), run(peft, case), truth(case))


SHAPES = [(12,), (9, 12), (3, 3, 12), (2, 1, 3, 12)]
SUBSETS = [s for n in range(1, 5) for s in itertools.combinations(("x", "A", "B", "e"), n)]


def layouts(y: Tensor) -> list[Tensor]:
    """dy dense, of zero strides, transposed and sliced."""
    dense = torch.arange(y.numel(), dtype=F64).view(y.shape).remainder(7.0).to(y.dtype)
    return [
        dense,
        torch.ones((), dtype=y.dtype).expand(y.shape),
        dense.mT.contiguous().mT if y.dim() > 1 else dense,
        torch.cat([dense, dense], -1)[..., : y.shape[-1]],
    ]


@WITH_E
@DROPPED
@pytest.mark.parametrize("mode", MODES)
def test_same_as_the_general_route(lane, mode, p, with_e):
    """Every subset of gradients, 1-D to 4-D x, all layouts of dy."""
    case = make(mode, M=9, K=12, N=10, R=3, with_e=with_e, with_bias=not with_e)
    for shape, subset in itertools.product(SHAPES, SUBSETS):
        given = {n: t if t is None else t.detach() for n, t in case.inputs().items()}
        given["x"] = given["x"].flatten()[: torch.Size(shape).numel()].view(shape)
        leaves = [given[n].requires_grad_() for n in subset if given[n] is not None]
        if not leaves:
            continue
        arguments, e = [given[n] for n in NAMES[:5]], given["e"]
        keywords = {"e": e, "scale": 0.7, "dropout_p": p, "seed": 5 if p else None}
        ours = lane(*arguments, **keywords)
        theirs = by_the_general_route(*arguments, **keywords)
        assert ours.shape == theirs.shape == (*shape[:-1], case.N)
        results = [(ours.detach(), theirs.detach())]
        for dy in layouts(ours):
            grads = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for y in (ours, theirs))
            results += zip(*grads, strict=True)
        for a, b in results:
            assert (a.dtype, a.shape) == (b.dtype, b.shape), (shape, subset)
            # y and dx of 16 bits may round the other way
            bound = {BF16: 4e-3, FP16: 5e-4}.get(a.dtype, 1e-6)
            assert errors(a, b.to(F64))[0] < bound, (shape, subset)


@WITH_E
@pytest.mark.parametrize(("rows", "R"), [(0, 3), (4, 0), (0, 0)])
def test_empty_inputs(lane, rows, R, with_e):
    case = make("bf16", M=rows, K=12, N=10, R=R, with_e=with_e, keywords={"dropout_p": P})
    ours, theirs = run(lane, case), run(by_the_general_route, case)
    assert ours.keys() == theirs.keys()
    assert all(bits_equal(ours[n], theirs[n]) for n in ours)


def test_strides_of_every_operand(lane):
    case = make("fp32", with_e=True, keywords={"dropout_p": P})
    given, expected = case.inputs(), run(lane, case)
    changes = {
        "x": torch.cat([given["x"], given["x"]], 1)[:, : case.K],
        "weight": given["weight"].T.contiguous().T,
        "A": given["A"].T.contiguous().T,
        "B": torch.stack([given["B"], given["B"]], -1)[..., 0],
        "e": torch.stack([given["e"], given["e"]], -1)[:, 0],
    }
    changes = {n: t.detach().requires_grad_(n != "weight") for n, t in changes.items()}
    assert not any(t.is_contiguous() for t in changes.values())
    for name, value in run(lane, case, **changes).items():
        assert errors(value, expected[name].to(F64))[0] < 1e-6, name


@DROPPED
def test_gradcheck(lane, p):
    leaves = list(make("fp64", M=4, K=5, N=3, R=4, with_e=True).inputs().values())
    keywords = {"dropout_p": p, "seed": 3, "scale": 1.3}
    assert torch.autograd.gradcheck(lambda *t: lane(*t[:5], e=t[5], **keywords), leaves)


@DROPPED
@pytest.mark.parametrize("mode", MODES)
def test_identities_are_exact(lane, mode, p):
    """e of ones is no e, and e of zeros or a scale of zero is the base."""
    plain_case = make(mode, keywords={"dropout_p": p})
    case = make(mode, with_e=True, keywords={"dropout_p": p})
    given, expected = case.inputs(), run(lane, plain_case)
    got = run(lane, case, e=torch.ones_like(given["e"]))
    assert got.keys() == expected.keys()
    assert all(bits_equal(got[n], expected[n]) for n in got)
    base = torch.nn.functional.linear(*(given[n] for n in NAMES[:3])).detach()
    off = run(lane, case, e=torch.zeros_like(given["e"]).requires_grad_())
    assert bits_equal(off["y"], base)
    assert off["dA"].count_nonzero() == off["dB"].count_nonzero() == 0
    assert off["de"].count_nonzero() == case.R
    silent = make(mode, with_e=True, keywords={"dropout_p": p, "scale": 0.0})
    assert bits_equal(run(lane, silent)["y"], base)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("stay")
def test_same_bits_twice(mode, p):
    """Dropout is a function of torch's generator alone."""
    case = make(mode, M=250, K=900, N=30, with_e=True, keywords={"dropout_p": p})
    results = []
    for _ in range(2):
        torch.manual_seed(4)
        results.append(run(lowrank_linear, case))
    first, second = results
    assert all(bits_equal(first[n], second[n]) for n in first)
    other = run(lowrank_linear, case)
    assert bits_equal(other["y"], first["y"]) == (p == 0.0)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("stay")
def test_the_draw(mode, p):
    """Identity adapters show what was kept: its share, its mean, and dropped elements as zeros."""
    dtype, adapters = MODES[mode]
    x = torch.full((400, 64), 3.0, dtype=dtype)
    eye = torch.eye(64, dtype=adapters)
    y = lowrank_linear(x, torch.zeros(64, 64, dtype=dtype), None, eye, eye, dropout_p=p).double()
    kept = y != 0.0
    assert abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
    factor = y[kept] / 3.0
    rounding = {BF16: 4e-3, FP16: 5e-4}.get(dtype, 0.0)  # y is rounded
    # and p to a multiple of 2**-15, of which the factor knows
    assert (factor * (1 - p) - 1.0).abs().max() < 4e-5 + rounding
    rows = kept.double().mean(1)
    assert rows.min() > 1 - p - 0.4
    assert rows.max() - rows.min() > 0.05


def test_what_is_saved(lane):
    """x for dA, S or S ⊙ e for dB, S for de where dA is not made; bits of a mask for dx."""
    x, S, mask = (((9, 12), F32), ((9, 3), F32), ((9, 12), torch.int32))
    expected = {
        "x": ([], [mask]),
        "A": ([x], [x]),
        "B": ([S], [S]),
        "e": ([S], [S]),
        "xe": ([S], [S, mask]),
        "Ae": ([x], [x]),
        "Be": ([S], [S]),
        "AB": ([x, S], [x, S]),
        "xABe": ([x, S], [x, S, mask]),
    }
    for (needs, by_p), p in itertools.product(expected.items(), (0, 1)):
        given = make("fp32", M=9, K=12, N=10, R=3, with_e=True).inputs()
        given = {n: t.detach().requires_grad_(n in needs) for n, t in given.items()}
        parameters, kept = {t.data_ptr() for n, t in given.items() if n != "x"}, []

        def pack(t, parameters=parameters, kept=kept):
            if t.data_ptr() not in parameters:
                kept.append((tuple(t.shape), t.dtype))
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            lane(*(given[n] for n in NAMES[:5]), e=given["e"], dropout_p=p * P)
        assert kept == by_p[p], (needs, p)


@pytest.mark.parametrize("mode", MODES)
def test_among_autograds_machinery(lane, mode):
    """Backward under autocast, a result written in place, and one order of gradients only."""
    given = make(mode, with_e=True).inputs()
    leaves = [given[n] for n in ("x", "A", "B", "e")]
    e, arguments = given["e"], [given[n] for n in NAMES[1:5]]
    y = lane(given["x"], *arguments, e=e)
    outside = torch.autograd.grad(y.float().sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", BF16):
        inside = torch.autograd.grad(y.float().sum(), leaves)
    assert all(bits_equal(a, b) for a, b in zip(inside, outside, strict=True))

    y = lane(given["x"].view(2, 24, 40), *arguments, e=e)
    y += 1.0
    after = torch.autograd.grad(y.float().sum(), leaves)
    assert all(bits_equal(a, b) for a, b in zip(after, outside, strict=True))

    y = lane(given["x"], *arguments, e=e)
    (dx,) = torch.autograd.grad(y.float().pow(2).sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_e_that_does_not_fit():
    """What would broadcast is refused; another dtype takes the general route."""
    given = make("fp32", with_e=True).inputs()
    arguments, e = [given[n] for n in NAMES[:5]], given["e"].detach()
    for wrong in (e[:1], e[:, None], e.sum(), e[:7]):
        with pytest.raises(ValueError, match="e has shape"):
            lowrank_linear(*arguments, e=wrong)
    with pytest.raises(TypeError, match=r"e has dtype torch\.int64"):
        lowrank_linear(*arguments, e=torch.ones(8, dtype=torch.int64))
    narrow = e.bfloat16()
    ours, wide = (lowrank_linear(*arguments, e=t).detach() for t in (narrow, narrow.float()))
    assert errors(ours, wide.double())[0] < 1e-6
