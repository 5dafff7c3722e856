"""The grouped Triton path in the interpreter, against the loop of references in float64.

bf16 is left to ahead-of-time compilation and GPUs: the interpreter truncates where GPUs round.
"""

from dataclasses import dataclass

import pytest
import torch
from lowrank_cases import F32, F64, FP16, NAMES, bits_equal, errors
from torch import Tensor

from fastrank.kernels.common.launch import INTERPRETED, plan_launches, pretend
from fastrank.kernels.lowrank import (
    grouped_launchers,
    grouped_lowrank_linear,
    grouped_reference,
    grouped_triton,
)
from fastrank.kernels.lowrank.grouped_arguments import GroupedAux, GroupedBranch, Layout

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_empty")]

LAYOUTS = {
    "ragged": ((5, 0, 21, 3, 1, 8), (3, 2, 0, 7, 1, 20)),  # no rows, no ranks, several tiles
    "one group": ((37,), (5,)),
    "one row each": ((1,) * 9, tuple(range(1, 10))),
    "long groups": ((70, 0, 37, 0), (4, 4, 9, 0)),
    "many ranks": ((9, 30), (70, 33)),
}


@dataclass
class Case:
    """One call: counts, dtypes and what is drawn. `on_device`: the host doesn't know the counts."""

    rows: tuple[int, ...] = LAYOUTS["ragged"][0]
    ranks: tuple[int, ...] = LAYOUTS["ragged"][1]
    K: int = 24
    N: int = 20
    dtype: torch.dtype = F32
    adapters: torch.dtype = F32
    p: float = 0.0
    with_e: bool = True
    with_ids: bool = False
    active: Tensor | None = None
    trainable: Tensor | None = None
    on_device: bool = False
    precision: str = "peft"
    rest: int = 0  # rows and ranks that belong to no group

    @property
    def sizes(self) -> tuple[int, int]:
        return sum(self.rows) + self.rest, sum(self.ranks) + self.rest

    def inputs(self) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, dtype: torch.dtype, gain: float = 1.0) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=F64) * gain
            return values.to(dtype).requires_grad_()

        (M, R), K, N = self.sizes, self.K, self.N
        given = {
            "x": draw(M, K, dtype=self.dtype),
            "weight": draw(N, K, dtype=self.dtype, gain=K**-0.5),
            "bias": draw(N, dtype=self.dtype),
            "A": draw(R, K, dtype=self.adapters, gain=K**-0.5),
            "B": draw(R, N, dtype=self.adapters, gain=0.5),
            "e": draw(R, dtype=self.adapters) if self.with_e else None,
        }
        for name in ("weight", "bias"):
            given[name].requires_grad_(False)
        return given

    def dy(self) -> Tensor:
        """Values that every dtype holds exactly."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(-128, 129, (self.sizes[0], self.N), generator=generator) / 64

    def layout(self) -> Layout:
        starts = (torch.tensor([0, *counts]).cumsum(0) for counts in (self.rows, self.ranks))
        if self.on_device:
            return Layout(None, None, *starts, self.sizes[1])
        return Layout(self.rows, self.ranks, *starts, max(self.ranks))

    def aux(self) -> GroupedAux:
        groups, M = len(self.rows), self.sizes[0]
        ids = torch.arange(M) * 5 % 16 + 2**33 if self.with_ids else None
        return GroupedAux(
            torch.arange(groups) * 0.25 + 0.5,
            torch.arange(groups) * 2**35 - 3 if self.p else None,
            ids if self.p else None,
            self.active,
            self.trainable,
        )


def fused(case: Case, dy: Tensor | None = None, **changes) -> dict[str, Tensor]:
    """y and the gradient of everything that asks for one, from the path's two functions."""
    given = case.inputs() | changes
    needs = [given[n] is not None and given[n].requires_grad for n in ("x", "A", "B", "e")]
    given = {n: None if t is None else t.detach() for n, t in given.items()}
    x, weight, _, *factors = given.values()
    call = case.layout(), GroupedBranch(case.p, "triton", None, case.precision), case.aux()
    y, S, keep = grouped_triton.forward(*given.values(), *call)
    dy = (case.dy() if dy is None else dy).to(y.dtype)
    saved = (S if needs[2] else None, keep)
    grads = grouped_triton.backward(dy, weight, x, *factors, *saved, *call, needs, x.dtype)
    assert [t is not None for t in grads] == needs
    found = zip(("dx", "dA", "dB", "de"), grads, strict=True)
    return {"y": y} | {n: t for n, t in found if t is not None}


def truth(case: Case) -> dict[str, Tensor]:
    """The loop in float64, from the same rounded inputs."""
    wide = {
        n: None if t is None else t.detach().to(F64).requires_grad_(t.requires_grad)
        for n, t in case.inputs().items()
    }
    arguments = (*wide.values(), case.layout(), case.p, case.aux())
    y = grouped_reference.grouped_lowrank_linear(*arguments)
    wanted = {n: t for n, t in wide.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), case.dy().to(F64))
    return {"y": y.detach()} | dict(zip((f"d{n}" for n in wanted), grads, strict=True))


def compare(case: Case, tolerance: float = 1e-6, **changes) -> dict[str, Tensor]:
    got, exact = fused(case, **changes), truth(case)
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert errors(value, exact[name])[0] < tolerance, name
    return got


@pytest.fixture
def launches():
    """(name without affixes, grid, arguments) of each launch."""
    seen = []

    def run_and_note(kernel, grid, arguments):
        seen.append((kernel.__name__.split("_")[1], grid, arguments))
        kernel[grid](**arguments)

    with plan_launches(run_and_note):
        yield seen


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["p0", "p0.3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_a_loop_of_references(layout, p, on_device):
    """y and every gradient; ids of rows on and off, with and without e, along the way."""
    rows, ranks = LAYOUTS[layout]
    case = Case(rows, ranks, p=p, with_ids=not on_device, with_e=layout != "one group")
    case.on_device = on_device
    got = compare(case)
    starts = torch.tensor([0, *ranks]).cumsum(0).tolist()
    for group, m in enumerate(rows):
        if m == 0:
            own = slice(starts[group], starts[group + 1])
            assert got["dA"][own].abs().sum() == got["dB"][own].abs().sum() == 0.0


@pytest.mark.parametrize("precision", ["peft", "compute"])
@pytest.mark.parametrize("adapters", [FP16, F32], ids=["fp16", "fp32-adapters"])
def test_sixteen_bits(adapters, precision):
    case = Case(K=72, dtype=FP16, adapters=adapters, p=0.2, precision=precision)
    exact, got = truth(case), fused(case)
    wide = adapters == F32 and precision == "peft"
    for name, value in got.items():
        assert value.dtype == (FP16 if name in ("y", "dx") else adapters)
        tolerance = 1e-6 if wide and name not in ("y", "dx") else 2e-3
        assert errors(value, exact[name])[0] < tolerance, name
    assert wide or errors(got["dA"], exact["dA"])[0] > 1e-5


def test_fp16_adapters_over_fp32_rows():
    compare(Case(adapters=FP16), tolerance=1e-3)


R = sum(LAYOUTS["ragged"][1])
ON, TRAINED = torch.arange(R) % 3 != 1, torch.arange(R) % 4 != 0
NONE = torch.zeros(R, dtype=torch.bool)
MASKS = [(ON, None), (None, TRAINED), (ON, TRAINED), (ON, NONE)]


@pytest.mark.parametrize("p", [0.0, 0.4], ids=["p0", "p0.4"])
@pytest.mark.parametrize(("active", "trainable"), MASKS)
def test_masks(active, trainable, p):
    case = Case(active=active, trainable=trainable, p=p, on_device=p == 0.0)
    got = compare(case)
    off = ~(active if trainable is None else trainable if active is None else active & trainable)
    for name in ("dA", "dB", "de"):
        assert got[name][off].abs().sum() == 0.0


def test_masks_of_all_ranks_are_none():
    everything = ~NONE
    plain = fused(Case(p=0.0))
    masked = fused(Case(p=0.0, active=everything, trainable=everything))
    assert all(bits_equal(plain[n], masked[n]) for n in plain)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["p0", "p0.3"])
def test_ranks_that_are_off_never_show(p, poison):
    case = Case(active=ON, trainable=TRAINED, p=p)
    clean, given = fused(case), case.inputs()
    with torch.no_grad():
        for name in ("A", "B", "e"):
            given[name][~ON] = poison
    spoiled = fused(case, **given)
    for name in clean:
        assert bits_equal(spoiled[name], clean[name]), name


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("where", ["x", "A", "B", "e", "dy"])
def test_a_group_gone_wrong_harms_no_other(where, poison, masked):
    """Bit for bit; its neighbours share tiles of rows and of ranks with it."""
    case = Case((6, 7, 5), (4, 3, 5), p=0.3 if masked else 0.0)
    if masked:
        case.active, case.trainable = torch.arange(12) != 5, torch.arange(12) != 8
    rows, ranks = slice(6, 13), slice(4, 7)
    clean, given, dy = fused(case), case.inputs(), case.dy()
    with torch.no_grad():
        if where == "dy":
            dy[rows] = poison
        else:
            given[where][rows if where == "x" else ranks] = poison
    hurt = fused(case, dy=dy, **given)
    assert not all(t.isfinite().all() for t in hurt.values())
    for name, value in hurt.items():
        others = torch.ones(len(value), dtype=torch.bool)
        others[rows if name in ("y", "dx") else ranks] = False
        assert bits_equal(value[others], clean[name][others]), name
    if masked:  # 0 * NaN is NaN, but the gradient of a rank that is off is zero all the same
        assert hurt["dA"][5].abs().sum() == hurt["dB"][5].abs().sum() == hurt["de"][5] == 0.0


def test_order_of_the_groups_is_order_of_the_results():
    rows, ranks = LAYOUTS["ragged"]
    case, turned = Case(rows, ranks), Case(rows[::-1], ranks[::-1])
    given, scale = case.inputs(), case.aux().scale
    swapped, parts = dict(given), {}
    for name, counts in (("x", rows), ("A", ranks), ("B", ranks), ("e", ranks)):
        parts[name] = counts
        pieces = given[name].detach().split(counts)
        swapped[name] = torch.cat(pieces[::-1]).requires_grad_()
    turned.aux = lambda: GroupedAux(scale.flip(0), None, None, None, None)
    dy = case.dy()
    found = fused(case)
    other = fused(turned, dy=torch.cat(dy.split(rows)[::-1]), **swapped)
    for name, value in found.items():
        pieces = other[name].split((rows if name in ("y", "dx") else ranks)[::-1])
        assert bits_equal(torch.cat(pieces[::-1]), value), name


def test_groups_without_ranks_are_the_base():
    case = Case((5, 4), (0, 3))
    given = case.inputs()
    base = torch.nn.functional.linear(*(given[n] for n in NAMES[:3]))
    got = fused(case)
    assert bits_equal(got["y"][:5], base[:5].detach())
    assert bits_equal(got["dx"][:5], case.dy()[:5] @ given["weight"])
    assert not torch.equal(got["y"][5:], base[5:])


def test_rows_and_ranks_of_no_group():
    """Counts on the device that leave some over: the base alone, and zero gradients."""
    case = Case((5, 0, 12), (3, 2, 4), on_device=True, rest=6)
    got = compare(case)
    given = case.inputs()
    base = torch.nn.functional.linear(*(given[n] for n in NAMES[:3]))
    assert torch.equal(got["y"][17:], base[17:])
    for name in ("dA", "dB", "de"):
        assert got[name][9:].abs().sum() == 0.0


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_reductions_split_over_programs(masked, launches):
    """Long K, N and groups: parts are added up in a fixed order, so twice gives the same bits."""
    case = Case((150, 0, 70), (4, 3, 2), K=150, N=200, p=0.1)
    case.trainable = torch.arange(9) != 3 if masked else None
    with pretend(INTERPRETED._replace(units=64)):
        first, exact = fused(case), truth(case)
        names = [name for name, _, _ in launches]
        assert names == ["shrink", "expand", "gram", "finish", "shrink", "gram", "finish", "expand"]
        assert all(grid[-1] > 1 for name, grid, _ in launches if name in ("shrink", "gram"))
        second = fused(case)
    for name, value in first.items():
        assert errors(value, exact[name])[0] < 1e-6, name
        assert bits_equal(value, second[name]), name


SUBSETS = {
    ("x",): ["shrink", "expand"],
    ("A",): ["shrink", "gram"],
    ("B",): ["gram"],
    ("e",): ["shrink", "gram"],
    ("B", "e"): ["gram"],
    ("x", "B"): ["gram", "shrink", "expand"],
    ("A", "e"): ["shrink", "gram"],
}


@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
def test_what_needs_no_gradient_costs_nothing(subset, launches):
    case = Case(p=0.3)
    exact = truth(case)
    given = {n: t.detach().requires_grad_(n in subset) for n, t in case.inputs().items()}
    got = fused(case, **given)
    assert got.keys() == {"y", *(f"d{n}" for n in subset)}
    for name, value in got.items():
        assert errors(value, exact[name])[0] < 1e-6, name
    assert [name for name, _, _ in launches][2:] == SUBSETS[subset]


def test_strides_of_every_operand():
    mask = torch.stack([ON, ~ON], -1)[:, 0]
    case = Case(active=mask, trainable=torch.stack([TRAINED, TRAINED], -1)[:, 0], p=0.3)
    given = case.inputs()
    changes = {n: given[n].T.contiguous().T for n in ("x", "weight")}
    changes |= {n: torch.stack([given[n]] * 2, -1)[..., 0] for n in ("A", "B", "e")}
    changes = {n: t.detach().requires_grad_(n != "weight") for n, t in changes.items()}
    aux = case.aux()
    spread = aux._replace(
        scale=torch.stack([aux.scale] * 2, -1)[:, 0],
        seeds=torch.stack([aux.seeds] * 2, -1)[:, 0],
        row_ids=(torch.arange(76) * 5)[::2],
    )
    case.aux = lambda: spread
    compare(case, **changes)
    dy = case.dy()
    expected = fused(case)
    for strided in (dy.T.contiguous().T, torch.cat([dy, dy], 1)[:, : case.N]):
        assert strided.stride() != dy.stride()
        for name, value in fused(case, dy=strided).items():
            assert errors(value, expected[name].to(F64))[0] < 1e-6, name


def test_offsets_are_64_bit(tmp_path):
    """Rows 2**30 elements apart, in a sparse file: the last starts beyond what int32 can count."""
    step = 2**30
    sparse = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * step + 64, dtype=FP16)
    case = Case((1, 3), (2, 3), dtype=FP16)
    near = case.inputs()["x"].detach()
    far = sparse.as_strided((4, 24), (step, 1)).copy_(near)
    call = case.layout(), GroupedBranch(0.0, "triton", None, "peft"), case.aux()
    A, B = (case.inputs()[n].detach() for n in ("A", "B"))
    call = grouped_launchers.start(4, FP16, A, B, None, *call)[0]
    S, S_far = (grouped_launchers.shrink(call, x, A, dropout=False) for x in (near, far))
    assert bits_equal(S[0, :2], S_far[0, :2])
    assert bits_equal(S[1:], S_far[1:])
    options = {"e": None, "dtype": F32, "dropout": False, "want_de": False}
    H, H_far = (grouped_launchers.gradient(call, x, S, A, **options)[0] for x in (near, far))
    assert bits_equal(H, H_far)


def test_tiles_follow_the_average_group(launches):
    """Small ones for few rows; BLOCK_R by the largest rank, or the average on the device."""
    for rows, ranks, on_device, blocks in (
        ((3, 2, 4), (4, 4, 40), False, (16, 32)),
        ((3, 0, 40), (4, 4, 4), False, (32, 16)),
        ((3, 2, 4), (4, 4, 31), True, (16, 16)),
        ((30, 20, 40), (20, 20, 30), True, (32, 32)),
    ):
        launches.clear()
        compare(Case(rows, ranks, on_device=on_device))
        found = {(a["BLOCK_M"], a["BLOCK_R"]) for n, _, a in launches if n == "shrink"}
        assert found == {blocks}
        assert {a["BLOCK_M"] for n, _, a in launches if n == "expand"} == {blocks[0]}


@pytest.mark.parametrize("block", [16, 64])
def test_tables_name_every_tile_once(block):
    make_table = grouped_launchers.make_table
    counts = (0, 5, 64, 65, 0, 0, 200, 1, 16, 0)
    expected = [[g, f] for g, m in enumerate(counts) for f in range(0, m, block)]
    starts, total = torch.tensor([0, *counts]).cumsum(0), sum(counts)
    assert make_table(counts, starts, total, block).tolist() == expected
    on_device = make_table(None, starts, total + 7, block).tolist()
    assert on_device[: len(expected)] == expected
    assert all(first >= 2**30 for _, first in on_device[len(expected) :])
    assert len(on_device) <= (total + 7) // block + len(counts)
    assert make_table(counts, starts, total, block) is make_table(counts, starts, total, block)


def test_the_public_op_takes_this_path(launches):
    """Three dimensions, a gradient without strides, a mask on the host, which is compacted."""
    rows, ranks = (8, 4), (3, 2)
    case = Case(rows, ranks)
    given = case.inputs()
    leaves = [t for t in given.values() if t.requires_grad]
    keywords = {"rows": rows, "ranks": ranks, "scale": (0.5, 2.0), "e": given["e"]}
    keywords |= {"active": torch.tensor([1, 0, 1, 1, 1], dtype=torch.bool)}
    keywords |= {"dropout_p": 0.3, "seeds": (1, 2)}
    results = []
    for backend in ("triton", "reference"):
        x = given["x"].view(3, 4, 24)
        others = [given[n] for n in NAMES[1:5]]
        y = grouped_lowrank_linear(x, *others, **keywords, backend=backend)
        assert y.shape == (3, 4, 20)
        results.append([y, *torch.autograd.grad(y.sum(), leaves)])
    for ours, exact in zip(*results, strict=True):
        assert errors(ours, exact.to(F64))[0] < 1e-6
    assert {name for name, _, _ in launches} == {"shrink", "expand", "gram"}
