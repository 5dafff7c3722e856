"""What pack, unpack_add_, aggregate and Packed refuse, and what they say."""

import math

import pytest
import torch
from packing_cases import F64, FP16, INT8

from fastrank.kernels.packing import (
    Packed,
    SparseMask,
    aggregate,
    aggregate_dense,
    pack,
    unpack_add_,
)

MASK = SparseMask((8, 8), 0.25)
PACKED = pack(torch.ones(8, 8), MASK)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack(torch.ones(64), MASK), ValueError, r"\[64\].*\[8, 8\]"),
        (lambda: pack(torch.ones(8, 8).long(), MASK), ValueError, "int64"),
        (lambda: pack(torch.ones(8, 8).to_sparse(), MASK), ValueError, "layout"),
        (lambda: pack([1.0], MASK), TypeError, "list"),
        (lambda: pack(torch.ones(8, 8), (8, 8)), TypeError, "SparseMask"),
        (lambda: pack(torch.ones(8, 8), MASK, dtype=F64), ValueError, "float32, bfloat16"),
        (lambda: pack(torch.ones(8, 8), MASK, dtype=INT8, block=100), ValueError, "power of two"),
        (lambda: pack(torch.ones(8, 8), MASK, block=True), ValueError, "power of two"),
        (lambda: pack(torch.ones(8, 8), MASK, nonfinite="skip"), ValueError, "raise, zero"),
        (lambda: pack(torch.ones(8, 8), MASK, dtype=INT8, seed=-1), ValueError, "seed is -1"),
        (lambda: pack(torch.ones(8, 8), MASK, seed=2**64), ValueError, "seed"),
        (lambda: pack(torch.ones(8, 8), MASK, backend="cuda"), ValueError, "unknown backend"),
        (lambda: pack(torch.ones(8, 8), MASK, backend="triton"), ValueError, "TRITON_INTERPRET"),
        (lambda: unpack_add_(torch.ones(4, 16), PACKED), ValueError, r"\[4, 16\].*\[8, 8\]"),
        (lambda: unpack_add_(torch.ones(8, 8), PACKED, math.nan), ValueError, "weight is nan"),
        (lambda: unpack_add_(torch.ones(8, 8), PACKED, 1e39), ValueError, "float32"),
        (lambda: unpack_add_(torch.ones(8, 1).expand(8, 8), PACKED), ValueError, "overlap"),
        (lambda: unpack_add_(torch.ones(8, 8).int(), PACKED), ValueError, "int32"),
        (lambda: unpack_add_(torch.ones(8, 8, device="meta"), PACKED), ValueError, "meta"),
        (lambda: aggregate([], []), ValueError, "nothing to sum"),
        (lambda: aggregate([PACKED], [1, 2]), ValueError, "1 updates but 2 weights"),
        (lambda: aggregate([PACKED], [math.inf]), ValueError, "weight 0 is inf"),
        (lambda: aggregate([PACKED], [1e40]), ValueError, "too large"),
        (lambda: aggregate([PACKED] * 2, [1, -1], normalize=True), ValueError, "sum to 0"),
        (lambda: aggregate([PACKED.values], [1]), TypeError, "Tensor"),
        (
            lambda: aggregate([PACKED, pack(torch.ones(64), SparseMask((64,), 0.25))], [1, 1]),
            ValueError,
            r"update 1 is of '' \[64\]",
        ),
        (
            lambda: aggregate_dense([PACKED], [1], out=torch.ones(8, 8).t().double()),
            ValueError,
            "contiguous float32",
        ),
    ],
)
def test_arguments_are_checked(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"values": torch.ones(15)}, "keeps 16 entries"),
        ({"values": torch.ones(16, 1)}, "keeps 16 entries"),
        ({"values": torch.ones(16, dtype=F64)}, "float64"),
        ({"values": torch.ones(16, dtype=INT8)}, r"need a scale \[1\]"),
        ({"scale": torch.ones(1)}, "take no scale"),
        ({"values": torch.ones(16, dtype=FP16), "scale": torch.ones(2)}, r"need float32 \[1\]"),
        ({"values": torch.ones(16, dtype=FP16), "scale": torch.ones(1).half()}, "need float32"),
        ({"status": torch.zeros(1, dtype=torch.int64)}, r"int64 \[2\]"),
        ({"status": torch.zeros(2)}, r"int64 \[2\]"),
        ({"values": torch.ones(16, device="meta")}, "on one"),
        ({"block": 48}, "power of two"),
    ],
)
def test_parts_must_go_together(parts, message):
    given = {"values": torch.ones(16), "scale": None, "mask": MASK}
    given["status"] = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        Packed(**given | parts)
