"""pack, unpack and unpack_add_ on a CPU, against what they are defined to be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_cases import BF16, F32, F64, FORMATS, FP16, INT8, SCHEMES, STEPS, at, same_bits, values

from fastrank.kernels.packing import SparseMask, draws, pack, unpack, unpack_add_

# (shape, density): one entry, tails within blocks of scales, everything, nothing
SHAPES = [((1,), 0.01), ((37, 91), 0.1), ((700,), 1.0), ((5, 4, 30), 0.5), ((0, 3), 0.01)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("shape", "density"), SHAPES, ids=str)
def test_values_come_back(shape, density, dtype, scheme):
    mask = SparseMask(shape, density, seed=1, scheme=scheme)
    dense = values(*shape)
    packed = pack(dense, mask, dtype=dtype, block=64)
    assert packed.values.dtype == dtype
    assert packed.values.shape == (mask.nnz,)
    assert packed.status.tolist() == [0, 0]
    expected, got = at(dense, mask), unpack(packed)
    assert got.dtype == F32
    for start in range(0, mask.nnz, 64):
        piece = slice(start, start + 64)
        bound = STEPS[dtype] * expected[piece].abs().max() * (1 + 1e-6)
        assert (got[piece] - expected[piece]).abs().max() <= bound
    if dtype == F32:
        assert same_bits(got, expected)


@pytest.mark.parametrize("dtype", [F32, BF16, FP16, F64], ids=str)
def test_the_default_format_is_the_tensors_own(dtype):
    mask = SparseMask((50, 40), 0.1)
    dense = values(50, 40, dtype=dtype)
    packed = pack(dense, mask)
    assert packed.values.dtype == (F32 if dtype == F64 else dtype)
    assert same_bits(unpack(packed), at(dense, mask).float())


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_strides_don_t_matter(dtype):
    mask = SparseMask((24, 30), 0.25, seed=2)
    dense = values(30, 24).t()
    assert not dense.is_contiguous()
    wide = values(24, 99)
    for tensor in (dense, wide[:, 5:95:3], values(1, 30).expand(24, 30)):
        packed, plain = (pack(t, mask, dtype=dtype) for t in (tensor, tensor.contiguous()))
        assert same_bits(packed.values, plain.values)
        assert (packed.scale is None) or same_bits(packed.scale, plain.scale)


def test_int8_is_absmax_over_127():
    mask = SparseMask((256,), 1.0)
    dense = values(256)
    packed = pack(dense, mask, dtype=INT8, block=128)
    blocks = dense.view(2, 128)
    assert torch.equal(packed.scale, blocks.abs().amax(1) / 127)
    expected = (blocks / packed.scale[:, None]).round().to(INT8)
    assert torch.equal(packed.values.view(2, 128), expected)
    assert packed.values.abs().max() == 127


def test_fp16_scales_are_powers_of_two_and_lose_nothing_of_fp16():
    mask = SparseMask((64,), 1.0)
    for factor in (1.0, 1e-20, 1e20, 2.0**-149, 3e38):
        dense = (values(64).clamp(-1, 1) * factor).float()
        packed = pack(dense, mask, dtype=FP16, block=16)
        assert torch.equal(torch.frexp(packed.scale).mantissa, torch.full((4,), 0.5))
        top = packed.values.view(4, 16).abs().amax(1)
        assert (top <= 2**15).all()
        assert packed.values.isfinite().all()
        if factor > 1e-30:
            assert (top >= 2**14).all()
        error = (unpack(packed) - dense).abs().view(4, 16).amax(1)
        assert (error <= 2.0**-11 * dense.abs().view(4, 16).amax(1)).all()
    # fp16's own numbers come back as they were, unless one block holds the whole range
    halves = torch.tensor([30000.0, 6e-8, -1.0, 65504.0] * 16, dtype=FP16).view(16, 4).t()
    assert torch.equal(unpack(pack(halves.reshape(64), mask, block=16)), halves.flatten().float())


def test_blocks_of_zeros_have_scale_one():
    mask = SparseMask((96,), 1.0)
    dense = torch.cat([torch.zeros(64), values(32)])
    for dtype in (FP16, INT8):
        packed = pack(dense, mask, dtype=dtype, block=32)
        assert packed.scale[:2].tolist() == [1.0, 1.0]
        assert not unpack(packed)[:64].any()
    # the scale of magnitudes near fp32's least would be 0
    packed = pack(torch.full((96,), 1e-45), mask, dtype=INT8, block=32)
    assert packed.scale.tolist() == [1.0] * 3
    assert not packed.values.any()


@pytest.mark.parametrize(("dtype", "seed"), [(FP16, None), (INT8, None), (INT8, 3)], ids=str)
def test_values_at_the_end_of_fp32_stay_finite(dtype, seed):
    """Rounding up, to 2**15 or of absmax / 127, must not make what is decoded infinite."""
    largest = torch.tensor([torch.finfo(F32).max]).view(torch.int32)
    below = [*range(64), *(1 << n for n in range(6, 24))]  # in steps of fp32
    dense = (largest - torch.tensor(below)[:, None]).to(torch.int32).view(F32).repeat(1, 16)
    dense[:, 1::2] *= -1
    dense[:, 8:] *= 0.3  # and smaller ones beside them
    mask = SparseMask(tuple(dense.shape), 1.0)
    packed = pack(dense, mask, dtype=dtype, block=16, seed=seed)
    assert packed.status.tolist() == [0, 0]
    got = unpack(packed).view(dense.shape)
    assert got.isfinite().all()
    error = (got.double() - dense.double()).abs() / dense.double().abs().amax(1, keepdim=True)
    assert error.max() <= STEPS[dtype] * (1 if seed is None else 2) * (1 + 1e-6)


def test_stochastic_rounding_is_unbiased():
    mask = SparseMask((4096,), 1.0, tensor_id="w", round=3)
    dense = torch.linspace(-1, 1, 4096)
    draws_made = 200
    total = torch.zeros(4096, dtype=F64)
    for seed in range(draws_made):
        got = unpack(pack(dense, mask, dtype=INT8, block=4096, seed=seed)).double()
        assert (got - dense).abs().max() < 1 / 127 * (1 + 1e-6)
        total += got
    error = (total / draws_made - dense) * 127 * draws_made**0.5  # in steps; variance at most 1/4
    assert error.abs().max() < 0.5 * 5
    assert error.mean().abs() * 64 < 5 * 0.5
    # nearest rounding of the same is biased at most places, so this could fail
    nearest = (unpack(pack(dense, mask, dtype=INT8, block=4096)) - dense) * 127 * draws_made**0.5
    assert nearest.abs().max() > 0.5 * 5


def test_stochastic_rounding_follows_its_words():
    mask = SparseMask((1000,), 0.2, tensor_id="w", round=3)
    dense = values(1000)
    packed = pack(dense, mask, dtype=INT8, block=16, seed=2**64 - 1)
    source = draws.stream(2**64 - 1, "w", draws.ROUNDING, 3)
    word = draws.words_at(source, torch.arange(mask.nnz))
    scale = packed.scale.repeat_interleave(16)[: mask.nnz]
    ratio = (at(dense, mask) / scale).double()
    expected = ratio.floor() + ((word >> 8) / 2**24 < ratio - ratio.floor())
    assert torch.equal(packed.values.double(), expected)
    again = pack(dense, mask, dtype=INT8, block=16, seed=2**64 - 1)
    other = pack(dense, mask, dtype=INT8, block=16, seed=5)
    assert same_bits(packed.values, again.values)
    assert not same_bits(packed.values, other.values)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_non_finite_values(dtype):
    mask = SparseMask((60, 40), 0.25, tensor_id="layer.1.value", round=6)
    dense = values(60, 40)
    inside, outside = mask.positions(), (~mask.contains(torch.arange(2400))).nonzero()[:, 0]
    dense.view(-1)[outside[:7]] = math.nan
    clean = pack(dense, mask, dtype=dtype, block=32)  # only kept entries are looked at
    assert clean.status.tolist() == [0, 0]
    dense.view(-1)[inside[[0, 5, 599]]] = math.nan
    dense.view(-1)[inside[70]] = -math.inf
    with pytest.raises(ValueError, match=r"'layer.1.value'.*round 6: 3 NaN and 1 infinite"):
        pack(dense, mask, dtype=dtype, block=32)
    packed = pack(dense, mask, dtype=dtype, block=32, nonfinite="zero")
    assert packed.status.tolist() == [3, 1]
    zeroed = dense.clone()
    zeroed.view(-1)[inside[[0, 5, 599, 70]]] = 0
    expected = pack(zeroed, mask, dtype=dtype, block=32)
    assert same_bits(packed.values, expected.values)
    assert unpack(packed).isfinite().all()


def test_values_that_overflow_count_as_infinite():
    mask = SparseMask((2,), 1.0)
    top = torch.tensor([3.4e38, 1.0])
    assert pack(top, mask, dtype=BF16, nonfinite="zero").status.tolist() == [0, 1]
    assert unpack(pack(top, mask, dtype=INT8)).isfinite().all()
    wide = torch.tensor([1e300, 1.0], dtype=F64)
    assert pack(wide, mask, nonfinite="zero").status.tolist() == [0, 1]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("into", [F32, BF16, FP16, F64], ids=str)
def test_unpack_add(dtype, into, scheme):
    mask = SparseMask((31, 50), 0.07, seed=4, scheme=scheme)
    packed = pack(values(31, 50), mask, dtype=dtype, block=16)
    before = values(31, 50, dtype=into, seed=1)
    dense = before.clone()
    version = dense._version
    assert unpack_add_(dense, packed, 0.3) is dense
    assert dense._version > version
    wide = torch.promote_types(into, F32)
    expected = before.flatten().to(wide, copy=True)
    expected[mask.positions()] += (unpack(packed) * torch.tensor(0.3)).to(wide)
    assert same_bits(dense.flatten(), expected.to(into))
    strided = before.t().contiguous().t()
    assert not strided.is_contiguous()
    assert same_bits(unpack_add_(strided, packed, 0.3), dense)
    holes = torch.zeros(31, 100, dtype=into)
    holes[:, ::2] = before
    unpack_add_(holes[:, ::2], packed, 0.3)
    assert same_bits(holes[:, ::2], dense)
    assert not holes[:, 1::2].any()


def test_a_round_trip_is_the_identity():
    mask = SparseMask((40, 40), 0.05)
    dense = values(40, 40)
    sparse = torch.zeros(1600)
    sparse[mask.positions()] = at(dense, mask)
    assert same_bits(unpack_add_(torch.zeros(40, 40), pack(dense, mask)), sparse.view(40, 40))


def test_parameters_are_written_without_grad_alone():
    mask = SparseMask((10, 10), 0.1)
    packed = pack(values(10, 10), mask)
    parameter = torch.nn.Parameter(torch.zeros(10, 10))
    with pytest.raises(ValueError, match="no_grad"):
        unpack_add_(parameter, packed)
    assert not parameter.any()
    with torch.no_grad():
        unpack_add_(parameter, packed)
    assert int((parameter != 0).sum()) == 10
    assert not pack(parameter, mask).values.requires_grad


def test_inference_tensors():
    mask = SparseMask((10, 10), 0.1, seed=8)
    with torch.inference_mode():
        dense = torch.zeros(10, 10)
        packed = pack(values(10, 10), mask)
        unpack_add_(dense, packed)
        assert dense.count_nonzero() == 10
    with pytest.raises(ValueError, match="inference_mode"):
        unpack_add_(dense, packed)
    # what the first use put into the cache serves training too
    assert pack(torch.ones(10, 10), mask).values.requires_grad_().sum().requires_grad


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 30), min_size=1, max_size=3).map(tuple),
    density=st.one_of(st.floats(0.001, 0.5), st.just(1.0)),
    dtype=st.sampled_from(FORMATS),
    block=st.sampled_from([16, 64, 4096]),
    seed=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    scheme=st.sampled_from(SCHEMES),
    exponent=st.integers(-40, 37),
)
def test_any_round_trip(shape, density, dtype, block, seed, scheme, exponent):
    mask = SparseMask(shape, density, seed=3, scheme=scheme)
    dense = (values(*shape, dtype=F64).clamp(-2, 2) * 10.0**exponent).float()
    packed = pack(dense, mask, dtype=dtype, block=block, seed=seed)
    got, expected = unpack(packed), at(dense, mask)
    assert got.isfinite().all()
    if mask.nnz:
        step = STEPS[dtype] * (2 if seed is not None and dtype == INT8 else 1)
        # half a step of subnormal bf16 numbers; what rounding a subnormal scale costs
        least = 4.7e-41 if dtype == BF16 else 2e-43
        bound = step * 1.0001 * expected.abs().max().item() + least
        assert (got - expected).abs().max() <= bound
    scales = 0 if dtype in (F32, BF16) else -(-mask.nnz // block)
    assert packed.nbytes == mask.nnz * dtype.itemsize + 4 * scales
    dense = torch.zeros(shape)
    unpack_add_(dense, packed)
    assert torch.equal(at(dense, mask), got)
    assert int((dense != 0).sum()) == int((got != 0).sum())
