"""The Triton path on a GPU: what the interpreter can't model, and the same comparisons in bf16."""

import pytest
import torch
from lowrank_cases import (
    BF16,
    F64,
    MODES,
    NAMES,
    Case,
    assert_as_good_as,
    bits_equal,
    errors,
    make,
    peft,
    run,
    truth,
)

from fastrank.kernels.common import dropout_keep
from fastrank.kernels.lowrank import lowrank_add, lowrank_linear

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_empty")]


def large(mode: str, **changes) -> Case:
    return make(mode, device="cuda", **{"M": 1000, "K": 776, "N": 1032, "R": 16} | changes)


def mask(*bits: int) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.bool)


@pytest.mark.parametrize("R", [8, 24, 64, 200])
@pytest.mark.parametrize("p", [0.0, 0.1], ids=["p0", "p0.1"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "fp64"])
def test_error_is_at_most_pefts(mode, p, R):
    keywords = {"scale": 1.7} | ({"dropout_p": p, "seed": 12} if p else {})
    case = large(mode, R=R, with_e=R == 24, keywords=keywords)
    assert_as_good_as(run(lowrank_linear, case), run(peft, case), truth(case))


@pytest.mark.parametrize(
    ("M", "K", "N"), [(1, 64, 64), (63, 123, 431), (2837, 4097, 500), (8192, 4096, 4096)]
)
@pytest.mark.parametrize("mode", ["bf16", "bf16-fp32-adapters"])
def test_shapes(mode, M, K, N):
    case = large(mode, M=M, K=K, N=N, with_e=True, keywords={"dropout_p": 0.1, "seed": 1})
    assert_as_good_as(run(lowrank_linear, case), run(peft, case), truth(case))


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["p0", "p0.3"])
def test_masks(where, p):
    on, trained = mask(1, 0, 1, 1, 0, 1, 0, 1).to(where), mask(0, 1, 1, 0, 1, 1, 1, 1).to(where)
    for active, trainable in ((on, None), (None, trained), (on, trained), (5, trained)):
        keywords = {"active": active, "trainable": trainable, "dropout_p": p, "seed": 1}
        case = large("fp32", R=8, with_e=True, keywords=keywords)
        exact = truth(case)
        for name, value in run(lowrank_linear, case).items():
            assert errors(value, exact[name])[0] < 3e-6, name


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_ranks_that_are_off_never_show(where):
    on = mask(1, 0, 1, 1, 0, 1, 0, 1).to(where)
    case = large("bf16", R=8, with_e=True, keywords={"active": on, "dropout_p": 0.2, "seed": 1})
    clean, given = run(lowrank_linear, case), case.inputs()
    off = ~on.cuda()
    with torch.no_grad():
        given["A"][off] = float("nan")
        given["B"][:, off] = float("inf")
        given["e"][off] = float("nan")
    spoiled = run(lowrank_linear, case, **given)
    for name in clean:
        assert bits_equal(spoiled[name], clean[name]), name
    for grad in (spoiled["dA"][off], spoiled["dB"][:, off], spoiled["de"][off]):
        assert grad.abs().sum() == 0.0


def test_same_bits_twice():
    case = large("bf16", M=4096, with_e=True, keywords={"dropout_p": 0.1, "seed": 3})
    first, second = run(lowrank_linear, case), run(lowrank_linear, case)
    assert all(bits_equal(first[n], second[n]) for n in first)


def test_dropout_draws_the_words_of_plain_torch(device):
    """Identity adapters show the dropped input itself."""
    x = torch.ones(300, 64, device=device)
    eye, seed = torch.eye(64, device=device), torch.tensor([2**40 + 3], device=device)
    shown = lowrank_add(torch.zeros_like(x), x, eye, eye, dropout_p=0.3, seed=seed)
    assert torch.equal(shown != 0.0, dropout_keep(seed, 300, 64, 0.3))


def test_device_masks_and_drawn_seeds_cost_no_sync():
    case = large("bf16", R=8, with_e=True)
    given = case.inputs()
    on, prefix = mask(1, 0, 1, 1, 0, 1, 0, 1).cuda(), torch.tensor(5, device="cuda")
    leaves = [given[n] for n in NAMES]

    def step(active):
        y = lowrank_linear(*leaves[:5], e=leaves[5], active=active, dropout_p=0.1)
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    for active in (on, prefix):
        step(active)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(active)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_replays_draw_anew():
    case = large("bf16")
    given = {n: t.detach() for n, t in case.inputs().items() if n != "e"}
    given["A"].requires_grad_(), given["B"].requires_grad_()

    def step():
        y = lowrank_linear(*given.values(), dropout_p=0.5)
        return y, *torch.autograd.grad(y, [given["A"], given["B"]], torch.ones_like(y))

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
    B_dB, A_dA = (given["B"] * results[2]).float().sum(0), (given["A"] * results[1]).float().sum(1)
    assert errors(B_dB, A_dA.to(F64))[0] < 2e-2


def test_compile_in_one_graph():
    case = large("bf16", R=8, with_e=True)
    leaves = list(case.inputs().values())
    on = mask(1, 0, 1, 1, 0, 1, 0, 1).cuda()

    def call(*t):
        return lowrank_linear(*t[:5], e=t[5], active=on, dropout_p=0.3, seed=3)

    torch.compiler.reset()
    results = []
    for function in (call, torch.compile(call, fullgraph=True)):
        y = function(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    for name, eager, traced in zip(("y", *NAMES), *results, strict=True):
        assert errors(traced, eager.to(F64))[0] < 1e-6, name


def test_offsets_are_64_bit():
    """2.2e9 elements: the last rows start beyond what int32 can count."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    M, K = 540_000, 4096
    x = torch.zeros(M, K, dtype=BF16, device="cuda")
    x[-64:] = torch.randn(64, K)
    A = torch.randn(8, K, device="cuda", dtype=BF16)
    B = torch.randn(16, 8, device="cuda", dtype=BF16)
    y = lowrank_add(torch.zeros(M, 16, dtype=BF16, device="cuda"), x, A, B)
    few = lowrank_add(torch.zeros(64, 16, dtype=BF16, device="cuda"), x[-64:], A, B)
    assert errors(y[-64:], few.to(F64))[0] < 1e-2
    assert y[:-64].abs().sum() == 0.0


def test_peak_memory_is_below_pefts():
    """fp32 adapters over a bf16 x: no fp32 copy of x, nothing kept for dropout."""
    case = large("bf16-fp32-adapters", M=8192, K=2048, N=2048)
    given = {n: t.detach() for n, t in case.inputs().items() if n != "e"}
    given["A"].requires_grad_(), given["B"].requires_grad_()
    given["x"].requires_grad_()
    peaks = []
    for function in (lowrank_linear, peft):
        for _ in range(2):  # the first call compiles
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            y = function(*given.values(), dropout_p=0.1, seed=1)
            y.sum().backward()
            peak = torch.cuda.max_memory_allocated() - before
            for n in ("x", "A", "B"):
                given[n].grad = None
            del y
        peaks.append(peak)
    assert peaks[0] < 0.6 * peaks[1]
