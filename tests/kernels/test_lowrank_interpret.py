"""The Triton path in the interpreter: every output and gradient, and every launch accounted for.

bf16 is left to ahead-of-time compilation and GPUs: the interpreter truncates where GPUs round.
"""

import pytest
import torch
from lowrank_cases import (
    F32,
    F64,
    FP16,
    NAMES,
    Case,
    assert_any_dy,
    assert_as_good_as,
    bits_equal,
    errors,
    peft,
    run,
    truth,
)
from torch.library import opcheck

from fastrank.kernels.common.launch import INTERPRETED, plan_launches, pretend
from fastrank.kernels.lowrank import core, lowrank_add, lowrank_linear
from fastrank.kernels.lowrank.choices import table_for
from fastrank.kernels.lowrank.variants import variants

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_empty", "launches")]

FLAGS = ("MASKED", "DROPOUT", "ADD", "WANT_DE", "EVEN_C", "BIAS")
FLAGS += ("BLOCK_M", "BLOCK_W", "BLOCK_C", "BLOCK_R", "GROUP_M")
POINTERS = ("x_ptr", "q_ptr", "out_ptr")
TYPES = {F32: "*fp32", FP16: "*fp16", torch.bfloat16: "*bf16"}


def key(kernel: str, arguments: dict, pointers: dict, warps: int, stages: int) -> tuple:
    fixed = {n: arguments[n] for n in FLAGS if n in arguments}
    if kernel == "lowrank_gemm_kernel":  # of these only all and none are compiled
        fixed = {n: v for n, v in fixed.items() if n not in FLAGS[:6]}
    dot = (str(arguments.get("DOT")), arguments.get("PRECISION"))
    return kernel, tuple(fixed.items()), tuple(pointers.items()), *dot, warps, stages


COMPILED = {
    key(
        v.kernel.__name__,
        v.constants,
        {n: v.types[n] for n in POINTERS if n in v.types},
        v.tile.num_warps,
        v.tile.num_stages,
    )
    for v in variants(table_for(INTERPRETED), hip=False)
}


@pytest.fixture
def launches():
    """(name, grid) of the kernels launched; each launch is one of those compiled ahead of time."""
    seen = []

    def run_and_note(kernel, grid, arguments):
        name = kernel.__name__
        pointers = {n: TYPES[arguments[n].dtype] for n in POINTERS if n in arguments}
        options = arguments["num_warps"], arguments["num_stages"]
        assert key(name, arguments, pointers, *options) in COMPILED
        seen.append((name, grid))
        kernel[grid](**arguments)

    with plan_launches(run_and_note):
        yield seen


@pytest.fixture
def device_masks(monkeypatch):
    """Masks as they arrive on a GPU, where the host can't read them: not compacted."""

    def resolve(active, trainable, ranks, device):
        if active is not None and not (isinstance(active, torch.Tensor) and active.dim()):
            active = torch.arange(ranks) < active
        return ranks, ranks, None, active, trainable

    monkeypatch.setattr(core, "resolve_masks", resolve)


def fused(*arguments, **keywords):
    return lowrank_linear(*arguments, backend="triton", **keywords)


def small(**changes) -> Case:
    return Case(**({"M": 37, "K": 24, "N": 19, "R": 5} | changes))


MODES = {"fp32": (F32, F32), "fp16": (FP16, FP16), "fp16-fp32-adapters": (FP16, F32)}


@pytest.mark.parametrize("with_e", [False, True], ids=["plain", "e"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["p0", "p0.3"])
@pytest.mark.parametrize("mode", MODES)
def test_error_is_at_most_pefts(mode, p, with_e):
    dtype, adapters = MODES[mode]
    keywords = {"scale": 1.7} | ({"dropout_p": p, "seed": 12} if p else {})
    case = Case(70, 136, 150, 12, dtype, adapters, with_e=with_e, keywords=keywords)
    assert_as_good_as(run(fused, case), run(peft, case), truth(case))


def compare(case: Case, **changes):
    exact, got = truth(case), run(fused, case, **changes)
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert errors(value, exact[name])[0] < 1e-6, name


def test_autocast_and_bf16():
    """Within the interpreter's truncation of bf16: 2**-7 instead of 2**-8."""
    bf16 = torch.bfloat16
    for dtype, adapters, autocast in (
        (F32, F32, bf16),
        (bf16, F32, bf16),
        (bf16, bf16, None),
        (bf16, F32, None),
    ):
        case = small(dtype=dtype, adapters=adapters, autocast=autocast, with_e=True)
        exact, got = truth(case), run(fused, case)
        for name, value in got.items():
            narrow = adapters is bf16 or autocast or name in ("y", "dx", "dweight", "dbias")
            assert errors(value, exact[name])[0] < (1.6e-2 if narrow else 1e-6), (name, autocast)
            assert (
                value.dtype == (dtype if name in ("dx", "dweight", "dbias") else adapters)
                or name == "y"
            )


def test_precision_chooses_what_is_multiplied():
    """fp32 adapters over a sixteen-bit x: an fp32-accurate branch, or the base's dtype."""
    found = {}
    for precision in ("peft", "compute"):
        case = small(K=136, dtype=FP16, keywords={"precision": precision})
        got, exact = run(fused, case), truth(small(K=136, dtype=FP16))
        found[precision] = max(errors(got[n], exact[n])[0] for n in ("dA", "dB"))
        assert got["dA"].dtype == F32
    assert found["peft"] < 1e-6
    assert 1e-5 < found["compute"] < 2e-3


@pytest.mark.parametrize("R", [1, 17, 33, 64, 70, 130])
def test_ranks_of_any_number(R, launches):
    """Padded tiles, one of every size, and several tiles of ranks."""
    compare(small(R=R, with_e=True, keywords={"dropout_p": 0.2, "seed": 1}))
    names = [name for name, _ in launches]
    assert ("lowrank_dual_kernel" in names) == (R <= 16)


def test_reductions_split_over_programs(launches):
    """Long K, N and M: parts are added up in a fixed order, so twice gives the same bits."""
    case = Case(70, 150, 260, 4, with_e=True, keywords={"dropout_p": 0.1, "seed": 2})
    with pretend(INTERPRETED._replace(units=8)):
        first, exact = run(fused, case), truth(case)
        grids = dict(launches)
        second = run(fused, case)
    assert grids["lowrank_shrink_kernel"][2] > 1
    assert grids["lowrank_gram_kernel"][2] > 1
    assert grids["lowrank_dual_kernel"][1] > 1
    for name, value in first.items():
        assert errors(value, exact[name])[0] < 1e-6, name
        assert bits_equal(value, second[name]), name


ON = torch.tensor([1, 0, 1, 1, 0], dtype=torch.bool)
TRAINED = torch.tensor([0, 1, 1, 0, 1], dtype=torch.bool)
MASKS = [
    (ON, None),
    (None, TRAINED),
    (ON, TRAINED),
    (3, TRAINED),
    (0, None),
    (torch.tensor(2), None),
]


@pytest.mark.parametrize("p", [0.0, 0.4], ids=["p0", "p0.4"])
@pytest.mark.parametrize(("active", "trainable"), MASKS)
def test_host_masks(active, trainable, p):
    keywords = {"active": active, "trainable": trainable, "dropout_p": p, "seed": 3}
    compare(small(with_e=True, keywords=keywords))


@pytest.mark.parametrize("p", [0.0, 0.4], ids=["p0", "p0.4"])
@pytest.mark.parametrize(("active", "trainable"), MASKS)
def test_device_masks(active, trainable, p, device_masks):
    keywords = {"active": active, "trainable": trainable, "dropout_p": p, "seed": 3}
    compare(small(with_e=True, keywords=keywords))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("R", [5, 40], ids=["dual", "two-pass"])
def test_ranks_that_are_off_never_show(R, poison, device_masks):
    on = torch.arange(R) % 3 != 1
    keywords = {"active": on, "trainable": torch.arange(R) % 2 == 0, "dropout_p": 0.3, "seed": 1}
    case = small(R=R, with_e=True, keywords=keywords)
    clean, given = run(fused, case), case.inputs()
    with torch.no_grad():
        given["A"][~on] = poison
        given["B"][:, ~on] = poison
        given["e"][~on] = poison
    spoiled = run(fused, case, **given)
    for name in clean:
        assert bits_equal(spoiled[name], clean[name]), name
    for grad in (spoiled["dA"][~on], spoiled["dB"][:, ~on], spoiled["de"][~on]):
        assert grad.abs().sum() == 0.0


def test_a_nan_row_stays_a_row(device_masks):
    """Off ranks get zero gradients even where x is NaN; other rows of y stay clean."""
    case = small(with_e=True, keywords={"active": ON})
    given = case.inputs()
    with torch.no_grad():
        given["x"][3] = float("nan")
    got = run(fused, case, **given)
    for grad in (got["dA"][~ON], got["dB"][:, ~ON], got["de"][~ON]):
        assert grad.abs().sum() == 0.0
    rows = torch.arange(case.M) != 3
    assert got["y"][rows].isfinite().all()
    assert got["y"][3].isnan().all()


SUBSETS = [{"x"}, {"A"}, {"B"}, {"e"}, {"A", "e"}, {"B", "e"}, {"x", "A"}, {"x", "B"}, {"A", "B"}]


@pytest.mark.parametrize("R", [5, 40], ids=["dual", "two-pass"])
def test_subsets_of_gradients(R):
    case = small(R=R, with_e=True, keywords={"dropout_p": 0.3, "seed": 4, "trainable": None})
    exact = truth(case)
    for subset in SUBSETS:
        given = {n: t.detach().requires_grad_(n in subset) for n, t in case.inputs().items()}
        got = run(fused, case, **given)
        assert got.keys() == {"y", *(f"d{n}" for n in subset)}
        for name, value in got.items():
            assert errors(value, exact[name])[0] < 1e-6, (subset, name)


def test_only_e_with_frozen_ranks(device_masks):
    case = small(with_e=True, keywords={"active": ON, "trainable": TRAINED})
    given = {n: t.detach().requires_grad_(n == "e") for n, t in case.inputs().items()}
    got = run(fused, case, **given)
    assert errors(got["de"], truth(case)["de"])[0] < 1e-6
    assert got["de"][~(ON & TRAINED)].abs().sum() == 0.0


def test_row_ids_make_a_draw_independent_of_neighbours():
    case = small(keywords={"dropout_p": 0.5, "seed": 9})
    given = {n: t for n, t in case.inputs().items() if n != "e"}
    y = fused(*given.values(), dropout_p=0.5, seed=9)
    part = dict(given, x=given["x"][[30, 4]])
    alone = fused(*part.values(), dropout_p=0.5, seed=9, row_ids=torch.tensor([30, 4]))
    torch.testing.assert_close(alone, y[[30, 4]], rtol=1e-5, atol=1e-6)


def test_strides_of_every_operand(device_masks):
    case = small(with_e=True)
    given = case.inputs()
    changes = {
        "x": given["x"].T.contiguous().T,
        "weight": given["weight"].T.contiguous().T,
        "A": given["A"].T.contiguous().T,
        "B": torch.stack([given["B"], given["B"]], -1)[..., 0],
        "e": torch.stack([given["e"], given["e"]], -1)[:, 0],
    }
    changes = {n: t.detach().requires_grad_() for n, t in changes.items()}
    case.keywords = {
        "active": torch.stack([ON, ~ON], -1)[:, 0],
        "trainable": torch.stack([TRAINED, ~TRAINED], -1)[:, 0],
        "row_ids": (torch.arange(74) * 5)[::2],
        "dropout_p": 0.3,
        "seed": 2,
    }
    dense = {n: v.contiguous() for n, v in case.keywords.items() if isinstance(v, torch.Tensor)}
    expected = run(fused, small(with_e=True, keywords=case.keywords | dense))
    for name, value in run(fused, case, **changes).items():
        assert errors(value, expected[name].to(F64))[0] < 1e-6, name
    leaves = [given[n] for n in NAMES]
    y = fused(*leaves[:5], e=leaves[5])
    assert_any_dy(y, leaves)


@pytest.mark.parametrize(("shape", "R"), [((24,), 5), ((2, 3, 24), 5), ((0, 24), 5), ((3, 24), 0)])
def test_dimensions_and_empty_inputs(shape, R):
    given = small(R=R, with_e=True).inputs()
    x = torch.randn(*shape).requires_grad_()
    leaves = [x, *(given[n] for n in NAMES[1:])]
    results = []
    for backend in ("triton", "reference"):
        y = lowrank_linear(*leaves[:5], e=leaves[5], dropout_p=0.2, seed=1, backend=backend)
        grads = torch.autograd.grad(y, leaves, torch.ones(()).expand(y.shape), allow_unused=True)
        results.append([y, *grads])
    for leaf, ours, exact in zip([y, *leaves], *results, strict=True):
        assert ours.shape == leaf.shape
        assert errors(ours, (torch.zeros_like(leaf) if exact is None else exact).to(F64))[0] < 1e-6


@pytest.mark.parametrize(("x_dtype", "y_dtype"), [(F32, F32), (FP16, F32), (F32, FP16)])
def test_add(x_dtype, y_dtype):
    case = small(dtype=x_dtype, with_e=True)
    given = case.inputs()
    x, A, B, e = (given[n] for n in ("x", "A", "B", "e"))
    base = torch.randn(case.M, case.N, dtype=y_dtype, requires_grad=True)
    tolerance = 1e-3 if FP16 in (x_dtype, y_dtype) else 1e-6
    results = []
    for backend in ("triton", "reference"):
        y = lowrank_add(base, x, A, B, e=e, scale=0.7, backend=backend)
        assert y.dtype == y_dtype
        results.append([y, *torch.autograd.grad(y.sum(), (base, x, A, B, e))])
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == exact.dtype
        assert errors(ours, exact.to(F64))[0] < tolerance
    y = base.detach().clone()
    assert lowrank_add(y, x, A, B, e=e, scale=0.7, backend="triton", inplace=True) is not None
    assert bits_equal(y.detach(), results[0][0].detach())


def test_add_refuses_two_kinds_of_sixteen_bits():
    given = small(dtype=FP16).inputs()
    y = torch.zeros(37, 19, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"can't add a branch of torch\.float16 to y"):
        lowrank_add(y, given["x"], given["A"], given["B"], backend="triton")
    assert lowrank_add(y, given["x"], given["A"], given["B"]).dtype == torch.bfloat16


def test_offsets_are_64_bit(tmp_path):
    """Rows 2**30 elements apart, in a sparse file: the last starts beyond what int32 can count."""
    row = 2**30
    sparse = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * row + 64, dtype=FP16)
    x = sparse.as_strided((4, 24), (row, 1))
    with torch.no_grad():
        x.copy_(torch.randn(4, 24))
    given = small(dtype=FP16).inputs()
    for column_stride in (False, True):
        far = sparse.as_strided((24, 4), (1, row)) if column_stride else x
        near = far.clone(memory_format=torch.contiguous_format)
        if column_stride:
            A, B = torch.randn(5, 4), torch.randn(19, 5)
            add = [lowrank_add(torch.zeros(24, 19), t, A, B, backend="triton") for t in (far, near)]
        else:
            add = [
                lowrank_add(torch.zeros(4, 19), t, given["A"], given["B"], backend="triton")
                for t in (far, near)
            ]
        assert bits_equal(add[0].detach(), add[1].detach())


def test_registered_op_is_the_eager_path():
    """Through torch.compile and opcheck, with a mask that leaves S padded."""
    case = small(with_e=True)
    leaves = list(case.inputs().values())
    options = (0.5, 0.3, "triton", None, "peft")
    arguments = (*leaves, ON, None, TRAINED, torch.tensor([3]), None, *options)
    opcheck(torch.ops.fastrank.lowrank_linear, arguments)

    def call(*t):
        return fused(*t[:5], e=t[5], active=ON, trainable=TRAINED, dropout_p=0.3, seed=3).sin()

    torch.compiler.reset()
    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        y = function(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), leaves)])
    for name, eager, traced in zip(("y", *NAMES), *results, strict=True):
        assert errors(traced, eager.to(F64))[0] < 1e-6, name


def test_checkpointing_replays_dropout():
    from torch.utils.checkpoint import checkpoint

    leaves = list(small(with_e=True).inputs().values())

    def layer(*t):
        return fused(*t[:5], e=t[5], dropout_p=0.4)

    results = []
    for wrap in (False, True):
        torch.manual_seed(5)
        y = checkpoint(layer, *leaves, use_reentrant=False) if wrap else layer(*leaves)
        torch.manual_seed(6)
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    for plain, replayed in zip(*results, strict=True):
        assert bits_equal(plain.detach(), replayed.detach())
