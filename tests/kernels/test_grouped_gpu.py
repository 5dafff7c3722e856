"""The grouped Triton path on a GPU: what the interpreter can't model, and the same comparisons in
bf16 and at larger shapes. The baseline is a loop over groups of what PEFT computes.
"""

from dataclasses import dataclass, field

import lowrank_cases
import pytest
import torch
from lowrank_cases import BF16, F64, NAMES, assert_as_good_as, bits_equal, errors, peft
from torch import Tensor

from fastrank.kernels.common import dropout_keep
from fastrank.kernels.lowrank import grouped_lowrank_linear

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_empty")]

MODES = {name: mode for name, mode in lowrank_cases.MODES.items() if name != "fp64"}
LAYOUTS = {
    "ragged": ((300, 0, 1, 517, 64, 100), (8, 4, 16, 3, 0, 24)),
    "uniform": ((128,) * 8, (8,) * 8),
    "few rows": ((5, 0, 16, 1) * 40, (16, 8, 4, 1) * 40),
    "many ranks": ((700, 333), (200, 70)),
}


@dataclass
class Case:
    """One call of the public op."""

    rows: tuple[int, ...] = LAYOUTS["ragged"][0]
    ranks: tuple[int, ...] = LAYOUTS["ragged"][1]
    K: int = 776
    N: int = 1032
    mode: str = "bf16"
    with_e: bool = False
    keywords: dict = field(default_factory=dict)

    def inputs(self) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(0)
        dtype, adapters, _ = MODES[self.mode]

        def draw(*shape: int, dtype: torch.dtype, gain: float = 1.0) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=F64) * gain
            return values.to(dtype).cuda().requires_grad_()

        M, R, K, N = sum(self.rows), sum(self.ranks), self.K, self.N
        given = {
            "x": draw(M, K, dtype=dtype),
            "weight": draw(N, K, dtype=dtype, gain=K**-0.5).detach(),
            "bias": draw(N, dtype=dtype).detach(),
            "A": draw(R, K, dtype=adapters, gain=K**-0.5),
            "B": draw(R, N, dtype=adapters, gain=0.3),
            "e": draw(R, dtype=adapters) if self.with_e else None,
        }
        return given

    def dy(self) -> Tensor:
        """Values that every dtype holds exactly."""
        generator = torch.Generator().manual_seed(1)
        dy = torch.randint(-128, 129, (sum(self.rows), self.N), generator=generator)
        return (dy / 64).cuda()

    def scale(self) -> tuple[float, ...]:
        return tuple(0.5 + g % 7 / 4 for g in range(len(self.rows)))

    def seeds(self) -> tuple[int, ...]:
        return tuple(2**40 + g for g in range(len(self.rows)))


def run(function, case: Case, **changes) -> dict[str, Tensor]:
    """y and the gradient of everything that asks for one."""
    given = case.inputs() | changes
    _, _, autocast = MODES[case.mode]
    with torch.autocast("cuda", autocast, enabled=autocast is not None):
        y = function(case, given)
    wanted = {n: t for n, t in given.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), case.dy().to(y.dtype))
    return {"y": y.detach()} | dict(zip((f"d{n}" for n in wanted), grads, strict=True))


def fused(case: Case, given: dict) -> Tensor:
    keywords = {"rows": case.rows, "ranks": case.ranks, "scale": case.scale()} | case.keywords
    if case.keywords.get("dropout_p"):
        keywords = {"seeds": case.seeds()} | keywords
    return grouped_lowrank_linear(*(given[n] for n in NAMES[:5]), e=given["e"], **keywords)


def loop(case: Case, given: dict) -> Tensor:
    """PEFT's computation, group by group."""
    ys, row, rank = [], 0, 0
    for m, r, scale, seed in zip(case.rows, case.ranks, case.scale(), case.seeds(), strict=True):
        own, ranks = slice(row, row + m), slice(rank, rank + r)
        keywords = {"scale": scale, "e": None if given["e"] is None else given["e"][ranks]}
        if "dropout_p" in case.keywords:
            keywords |= {"dropout_p": case.keywords["dropout_p"], "seed": seed}
        factors = given["A"][ranks], given["B"][ranks].t()
        ys.append(peft(given["x"][own], given["weight"], given["bias"], *factors, **keywords))
        row, rank = row + m, rank + r
    return torch.cat(ys)


def exactly(case: Case, **changes) -> dict[str, Tensor]:
    """The reference in float64, from the same rounded inputs."""
    wide = {
        n: None if t is None else t.detach().to(F64).requires_grad_(t.requires_grad)
        for n, t in (case.inputs() | changes).items()
    }
    plain = Case(**(vars(case) | {"mode": "fp32"}))
    plain.keywords = case.keywords | {"backend": "reference"}
    return run(fused, plain, **wide)


@pytest.mark.parametrize("p", [0.0, 0.1], ids=["p0", "p0.1"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_error_is_at_most_pefts(mode, layout, p):
    rows, ranks = LAYOUTS[layout]
    case = Case(rows, ranks, mode=mode, with_e=layout == "ragged")
    case.keywords = {"dropout_p": p} if p else {}
    assert_as_good_as(run(fused, case), run(loop, case), exactly(case))


@pytest.mark.parametrize(("K", "N"), [(64, 64), (123, 431), (4097, 500), (4096, 4096)])
@pytest.mark.parametrize("mode", ["bf16", "bf16-fp32-adapters"])
def test_shapes(mode, K, N):
    case = Case((2837, 1, 3000, 0), (16, 8, 40, 3), K, N, mode, with_e=True)
    case.keywords = {"dropout_p": 0.1}
    assert_as_good_as(run(fused, case), run(loop, case), exactly(case))


def masks() -> tuple[Tensor, Tensor]:
    ranks = torch.arange(sum(LAYOUTS["ragged"][1]), device="cuda")
    return ranks % 3 != 1, ranks % 4 != 0


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["p0", "p0.3"])
def test_masks_on_the_device(p):
    on, trained = masks()
    for active, trainable in ((on, None), (None, trained), (on, trained)):
        case = Case(mode="fp32", with_e=True)
        case.keywords = {"active": active, "trainable": trainable, "dropout_p": p}
        got, exact = run(fused, case), exactly(case)
        for name, value in got.items():
            assert errors(value, exact[name])[0] < 3e-6, name
        off = ~(on if trainable is None else trained if active is None else on & trained)
        for name in ("dA", "dB", "de"):
            assert got[name][off].abs().sum() == 0.0


def test_ranks_that_are_off_never_show():
    on, trained = masks()
    case = Case(with_e=True, keywords={"active": on, "trainable": trained, "dropout_p": 0.2})
    clean, given = run(fused, case), case.inputs()
    with torch.no_grad():
        for name, poison in (("A", float("nan")), ("B", float("inf")), ("e", float("nan"))):
            given[name][~on] = poison
    spoiled = run(fused, case, **given)
    for name in clean:
        assert bits_equal(spoiled[name], clean[name]), name


@pytest.mark.parametrize("where", ["x", "A", "B", "e"])
def test_a_group_gone_wrong_harms_no_other(where):
    case = Case((300, 517, 70), (8, 5, 16), with_e=True, keywords={"dropout_p": 0.1})
    rows, ranks = slice(300, 817), slice(8, 13)
    clean, given = run(fused, case), case.inputs()
    with torch.no_grad():
        given[where][rows if where == "x" else ranks] = float("nan")
    hurt = run(fused, case, **given)
    assert not hurt["y"][rows].isfinite().all()
    for name, value in hurt.items():
        others = torch.ones(len(value), dtype=torch.bool, device="cuda")
        others[rows if name in ("y", "dx") else ranks] = False
        assert bits_equal(value[others], clean[name][others]), name


@pytest.mark.parametrize("layout", [*LAYOUTS, "long groups"])
def test_same_bits_twice(layout):
    """Also where the rows of a group are split over programs."""
    rows, ranks = LAYOUTS.get(layout, ((6000, 5000), (8, 8)))
    case = Case(rows, ranks, with_e=True, keywords={"dropout_p": 0.1})
    first, second = run(fused, case), run(fused, case)
    assert all(bits_equal(first[n], second[n]) for n in first)


def test_dropout_draws_the_words_of_plain_torch():
    """Identity adapters show the dropped input itself."""
    rows = (300, 40)
    x = torch.ones(340, 64, device="cuda")
    eye = torch.eye(64, device="cuda").repeat(2, 1)
    weight = torch.zeros(64, 64, device="cuda")
    seeds = torch.tensor([2**40 + 3, -5], device="cuda")
    keywords = {"rows": rows, "ranks": (64, 64), "scale": 1.0, "dropout_p": 0.3, "seeds": seeds}
    shown = grouped_lowrank_linear(x, weight, None, eye, eye, **keywords)
    for own, seed in zip(shown.split(rows), seeds.split(1), strict=True):
        assert torch.equal(own != 0.0, dropout_keep(seed, len(own), 64, 0.3))


def on_device(case: Case) -> dict[str, Tensor]:
    """Counts and scales that the host doesn't know."""
    given = {"rows": case.rows, "ranks": case.ranks, "scale": case.scale()}
    return {name: torch.tensor(values, device="cuda") for name, values in given.items()}


@pytest.mark.parametrize("p", [0.0, 0.1], ids=["p0", "p0.1"])
@pytest.mark.parametrize("layout", ["ragged", "few rows"])
def test_counts_on_the_device(layout, p):
    rows, ranks = LAYOUTS[layout]
    case = Case(rows, ranks, mode="fp32", with_e=True, keywords={"dropout_p": p})
    exact = exactly(case)
    case.keywords |= on_device(case)
    for name, value in run(fused, case).items():
        assert errors(value, exact[name])[0] < 3e-6, name


def test_rows_of_no_group_are_the_base():
    case = Case((300, 200, 100), (8, 4, 16), mode="fp32", with_e=True)
    exact = exactly(Case((300, 100, 200), (8, 2, 18), mode="fp32", with_e=True))
    case.keywords = on_device(Case((300, 100), (8, 2)))
    got, given = run(fused, case), case.inputs()
    base = torch.nn.functional.linear(*(given[n] for n in NAMES[:3]))
    assert torch.equal(got["y"][400:], base[400:])
    assert errors(got["y"][:400], exact["y"][:400])[0] < 3e-6
    for name in ("dA", "dB", "de"):
        assert errors(got[name][:10], exact[name][:10])[0] < 3e-6
        assert got[name][10:].abs().sum() == 0.0


@pytest.mark.parametrize("where", ["host", "device"])
def test_a_step_costs_no_sync(where):
    """Once the tables of a layout are there; masks, drawn seeds and counts on the device."""
    on, trained = masks()
    case = Case(with_e=True)
    case.keywords = {"active": on, "trainable": trained, "dropout_p": 0.1, "seeds": None}
    case.keywords |= on_device(case) if where == "device" else {}
    given, dy = case.inputs(), case.dy().to(BF16)
    leaves = [given[n] for n in ("x", "A", "B", "e")]

    def step():
        torch.autograd.grad(fused(case, given), leaves, dy)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_replays_take_new_counts_and_draw_anew():
    case = Case((300, 200, 100), (8, 4, 16), with_e=True)
    counts = on_device(case)
    case.keywords = counts | {"dropout_p": 0.5, "seeds": None}
    given, dy = case.inputs(), case.dy().to(BF16)
    leaves = [given[n] for n in ("x", "A", "B", "e")]

    def step():
        y = fused(case, given)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    first = [t.clone() for t in results]
    graph.replay()
    assert not torch.equal(results[0], first[0])
    counts["rows"].copy_(torch.tensor([0, 550, 50]))
    graph.replay()
    _, _, dA, dB, de = results
    assert dA[:8].abs().sum() == dB[:8].abs().sum() == de[:8].abs().sum() == 0.0
    assert dA[8:12].abs().sum() > 0.0
    # ΣB∘dB = ΣA∘dA = e∘de, rank by rank: of one draw
    sums = [(given[n] * t).float().sum(1) for n, t in (("A", dA), ("B", dB))]
    sums.append((given["e"] * de).float())
    assert errors(sums[0][8:], sums[1][8:].to(F64))[0] < 2e-2
    assert errors(sums[2][8:], sums[1][8:].to(F64))[0] < 2e-2


def test_offsets_are_64_bit():
    """2.2e9 elements: the last group starts beyond what int32 can count."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    M, K = 540_000, 4096
    x = torch.zeros(M, K, dtype=BF16, device="cuda")
    x[-64:] = torch.randn(64, K)
    weight = torch.zeros(16, K, dtype=BF16, device="cuda")
    A = torch.randn(16, K, dtype=BF16, device="cuda")
    B = torch.randn(16, 16, dtype=BF16, device="cuda")
    y = grouped_lowrank_linear(x, weight, None, A, B, rows=(M - 64, 64), ranks=(8, 8), scale=1.0)
    few = grouped_lowrank_linear(
        x[-64:], weight, None, A[8:], B[8:], rows=(64,), ranks=(8,), scale=1.0
    )
    assert errors(y[-64:], few.to(F64))[0] < 1e-2
    assert y[:-64].abs().sum() == 0.0
