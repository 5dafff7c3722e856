"""Products by oneDNN where MKL is slow: as accurate, for every layout and size."""

import pytest
import torch

from fastrank.kernels.common import products

SHAPES = [(97, 600, 520), (600, 200, 300), (1100, 1030, 90), (130, 2048, 2100)]


@pytest.fixture
def small(monkeypatch):
    """Everything counts as worth it, blocks are small and copies smaller than the weights."""
    monkeypatch.setattr(products, "_LEAST", 1)
    monkeypatch.setattr(products, "_LEAST_COPIED", 1)
    monkeypatch.setattr(products, "_LEAST_ROWS", 1)
    monkeypatch.setattr(products, "_LEAST_WIDTH", 1)
    monkeypatch.setattr(products, "_COPIED", 1 << 18)
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
