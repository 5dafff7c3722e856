"""What the wire format refuses: whatever is malformed, forged, mutated, too large or unexpected."""

import json
import random
import struct
from collections import Counter

import numpy as np
import pytest
import torch
from wire_cases import assert_same, raw, sample

from fastrank.federated import wire
from fastrank.federated.wire import Payload, WireError, from_bytes, spec_of, to_bytes


def craft(table, record, body=b"", entry="fastrank"):
    """A message with any header, and a checksum that is right for it where there can be one."""
    record = {"format": wire.FORMAT, "version": wire.VERSION, "metadata": {}, **record}
    if "sha256" not in record:
        record["sha256"] = wire._digest(table, record["metadata"], [body])
    header = json.dumps({**table, "__metadata__": {entry: json.dumps(record)}}).encode()
    return struct.pack("<Q", len(header)) + header + body


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": float("nan")}, r"metadata\['a'\] is nan"),
        ({"a": [1, float("inf")]}, r"metadata\['a'\]\[1\] is inf"),
        ({"a": (1, 2)}, "is a tuple"),
        ({1: 2}, "key 1"),
        ({"a": np.float64(1.0)}, "is a float64"),
        ({"a": torch.ones(1)}, "is a Tensor"),
        ([1], "is a list"),
    ],
)
def test_metadata_must_be_plain_json(metadata, message):
    with pytest.raises(WireError, match=message):
        to_bytes(Payload({}, metadata))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"": torch.ones(1)}, "can't name"),
        ({3: torch.ones(1)}, "can't name"),
        ({"__metadata__": torch.ones(1)}, "can't name"),
        ({"\ud800": torch.ones(1)}, "not valid Unicode"),
        ({"a": [1.0]}, "a is a list"),
        ({"a": torch.eye(2).to_sparse()}, "sparse"),
        ({"a": torch.ones(1, device="meta")}, "meta"),
        ({"a": torch.ones(1, dtype=torch.complex128)}, "complex128"),
    ],
)
def test_unsendable_tensors(tensors, message):
    with pytest.raises(WireError, match=message):
        to_bytes(Payload(tensors))


GOOD = {"x": entry("F32", [2], 0, 8)}
EIGHT = b"\0" * 8


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut off"),
        (b"1234567", "cut off"),
        (struct.pack("<Q", 1 << 60), "header of"),
        (struct.pack("<Q", 2) + b"[]", "expected an object"),
        (struct.pack("<Q", 2) + b"{}", "no fastrank entry"),
        (struct.pack("<Q", 3) + b"{,}", "not JSON"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "not JSON"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "not JSON"),
        (struct.pack("<Q", 15) + b'{"a":1, "a":2} ', "a key twice"),
        (struct.pack("<Q", 9) + b'{"a":NaN}', "finite"),
        (struct.pack("<Q", 11) + b'{"a":1e999}', "finite"),
        (craft(GOOD, {}, EIGHT, entry="other"), "no fastrank entry"),
        (craft(GOOD, {"format": "x"}, EIGHT), "format is 'x'"),
        (craft(GOOD, {"version": 2}, EIGHT), "version 2"),
        (craft(GOOD, {"version": True}, EIGHT), "version True"),
        (craft(GOOD, {"extra": 1}, EIGHT), "extra metadata"),
        (craft(GOOD, {"metadata": []}, EIGHT), "malformed metadata"),
        (craft(GOOD, {"sha256": "0" * 64}, EIGHT), "checksum"),
        (craft(GOOD, {}, EIGHT[:-1]), "cut off"),
        (craft(GOOD, {}, EIGHT + b"\0"), "1 bytes after the last tensor"),
        (craft({"x": 1}, {}), "malformed header entry"),
        (craft({"x": {**GOOD["x"], "y": 1}}, {}, EIGHT), "malformed header entry"),
        (craft({"x": entry("F4", [2], 0, 8)}, {}, EIGHT), "unknown dtype 'F4'"),
        (craft({"x": entry(None, [2], 0, 8)}, {}, EIGHT), "unknown dtype None"),
        (craft({"x": entry("F32", [-2], 0, 8)}, {}, EIGHT), "malformed shape"),
        (craft({"x": entry("F32", [2.0], 0, 8)}, {}, EIGHT), "malformed shape"),
        (craft({"x": entry("F32", [True, 2], 0, 8)}, {}, EIGHT), "malformed shape"),
        (craft({"x": entry("F32", 2, 0, 8)}, {}, EIGHT), "malformed shape"),
        (craft({"x": {**GOOD["x"], "data_offsets": [0]}}, {}, EIGHT), "malformed shape"),
        (craft({"x": entry("F32", [2], 8, 0)}, {}, EIGHT), "lies at bytes 8 to 0"),
        (craft({"x": entry("F32", [3], 0, 8)}, {}, EIGHT), "does not take 8 bytes"),
        (craft({"x": entry("F32", [2**62, 2**62], 0, 8)}, {}, EIGHT), "does not take 8 bytes"),
        (craft({"x": entry("F32", [0, 2**62, 2**62], 0, 0)}, {}), "shape torch can't make"),
        (craft({"x": GOOD["x"], "y": entry("F32", [1], 4, 8)}, {}, EIGHT), "overlaps"),
        (craft({"x": GOOD["x"], "y": GOOD["x"]}, {}, EIGHT), "overlaps"),
        (craft({"x": entry("F32", [1], 4, 8)}, {}, EIGHT), "follows a gap"),
        (craft({"x": entry("BOOL", [2], 0, 2)}, {}, b"\1\2"), "other than 0 and 1"),
    ],
)
def test_malformed_messages_are_refused(data, message):
    with pytest.raises(WireError, match=message):
        from_bytes(data)


@pytest.mark.parametrize("depth", [70, 200, 500, *range(900, 1010), 5_000])
def test_nesting_of_any_depth_is_refused(depth):
    # at some depth reading just fits into Python's stack and writing it out again does not
    nested = "[" * depth + "]" * depth
    record = f'{{"format":"fastrank-payload","metadata":{{"x":{nested}}},"sha256":"","version":1}}'
    header = json.dumps({"__metadata__": {"fastrank": record}}).encode()
    with pytest.raises(WireError, match=r"nested deeper|recursion"):
        from_bytes(struct.pack("<Q", len(header)) + header)


def test_what_is_too_deep_to_read_is_not_sent():
    for depth, sendable in ((50, True), (64, False), (200, False)):
        nested = {}
        for _ in range(depth):
            nested = {"x": nested}
        if sendable:
            assert from_bytes(to_bytes(Payload({}, nested))).metadata == nested
        else:
            with pytest.raises(WireError, match="nested deeper than 64"):
                to_bytes(Payload({}, nested))


def test_size_limit_comes_first():
    data = to_bytes(sample())
    assert_same(sample(), from_bytes(data, max_bytes=len(data)))
    with pytest.raises(WireError, match=f"message of {len(data)} bytes, but the limit is 100"):
        from_bytes(data, max_bytes=100)


def test_expectations():
    payload = sample()
    data, spec = to_bytes(payload), dict(spec_of(payload.tensors))
    assert_same(payload, from_bytes(bytearray(data), expect=spec))
    lacking = {k: v for k, v in spec.items() if k not in ("mask", "none")}
    with pytest.raises(WireError, match=r"3 tensors expected; the message adds 2 \(mask, none\)"):
        from_bytes(data, expect=lacking)
    with pytest.raises(WireError, match=r"lacks 1 \(head\)"):
        from_bytes(data, expect={**spec, "head": ((1,), torch.float32)})
    with pytest.raises(WireError, match=r"steps is torch.int64 \[\]; expected torch.int64 \[1\]"):
        from_bytes(data, expect={**spec, "steps": ((1,), torch.int64)})
    with pytest.raises(WireError, match=r"mask is torch.bool \[3\]; expected torch.uint8"):
        from_bytes(data, expect={**spec, "mask": ((3,), torch.uint8)})


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three small faults of the kinds transport, storage or a hostile peer produce."""
    out = bytearray(data)
    header_end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.randint(1, 3)):
        limit = min(header_end, len(out)) if rng.random() < 0.7 else len(out)
        i = rng.randrange(max(limit, 1))
        kind = rng.randrange(6)
        if kind == 0 and i < len(out):
            out[i] ^= 1 << rng.randrange(8)
        elif kind == 1 and i < len(out):
            out[i] = rng.choice(b'0123456789{}[]",:\\ FIBUE\x00\xff')
        elif kind == 2:
            del out[i : i + rng.randint(1, 16)]
        elif kind == 3:
            out[i:i] = rng.choice([b" ", b"0", b"-", b"1e9", b"null", b"\0" * 8, out[i : i + 9]])
        elif kind == 4:
            del out[i:]
        else:
            j = rng.randrange(max(limit, 1))
            out[i : i + 4], out[j : j + 4] = out[j : j + 4], out[i : i + 4]
    if rng.random() < 0.5 and len(out) >= 8:  # so that faults inside the header get past its length
        grown = len(out) - len(data)
        out[:8] = max(header_end - 8 + grown, 0).to_bytes(8, "little")
    return bytes(out)


def test_mutated_messages_are_refused_or_mean_the_same():
    rng = random.Random(0)
    payload = sample()
    data = to_bytes(payload)
    refusals = Counter()
    for _ in range(10_000):
        changed = mutate(data, rng)
        try:
            back = from_bytes(changed)
        except WireError as error:
            refusals[str(error).split(":")[0]] += 1
        else:  # white space, or a fault that undid itself
            assert_same(payload, back)
    assert sum(refusals.values()) > 9_000
    assert refusals["checksum mismatch"] > 500  # many get as far as the last check


def test_forged_headers_are_refused_or_decode_to_what_they_say():
    # the checksum is right here, as a hostile peer would make it: the other checks stand alone
    rng = random.Random(0)
    values = [
        0,
        1,
        2,
        3,
        8,
        16,
        -1,
        2**63,
        2**70,
        1.5,
        True,
        None,
        "x",
        [],
        [2, 2],
        {},
        "F64",
        "I8",
    ]
    accepted = 0
    for _ in range(4_000):
        table = {"x": entry("F32", [2], 0, 8), "y": entry("I16", [2, 2], 8, 16)}
        for _ in range(rng.randint(1, 3)):
            target = rng.choice(list(table.values()))
            key = rng.choice(list(target))
            if isinstance(target[key], list) and target[key] and rng.random() < 0.8:
                target[key][rng.randrange(len(target[key]))] = rng.choice(values)
            else:
                target[key] = rng.choice([*values, [0, 8], [8, 16], "BOOL", "BF16", [4], [0]])
        body = bytes(rng.randrange(2) for _ in range(16))
        try:
            back = from_bytes(craft(table, {}, body))
        except WireError:
            continue
        accepted += 1
        for name, tensor in back.tensors.items():
            begin, end = table[name]["data_offsets"]
            assert list(tensor.shape) == table[name]["shape"]
            assert tensor.dtype == wire._DTYPES[table[name]["dtype"]]
            assert bytes(raw(tensor).tolist()) == body[begin:end]
    assert 20 < accepted < 1_000
