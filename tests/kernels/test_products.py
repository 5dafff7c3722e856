"""Products by oneDNN where MKL is slow: as accurate, for every layout and size."""

import pytest
import torch

from fastrank.kernels.common import products
from fastrank.kernels.lowrank import lowrank_linear, plain

SHAPES = [(97, 600, 520), (600, 200, 300), (1100, 1030, 90), (130, 2048, 2100)]


@pytest.fixture
def small(monkeypatch):
    """Everything counts as worth it, blocks are small and copies smaller than the weights."""
    for least in ("_LEAST", "_LEAST_COPIED", "_LEAST_ROWS", "_MANY_ROWS", "_LEAST_COLUMNS"):
        monkeypatch.setattr(products, least, 1)
    monkeypatch.setattr(products, "_COPIED", 1 << 18)
    monkeypatch.setattr(products, "_PARTIAL", 1 << 10)
    monkeypatch.setattr(products, "prefers_onednn", torch.backends.mkldnn.is_available)


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_as_accurate_as_torch(small, shape, turned):
    M, K, N = shape
    generator = torch.Generator().manual_seed(M)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((M, K), (N, K), (N,)))
    if turned:
        weight = weight.t().contiguous().t()
    exact = x.double() @ weight.double().t()
    theirs = error(torch.mm(x, weight.t()), exact)
    assert error(products.mm(x, weight.t()), exact) <= 1.2 * theirs + 1e-8
    assert error(products.linear(x, weight, bias), exact + bias) <= 1.2 * theirs + 1e-8
    out = torch.randn(M, N, generator=generator)
    wanted = exact + out
    assert products.add_mm_(out, x, weight.t()) is out
    assert error(out, wanted) <= 1.2 * theirs + 1e-8
    out = torch.randn(M, N, generator=generator)
    wanted = -3.0 * exact + out
    assert products.suits(x, weight.t())
    assert error(products.add_mm_(out, x, weight.t(), -3.0), wanted) <= 1.2 * theirs + 1e-8
    nothing = products.add_mm_(None, x, weight.t(), 0.5)
    assert error(nothing, 0.5 * exact) <= 1.2 * theirs + 1e-8


def test_transposes_are_multiplied_whatever_their_rows(small, monkeypatch):
    """S.T dY: its few rows are a transpose that oneDNN copies, so they don't count."""
    monkeypatch.setattr(products, "_LEAST_ROWS", 96)
    S, dY = torch.randn(700, 12), torch.randn(700, 300)
    assert products.suits(S.t(), dY)
    assert not products.suits(S.t().contiguous(), dY)
    exact = S.double().t() @ dY.double()
    assert error(products.mm(S.t(), dY), exact) <= 1.2 * error(torch.mm(S.t(), dY), exact)


def test_long_chains_are_cut(small, monkeypatch):
    """In one chain the error grows with K: what the chunks are for, and a test that can fail."""
    x, weight = torch.randn(64, 4096), torch.randn(64, 4096)
    exact = x.double() @ weight.double().t()
    cut = error(products.linear(x, weight, None), exact)
    monkeypatch.setattr(products, "_chunks", lambda K: [slice(0, K)])
    assert error(products.linear(x, weight, None), exact) > 1.3 * cut


@pytest.mark.parametrize("part", ["columns", "rows"])
def test_odd_strides_go_to_torch(small, monkeypatch, part):
    def refuse(*arguments):
        raise AssertionError("a layout that takes oneDNN seconds")

    x, weight = torch.randn(128, 64), torch.randn(128, 128)
    weight = weight[:, :64] if part == "columns" else weight[::2, :64]
    monkeypatch.setattr(products, "_onednn", refuse)
    assert torch.equal(products.mm(x, weight.t()), torch.mm(x, weight.t()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs(small, dtype):
    x, weight, bias = torch.randn(64, 32), torch.randn(48, 32), torch.randn(48)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    assert torch.equal(
        products.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("route", ["plain", "general"])
def test_a_layer_of_these_products_is_as_accurate_as_plain_torch(
    small, monkeypatch, dtype, p, route
):
    if route == "general":
        monkeypatch.setattr(plain, "fits", lambda *arguments: False)
    M, K, N, R = 400, 520, 330, 70
    generator = torch.Generator().manual_seed(3)
    x, W, dy = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((M, K), (N, K), (M, N))
    )
    A, B = (torch.randn(shape, generator=generator) / 9 for shape in ((R, K), (N, R)))
    x, A, B = (t.requires_grad_() for t in (x, A, B))
    seed = None if route == "plain" else 5
    torch.manual_seed(1)
    y = lowrank_linear(x, W, None, A, B, scale=2.0, dropout_p=p, seed=seed)
    found = [y.detach(), *torch.autograd.grad(y, (x, A, B), dy)]
    if p:  # which elements were kept: those whose branch alone reaches y
        torch.manual_seed(1)
        one = torch.ones_like(x).requires_grad_()
        eye, zero = torch.eye(K), torch.zeros(K, K, dtype=dtype)
        keep = lowrank_linear(one, zero, None, eye, eye, dropout_p=p, seed=seed).detach()
        keep = (keep != 0).double() / (1.0 - p)
    else:
        keep = torch.ones(M, K, dtype=torch.float64)

    def by_torch(wide, keep):
        xs, As, Bs = (t.detach().to(wide or t.dtype).requires_grad_() for t in (x, A, B))
        base = xs @ W.to(wide or dtype).t()
        branch = 2.0 * ((xs.to(As.dtype) * keep.to(As.dtype)) @ As.t()) @ Bs.t()
        out = base + branch.to(base.dtype)
        return [out.detach(), *torch.autograd.grad(out, (xs, As, Bs), dy.to(out.dtype))]

    exact, theirs = by_torch(torch.float64, keep), by_torch(None, keep)
    for name, ours, plain_torch, wanted in zip(
        ["y", "dx", "dA", "dB"], found, theirs, exact, strict=True
    ):
        assert error(ours, wanted) <= 1.2 * error(plain_torch, wanted), name


@pytest.mark.parametrize(
    ("maker", "wanted"),
    [
        (("AuthenticAMD", 26), True),  # Zen 5
        (("AuthenticAMD", 25), False),  # Zen 4: AVX-512 in two halves, MKL's AVX2 is as fast
        (("GenuineIntel", 6), False),
        (("", 0), False),
    ],
    ids=str,
)
def test_only_wide_units_that_mkl_leaves_idle_get_onednn(monkeypatch, maker, wanted):
    monkeypatch.setattr(products, "_maker", lambda: maker)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.prefers_onednn.__wrapped__() is wanted
