"""What the low-rank op promises whatever it is given: calls of several row blocks, lowrank_add in
every precision mode, poison in more places, any strides, the registered ops, threads.
"""

import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank_cases import (
    BF16,
    F32,
    F64,
    FP16,
    NAMES,
    ON,
    TRAINED,
    Case,
    assert_as_good_as,
    bits_equal,
    make,
    peft,
    run,
    truth,
)
from torch import Tensor
from torch.library import opcheck

from fastrank.kernels.common.scratch import BLOCK
from fastrank.kernels.lowrank import lowrank_add, lowrank_linear, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")

MODES = ("fp32", "bf16", "fp16", "bf16-fp32-adapters", "autocast-bf16")
# rows of x and y that make two row blocks each
LARGE = {"M": 2200, "K": 264, "N": 280, "R": 16}
assert LARGE["M"] * LARGE["K"] > BLOCK


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["p0", "p0.3"])
@pytest.mark.parametrize("mode", MODES)
def test_error_over_several_row_blocks(mode, p):
    keywords = {"scale": 1.7, "dropout_p": p}
    if p:
        keywords |= {"seed": 12, "row_ids": torch.arange(LARGE["M"])}
    case = make(mode, **LARGE, with_e=True, frozen_base=True, keywords=keywords)
    assert_as_good_as(run(lowrank_linear, case), run(peft, case), truth(case))


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["p0", "p0.3"])
@pytest.mark.parametrize("mode", MODES)
def test_error_of_add(mode, p):
    """On the outcome of a base layer, against PEFT's own sum."""
    keywords = {"scale": 1.7, "dropout_p": p}
    if p:
        keywords |= {"seed": 12, "row_ids": torch.arange(150)}
    case = make(mode, M=150, K=136, N=120, R=12, with_e=True, frozen_base=True, keywords=keywords)

    def add(x, weight, bias, A, B, **keywords):
        return lowrank_add(torch.nn.functional.linear(x, weight, bias), x, A, B, **keywords)

    def add_in_place(x, weight, bias, A, B, **keywords):
        y = torch.nn.functional.linear(x, weight, bias)
        return lowrank_add(y, x, A, B, inplace=True, **keywords)

    exact, baseline = truth(case), run(peft, case)
    got = run(add, case)
    assert_as_good_as(got, baseline, exact)
    in_place = run(add_in_place, case)
    assert all(bits_equal(got[n], in_place[n]) for n in got)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["p0", "p0.3"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", ["linear", "add", "registered"])
def test_ranks_that_are_off_never_show(op, mode, p, poison):
    """With trainable ranks and dropout as well, as a mask and as a prefix, in all ways in."""
    for active in (ON, 3):
        off = ~ON if active is ON else torch.arange(8) >= active
        case = make(mode, with_e=True)
        case.keywords = {"active": active, "trainable": TRAINED, "dropout_p": p, "seed": 9}

        def call(x, weight, bias, A, B, **keywords):
            if op == "add":
                return lowrank_add(torch.nn.functional.linear(x, weight, bias), x, A, B, **keywords)
            if op == "linear":
                return lowrank_linear(x, weight, bias, A, B, **keywords)
            return registered(x, weight, bias, A, B, **keywords)

        clean, planted = run(call, case), case.inputs()
        with torch.no_grad():
            planted["A"][off] = poison
            planted["B"][:, off] = poison
            planted["e"][off] = poison
        spoiled = run(call, case, **planted)
        for name in clean:
            assert bits_equal(spoiled[name], clean[name]), name
        for grad in (spoiled["dA"][off], spoiled["dB"][:, off], spoiled["de"][off]):
            assert grad.count_nonzero() == 0


def registered(x, weight, bias, A, B, *, e, active, trainable, dropout_p, seed):
    mask, prefix = (None, active) if isinstance(active, int) else (active, None)
    seed = torch.tensor([seed]) if dropout_p else None
    autocast = BF16 if torch.is_autocast_enabled("cpu") else None
    options = (1.0, dropout_p, "torch", autocast, "peft")
    tail = (mask, prefix, trainable, seed, None, *options)
    return torch.ops.fastrank.lowrank_linear(x, weight, bias, A, B, e, *tail)[0]


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["p0", "p0.3"])
@pytest.mark.parametrize("mode", MODES)
def test_identities_are_exact(mode, p):
    """e of ones is none; a scale, a B or an e of zeros leaves the base's bits."""
    keywords = {"dropout_p": p, "seed": 4}
    case = make(mode, with_e=True, keywords=keywords)
    ones = torch.ones_like(case.inputs()["e"])
    expected, got = (
        run(lowrank_linear, make(mode, keywords=keywords)),
        run(lowrank_linear, case, e=ones),
    )
    assert all(bits_equal(got[n], expected[n]) for n in got)
    off = make(mode, with_e=True, keywords={"active": 0})
    base = run(lowrank_linear, off)["y"]
    silent = make(mode, with_e=True, keywords=keywords | {"scale": 0.0})
    assert bits_equal(run(lowrank_linear, silent)["y"], base)
    for name in ("B", "e"):
        zeros = torch.zeros_like(case.inputs()[name]).requires_grad_()
        assert bits_equal(run(lowrank_linear, case, **{name: zeros})["y"], base), name


@st.composite
def strided(draw, values: Tensor) -> Tensor:
    """The same values in memory laid out otherwise."""
    layout = draw(st.sampled_from(["dense", "transposed", "sliced", "spread", "offset"]))
    if layout == "transposed":
        values = values.mT.contiguous().mT if values.dim() > 1 else values
    elif layout == "sliced":
        values = torch.cat([values, values], -1)[..., : values.shape[-1]]
    elif layout == "spread":
        values = torch.stack([values, values], -1)[..., 0]
    elif layout == "offset":
        values = torch.cat([values.new_full((1,), 9.0), values.flatten()])[1:].view(values.shape)
    return values


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 24)] * 3, st.integers(0, 9)),
    leading=st.sampled_from([(), (1,), (2,), (2, 3)]),
    dtype=st.sampled_from([F32, F64, BF16, FP16]),
    wide_adapters=st.booleans(),
    masked=st.booleans(),
    frozen=st.booleans(),
    p=st.sampled_from([0.0, 0.5]),
    data=st.data(),
)
def test_strides_and_dtypes(sizes, leading, dtype, wide_adapters, masked, frozen, p, data):
    """Layouts of every operand and of dy change nothing beyond the order of sums."""
    M, K, N, R = sizes
    rows = torch.Size((M, *leading)).numel()
    adapters = F32 if wide_adapters and dtype != F64 else dtype
    case = Case(
        M=rows, K=K, N=N, R=R, dtype=dtype, adapters=adapters, with_e=True, frozen_base=frozen
    )
    keywords = {"scale": 0.9}
    if p or data.draw(st.booleans(), label="general"):
        keywords |= {"dropout_p": p, "seed": 7, "row_ids": torch.arange(rows)}
    if masked:
        bits = data.draw(st.lists(st.booleans(), min_size=R, max_size=R), label="active")
        keywords["active"] = torch.tensor(bits, dtype=torch.bool)
    dense = {n: t.detach() for n, t in case.inputs().items()}
    dense["x"] = dense["x"].view(M, *leading, K)
    dy = case.dy().to(dtype).view(M, *leading, N)
    trained = [n for n in NAMES if not (frozen and n in ("weight", "bias"))]

    def results(function, given_, dy):
        leaves = {n: t.detach().requires_grad_(n in trained) for n, t in given_.items()}
        y = function(*(leaves[n] for n in NAMES[:5]), e=leaves["e"], **keywords)
        return [y.detach(), *torch.autograd.grad(y, [leaves[n] for n in trained], dy)]

    laid = {n: data.draw(strided(t), label=n) for n, t in dense.items()}
    ours = results(lowrank_linear, laid, data.draw(strided(dy), label="dy"))
    wide = {n: t.to(F64) for n, t in dense.items()}
    exact = results(reference.lowrank_linear, wide, dy.to(F64))
    bound = {F32: 1e-5, F64: 1e-12, BF16: 3e-2, FP16: 4e-3}[dtype]
    for name, a, b in zip(("y", *trained), ours, exact, strict=True):
        assert a.shape == b.shape, name
        # measured against the terms of a sum where they cancel
        unit = max((rows * N) ** 0.5, 1.0)
        assert (a.to(F64) - b).norm() <= bound * max(b.norm().item(), unit), name


LAYOUTS = {
    "plain": lambda t: t,
    "permuted": lambda t: t.mT.contiguous().mT,
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "3-d": lambda t: t.view(4, 12, -1).transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize(
    ("p", "mask", "prefix"), [(0.0, None, None), (0.3, ON, None), (0.3, None, 3)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_every_op(layout, p, mask, prefix):
    """Operands of one layout each; the backward op has no gradient of its own to check."""
    given_ = {n: t.detach() for n, t in Case(with_e=True).inputs().items()}
    lay = LAYOUTS[layout]
    flat = LAYOUTS["permuted"] if layout == "3-d" else lay
    x, dy, y = lay(given_["x"]), lay(torch.randn(48, 56)), lay(torch.randn(48, 56))
    weight, A, B = (flat(given_[n]) for n in ("weight", "A", "B"))
    bias, e = given_["bias"], given_["e"]
    seed = torch.tensor([3]) if p else None
    options = (mask, prefix, TRAINED, seed, None, 0.5, p, "torch", None, "peft")
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.fastrank
    linear, add = (x, weight, bias, A, B, e, *options), (y, x, A, B, e, *options)
    opcheck(ops.lowrank_linear, linear, test_utils=checks)
    opcheck(ops.lowrank_add, add, test_utils=checks)
    _, S, keep = ops.lowrank_linear(*linear)
    for needs in ([True] * 6, [False, True, False, True, False, True]):
        arguments = (dy, x, weight, bias, A, B, e, S, keep, *options, needs)
        opcheck(ops.lowrank_backward, arguments, test_utils=checks)


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["p0", "p0.3"])
def test_gradcheck_with_masks_and_add(p):
    """The definition and both public functions in float64, with ranks that are not trained."""
    leaves = list(Case(M=4, K=5, N=3, R=4, dtype=F64, adapters=F64, with_e=True).inputs().values())
    keywords = {"active": ON[:4], "dropout_p": p, "seed": 3, "scale": 1.3}

    def add(x, weight, bias, A, B, e):
        y = torch.nn.functional.linear(x, weight, bias)
        return lowrank_add(y, x, A, B, e=e, **keywords)

    for function in (reference.lowrank_linear, lowrank_linear):
        assert torch.autograd.gradcheck(
            lambda *t, function=function: function(*t[:5], e=t[5], **keywords), leaves
        )
    assert torch.autograd.gradcheck(add, leaves)
    # frozen ranks: no gradients for them, so only dx, dW and db are derivatives of y
    fixed = [t.detach() for t in leaves[3:]]
    keywords["trainable"] = TRAINED[:4]
    for function in (reference.lowrank_linear, lowrank_linear):
        assert torch.autograd.gradcheck(
            lambda *t, function=function: function(*t, *fixed[:2], e=fixed[2], **keywords),
            leaves[:3],
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["p0", "p0.3"])
def test_same_bits_twice(mode, p):
    """Over several blocks; a call full of NaN in between leaves nothing in scratch memory."""
    keywords = {"dropout_p": p, "seed": 5}
    case = make(mode, **LARGE, with_e=True, frozen_base=True, keywords=keywords)
    nan = torch.full((LARGE["M"], LARGE["K"]), float("nan"), dtype=case.dtype).requires_grad_()
    first = run(lowrank_linear, case)
    assert run(lowrank_linear, case, x=nan)["y"].isnan().any()
    second = run(lowrank_linear, case)
    assert all(bits_equal(first[n], second[n]) for n in first)


def test_two_threads_give_the_bits_of_one():
    """Scratch memory is a thread's own: forwards and backwards at once, of different calls."""
    cases = [
        make("bf16-fp32-adapters", **LARGE, with_e=True, frozen_base=True, seed=i,
             keywords={"dropout_p": 0.3, "seed": i})
        for i in (1, 2)
    ]  # fmt: skip
    alone = [run(lowrank_linear, case) for case in cases]
    together = [[], []]
    start = threading.Barrier(2, timeout=60)

    def work(i):
        start.wait()
        for _ in range(10):
            together[i].append(run(lowrank_linear, cases[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    finally:
        sys.setswitchinterval(interval)
    for expected, results in zip(alone, together, strict=True):
        assert len(results) == 10
        for got in results:
            assert all(bits_equal(got[n], expected[n]) for n in expected)
