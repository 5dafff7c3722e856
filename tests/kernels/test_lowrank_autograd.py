"""The op among autograd's machinery: saving, checkpointing, autocast, in place, compile."""

import subprocess
import sys

import pytest
import torch
from lowrank_cases import BF16, F32, F64, NAMES, Case, bits_equal, errors, run
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from fastrank.kernels.lowrank import lowrank_add, lowrank_linear

ON = torch.tensor([1, 0, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
TRAINED = torch.tensor([0, 1, 1, 1, 0, 1, 1, 1], dtype=torch.bool)


def saved(case: Case, needs: set[str]) -> list[torch.Size]:
    """Shapes that autograd keeps for a call, parameters aside."""
    given = {n: t.detach().requires_grad_(n in needs) for n, t in case.inputs().items()}
    kept = []

    def pack(t):
        if not any(t.data_ptr() == p.data_ptr() for n, p in given.items() if n != "x"):
            kept.append((tuple(t.shape), t.dtype))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lowrank_linear(*(given[n] for n in NAMES[:5]), e=given["e"], **case.keywords)
    return kept


def test_nothing_is_saved_without_need():
    """x for dA only, S for dB only, a byte mask under dropout, nothing without gradients."""
    case = Case(with_e=True)
    x, S = ((48, 40), F32), ((48, 8), F32)
    assert saved(case, set()) == []
    assert saved(case, {"x"}) == []
    assert saved(case, {"B"}) == [S]
    assert saved(case, {"A"}) == [x]
    assert saved(case, {"A", "e"}) == [x]
    assert saved(case, {"e"}) == [S]
    assert saved(case, {"A", "B", "e", "x"}) == [x, S]
    case.keywords = {"dropout_p": 0.5, "seed": 1}
    mask = ((48, 40), torch.int8)
    assert [k for k in saved(case, {"A", "B", "x"}) if k[0] != (1,)] == [x, S, mask]
    assert [k for k in saved(case, {"B"}) if k[0] != (1,)] == [S]
    case.keywords = {"active": 0}
    assert saved(case, {"A", "B", "e"}) == []


def test_saved_tensors_are_not_written():
    case = Case(with_e=True, keywords={"dropout_p": 0.3, "seed": 1})
    given = case.inputs()
    before = {n: t.detach().clone() for n, t in given.items()}
    run(lowrank_linear, case, **given)
    assert all(torch.equal(given[n], before[n]) for n in NAMES)
    y = lowrank_linear(*(given[n] for n in NAMES[:5]))
    with torch.no_grad():
        given["A"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_double_backward_is_refused():
    given = Case().inputs()
    y = lowrank_linear(*(given[n] for n in NAMES[:5]))
    (dx,) = torch.autograd.grad(y.pow(2).sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("explicit", [False, True], ids=["drawn", "seeded"])
def test_checkpointing_replays_dropout(reentrant, explicit):
    case = Case(with_e=True)
    given = case.inputs()
    leaves = [given[n] for n in NAMES]

    def layer(*t):
        return lowrank_linear(*t[:5], e=t[5], dropout_p=0.4, seed=3 if explicit else None)

    results = []
    for wrap in (False, True):
        torch.manual_seed(5)
        # twice in a row: the second layer's draw must be replayed from where it began
        y = checkpoint(layer, *leaves, use_reentrant=reentrant) if wrap else layer(*leaves)
        z = checkpoint(layer, *leaves, use_reentrant=reentrant) if wrap else layer(*leaves)
        torch.manual_seed(99)  # what happens in between must not matter
        results.append([y, z, *torch.autograd.grad(y.sin().sum() + z.cos().sum(), leaves)]
                       if not reentrant else _reentrant(y, z, leaves))  # fmt: skip
    for plain, replayed in zip(*results, strict=True):
        assert bits_equal(plain.detach(), replayed.detach())
    if not explicit:
        assert not torch.equal(results[0][0], results[0][1])


def _reentrant(y, z, leaves):
    for leaf in leaves:
        leaf.grad = None
    (y.sin().sum() + z.cos().sum()).backward()  # reentrant checkpointing needs .backward()
    return [y, z, *(leaf.grad for leaf in leaves)]


def test_seeds_come_from_torchs_generator():
    given = {n: t.detach() for n, t in Case().inputs().items() if n != "e"}
    torch.manual_seed(1)
    a = lowrank_linear(*given.values(), dropout_p=0.5)
    b = lowrank_linear(*given.values(), dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(a, lowrank_linear(*given.values(), dropout_p=0.5))
    assert not torch.equal(a, b)


def test_inference_mode_leaves_nothing_behind():
    """A mask first seen in inference mode is compacted by tensors that training may save."""
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1], dtype=torch.bool)
    case = Case(keywords={"active": mask, "dropout_p": 0.2, "seed": 1})
    given = case.inputs()
    with torch.inference_mode():
        y = lowrank_linear(*(given[n] for n in NAMES[:5]), **case.keywords)
    assert y.is_inference()
    trained = run(lowrank_linear, case)
    assert bits_equal(trained["y"], y.clone())


def test_autocast_casts_as_linear_does():
    given = Case().inputs()
    with torch.autocast("cpu", BF16):
        y = lowrank_linear(*(given[n] for n in NAMES[:5]))
        base = torch.nn.functional.linear(given["x"], given["weight"], given["bias"])
        off = lowrank_linear(*(given[n] for n in NAMES[:5]), active=0)
        assert bits_equal(off, base)
        wide = [given[n].double() for n in NAMES[:5]]
        assert lowrank_linear(*wide).dtype == F64
    assert y.dtype == BF16
    # only the casts: what follows is the op on cast operands
    narrow = [given[n].to(BF16) for n in NAMES[:3]]
    adapters = given["A"], given["B"]
    assert bits_equal(y, lowrank_linear(*narrow, *adapters, precision="compute"))
    # backward inside or outside of autocast: the same bits
    outside = torch.autograd.grad(y.float().sum(), list(given.values())[:5], retain_graph=True)
    with torch.autocast("cpu", BF16):
        inside = torch.autograd.grad(y.float().sum(), list(given.values())[:5])
    for name, a, b in zip(NAMES, outside, inside, strict=False):
        assert a.dtype == F32, name
        assert bits_equal(a, b), name


def test_result_can_be_modified_in_place():
    """A view made inside a Function could not."""
    given = Case().inputs()
    for x in (given["x"], given["x"].detach().view(2, 24, 40)):
        y = lowrank_linear(x, *(given[n] for n in NAMES[1:5]))
        y += 1.0
        y.sum().backward()


def test_add_in_place():
    given = Case().inputs()
    x, A, B = given["x"], given["A"], given["B"]
    base = torch.randn(48, 56)
    expected = lowrank_add(base, x, A, B)
    exact = torch.autograd.grad(expected.pow(2).sum(), [x, A, B])

    y = base.clone()
    out = lowrank_add(y, x, A, B, inplace=True)
    assert out.data_ptr() == y.data_ptr()
    assert bits_equal(out.detach(), expected.detach())
    for a, b in zip(torch.autograd.grad(out.pow(2).sum(), [x, A, B]), exact, strict=True):
        assert bits_equal(a, b)

    # a base that remembers its output for its own backward must notice
    leaf = torch.randn(48, 56, requires_grad=True)
    y = leaf.exp()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lowrank_add(y, x, A, B, inplace=True).sum().backward()
    y = leaf * 2.0
    lowrank_add(y, x, A, B, inplace=True).sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2.0))
    with torch.no_grad():
        y = torch.empty(56, 48).T.copy_(base).clone(memory_format=torch.preserve_format)
        assert not y.is_contiguous()
        assert torch.equal(lowrank_add(y, x, A, B, inplace=True), expected)


def example(p: float, mask: torch.Tensor | None, prefix: int | None, x: torch.Tensor | None = None):
    given = Case(with_e=True).inputs()
    x = given["x"] if x is None else x
    seed = torch.tensor([3]) if p else None
    options = (0.5, p, "torch", None, "peft")
    tail = (mask, prefix, TRAINED, seed, None, *options)
    linear = (x, given["weight"], given["bias"], given["A"], given["B"], given["e"], *tail)
    y = torch.randn(*x.shape[:-1], 56, requires_grad=True)
    return linear, (y, x, given["A"], given["B"], given["e"], *tail)


@pytest.mark.parametrize(
    ("p", "mask", "prefix", "layout"),
    [(0.0, None, None, "plain"), (0.3, ON, None, "permuted"), (0.3, None, 3, "3-d")],
)
def test_opcheck(p, mask, prefix, layout):
    """Schema, fakes and the traced backward, on permuted layouts too."""
    x = {
        "plain": None,
        "permuted": torch.randn(40, 48).T.requires_grad_(),
        "3-d": torch.randn(4, 12, 40).transpose(0, 1).requires_grad_(),
    }[layout]
    linear, add = example(p, mask, prefix, x)
    opcheck(torch.ops.fastrank.lowrank_linear, linear)
    opcheck(torch.ops.fastrank.lowrank_add, add)


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"active": ON, "trainable": TRAINED, "dropout_p": 0.3, "seed": 3},
        {"active": 3},
        {"dropout_p": 0.2},
        {"backend": "reference", "dropout_p": 0.2, "seed": 3},
    ],
    ids=["plain", "masks", "prefix", "drawn", "reference"],
)
def test_compile_in_one_graph(keywords):
    """Forward, backward and a view input, against eager; the eager path is another one."""
    torch.compiler.reset()
    given = Case(with_e=True).inputs()
    leaves = [given[n] for n in NAMES]

    def linear(x, *t):
        return lowrank_linear(x[:32].view(4, 8, 40), *t[:4], e=t[4], **keywords).sin()

    def add(x, *t):
        y = lowrank_linear(x, *t[:4])
        return lowrank_add(y * 2.0, x, *t[2:4], e=t[4], inplace=True, **keywords).sin()

    for function in (linear, add):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        results = []
        for variant in (function, compiled):
            torch.manual_seed(3)
            y = variant(*leaves)
            results.append([y.detach(), *torch.autograd.grad(y.sum(), leaves)])
        for name, eager, traced in zip(("y", *NAMES), *results, strict=True):
            assert errors(traced, eager.to(F64))[0] < 1e-6, (function.__name__, name)


def test_selective_checkpointing_sees_the_op():
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    seen = []

    def policy(ctx, op, *args, **kwargs):
        seen.append(str(op))
        return CheckpointPolicy.MUST_SAVE if "fastrank" in str(op) else (
            CheckpointPolicy.PREFER_RECOMPUTE
        )  # fmt: skip

    case = Case(with_e=True)
    leaves = list(case.inputs().values())

    def layer(*t):
        return lowrank_linear(*t[:5], e=t[5], dropout_p=0.3).sin()

    def contexts():
        return create_selective_checkpoint_contexts(policy)

    torch.manual_seed(2)
    plain = layer(*leaves)
    expected = torch.autograd.grad(plain.sum(), leaves)
    torch.manual_seed(2)
    y = checkpoint(layer, *leaves, use_reentrant=False, context_fn=contexts)
    for a, b in zip(torch.autograd.grad(y.sum(), leaves), expected, strict=True):
        assert errors(a, b.to(F64))[0] < 1e-6
    assert "fastrank.lowrank_linear.default" in seen


def test_import_is_light():
    """No Triton and no compiler until something needs them."""
    code = (
        "import sys, fastrank.kernels.lowrank; "
        "heavy = ('triton', 'torch._dynamo', 'peft', 'transformers'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
