"""Sums of packed updates on a CPU: a fixed order, any formats and masks, the caller's weights."""

import math

import pytest
import torch
from packing_cases import BF16, F32, FORMATS, INT8, SCHEMES, same_bits, values

from fastrank.kernels.packing import (
    SparseMask,
    aggregate,
    aggregate_dense,
    aggregation,
    pack,
    unpack,
    unpack_add_,
)


def weights_for(clients: int) -> list[float]:
    return [0.1 + 0.37 * c for c in range(clients)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_sum_of_one_mask(dtype, scheme):
    mask = SparseMask((300, 40), 0.3, scheme=scheme)
    clients = [pack(values(300, 40, seed=c), mask, dtype=dtype, block=16, seed=c) for c in range(5)]
    weights = weights_for(5)
    total = aggregate(clients, weights)
    assert total.mask == mask
    assert total.values.dtype == F32
    assert total.scale is None
    acc = torch.zeros(mask.nnz)
    for client, weight in zip(clients, weights, strict=True):
        acc += unpack(client) * torch.tensor(weight)
    assert same_bits(total.values, acc)
    exact = sum(unpack(c).double() * w for c, w in zip(clients, weights, strict=True))
    assert (total.values - exact).abs().max() < 1e-5
    dense = aggregate_dense(clients, weights)
    assert same_bits(dense.flatten()[mask.positions()], acc)
    assert int((dense != 0).sum()) <= mask.nnz


def test_a_sum_is_cut_into_pieces_without_a_trace(monkeypatch):
    mask = SparseMask((3000,), 0.5)
    clients = [pack(values(3000, seed=c), mask, dtype=INT8, block=64) for c in range(3)]
    whole = aggregate(clients, [1, 2, 3]).values
    monkeypatch.setattr(aggregation, "_PIECE", 256)
    assert same_bits(aggregate(clients, [1, 2, 3]).values, whole)


def test_formats_may_differ():
    mask = SparseMask((100, 9), 0.5)
    clients = [pack(values(100, 9, seed=i), mask, dtype=d) for i, d in enumerate(FORMATS)]
    total = aggregate(clients, [1, 1, 1, 1])
    acc = torch.zeros(mask.nnz)
    for client in clients:
        acc += unpack(client)
    assert same_bits(total.values, acc)


def test_masks_of_their_own():
    masks = [SparseMask((70, 30), 0.1, seed=c) for c in range(4)]
    masks[2] = SparseMask((70, 30), 0.3, seed=9, scheme="bernoulli")
    clients = [pack(values(70, 30, seed=c), m, dtype=BF16) for c, m in enumerate(masks)]
    weights = weights_for(4)
    total = aggregate(clients, weights)
    expected = torch.zeros(70, 30)
    for client, weight in zip(clients, weights, strict=True):
        unpack_add_(expected, client, weight)
    assert same_bits(total, expected)
    out = torch.full((70, 30), math.nan)
    assert aggregate_dense(clients, weights, out=out) is not None
    assert same_bits(out, expected)


def test_the_order_is_the_callers_and_fixed():
    mask = SparseMask((5000,), 0.5)
    clients = [pack(values(5000, seed=c), mask) for c in range(6)]
    weights = weights_for(6)
    total = aggregate(clients, weights).values
    assert same_bits(total, aggregate(clients, weights).values)
    # arrival: sorted back by client, the bits are the same; otherwise they are not
    arrived = [(3, clients[3], weights[3])] + [(c, clients[c], weights[c]) for c in (5, 0, 1, 4, 2)]
    again = sorted(arrived, key=lambda entry: entry[0])
    assert same_bits(total, aggregate([p for _, p, _ in again], [w for *_, w in again]).values)
    unsorted = aggregate([p for _, p, _ in arrived], [w for *_, w in arrived]).values
    assert not same_bits(total, unsorted)
    assert torch.allclose(total, unsorted, atol=1e-5)


def test_the_denominator_is_the_callers():
    masks = [SparseMask((400,), 0.5, seed=c) for c in range(2)]
    ones = [pack(torch.ones(400), m) for m in masks]
    plain = aggregate(ones, [3, 1])
    assert set(plain.tolist()) == {0.0, 1.0, 3.0, 4.0}
    assert torch.equal(aggregate(ones, [3, 1], normalize=True), plain / 4)
    assert torch.equal(aggregate(ones, torch.tensor([3, 1]), normalize=True), plain / 4)
    assert aggregate(ones, [0.0, -1.0]).min() == -1


def test_counts_of_non_finite_values_add_up():
    mask = SparseMask((100,), 1.0)
    dense = values(100)
    dense[3], dense[4] = math.nan, math.inf
    clients = [pack(dense, mask, nonfinite="zero"), pack(values(100), mask)]
    assert aggregate([clients[0], *clients], [1, 1, 1]).status.tolist() == [2, 2]
