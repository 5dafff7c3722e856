"""Masks, packing and sums on a GPU: the bits of a CPU, without waiting for the device."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from packing_cases import BF16, F32, FORMATS, FP16, INT8, same_bits, values

from fastrank.kernels.packing import (
    Packed,
    SparseMask,
    aggregate,
    aggregate_dense,
    pack,
    topk_pack,
    topk_unpack,
    unpack,
    unpack_add_,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_empty")]

SHAPES = [
    ((1,), 0.01),
    ((4096, 4096), 0.01),
    ((768, 3072), 1 / 64),
    ((333, 777), 0.37),
    ((1000,), 1.0),
    ((3, 70_000), 0.0005),
    ((0, 3), 0.01),
]


@contextmanager
def no_sync() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def on_gpu(packed: Packed) -> Packed:
    scale = None if packed.scale is None else packed.scale.cuda()
    return Packed(packed.values.cuda(), scale, packed.status.cuda(), packed.mask, packed.block)


@pytest.mark.parametrize("scheme", ["stratified", "bernoulli"])
@pytest.mark.parametrize(("shape", "density"), SHAPES, ids=str)
@pytest.mark.parametrize("seed", [0, 2**63 + 2**31 + 7])
def test_positions_are_those_of_a_cpu(shape, density, scheme, seed):
    mask = SparseMask(shape, density, seed, "layer.3.query", 2**24 - 1, scheme)
    expected = mask.positions()
    for backend in ("triton", "reference"):
        assert torch.equal(mask.positions("cuda", backend=backend).cpu(), expected)
    assert mask.contains(mask.positions("cuda")).all()


def test_stratified_positions_cost_no_sync():
    mask = SparseMask((512, 512), 0.01)
    mask.positions("cuda")
    with no_sync():
        SparseMask((512, 512), 0.01, seed=3).positions("cuda")


@pytest.mark.parametrize("scheme", ["stratified", "bernoulli"])
@pytest.mark.parametrize("into", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, FP16, torch.float64], ids=str)
def test_pack_and_unpack(dtype, into, scheme):
    mask = SparseMask((700, 900), 0.07, seed=4, scheme=scheme)
    dense = values(700, 900, dtype=torch.float64)
    dense.view(-1)[::7], dense.view(-1)[1::7], dense.view(-1)[3::97] = 0.0, -0.0, 1e-40
    dense = dense.to(dtype)
    for strided in (False, True):
        for block, seed in ((16, None), (256, 5), (4096, 2**64 - 1)):
            host = dense.t().contiguous().t() if strided else dense
            options = {"dtype": into, "block": block, "seed": seed}
            plain, fused = pack(host, mask, **options), pack(host.cuda(), mask, **options)
            assert same_bits(plain.values, fused.values.cpu())
            assert plain.scale is None or same_bits(plain.scale, fused.scale.cpu())
            assert same_bits(unpack(plain), unpack(fused).cpu())
            target = values(700, 900, dtype=dtype, seed=1)
            target = target.t().contiguous().t() if strided else target
            added = unpack_add_(target.cuda(), fused, 0.3)
            assert same_bits(added.cpu(), unpack_add_(target, plain, 0.3))


@pytest.mark.parametrize("into", FORMATS, ids=str)
def test_non_finite_values(into):
    mask = SparseMask((900, 900), 0.5, tensor_id="v", seed=1)
    dense = values(900, 900)
    inside = mask.positions()
    dense.view(-1)[inside[::1000]] = math.nan
    dense.view(-1)[inside[3::5000]] = -math.inf
    plain = pack(dense, mask, dtype=into, nonfinite="zero")
    fused = pack(dense.cuda(), mask, dtype=into, nonfinite="zero")
    assert torch.equal(plain.status, fused.status.cpu())
    assert same_bits(plain.values, fused.values.cpu())
    with pytest.raises(ValueError, match=r"'v'.*405 NaN"):
        pack(dense.cuda(), mask, dtype=into)


@pytest.mark.parametrize("into", FORMATS, ids=str)
def test_sums(into):
    mask = SparseMask((1024, 1030), 0.01, seed=1)
    weights = [0.1 + 0.3 * c for c in range(9)]
    shared = [pack(values(1024, 1030, seed=c), mask, dtype=into, seed=c) for c in range(9)]
    total = aggregate([on_gpu(p) for p in shared], weights)
    assert same_bits(total.values.cpu(), aggregate(shared, weights).values)
    again = aggregate([on_gpu(p) for p in shared], weights)
    assert same_bits(total.values, again.values)
    for density in (0.01, 1 / 16, 1 / 1000):
        masks = [SparseMask((1024, 1030), density, seed=c) for c in range(9)]
        own = [pack(values(1024, 1030, seed=c), m, dtype=into) for c, m in enumerate(masks)]
        out = torch.full((1024, 1030), math.nan, device="cuda")
        aggregate_dense([on_gpu(p) for p in own], weights, out=out)
        assert same_bits(out.cpu(), aggregate(own, weights))


def test_nothing_waits_for_the_device():
    mask = SparseMask((512, 512), 0.01)
    others = [SparseMask((512, 512), 0.01, seed=s) for s in (1, 2)]
    dense = values(512, 512).cuda()

    def round() -> None:
        for dtype in FORMATS:
            packed = pack(dense, mask, dtype=dtype, nonfinite="zero", seed=1)
            unpack_add_(dense, packed, 0.5)
            aggregate([packed, packed], [1, 2])
            aggregate([pack(dense, m, dtype=dtype, nonfinite="zero") for m in others], [1, 2])

    round()
    with no_sync():
        round()


def test_a_graph_replays():
    """pack and unpack_add_ keep no memory of their own between calls."""
    mask = SparseMask((600, 600), 0.05, seed=2)
    source, target = values(600, 600).cuda(), torch.zeros(600, 600, device="cuda")

    def step() -> None:
        unpack_add_(target, pack(source, mask, dtype=INT8, nonfinite="zero", seed=4), 0.5)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    target.zero_()
    source.copy_(values(600, 600, seed=7))
    graph.replay()
    expected = pack(values(600, 600, seed=7), mask, dtype=INT8, seed=4)
    assert same_bits(target.cpu(), unpack_add_(torch.zeros(600, 600), expected, 0.5))


@pytest.mark.parametrize("k", [0, 1, 20_000])
def test_top_k(k):
    dense = (values(2000, 1000) * 50).round()  # many ties
    memory = values(2000, 1000, seed=1)
    memories = memory.clone(), memory.cuda()
    host = topk_pack(dense, k, residual=memories[0])
    device = topk_pack(dense.cuda(), k, residual=memories[1])
    assert torch.equal(host.code, device.code.cpu())
    assert same_bits(host.values, device.values.cpu())
    assert same_bits(memories[0], memories[1].cpu())
    assert same_bits(topk_unpack(host), topk_unpack(device).cpu())
    plain = topk_pack(dense, k), topk_pack(dense.cuda(), k)
    assert torch.equal(plain[0].code, plain[1].code.cpu())
