"""The Triton path of truncated_svd on a GPU: what the interpreter can't model, at real sizes."""

import pytest
import torch
from svd_cases import MOST, MOST_SIGMA, energy_ratio, hard, masked, ratios

from fastrank.kernels.svd import NONFINITE, FactoredSum, PackedSparse, TruncatedSVD, truncated_svd
from fastrank.kernels.svd.presets import PRESETS
from fastrank.kernels.svd.reference import materialise

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_empty")]

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ENERGY = {"fast": 0.98, "default": 0.999, "tight": 0.99999}


def run(operand, rank, **keywords) -> TruncatedSVD:
    return truncated_svd(operand, rank, backend="triton", **keywords)


def on_cpu(found) -> TruncatedSVD:
    return TruncatedSVD(*(part.cpu() for part in found))


def check(A, found, exact=True):
    """Within LAPACK's bounds. A: float64 on the CPU."""
    found = on_cpu(found)
    assert not found.status.any()
    got = ratios(A, found)
    assert max(got["residual"], got["orthogonal"], got["excess"]) < MOST, got
    assert not exact or got["sigma"] < MOST_SIGMA, got
    S = found.S
    assert (S[:, 1:] <= S[:, :-1]).all()
    at = found.U.abs().argmax(1, keepdim=True)
    assert (found.U.gather(1, at) > 0).all()


def packed(G, n, k, density, seed=0) -> PackedSparse:
    values, masks = masked(G, n, k, density, seed)
    return PackedSparse([v.cuda() for v in values], masks)


def equal(left, right) -> bool:
    return all(
        torch.equal(a.view(torch.int32), b.view(torch.int32))
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (48, 48)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("rank", [1, 6, 16, "all"])
@pytest.mark.parametrize("dtype", [F32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_hard_matrices(shape, rank, dtype):
    rank = min(shape) if rank == "all" else rank
    several = [m.to(dtype) for m in hard(*shape).values()]
    A = torch.stack([m for m in several if m.isfinite().all()])
    found = run(A.cuda(), rank)
    check(A.double(), found)
    assert found.energy[list(hard(4, 4)).index("zero")] == 1


@pytest.mark.parametrize("rank", [1, 40, 64, 112, 150, 300])
def test_every_core(rank):
    """Jacobi in registers and in memory, full blocks and odd ones."""
    A = torch.randn(3, 300, 317) * torch.logspace(0, -3, 317)
    check(A.double(), run(A.cuda(), rank), exact=rank > 1)


@pytest.mark.parametrize("accuracy", PRESETS)
@pytest.mark.parametrize("rank", [8, 64])
def test_energy_of_packed_sparse(accuracy, rank):
    operand = packed(3, 768, 768, 0.01)
    found = run(operand, rank, accuracy=accuracy)
    A = materialise(operand).cpu()
    check(A, found, exact=False)
    assert energy_ratio(A, on_cpu(found)).min() >= ENERGY[accuracy]


@pytest.mark.parametrize("Q", [8, 64, 100, 160, 640, 1000])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_sums_of_factors(Q, dtype):
    B, A = torch.randn(3, 700, Q).to(dtype), torch.randn(3, Q, 900).to(dtype)
    weights = torch.randn(Q)
    weights[0] = 0
    exact = (B.double() * weights.double()) @ A.double()
    found = run(FactoredSum(B.cuda(), A.cuda(), weights.cuda()), 6)
    # beyond DIRECT a flat spectrum's values are found as a group
    check(exact, found, exact=Q <= 256)
    assert energy_ratio(exact, on_cpu(found)).min() > 0.999


def test_identical_clients_and_zeros():
    B, A = torch.randn(2, 512, 16), torch.randn(2, 16, 512)
    B, A = torch.cat([B] * 10, 2), torch.cat([A] * 10, 1)
    B[1] = 0
    check(B.double() @ A.double(), run(FactoredSum(B.cuda(), A.cuda()), 20))


@pytest.mark.parametrize("kind", ["dense", "sparse", "factored"])
def test_a_bad_matrix_spoils_itself_alone_and_bits_repeat(kind):
    def once(bad):
        generator = torch.Generator().manual_seed(3)
        if kind == "sparse":
            operand = packed(6, 256, 300, 0.02)
            operand.values[4][7] = bad
            return run(operand, 8)
        A = torch.randn(6, 64, 300, generator=generator)
        if kind == "dense":
            A[4, 5, 6] = bad
            return run(A.cuda(), 8)
        B = torch.randn(6, 256, 64, generator=generator)
        B[4, 5, 6] = bad
        return run(FactoredSum(B.cuda(), A.cuda()), 8)

    good = once(0.5)
    assert equal(good, once(0.5))
    for value in (float("nan"), float("inf")):
        bad = once(value)
        assert bad.status.tolist() == [0, 0, 0, 0, NONFINITE, 0]
        assert all(part[4].isnan().all() for part in bad[:4])
        others = [0, 1, 2, 3, 5]
        assert equal([p[others] for p in bad], [p[others] for p in good])


@pytest.mark.parametrize("kind", ["dense", "sparse", "factored"])
def test_no_host_sync_and_a_graph(kind):
    """Nothing waits for the device: a call can be captured, and replays on new values."""
    generator = torch.Generator("cuda").manual_seed(1)
    A = torch.randn(4, 160, 512, device="cuda", generator=generator)
    if kind == "sparse":
        from fastrank.kernels.svd import triton_path
        from fastrank.kernels.svd.sparse import SparseBatch

        batch = SparseBatch.of(packed(4, 512, 512, 0.02))
        values = batch.values

        def call():
            return triton_path.sparse(batch, 8, PRESETS["default"], 0)

    else:
        values = A
        B = torch.randn(4, 512, 160, device="cuda", generator=generator)
        operand = A if kind == "dense" else FactoredSum(B, A)

        def call():
            return run(operand, 8)

    call()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    values.copy_(torch.randn(values.shape, device="cuda", generator=generator))
    graph.replay()
    torch.cuda.synchronize()
    assert equal(found, call())


def test_packed_sparse_is_built_without_a_sync():
    operand = packed(4, 256, 256, 0.02)
    run(operand, 8)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(operand, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_stays_small():
    """Nothing of the size N K is made from factors or packed values."""
    N = 8192
    B, A = torch.randn(1, N, 32, device="cuda"), torch.randn(1, 32, N, device="cuda")
    operand = packed(1, N, N, 0.001)
    run(operand, 8)
    for each in (FactoredSum(B, A), operand):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(each, 8)
        assert torch.cuda.max_memory_allocated() - before < N * N
