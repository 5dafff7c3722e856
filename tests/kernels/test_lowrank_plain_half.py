"""The short way of bf16 products on a CPU: taken where it fits, as right as the general one."""

import pytest
import torch

from fastrank.kernels.lowrank import lowrank_linear, op, plain_half

BF16, FP32 = torch.bfloat16, torch.float32
# dtypes of x, of the base and of the adapters; whether autocast is on
CALLS = [(FP32, FP32, FP32, True), (BF16, BF16, FP32, True), (FP32, FP32, BF16, True),
         (BF16, BF16, BF16, False)]  # fmt: skip


@pytest.fixture(autouse=True)
def units(monkeypatch):
    monkeypatch.setattr(plain_half, "bf16_units", lambda: True)


def tensors(x_dtype, base_dtype, adapter_dtype, lead=(3, 20)):
    generator = torch.Generator().manual_seed(7)
    x, weight, bias, A, B = (
        torch.randn(shape, generator=generator)
        for shape in ((*lead, 48), (40, 48), (40,), (6, 48), (40, 6))
    )
    base = (weight.to(base_dtype), bias.to(base_dtype))
    x, A, B = (
        t.to(dtype).requires_grad_()
        for t, dtype in ((x, x_dtype), (A, adapter_dtype), (B, adapter_dtype))
    )
    return x, *base, A, B


def step(call, lead=(3, 20), **keywords):
    """y and the gradients of x, A and B, in float64."""
    *dtypes, autocast = call
    x, weight, bias, A, B = tensors(*dtypes, lead)
    with torch.autocast("cpu", BF16, enabled=autocast):
        y = lowrank_linear(x, weight, bias, A, B, scale=0.7, **keywords)
    assert y.dtype is BF16
    assert y.shape == (*lead, 40)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(8)).to(BF16))
    for leaf in (x, A, B):
        assert leaf.grad.dtype is leaf.dtype
    return [t.detach().double() for t in (y, x.grad, A.grad, B.grad)]


def error(found, exact):
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("lead", [(3, 20), (60,), (0,)], ids=str)
def test_as_right_as_the_general_route(monkeypatch, call, lead):
    *dtypes, _ = call
    with monkeypatch.context() as patched:
        patched.setattr(op, "_run", None)  # nothing but the short way can answer
        short = step(call, lead)
    with monkeypatch.context() as patched:
        patched.setattr(plain_half, "fits", lambda *args: False)
        general = step(call, lead)
    x, weight, bias, A, B = (t.detach().double().requires_grad_() for t in tensors(*dtypes, lead))
    y = x @ weight.t() + bias + 0.7 * (x @ A.t() @ B.t())
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(8)).to(BF16).double())
    if not x.numel():
        assert all(torch.equal(one, other) for one, other in zip(short, general, strict=True))
        return
    exact = (y.detach(), x.grad, A.grad, B.grad)
    for one, other, wanted in zip(short, general, exact, strict=True):
        assert error(one, wanted) <= 1.1 * error(other, wanted) + 1e-4


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_what_dropout_drops_gets_no_gradient(monkeypatch, call):
    """dx less the base's is zero where x was dropped, and its kept elements are scaled."""
    *dtypes, autocast = call
    monkeypatch.setattr(op, "_run", None)
    x, weight, _, A, B = tensors(*dtypes, (4000,))
    torch.manual_seed(3)
    with torch.autocast("cpu", BF16, enabled=autocast):
        y = lowrank_linear(x, torch.zeros_like(weight), None, A, B, scale=0.7, dropout_p=0.25)
    y.backward(torch.ones_like(y))
    dropped = x.grad == 0
    assert abs(float(dropped.float().mean()) - 0.25) < 0.01
    inner = (A.detach().double().t() @ B.detach().double().sum(0)) * 0.7 / 0.75
    kept = x.grad.double()[~dropped]
    wanted = inner.expand(4000, -1)[~dropped]
    assert error(kept, wanted) < 0.01
    used = torch.where(dropped, 0.0, x.detach().double()) / 0.75
    wanted_A = torch.outer(B.detach().double().sum(0), used.sum(0)) * 0.7
    assert error(A.grad.double(), wanted_A) < 0.05


def test_a_backward_under_another_autocast_keeps_bf16(monkeypatch):
    monkeypatch.setattr(op, "_run", None)
    x, weight, bias, A, B = tensors(FP32, FP32, FP32)
    with torch.autocast("cpu", BF16):
        y = lowrank_linear(x, weight, bias, A, B)
    expected = torch.autograd.grad(y.sum(), (x, A, B), retain_graph=True)
    with torch.autocast("cpu", torch.float16):
        found = torch.autograd.grad(y.sum(), (x, A, B))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("change", ["fp16 autocast", "diagonal", "trainable base", "no units"])
def test_other_calls_take_the_general_route(monkeypatch, change):
    x, weight, bias, A, B = tensors(FP32, FP32, FP32)
    e = torch.ones(6) if change == "diagonal" else None
    weight.requires_grad_(change == "trainable base")
    monkeypatch.setattr(plain_half, "bf16_units", lambda: change != "no units")
    dtype = torch.float16 if change == "fp16 autocast" else BF16
    with torch.autocast("cpu", dtype):
        assert not plain_half.fits(x, weight, bias, A, B, e, 1.0, 0.0)


def test_shapes_that_do_not_fit_are_named():
    x, weight, bias, A, B = tensors(FP32, FP32, FP32)
    with torch.autocast("cpu", BF16), pytest.raises(ValueError, match="A"):
        lowrank_linear(x, weight, bias, A[:, :-1], B)
