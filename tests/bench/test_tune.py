"""The tuning sweep, rehearsed in the interpreter with a clock that makes times up."""

import json
import time

import pytest
import torch

from fastrank.bench import tune, tune_points
from fastrank.bench.tune_points import Point, on_small_shapes, points
from fastrank.bench.tune_table import entry
from fastrank.kernels.common.launch import Gpu, pretend
from fastrank.kernels.lowrank import load_choices
from fastrank.kernels.lowrank.choices import nearest, table_for
from fastrank.kernels.lowrank.choices_file import parse_entry

H200 = Gpu("sm_90", 132, 227 << 10)
CPU = torch.device("cpu")


class MadeUpClock:
    """Runs a step, and takes it to last the longer the later (or earlier) it was first seen."""

    def __init__(self, later_is_slower: bool = True):
        self.seen: dict[int, int] = {}
        self.kept, self.sign = [], 1 if later_is_slower else -1

    def seconds(self, step, calls):
        if id(step) not in self.seen:
            step()
            self.kept.append(step)  # an id stays one step's while that lives
            self.seen[id(step)] = len(self.seen)
        return 0.01 * 1.1 ** (self.sign * self.seen[id(step)])


@pytest.fixture
def few_tiles(monkeypatch):
    """Two candidates of each kernel, on a GPU that holds them."""
    monkeypatch.setattr(
        tune_points, "TILES", {name: several[-2:] for name, several in tune_points.TILES.items()}
    )
    with pretend(H200):
        yield


def small_points() -> list[Point]:
    return on_small_shapes([p for p in points() if p.R == 16], M=40, W=64)


@pytest.mark.interpret
@pytest.mark.parametrize("later_is_slower", [True, False], ids=["vendor-wins", "gemm-wins"])
def test_a_sweep_writes_a_table_that_loads(later_is_slower, tmp_path, few_tiles, capsys):
    clock = MadeUpClock(later_is_slower)
    some = small_points()
    assert tune.sweep(tmp_path, deadline=None, some=some, device=CPU, clock=clock)
    lines = [json.loads(line) for line in (tmp_path / "points.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [p.key for p in some]
    assert all(line["refused"] == {} and len(line["seconds"]) >= 2 for line in lines), lines
    try:
        load_choices(tmp_path / "choices.json")
        route = table_for(H200).route("forward", "half", 16, 40, 64, 64)
        dual = table_for(H200).route("dual", "half", 16, 40, 64)
    finally:
        load_choices(None)
    assert route == ("vendor" if later_is_slower else "gemm")
    assert dual == ("two_reads" if later_is_slower else "one_read")
    assert capsys.readouterr().out.count("\n") == len(some)


@pytest.mark.interpret
def test_a_sweep_goes_on_where_it_stopped(tmp_path, few_tiles):
    some, clock = small_points()[:3], MadeUpClock()
    sweep = {"some": some, "device": CPU, "clock": clock}
    assert not tune.sweep(tmp_path, deadline=time.monotonic() - 1, **sweep)
    assert not (tmp_path / "points.jsonl").exists()
    assert tune.sweep(tmp_path, deadline=None, only=some[1].key, **sweep)
    with (tmp_path / "points.jsonl").open("a") as file:
        file.write('{"capability": "sm_90", "ke')  # killed while writing
        file.write("\n")
    steps = len(clock.seen)
    assert not (tmp_path / "choices.json").exists()
    assert tune.sweep(tmp_path, deadline=None, **sweep)
    assert len(clock.seen) == steps + 4  # two points of two candidates, the third not again
    assert (tmp_path / "choices.json").exists()
    other = pretend(H200._replace(capability="sm_80"))
    with other, pytest.raises(ValueError, match="was measured on sm_90, this is sm_80"):
        tune.sweep(tmp_path, deadline=None, **sweep)


@pytest.mark.interpret
def test_wrong_results_are_refused(tmp_path, few_tiles, monkeypatch):
    """And what can't run; neither is timed."""
    from fastrank.kernels.lowrank import launchers

    right, point = launchers.shrink, small_points()[0]
    assert point.kind == "shrink"
    calls = iter([lambda *a: right(*a) * 1.1, lambda *a: 1 / 0])
    monkeypatch.setattr(launchers, "shrink", lambda *a: next(calls)(*a))
    clock = MadeUpClock()
    record = tune.measure(point, CPU, clock)
    assert record["seconds"] == {}
    reasons = list(record["refused"].values())
    assert reasons[0].startswith("error 0.1 against float64 is above")
    assert reasons[1].startswith("ZeroDivisionError")
    assert not clock.seen


def test_candidates_fit_the_device():
    """Of those listed, a device is offered what its shared memory holds."""
    for gpu, most in ((H200, 227 << 10), (Gpu("sm_75", 40, 64 << 10), 64 << 10)):
        point = Point("gemm", "half", 16, 64, 64, 64)
        with pretend(gpu):
            operands = tune_points.Operands(point, CPU)
            tiles = [tile for tile, _ in tune_points._tiled(operands, "gemm", "half")]
        assert tiles
        assert all(2 * t[2] * (t[0] + t[1]) * t[5] <= most for t in tiles)
    assert len(tiles) < len(tune_points.TILES["gemm"])


def made_up(M: int, winner: int, kind: str = "gram") -> tuple[Point, dict[str, float]]:
    names = ["32x64x4x3", "32x128x8x3", "64x64x4x3"]
    return Point(kind, "half", 16, M, 4096), {n: 1.0 + (i != winner) for i, n in enumerate(names)}


def test_rules_follow_the_measurements():
    """The fastest tile up to half way to the next M, the best overall at the end."""
    measured = dict([made_up(2048, 0), made_up(8192, 1), made_up(32768, 1)])
    found = entry(measured, table_for(H200))
    rules = found["tiles"]["gram"]["half"]["16"]
    assert rules[0] == {"M": 4096, "tile": [32, 64, 4, 3]}
    assert rules[-1]["tile"] == [32, 128, 8, 3]
    parse_entry("tuned", found)


def test_a_route_must_win_by_more_than_noise():
    """And is chosen for the sizes where it did."""

    def product(M, gemm):
        return Point("forward", "half", 16, M, 4096, 4096), {
            "vendor": 1.0,
            "128x128x32x8x8x4": gemm,
        }

    found = entry(dict([product(2048, 0.995), product(8192, 0.9)]), table_for(H200))
    assert found["routes"]["forward"]["half"] == [
        {"R": 16, "M": 4096, "W": 4096, "C": 4096, "use": "vendor"},
        {"R": 16, "W": 4096, "C": 4096, "use": "gemm"},
        {"use": "vendor"},
    ]


def test_no_gpu_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--out", str(tmp_path / "new")]) == 2
    assert "needs a CUDA or ROCm device" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no point has 'nothing' in its name, such as 'shrink/"):
        tune.sweep(tmp_path, deadline=None, only="nothing", device=CPU)


def test_the_sweep_covers_what_tables_choose():
    every = points()
    assert len({p.key for p in every}) == len(every)
    assert every[0].M == 8192
    kinds = {p.kind for p in every}
    assert kinds == {"shrink", "expand", "gram", "dual", "dual-route", "forward", "dx", "dx_any"}
    assert nearest("sm_90", ["default", "sm_80"]) == "sm_80"
