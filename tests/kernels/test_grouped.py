"""grouped_lowrank_linear on a CPU: a loop over groups in float64 is the truth."""

import pytest
import torch
from torch import Tensor

from fastrank.kernels.lowrank import grouped_lowrank_linear, lowrank_linear
from fastrank.kernels.lowrank.cpu_dropout import keyed_keep, mean_factor

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
K, N = 24, 20
LAYOUTS = {
    "uniform": ((6, 6, 6), (4, 4, 4)),
    "ragged": ((5, 1, 7, 7), (3, 8, 2, 2)),
    "empty groups and rank zero": ((0, 5, 4, 0), (3, 0, 2, 0)),
    "one group": ((9,), (5,)),
    "no ranks": ((4, 3), (0, 0)),
    "many": (tuple(i % 3 for i in range(40)), tuple((i * 5) % 7 for i in range(40))),
}
NAMES = ("x", "weight", "bias", "A", "B", "e")


def make(rows, ranks, dtype=F64, adapters=None, with_e=True, seed=0) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    M, R = sum(rows), sum(ranks)
    given = {"x": draw(M, K), "weight": draw(N, K) / 5, "bias": draw(N)}
    factors = {"A": draw(R, K) / 5, "B": draw(R, N) / 2, "e": draw(R) if with_e else None}
    given = {name: t.to(dtype) for name, t in given.items()}
    factors = {n: None if t is None else t.to(adapters or dtype) for n, t in factors.items()}
    return {n: None if t is None else t.requires_grad_() for n, t in (given | factors).items()}


def scales(groups: int) -> tuple[float, ...]:
    return tuple(0.5 + 0.25 * i for i in range(groups))


def op(given, **keywords) -> Tensor:
    *tensors, e = given.values()
    return grouped_lowrank_linear(*tensors, e=e, **keywords)


def run(given, **keywords) -> dict[str, Tensor]:
    """y and the gradient of everything that asks for one."""
    y = op(given, **keywords)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=F64).to(y.dtype)
    wanted = {n: t for n, t in given.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), dy)
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def widened(given) -> dict[str, Tensor | None]:
    return {
        n: None if t is None else t.detach().to(F64).requires_grad_(t.requires_grad)
        for n, t in given.items()
    }


def assert_close(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == value.shape, name
        difference = (found[name].to(F64) - value).norm()
        assert difference <= tolerance * value.norm() + 1e-30, (name, float(difference))


@pytest.mark.parametrize("with_e", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_a_loop_of_the_single_op(layout, with_e):
    """The definition: y and every gradient, in float64, group by group."""
    rows, ranks = LAYOUTS[layout]
    scale = scales(len(rows))
    given = make(rows, ranks, with_e=with_e)
    found = run(given, rows=rows, ranks=ranks, scale=scale)
    parts, start, first = [], 0, 0
    for m, r, s in zip(rows, ranks, scale, strict=True):
        own = slice(first, first + r)
        parts.append(
            lowrank_linear(
                given["x"][start : start + m],
                given["weight"],
                given["bias"],
                given["A"][own],
                given["B"][own].t(),
                scale=s,
                e=given["e"][own] if with_e else None,
                backend="reference",
            )
        )
        start, first = start + m, first + r
    y = torch.cat(parts)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=F64)
    wanted = [t for t in given.values() if t is not None]
    grads = torch.autograd.grad(y, wanted, dy)
    names = [n for n, t in given.items() if t is not None]
    assert_close(found, {"y": y.detach(), **dict(zip(names, grads, strict=True))}, 1e-13)


@pytest.mark.parametrize(
    ("dtype", "adapters", "tolerance"),
    [(F32, F32, 1e-6), (BF16, F32, 1e-2), (BF16, BF16, 2e-2), (torch.float16, F32, 2e-3)],
    ids=["fp32", "bf16 over fp32 adapters", "bf16", "fp16"],
)
@pytest.mark.parametrize("layout", ["uniform", "ragged", "many"])
def test_dtypes_against_float64(layout, dtype, adapters, tolerance):
    rows, ranks = LAYOUTS[layout]
    keywords = {"rows": rows, "ranks": ranks, "scale": scales(len(rows))}
    given = make(rows, ranks, dtype, adapters)
    exact = run(widened(given), **keywords, backend="reference")
    found = run(given, **keywords)
    assert found["y"].dtype == dtype
    assert found["A"].dtype == found["B"].dtype == found["e"].dtype == adapters
    assert_close(found, exact, tolerance)
    if adapters == F32 and dtype != F32:  # the branch's own gradients are fp32-accurate
        only = {n: found[n] for n in ("A", "B", "e")}
        exact_dy = run(widened(given), **keywords)
        assert_close(only, {n: exact_dy[n] for n in only}, 5e-3)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("with_ids", [False, True])
def test_dropout_is_the_draw_of_each_groups_seed_and_ids(with_ids, trainable):
    rows, ranks, p = (6, 6, 5), (4, 4, 3), 0.3
    seeds = (7, -3, 2**40)
    ids = torch.tensor([0, 1, 2, 2**32, 2**32 + 1, 9] * 2 + [4, 3, 2**33, 0, 1])
    given = make(rows, ranks)
    keywords = {"rows": rows, "ranks": ranks, "scale": scales(3), "dropout_p": p, "seeds": seeds}
    keywords["row_ids"] = ids if with_ids else None
    mask = None
    if trainable:
        mask = torch.tensor([True, False, True] * 4)[: sum(ranks)]
        keywords["trainable"] = mask
    found = run(given, **keywords)

    keep = torch.empty(sum(rows), K, dtype=torch.int8)
    for g, start in enumerate((0, 6, 12)):
        own = slice(start, start + rows[g])
        keyed_keep(seeds[g], ids[own] if with_ids else None, p, keep[own])
    assert 0.5 < (keep == -1).double().mean() < 0.9
    x, A, B, e = (given[n] for n in ("x", "A", "B", "e"))
    dropped = torch.where(keep == -1, x * mean_factor(p), 0.0)
    ys, first = [], 0
    for g, start in enumerate((0, 6, 12)):
        own, r = slice(start, start + rows[g]), slice(first, first + ranks[g])
        S = dropped[own] @ A[r].t()
        if trainable:
            fixed = torch.where(mask[r], 0.0, 1.0)
            Ar, er = A[r].detach(), e[r].detach()
            T = S * e[r] * (1 - fixed) + x[own] @ Ar.t() * er * fixed
            b = torch.where(mask[r][:, None], B[r], B[r].detach())
        else:
            T, b = S * e[r], B[r]
        ys.append(scales(3)[g] * T @ b)
        first += ranks[g]
    y = torch.nn.functional.linear(x, given["weight"], given["bias"]) + torch.cat(ys)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=F64)
    grads = torch.autograd.grad(y, list(given.values()), dy)
    wanted = {"y": y.detach(), **dict(zip(NAMES, grads, strict=True))}
    if trainable:
        for name in ("A", "B", "e"):
            assert (found[name][~mask] == 0).all()
    assert_close(found, wanted, 1e-12)


def test_a_row_drops_the_same_in_any_company():
    """By seed and row id alone: not by padding, position or neighbours."""
    given = make((4, 6), (3, 3), F32)
    ids = torch.tensor([5, 6, 7, 8])
    both = op(
        given, rows=(4, 6), ranks=(3, 3), scale=1.0, dropout_p=0.5, seeds=(1, 2),
        row_ids=torch.cat([ids, torch.arange(6)]),
    )  # fmt: skip
    alone = dict(given)
    order = [2, 0, 3]
    alone["x"] = given["x"][:4][order]
    for n in ("A", "B", "e"):
        alone[n] = given[n][:3]
    y = op(
        alone, rows=(3,), ranks=(3,), scale=1.0, dropout_p=0.5, seeds=(1,),
        row_ids=ids[order],
    )  # fmt: skip
    torch.testing.assert_close(y, both[:4][order])


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "A", "B", "e"])
def test_a_group_gone_wrong_harms_no_other(where, poison, p):
    rows, ranks = (6, 6, 6), (4, 4, 4)
    keywords = {"rows": rows, "ranks": ranks, "scale": scales(3), "dropout_p": p}
    keywords |= {"seeds": (1, 2, 3)} if p else {}
    given = make(rows, ranks, F32)
    for name in ("weight", "bias"):
        given[name].requires_grad_(False)
    clean = run(given, **keywords)
    with torch.no_grad():
        given[where][slice(6, 12) if where == "x" else slice(4, 8)] = poison
    hurt = run(given, **keywords)
    assert not hurt["y"][6:12].isfinite().all()
    for name, value in hurt.items():
        own = slice(6, 12) if name in ("x", "y") else slice(4, 8)
        others = torch.ones(len(value), dtype=torch.bool)
        others[own] = False
        assert torch.equal(value[others], clean[name][others]), name


def test_ranks_that_are_off_never_show():
    rows, ranks = (6, 5), (4, 3)
    active = torch.tensor([True, False, True, True, False, False, True])
    given = make(rows, ranks, F64)
    few = dict(given)
    for name in ("A", "B", "e"):
        few[name] = given[name].detach()[active].requires_grad_()
    wanted = run(few, rows=rows, ranks=(3, 1), scale=scales(2))
    with torch.no_grad():
        for name in ("A", "B", "e"):
            given[name][~active] = float("nan")
    found = run(given, rows=rows, ranks=ranks, scale=scales(2), active=active)
    for name in ("A", "B", "e"):
        assert (found[name][~active] == 0).all()
        found[name] = found[name][active]
    assert_close(found, wanted, 1e-13)


def test_order_of_the_groups_is_order_of_the_results():
    rows, ranks = (5, 3, 7), (2, 4, 3)
    given = make(rows, ranks, F64)
    found = run(given, rows=rows, ranks=ranks, scale=scales(3))
    turned = dict(given)
    parts = {n: given[n].split(rows if n == "x" else ranks) for n in ("x", "A", "B", "e")}
    for name, pieces in parts.items():
        turned[name] = torch.cat(pieces[::-1]).detach().requires_grad_()
    y = op(turned, rows=rows[::-1], ranks=ranks[::-1], scale=scales(3)[::-1])
    torch.testing.assert_close(torch.cat(y.split(rows[::-1])[::-1]), found["y"])


def test_groups_without_rows_have_zero_gradients():
    given = make((0, 4), (3, 2), F32)
    found = run(given, rows=(0, 4), ranks=(3, 2), scale=1.0)
    assert (found["A"][:3] == 0).all()
    assert (found["B"][:3] == 0).all()
    assert (found["e"][:3] == 0).all()
    assert found["A"][3:].abs().sum() > 0


def test_no_rows_at_all():
    given = make((0, 0), (3, 2), F32)
    found = run(given, rows=(0, 0), ranks=(3, 2), scale=1.0)
    assert found["y"].shape == (0, N)
    assert all((found[n] == 0).all() for n in ("A", "B", "e", "weight", "bias"))


@pytest.mark.parametrize("missing", ["x", "A", "B", "e", "bias", "weight"])
def test_what_needs_no_gradient_gets_none(missing):
    rows, ranks = (5, 4), (3, 2)
    given = make(rows, ranks)
    everything = run(given, rows=rows, ranks=ranks, scale=scales(2))
    given[missing].requires_grad_(False)
    found = run(given, rows=rows, ranks=ranks, scale=scales(2))
    everything.pop(missing)
    assert_close(found, everything, 1e-14)


def test_leading_dimensions_strides_and_an_expanded_gradient():
    rows, ranks = (8, 4), (3, 2)
    given = make(rows, ranks)
    flat = run(given, rows=rows, ranks=ranks, scale=1.0)["y"]
    x = given["x"].detach()
    deep = torch.stack([x, x], -1)[..., 0].view(3, 4, K)  # strided
    given["x"] = deep.requires_grad_()
    y = op(given, rows=rows, ranks=ranks, scale=1.0)
    assert y.shape == (3, 4, N)
    torch.testing.assert_close(y.view(12, N), flat)
    y.sum().backward()
    assert deep.grad.isfinite().all()


def test_same_bits_twice():
    rows, ranks = (60, 60, 50), (4, 4, 4)
    given = make(rows, ranks, F32)
    keywords = {"rows": rows, "ranks": ranks, "scale": 1.0, "dropout_p": 0.2, "seeds": (1, 2, 3)}
    a, b = (run(given, **keywords) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_gradcheck():
    rows, ranks = (3, 2, 2), (2, 1, 2)
    given = make(rows, ranks)

    def call(*tensors):
        return op(dict(zip(NAMES, tensors, strict=True)), rows=rows, ranks=ranks, scale=scales(3))

    assert torch.autograd.gradcheck(call, tuple(given.values()))


def test_autocast_computes_in_its_dtype():
    rows, ranks = (5, 4), (3, 2)
    given = make(rows, ranks, F32)
    with torch.autocast("cpu", dtype=BF16):
        y = op(given, rows=rows, ranks=ranks, scale=1.0)
    assert y.dtype == BF16
    y.float().sum().backward()
    assert given["A"].grad.dtype == F32


def test_double_backward_is_refused():
    given = make((3,), (2,))
    y = op(given, rows=(3,), ranks=(2,), scale=1.0)
    dy = torch.ones_like(y, requires_grad=True)
    (dx,) = torch.autograd.grad(y, given["x"], dy, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_counts_may_be_tensors():
    given = make((3, 2), (2, 1))
    plain = run(given, rows=(3, 2), ranks=(2, 1), scale=(0.5, 2.0))
    tensors = run(
        given,
        rows=torch.tensor([3, 2]),
        ranks=torch.tensor([2, 1], dtype=torch.int32),
        scale=torch.tensor([0.5, 2.0]),
    )
    assert_close(tensors, plain, 0.0)


BAD = {
    "rows don't sum": ({"rows": (4, 3)}, ValueError, "sum to 7, but x has 6 rows"),
    "negative rows": ({"rows": (7, -1)}, ValueError, "rows of group 1 is -1"),
    "float rows": ({"rows": (3.0, 3.0)}, TypeError, "rows of group 0"),
    "a count of rows": ({"rows": 6}, TypeError, "rows has type int"),
    "ranks don't sum": ({"ranks": (2, 2)}, ValueError, "sum to 4, but A and B hold 5 ranks"),
    "one rank too few": ({"ranks": (5,)}, ValueError, "rows has 2 entries and ranks 1"),
    "scales": ({"scale": (1.0,)}, ValueError, "scale has 1 entries for 2 groups"),
    "nan scale": ({"scale": (1.0, float("nan"))}, ValueError, "scale of group 1 is nan"),
    "seeds": ({"dropout_p": 0.1, "seeds": (1,)}, ValueError, "seeds has 1 entries for 2 groups"),
    "seed": ({"dropout_p": 0.1, "seeds": (1, 2**63)}, ValueError, "seed of group 1"),
    "dropout": ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0"),
    "row ids": ({"row_ids": torch.arange(5)}, ValueError, "row_ids must be int64"),
    "active": ({"active": torch.ones(4, dtype=torch.bool)}, ValueError, r"pass bool \[5\]"),
    "trainable": ({"trainable": [True] * 5}, TypeError, "trainable has type list"),
    "precision": ({"precision": "low"}, ValueError, "precision is 'low'"),
    "backend": ({"backend": "cuda"}, ValueError, "unknown backend"),
    "A and B": ({"B": torch.zeros(4, N)}, ValueError, "A holds 5 ranks, B 4"),
    "B not rank-major": ({"B": torch.zeros(N, 5)}, ValueError, "rank-major"),
    "e": ({"e": torch.zeros(4)}, ValueError, r"pass \[5\], one a rank"),
    "dtypes": ({"B": torch.zeros(5, N, dtype=F64)}, TypeError, "pass one dtype"),
    "integer x": ({"x": torch.zeros(6, K, dtype=torch.int64)}, TypeError, "x is torch.int64"),
    "columns": ({"x": torch.zeros(6, K + 1)}, ValueError, "pass x"),
    "bias": ({"bias": torch.zeros(N + 1)}, ValueError, r"pass \[20\]"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    changed, error, message = BAD[what]
    given = {n: t.detach() for n, t in make((3, 3), (2, 3), F32).items()}
    keywords = {"rows": (3, 3), "ranks": (2, 3), "scale": 1.0}
    for name, value in changed.items():
        (given if name in given else keywords)[name] = value
    with pytest.raises(error, match=message):
        op(given, **keywords)
