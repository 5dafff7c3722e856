"""sparse_linear on the CPU: W + S in outputs and gradients, and a weight that keeps its bits."""

import functools
import signal
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fastrank.kernels.common import products
from fastrank.kernels.packing import SparseMask
from fastrank.kernels.packing.overlay import places_of
from fastrank.kernels.packing.sparse_linear import sparse_linear

F64, F32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
N, K = 28, 20
SCHEMES = {"stratified": {"density": 0.1}, "bernoulli": {"density": 0.1, "scheme": "bernoulli"}}


def inputs(
    dtype: torch.dtype = F64, M: int = 12, fields: dict = SCHEMES["stratified"]
) -> tuple[dict[str, Tensor], SparseMask]:
    g = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    mask = SparseMask((N, K), seed=2, tensor_id="w", **fields)
    values = draw(mask.nnz).to(F64 if dtype == F64 else F32).requires_grad_()
    given = {
        "x": draw(M, K).to(dtype).requires_grad_(),
        "weight": draw(N, K).to(dtype),
        "bias": draw(N).to(dtype).requires_grad_(),
        "values": values,
    }
    return given, mask


def dense(weight: Tensor, values: Tensor, mask: SparseMask) -> Tensor:
    """W + S as a tensor of its own, differentiable in values."""
    S = torch.zeros(mask.numel, dtype=values.dtype).index_put((mask.positions(),), values)
    return (weight + S.view(mask.shape)).to(weight.dtype)


def bits_equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


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


class Trouble(RuntimeError):
    pass


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("kind", [Trouble, KeyboardInterrupt])
def test_weight_keeps_its_bits_when_a_product_raises(where, kind, monkeypatch):
    given, mask = inputs()
    before = given["weight"].clone()
    seen = []

    def fail(x, weight, *rest):
        seen.append(not torch.equal(weight, before))
        raise kind

    if where == "forward":
        monkeypatch.setattr(products, "linear", fail)
        with pytest.raises(kind):
            sparse_linear(**given, mask=mask)
    else:
        y = sparse_linear(**given, mask=mask)
        monkeypatch.setattr(products, "mm", fail)
        with pytest.raises(kind):
            y.sum().backward()
    assert seen == [True]
    assert bits_equal(given["weight"], before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this system")
def test_weight_keeps_its_bits_when_interrupted_anywhere():
    """Signals at odd times, which Python turns into exceptions between any two instructions."""
    given, mask = inputs()
    weight, before = given["weight"], given["weight"].clone()
    armed = False

    def interrupt(number, frame):
        if armed:
            raise Trouble

    previous = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for i in range(600):
            armed = True
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + 1e-6 * i)
                y = sparse_linear(**given, mask=mask)
                torch.autograd.grad(y, (given["x"], given["values"]), y)
                armed = False
            except Trouble:
                interrupted += 1
            armed = False
            torch.set_grad_enabled(True)  # an interrupt may have come inside of no_grad's exit
            assert bits_equal(weight, before)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interrupted > 50


def test_bits_come_back_whatever_the_values_are():
    given, mask = inputs(BF16)
    given["weight"].view(-1)[mask.positions()[0]] = -0.0
    given["weight"].view(-1)[mask.positions()[1]] = torch.nan
    before = given["weight"].clone()
    with torch.no_grad():
        given["values"].fill_(torch.nan)
        given["values"][::2] = 1e38
    y = sparse_linear(**given, mask=mask)
    y.sum().backward()
    assert y.isnan().any()
    assert bits_equal(given["weight"], before)


def test_one_weight_in_several_calls_before_the_backward():
    """Twice with one mask, and once with another: graphs that saved the weight stay right."""
    given, mask = inputs()
    other = SparseMask((N, K), density=0.2, tensor_id="other")
    more = torch.randn(other.nnz, dtype=F64, requires_grad=True)
    back = torch.randn(N, K, dtype=F64)
    leaves = [given[n] for n in ("x", "bias", "values")] + [more]

    def loss(linear) -> Tensor:
        y = linear(given["x"], given["weight"], given["bias"], given["values"], mask)
        y = linear((y @ back).tanh(), given["weight"], given["bias"], given["values"], mask)
        y = F.linear((y @ back).tanh(), given["weight"])
        y = linear((y @ back).tanh(), given["weight"], None, more, other)
        return y.square().sum()

    def plain(x, weight, bias, values, mask):
        return F.linear(x, dense(weight, values, mask), bias)

    before = given["weight"].clone()
    found = torch.autograd.grad(loss(sparse_linear), leaves)
    exact = torch.autograd.grad(loss(plain), leaves)
    for ours, theirs in zip(found, exact, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    assert bits_equal(given["weight"], before)


@pytest.mark.parametrize("reentrant", [False, True], ids=["no reentrant", "reentrant"])
def test_activation_checkpointing(reentrant):
    given, mask = inputs()
    leaves = [given[n] for n in ("x", "bias", "values")]

    def layer(x):
        return sparse_linear(x, given["weight"], given["bias"], given["values"], mask).tanh()

    plain = torch.autograd.grad(layer(given["x"]).sum(), leaves)
    checkpoint(layer, given["x"], use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(a, leaf.grad) for a, leaf in zip(plain, leaves, strict=True))


def test_selective_checkpointing():
    """What a policy keeps is the call's result, not the weight in the middle of it."""
    given, mask = inputs()
    leaves = [given[n] for n in ("x", "bias", "values")]

    def layer(x):
        y = sparse_linear(x, given["weight"], given["bias"], given["values"], mask).tanh()
        return sparse_linear(y[:, :K], given["weight"], None, given["values"], mask)

    plain = torch.autograd.grad(layer(given["x"]).sum(), leaves)
    for policy in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE):
        contexts = functools.partial(
            create_selective_checkpoint_contexts, lambda *a, policy=policy, **k: policy
        )
        y = checkpoint(layer, given["x"], use_reentrant=False, context_fn=contexts)
        found = torch.autograd.grad(y.sum(), leaves)
        assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(plain, found, strict=True))


def test_values_that_change_before_the_backward_are_noticed():
    given, mask = inputs()
    y = sparse_linear(**given, mask=mask)
    with torch.no_grad():
        given["values"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_needs_no_gradient_is_not_saved_nor_computed(monkeypatch):
    given, mask = inputs()
    x, bias, values = (given[n].detach() for n in ("x", "bias", "values"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        y = sparse_linear(x, given["weight"], bias, values.requires_grad_(), mask)
        assert saved == [x.shape]
        saved.clear()
        other = sparse_linear(
            x.clone().requires_grad_(), given["weight"], bias, values.detach(), mask
        )
        assert sorted(saved) == sorted([given["weight"].shape, values.shape])
    monkeypatch.setattr(products, "mm", None)  # no dx is computed
    y.sum().backward()
    assert values.grad is not None
    assert other.requires_grad
    with torch.no_grad():
        assert not sparse_linear(**given, mask=mask).requires_grad
    with torch.inference_mode():
        assert torch.equal(sparse_linear(**given, mask=mask), y)


def test_threads_that_share_a_weight_wait_for_each_other():
    given, mask = inputs(F32, M=200)
    x, weight = given["x"].detach(), given["weight"]
    several = [torch.full((mask.nnz,), float(i)) for i in range(4)]
    exact = [sparse_linear(x, weight, None, values, mask) for values in several]
    wrong = []

    def work(i):
        for _ in range(100):
            if not torch.equal(sparse_linear(x, weight, None, several[i], mask), exact[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_compiled_code_takes_the_call_as_an_op(autocast):
    given, mask = inputs(F32)
    before = given["weight"].clone()
    leaves = [given[n] for n in ("x", "bias", "values")]

    def function(x):
        y = sparse_linear(x * 2, given["weight"], given["bias"], given["values"], mask)
        return y.tanh()

    with torch.autocast("cpu", BF16, enabled=autocast):
        expected = function(given["x"])
        y = torch.compile(function, backend="aot_eager", fullgraph=True)(given["x"])
    assert torch.equal(y, expected)
    found = [torch.autograd.grad(t.float().sum(), leaves) for t in (y, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert bits_equal(given["weight"], before)


def test_the_op_is_registered_rightly():
    given, mask = inputs()
    fields = (mask.density, mask.seed, mask.tensor_id, mask.round, mask.scheme)
    options = (None, *fields, "auto", None)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.fastrank.sparse_linear, (*given.values(), *options), test_utils=tests
    )


def test_places_are_shared_while_somebody_holds_them():
    mask = SparseMask((N, K), density=0.1)
    held = places_of(mask, torch.device("cpu"))
    assert places_of(SparseMask((N, K), density=0.1), torch.device("cpu")) is held
    assert places_of(SparseMask((N, K), density=0.1, round=1), torch.device("cpu")) is not held
    turned = held.offsets((1, N))
    rows, columns = held.positions // K, held.positions % K
    assert torch.equal(turned, columns * N + rows)
    assert held.offsets((1, N)) is turned
    assert held.offsets((K, 1)) is held.positions


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
