"""A weight keeps its bits under sparse_linear: exceptions and signals anywhere, threads."""

import signal
import threading

import pytest
import torch
from sparse_linear_cases import BF16, F32, K, N, bits_equal, inputs

from fastrank.kernels.common import products
from fastrank.kernels.packing import SparseMask
from fastrank.kernels.packing.overlay import places_of
from fastrank.kernels.packing.sparse_linear import sparse_linear


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
