"""Top-k: which entries, their order, the code of their positions, error feedback, hostile codes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_cases import BF16, F32, FP16, same_bits, values

from fastrank.kernels.packing import TopK, codec, topk, topk_pack, topk_unpack
from fastrank.kernels.packing.codec import decode_positions, encode_positions


def slow_positions(dense: torch.Tensor, k: int) -> list[int]:
    magnitude = dense.flatten().double().abs().tolist()
    order = sorted(range(len(magnitude)), key=lambda i: (-magnitude[i], i))
    return sorted(order[:k])


@pytest.mark.parametrize("dtype", [F32, BF16, FP16, torch.float64], ids=str)
@pytest.mark.parametrize("k", [0, 1, 17, 599, 600])
def test_the_largest_in_order(k, dtype):
    dense = values(20, 30, dtype=dtype)
    packed = topk_pack(dense, k)
    positions = packed.positions()
    assert positions.tolist() == slow_positions(dense, k)
    assert same_bits(packed.values, dense.flatten()[positions])
    expected = torch.zeros(600, dtype=dtype)
    expected[positions] = dense.flatten()[positions]
    assert same_bits(topk_unpack(packed), expected.view(20, 30))
    assert same_bits(topk_pack(dense.t().contiguous().t(), k).values, packed.values)


@pytest.mark.parametrize("shape", [(1,), (0,), (), (3, 0, 2)], ids=str)
def test_small_shapes(shape):
    dense = torch.full(shape, -2.0)
    packed = topk_pack(dense, dense.numel())
    assert torch.equal(topk_unpack(packed), dense)
    assert topk_unpack(topk_pack(dense, 0)).shape == shape


@settings(max_examples=60, deadline=None)
@given(entries=st.lists(st.integers(-3, 3), min_size=1, max_size=60), share=st.floats(0, 1))
def test_ties_go_to_the_lowest_index(entries, share):
    dense = torch.tensor(entries, dtype=F32)
    k = int(share * len(entries))
    assert topk_pack(dense, k).positions().tolist() == slow_positions(dense, k)


@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "sorted", "periodic"])
def test_a_sample_never_changes_the_answer(kind, monkeypatch):
    monkeypatch.setattr(topk, "_LARGE", 1 << 12)
    monkeypatch.setattr(topk, "_SAMPLE", 1 << 8)
    size = 20_000
    dense = {
        "normal": values(size),
        "ties": (values(size) * 3).round(),
        "zeros": torch.where(torch.arange(size) % 1000 == 999, values(size), 0.0),
        "sorted": values(size).abs().sort().values,
        "periodic": torch.where(torch.arange(size) % 78 == 0, 100.0, values(size)),
    }[kind]
    for k in (1, 50, 200, 2000, 9000):
        assert topk_pack(dense, k).positions().tolist() == slow_positions(dense, k)


def test_a_large_tensor_takes_candidates():
    magnitude = values(1 << 19).abs()
    found = topk._candidates(magnitude, 5000)
    assert found is not None
    assert 5000 <= len(found) < 8000
    k = 5000
    least = magnitude.sort(descending=True).values[k - 1]
    assert torch.equal(topk._largest(magnitude, k), (magnitude >= least).nonzero()[:, 0])


def test_nine_bits_an_index():
    numel, k = 1 << 20, (1 << 20) // 100
    packed = topk_pack(values(numel), k)
    assert 8.0 < len(packed.code) * 8 / k < 9.0
    assert packed.nbytes == 4 * k + len(packed.code)


def test_error_feedback_loses_nothing():
    generator = torch.Generator().manual_seed(0)
    memory, sent, given_all = torch.zeros(40, 25), torch.zeros(40, 25), torch.zeros(40, 25)
    for step in range(30):
        # small whole numbers: sums are exact
        gradient = torch.randint(-8, 9, (40, 25), generator=generator).float()
        given_all += gradient
        expected = slow_positions(memory + gradient, 60)
        packed = topk_pack(gradient, 60, residual=memory)
        assert packed.positions().tolist() == expected
        sent += topk_unpack(packed)
        assert torch.equal(sent + memory, given_all), step
        assert not memory.flatten()[packed.positions()].any()
    assert memory.abs().max() < 60  # an entry that waits is sent at last


def test_a_strided_memory_is_updated():
    gradient, memory = values(30, 20), values(20, 30, seed=1).t()
    plain = memory.contiguous()
    a, b = topk_pack(gradient, 50, residual=memory), topk_pack(gradient, 50, residual=plain)
    assert same_bits(a.values, b.values)
    assert torch.equal(memory, plain)


def test_non_finite_values():
    dense, memory = values(100), values(100, seed=1)
    dense[[3, 50]], dense[60] = math.nan, -math.inf
    before = memory.clone()
    with pytest.raises(ValueError, match="2 NaN and 1 infinite"):
        topk_pack(dense, 5)
    with pytest.raises(ValueError, match="NaN"):
        topk_pack(dense, 5, residual=memory)
    assert same_bits(memory, before)
    zeroed = torch.where(dense.isfinite(), dense, 0.0)
    packed = topk_pack(dense, 5, nonfinite="zero")
    assert same_bits(packed.values, topk_pack(zeroed, 5).values)
    topk_pack(dense, 5, residual=memory, nonfinite="zero")
    assert memory.isfinite().all()
    assert memory[3] == 0


GAPS = [[], [0], [254], [255], [256], [509], [510], [511], [99_999], [0, 1, 2], [0, 255, 511]]


@pytest.mark.parametrize("positions", GAPS, ids=str)
def test_the_code_is_what_it_says(positions):
    expected, previous = [], -1
    for position in positions:
        gap = position - previous - 1
        expected += [255] * (gap // 255) + [gap % 255]
        previous = position
    code = encode_positions(torch.tensor(positions, dtype=torch.int64))
    assert code.dtype == torch.uint8
    assert code.tolist() == expected
    assert decode_positions(code, len(positions), 100_000).tolist() == positions


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(0, 5000)))
def test_any_positions_come_back(chosen):
    positions = torch.tensor(sorted(chosen), dtype=torch.int64)
    code = encode_positions(positions)
    assert torch.equal(decode_positions(code, len(chosen), 5001), positions)
    full = encode_positions(torch.arange(len(chosen)))
    assert torch.equal(decode_positions(full, len(chosen), len(chosen)), torch.arange(len(chosen)))


@settings(max_examples=300, deadline=None)
@given(
    code=st.lists(st.one_of(st.integers(0, 255), st.just(255)), max_size=40),
    count=st.integers(-2, 45),
    numel=st.integers(0, 3000),
)
def test_hostile_codes_are_refused_or_right(code, count, numel):
    code = torch.tensor(code, dtype=torch.uint8)
    try:
        positions = decode_positions(code, count, numel)
    except ValueError:
        return
    assert len(positions) == count
    assert (positions.diff() > 0).all()
    assert not count or (positions[0] >= 0 and positions[-1] < numel)
    assert torch.equal(encode_positions(positions), code)  # one code for a list, no other


@pytest.mark.parametrize(
    ("code", "count", "message"),
    [
        ([5, 5], 3, "can't hold 3"),
        ([5] * 9, 7, "9 bytes can't hold 7"),
        ([5] * 8, 7, "holds 8 positions, not 7"),
        ([255, 150], 1, "position is 405, outside 400"),
        ([0, 255], 1, "ends within a gap"),
        ([0, 255], 2, "holds 1 positions, not 2"),
        ([200, 200], 2, "position is 401"),
    ],
    ids=str,
)
def test_damage_is_named(code, count, message):
    with pytest.raises(ValueError, match=message):
        decode_positions(torch.tensor(code, dtype=torch.uint8), count, 400)


def test_nothing_is_written_from_a_hostile_code():
    packed = topk_pack(values(400), 4)
    hostile = TopK(packed.values, torch.tensor([0, 0, 0, 255, 254], dtype=torch.uint8), 4, (600,))
    assert topk_unpack(hostile).count_nonzero() == 4  # the last at 512
    with pytest.raises(ValueError, match="position is 512, outside 512"):
        topk_unpack(TopK(hostile.values, hostile.code, 4, (512,)))
    with pytest.raises(TypeError, match="uint8"):
        codec.decode_positions(torch.zeros(3, dtype=torch.int64), 3, 10)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 101}, ValueError, "from 0 to 100"),
        ({"k": -1}, ValueError, "k is -1"),
        ({"k": 2.0}, ValueError, "k is 2.0"),
        ({"dense": torch.ones(100, dtype=torch.int32)}, TypeError, "int32"),
        ({"nonfinite": "skip"}, ValueError, "raise, zero"),
        ({"residual": torch.ones(99)}, ValueError, r"\[99\].*\[100\]"),
        ({"residual": torch.ones(100).double()}, ValueError, "float64"),
        ({"residual": torch.ones(100, requires_grad=True)}, ValueError, "requires grad"),
    ],
)
def test_arguments_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        topk_pack(**{"dense": torch.ones(100), "k": 5} | arguments)


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"values": torch.ones(3)}, ValueError, r"floats \[2\]"),
        ({"values": torch.ones(2).int()}, ValueError, "floats"),
        ({"code": torch.ones(2)}, TypeError, "uint8"),
        ({"code": torch.zeros(2, dtype=torch.uint8, device="meta")}, ValueError, "meta"),
        ({"k": 11, "values": torch.ones(11)}, ValueError, "k is 11"),
        ({"shape": (-1, -10)}, ValueError, "shape"),
    ],
)
def test_parts_must_go_together(parts, error, message):
    given = {"values": torch.ones(2), "code": torch.zeros(2, dtype=torch.uint8), "k": 2}
    with pytest.raises(error, match=message):
        TopK(**given | {"shape": (10,)} | parts)
