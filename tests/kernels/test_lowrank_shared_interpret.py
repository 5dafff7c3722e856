"""Several layers of one x in the interpreter: as the layers one by one, with fewer launches."""

import pytest
import torch
from lowrank_cases import F32, F64, FP16, Case, bits_equal, errors

from fastrank.kernels.lowrank import core, shared_input, triton_path

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_empty")]

M, K = 37, 72


class Three:
    """Three layers of different ranks and widths on one x."""

    def __init__(self, p=0.0, masks=(None, None, None), trainable=None, half=False, ps=None):
        dtype = FP16 if half else F32
        self.layers, self.dys = [], []
        for i, (N, R) in enumerate(((40, 5), (24, 20), (56, 1))):
            given = Case(M, K, N, R, dtype, F32, with_e=i != 1, with_bias=i == 0, seed=i).inputs()
            given = {n: t if t is None else t.detach() for n, t in given.items()}
            seed, drop = torch.tensor([7 + i]), p if ps is None else ps[i]
            options = (0.5 + i, drop, "triton", None, "peft")
            seed = seed if drop else None
            branch, aux = core.prepare(given["A"], masks[i], trainable, seed, None, *options)
            self.layers.append(
                shared_input.Layer(
                    *(given[n] for n in ("weight", "bias", "A", "B", "e")), branch, aux
                )
            )
            self.dys.append(torch.randn(M, N).to(dtype))
            if i == 0:
                self.x = given["x"]

    def together(self, needs):
        ys, Ss = shared_input.linears(self.x, self.layers)
        dx, grads = shared_input.backward(self.dys, self.x, self.layers, Ss, needs, self.x.dtype)
        return ys, dx, grads

    def one_by_one(self, needs):
        ys, dxs, grads = [], [], []
        for layer, dy, need in zip(self.layers, self.dys, needs, strict=True):
            y, S, keep = triton_path.linear(self.x, *layer)
            weight, _, A, B, e, branch, aux = layer
            arguments = (dy, weight, self.x, A, B, e, S, keep, branch, aux, need, self.x.dtype)
            dx, *rest = triton_path.backward(*arguments)
            ys.append(y), dxs.append(dx), grads.append(tuple(rest))
        return ys, dxs, grads


def every(e: bool = True) -> tuple[bool, bool, bool, bool]:
    return True, True, True, e


NEEDS = [every(), every(False), every()]


def compare(case: Three, needs=NEEDS) -> None:
    ys, dx, grads = case.together(needs)
    expected_ys, expected_dxs, expected = case.one_by_one(needs)
    pairs = list(zip(ys, expected_ys, strict=True))
    pairs += [
        (a, b) for g, h in zip(grads, expected, strict=True) for a, b in zip(g, h, strict=True)
    ]
    for got, alone in pairs:
        assert (got is None) == (alone is None)
        # another number of splits may add up in another order
        assert got is None or errors(got, alone.to(F64))[0] < 1e-6
    total = sum(t.to(F64) for t in expected_dxs)
    assert errors(dx, total)[0] < (2e-3 if dx.dtype == FP16 else 1e-6)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16-fp32-adapters"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["p0", "p0.3"])
def test_together_is_one_by_one(p, half, launches):
    """Each with its own rank and seed; S and H of all in one launch each."""
    case = Three(p, half=half)
    case.together(NEEDS)
    assert launches[0] == "shrink"
    assert launches[1:4] == ["expand"] * 3
    backward = launches[4:]
    assert backward.count("gram") + backward.count("dual") == 1 + 3
    compare(case)


def test_masks_and_frozen_ranks():
    """On the host, compacted to ranks that differ; and as they are on a GPU."""
    on = torch.arange(20) % 3 != 0
    compare(Three(0.3, masks=(3, on, None)))


def test_device_masks(monkeypatch):
    def resolve(active, trainable, ranks, device):
        trainable = torch.arange(ranks) % 2 == 0
        return ranks, ranks, None, active, trainable

    monkeypatch.setattr(core, "resolve_masks", resolve)
    masks = (torch.arange(5) != 2, torch.arange(20) < 4, torch.ones(1, dtype=torch.bool))
    for p in (0.0, 0.3):
        compare(Three(p, masks=masks))


def test_layers_that_differ_are_launched_apart(launches):
    case = Three(ps=(0.3, 0.0, 0.3))
    case.together(NEEDS)
    assert launches[:5] == ["shrink"] * 2 + ["expand"] * 3
    compare(case)


def test_draws_are_each_layers_own():
    """The same seeds make the same draw, other seeds another."""
    case = Three(0.5)
    S = shared_input.linears(case.x, case.layers)[1]
    layer = case.layers[0]
    other = layer._replace(aux=layer.aux._replace(seed=torch.tensor([99])))
    S_same, S_other, _ = shared_input.linears(case.x, [layer, other, case.layers[2]])[1]
    assert bits_equal(S_same.contiguous(), S[0].contiguous())
    assert (S_other - S[0]).abs().max() > 0.01


def test_what_is_not_needed_is_not_launched(launches):
    case = Three()
    Ss = shared_input.linears(case.x, case.layers)[1]
    launches.clear()
    needs = [(False, False, True, False), (False, True, False, False), (False,) * 4]
    dx, grads = shared_input.backward(case.dys, case.x, case.layers, Ss, needs, F32)
    assert dx is None
    assert launches == ["gram", "finish", "shrink", "gram", "finish"]
    assert [[g is not None for g in several] for several in grads] == [
        [False, True, False], [True, False, False], [False] * 3,
    ]  # fmt: skip


def test_an_output_that_nobody_used():
    case = Three()
    Ss = shared_input.linears(case.x, case.layers)[1]
    whole = shared_input.backward(case.dys, case.x, case.layers, Ss, NEEDS, F32)
    without = [case.dys[0], None, case.dys[2]]
    dx, grads = shared_input.backward(without, case.x, case.layers, Ss, NEEDS, F32)
    assert grads[1][0].abs().sum() == grads[1][1].abs().sum() == 0.0
    assert grads[1][0].shape == case.layers[1].A.shape
    assert errors(grads[2][0], whole[1][2][0].to(F64))[0] < 1e-6
    _, dxs, _ = case.one_by_one(NEEDS)
    assert errors(dx, (dxs[0] + dxs[2]).to(F64))[0] < 1e-6
