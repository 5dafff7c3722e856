"""sparse_linear on the CPU: W + S in outputs and gradients, of any dtype and strides."""

import pytest
import torch
import torch.nn.functional as F
from sparse_linear_cases import BF16, F32, F64, FP16, SCHEMES, K, N, bits_equal, dense, inputs

from fastrank.kernels.packing.sparse_linear import sparse_linear


@pytest.mark.parametrize("fields", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("M", [12, 1, 0])
def test_equals_the_dense_sum(M, with_bias, fields):
    given, mask = inputs(M=M, fields=fields)
    if not with_bias:
        given["bias"] = None
    before = given["weight"].clone()
    leaves = [t for t in given.values() if t is not None and t.requires_grad]
    dy = torch.randn(M, N, dtype=F64)
    y = sparse_linear(**given, mask=mask)
    found = torch.autograd.grad(y, leaves, dy)
    exact_y = F.linear(given["x"], dense(given["weight"], given["values"], mask), given["bias"])
    exact = torch.autograd.grad(exact_y, leaves, dy)
    assert torch.allclose(y, exact_y, rtol=1e-12)
    for ours, theirs in zip(found, exact, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-13)
    assert bits_equal(given["weight"], before)
    if M:
        assert not torch.allclose(y, F.linear(given["x"], before, given["bias"]))


def test_gradcheck():
    given, mask = inputs()

    def function(x, bias, values):
        return sparse_linear(x, given["weight"], bias, values, mask)

    assert torch.autograd.gradcheck(function, (given["x"], given["bias"], given["values"]))


@pytest.mark.parametrize("dtype", [F32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_dtypes(dtype):
    """Over 16 bits the sum is rounded once, and gradients are of the rounded layer."""
    given, mask = inputs(dtype)
    base = dense(given["weight"], given["values"].detach(), mask).requires_grad_()
    x, bias = (given[n].detach().requires_grad_() for n in ("x", "bias"))
    y, exact_y = sparse_linear(**given, mask=mask), F.linear(x, base, bias)
    assert torch.equal(y, exact_y)
    dy = torch.randint(-8, 9, y.shape).to(dtype)
    y.backward(dy)
    exact_y.backward(dy)
    assert torch.equal(given["x"].grad, x.grad)
    assert torch.allclose(given["bias"].grad, bias.grad, rtol=1e-2)
    assert given["values"].grad.dtype == F32
    wanted = base.grad.reshape(-1)[mask.positions()].float()
    assert torch.allclose(
        given["values"].grad, wanted, rtol=2e-2 if dtype != F32 else 1e-5, atol=1e-2
    )


@pytest.mark.parametrize("base", [F32, BF16], ids=["fp32 base", "bf16 base"])
def test_autocast_casts_as_f_linear_does(base):
    given, mask = inputs(base)
    plain = {n: given[n].detach().float() for n in ("x", "bias")}
    with torch.autocast("cpu", BF16):
        y = sparse_linear(given["x"], given["weight"], given["bias"], given["values"], mask)
        total = dense(given["weight"], given["values"].detach(), mask)
        assert torch.equal(y, F.linear(given["x"], total, given["bias"]))
    assert y.dtype == BF16
    y.sum().backward()
    assert given["x"].grad.dtype == base
    assert given["values"].grad.dtype == F32
    wanted = (torch.ones(N, 12) @ plain["x"].bfloat16().float()).reshape(-1)[mask.positions()]
    assert torch.allclose(given["values"].grad, wanted, rtol=1e-2, atol=1e-2)
    double, mask = inputs(F64)
    with torch.autocast("cpu", BF16):
        assert sparse_linear(**double, mask=mask).dtype == F64


LAYOUTS = {
    "transposed": lambda w: w.t().contiguous().t(),
    "part of wider rows": lambda w: torch.cat([w, w], 1)[:, : w.shape[1]],
    "part of a fused weight": lambda w: torch.cat([w, w, w])[w.shape[0] : 2 * w.shape[0]],
    "every other column": lambda w: torch.stack([w, -w], -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_weights_of_any_strides(layout):
    given, mask = inputs()
    plain = sparse_linear(**given, mask=mask)
    weight = layout(given["weight"])
    memory = torch.empty(0, dtype=F64).set_(weight.untyped_storage())
    before = memory.clone()
    y = sparse_linear(**(given | {"weight": weight}), mask=mask)
    assert torch.allclose(y, plain, rtol=1e-12)
    grads = [torch.autograd.grad(t.sum(), (given["x"], given["values"])) for t in (y, plain)]
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(*grads, strict=True))
    assert bits_equal(memory, before)


def test_strides_of_x_and_dy():
    given, mask = inputs()
    expected = torch.autograd.grad(sparse_linear(**given, mask=mask).sum(), given["values"])
    for x in (
        given["x"].detach().t().contiguous().t(),
        given["x"].detach().view(3, 4, K),
        given["x"].detach().view(3, 4, K).transpose(0, 1),
    ):
        x.requires_grad_()
        y = sparse_linear(**(given | {"x": x}), mask=mask)
        assert y.shape == (*x.shape[:-1], N)
        exact = F.linear(x, dense(given["weight"], given["values"], mask), given["bias"])
        assert torch.allclose(y, exact, rtol=1e-12)
        assert torch.allclose(torch.autograd.grad(y.sum(), given["values"])[0], expected[0])
        y.mul_(2)  # the result is no view


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"weight": torch.ones(K, N)}, ValueError, r"weight has shape \[20, 28\] but the mask"),
        ({"weight": torch.ones(N, K, requires_grad=True)}, ValueError, "requires grad; freeze it"),
        ({"weight": torch.ones(1, K).expand(N, K)}, ValueError, "an expanded weight; pass weight"),
        ({"weight": torch.ones(N, K).half()}, TypeError, "float16 but x torch.float32; cast one"),
        ({"bias": torch.ones(N).half()}, TypeError, "bias has dtype torch.float16"),
        ({"bias": torch.ones(K)}, ValueError, r"bias has shape \[20\]; pass \[28\]"),
        ({"x": torch.ones(4, N)}, ValueError, r"x has shape \[4, 28\]"),
        ({"x": torch.ones(4, K).int()}, TypeError, "x has dtype torch.int32"),
        ({"values": torch.ones(5)}, ValueError, r"shape \[5\]; pass torch.float32 \[56\]"),
        ({"values": torch.ones(56).half()}, ValueError, "float16 of shape"),
        ({"mask": 0.1}, TypeError, "mask has type float"),
        ({"backend": "triton"}, ValueError, "tensors are on cpu"),
    ],
)
def test_bad_arguments_say_what_came_and_what_was_wanted(change, kind, message):
    given, mask = inputs(F32)
    good = given | {"mask": mask}
    with pytest.raises(kind, match=message):
        sparse_linear(**(good | change))
    overlapping = torch.ones(N * K).as_strided((N, K), (3, 1))
    with pytest.raises(ValueError, match=r"strides \(3, 1\), whose rows overlap"):
        sparse_linear(**(good | {"weight": overlapping}))
