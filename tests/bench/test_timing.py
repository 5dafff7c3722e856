"""Interleaving and quantiles, with a clock whose time is known."""

import gc
import itertools

import pytest
import torch

from fastrank.bench.timing import CpuClock, Timing, clock_for, interleave, quantile


class FakeClock:
    """Every call of a step takes as long as the step says; remembers who was sampled."""

    def __init__(self):
        self.sampled = []

    def seconds(self, step, calls):
        self.sampled.append((step.name, calls))
        step.done += calls
        return step.durations.pop(0) if len(step.durations) > 1 else step.durations[0]


class FakeStep:
    def __init__(self, name, *durations):
        self.name, self.durations, self.done = name, list(durations), 0

    def __call__(self):
        raise AssertionError("the clock calls it")


def test_variants_take_turns_and_follow_different_ones():
    clock = FakeClock()
    steps = {name: FakeStep(name, 1.0) for name in "abc"}
    found = interleave(steps, clock, seconds=0.0, min_rounds=20)
    assert [timing.samples for timing in found.values()] == [20, 20, 20]
    order = [name for name, _ in clock.sampled[6:]]  # two warm-up samples each come first
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert all(sorted(one) == list("abc") for one in rounds)
    before = {name: set() for name in "abc"}
    for earlier, later in itertools.pairwise(order):
        before[later].add(earlier)
    assert all(found >= set("abc") - {name} for name, found in before.items())
    again = FakeClock()
    interleave({name: FakeStep(name, 1.0) for name in "abc"}, again, seconds=0.0, min_rounds=20)
    assert [name for name, _ in again.sampled[6:]] == order


def test_short_steps_are_called_often_enough_for_the_clock():
    clock = FakeClock()
    steps = {"short": FakeStep("short", 1e-5), "long": FakeStep("long", 1.0)}
    interleave(steps, clock, seconds=0.0)
    calls = dict(clock.sampled[-2:])
    assert calls == {"short": 200, "long": 1}


def test_warm_up_is_not_a_sample():
    steps = {"a": FakeStep("a", 100.0, 100.0, 1.0, 2.0, 9.0)}
    timing = interleave(steps, FakeClock(), seconds=0.0, min_rounds=3)["a"]
    assert timing == Timing(median_s=2.0, q20_s=pytest.approx(1.4), q80_s=pytest.approx(6.2),
                            samples=3)  # fmt: skip


def test_the_number_of_rounds_follows_the_time_given():
    def rounds(seconds):
        steps = {"a": lambda: torch.ones(200_000).exp_()}
        return interleave(steps, CpuClock(), seconds=seconds, max_rounds=50)["a"].samples

    assert rounds(0.0) == 3
    assert rounds(1e-9) == 5
    assert 5 < rounds(1.0) <= 50
    steps = {"a": FakeStep("a", 1e-6)}
    assert interleave(steps, FakeClock(), seconds=1e9, max_rounds=7)["a"].samples == 7


def test_no_garbage_collection_within_samples():
    seen = []
    interleave({"a": lambda: seen.append(gc.isenabled())}, CpuClock(), seconds=0.0)
    assert gc.isenabled()
    assert seen[-1] is False


def test_a_step_that_fails_leaves_garbage_collection_on():
    calls = []

    def step():
        calls.append(1)
        if not gc.isenabled():
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        interleave({"a": step}, CpuClock(), seconds=0.0)
    assert gc.isenabled()


def test_quantiles_by_hand():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert quantile([0.0, 10.0], 0.2) == 2.0
    assert quantile([7.0], 0.8) == 7.0
    with pytest.raises(ValueError, match="at least one"):
        Timing.of([])


def test_the_cpu_clock_measures_one_call():
    import time

    taken = CpuClock().seconds(lambda: time.sleep(0.002), 5)
    assert 0.002 <= taken < 0.02
    assert isinstance(clock_for(torch.device("cpu")), CpuClock)
