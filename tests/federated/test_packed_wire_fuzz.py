"""Mutated messages of packed updates: refused as a whole with a reason, or valid and harmless.

A server's tensors lie in one stretch of bytes with guards between them. Each mutated message is
read and, where it is accepted, added to them; afterwards the guards and every entry that no
position of the message names must have their bits, and after a refusal all of them.
"""

import copy
import json
import random
import re
import time
from collections import Counter

import numpy as np
import pytest
import torch

from fastrank.bench import fuzz_files
from fastrank.federated import wire
from fastrank.federated.packed_wire import dump_packed, load_packed
from fastrank.federated.wire import WireError
from fastrank.kernels.packing import Packed, SparseMask, pack, topk_pack, unpack_add_

GUARD = 64
SHAPES = {"a": (24, 20), "b": (6, 50), "c": (300,), "d": (16, 16)}
NUMBERS = [0, 1, -1, 2, 7, 16, 17, 255, 256, 2**24, 2**31, 2**32 + 1, 2**61, 2**62, 2**64, 2**70]
ODD = [*NUMBERS, 0.5, 0.01, 1.0, 0.75, -0.0, 1e-300, 1e308, True, None, "", "x", "\ud800", [], {}]
SCHEMES = ["stratified", "bernoulli", "topk", "magic"]
TAGS = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F4", "", None]
PATTERNS = [b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\x00\x7c", b"\xc0\x7f", b"\xff" * 8,
            b"\x80" * 4, b"\x00" * 8, b"\xff\xff\x7f\x7f"]  # fmt: skip


class Server:
    """Tensors of SHAPES between guards."""

    def __init__(self):
        sizes = {name: 4 * int(np.prod(shape)) for name, shape in SHAPES.items()}
        noise = np.random.default_rng(0).integers(0, 256, sum(sizes.values()) + GUARD * 5)
        self.memory = torch.from_numpy(noise.astype(np.uint8))
        self.tensors, at = {}, GUARD
        for name, size in sizes.items():
            part = self.memory[at : at + size].view(torch.float32)
            part.copy_(torch.linspace(-1, 1, len(part)))
            self.tensors[name] = part.view(SHAPES[name])
            at += size + GUARD
        self.before = self.memory.clone()

    def add(self, updates):
        """What a server does with updates whose shapes are its own; the entries they name."""
        touched = self.memory.new_zeros(len(self.memory), dtype=torch.bool)
        for name, one in updates.items():
            target = self.tensors[name]
            if isinstance(one, Packed):
                unpack_add_(target, one)
                positions = one.mask.positions()
            else:
                positions = one.positions()
                target.view(-1).index_add_(0, positions, one.values.float())
            begin = target.data_ptr() - self.memory.data_ptr()
            for byte in range(4):
                touched[begin + 4 * positions + byte] = True
        return touched

    def untouched(self, touched=None):
        same = self.memory == self.before
        return bool(same.all() if touched is None else (same | touched).all())

    def restore(self):
        self.memory.copy_(self.before)


def messages():
    """Real messages: every format and scheme, alone and together."""
    g = torch.Generator().manual_seed(0)
    given = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    masks = {n: SparseMask(s, 0.1, seed=9, tensor_id=f"layer.{n}") for n, s in SHAPES.items()}
    iid = SparseMask(SHAPES["b"], 0.1, seed=9, tensor_id="layer.b", scheme="bernoulli")
    items = [
        {"a": pack(given["a"], masks["a"])},
        {"a": pack(given["a"], masks["a"], dtype=torch.int8, block=16)},
        {"c": topk_pack(given["c"], 3)},
        {"d": pack(given["d"], masks["d"], dtype=torch.float16, block=16)},
        {
            "a": pack(given["a"], masks["a"], dtype=torch.bfloat16),
            "b": pack(given["b"], iid, dtype=torch.int8, seed=1, block=32),
            "c": topk_pack(given["c"].bfloat16(), 30),
        },
    ]
    return [dump_packed(one, round=3, client=11) for one in items]


def damaged(data, rng):
    """Mostly flipped bits and hostile numbers in the place of values."""
    kinds = (0, 0, 0, 0, 1, 2, 3, 4, 5, 5, 5, 6)
    return fuzz_files.damaged(
        data,
        rng,
        times=(1, 2, 3),
        kinds=kinds,
        lengths=(2**31, 2**63),
        fills=PATTERNS,
        over=None,
    )


def forged(data, rng):
    """What a hostile peer writes: any header and data, offsets tiled again, the checksum right."""
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    metadata = json.loads(table.pop("__metadata__")["fastrank"])["metadata"]
    body = {n: bytearray(data[8 + length :][slice(*e["data_offsets"])]) for n, e in table.items()}
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        rng.choice(
            [_forge_field, _forge_field, _forge_data, _forge_data, _forge_entry, _forge_list]
        )(table, metadata, body, rng)
    chunks, end = [], 0
    for name, entry in table.items():
        chunk = body.get(name, b"")
        if rng.random() > 0.03:
            entry["data_offsets"] = [end, end + len(chunk)]
        if rng.random() > 0.1:
            _fit_shape(entry, len(chunk))
        chunks.append(chunk)
        end += len(chunk)
    if rng.random() < 0.03 and table:  # overlapping, reversed or far offsets
        entry = rng.choice(list(table.values()))
        entry["data_offsets"] = [rng.choice([*NUMBERS, 0, end]), rng.choice([*NUMBERS, end])]
    return seal(table, metadata, b"".join(chunks))


def seal(table, metadata, body):
    record = {"format": wire.FORMAT, "version": wire.VERSION, "metadata": metadata}
    record["sha256"] = wire._digest(table, metadata, [body])
    header = json.dumps({**table, "__metadata__": {"fastrank": json.dumps(record)}}).encode()
    return len(header).to_bytes(8, "little") + header + body


def _fit_shape(entry, size):
    itemsize = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(entry["dtype"], 1)
    entry["shape"] = [size // itemsize]


def _forge_field(table, metadata, body, rng):
    """A field of a tensor's header, or of the packed entry."""
    record = metadata["packed"]
    places = [record, *(f for f in record.get("tensors", {}).values() if isinstance(f, dict))]
    target = rng.choice(places[1:] or places) if rng.random() < 0.9 else record
    key = rng.choice(list(target)) if target else "x"
    if key == "tensors":
        return
    value = target.get(key)
    if rng.random() < 0.1:
        target.pop(key, None)
    elif key == "scheme":
        target[key] = rng.choice(SCHEMES)
    elif isinstance(value, list) and value and rng.random() < 0.8:
        value[rng.randrange(len(value))] = rng.choice(NUMBERS if rng.random() < 0.8 else ODD)
    elif isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        target[key] = value + rng.choice([-1, 1, 5, 2**32])
    else:
        target[key] = rng.choice(ODD)


def _forge_data(table, metadata, body, rng):
    """Bits, NaN, Inf and hostile codes in the data; data cut or made longer."""
    if not body:
        return
    chunk = body[rng.choice(list(body))]
    i, kind = rng.randrange(max(len(chunk), 1)), rng.randrange(6)
    if kind <= 2:
        for _ in range(rng.randint(1, 4)):
            pattern = rng.choice(PATTERNS)
            j = rng.randrange(max(len(chunk), 1)) // 4 * 4
            chunk[j : j + len(pattern)] = pattern[: max(len(chunk) - j, 0)]
    elif kind == 3 and chunk:
        chunk[i] ^= 1 << rng.randrange(8)
    elif kind == 4:
        del chunk[i:]
    else:
        chunk += rng.choice([b"\xff" * 9, b"\x00" * 4, rng.randbytes(300)])


def _forge_entry(table, metadata, body, rng):
    """A dtype or shape of the table."""
    if not table:
        return
    entry = rng.choice(list(table.values()))
    if rng.random() < 0.5:
        entry["dtype"] = rng.choice(TAGS)
    else:
        entry["shape"] = rng.choice([[], [0], [2**62, 2**62], [rng.choice(NUMBERS)], [3, 4], "x"])


def _forge_list(table, metadata, body, rng):
    """Tensors and headers removed, added or renamed."""
    if not isinstance(metadata["packed"].get("tensors"), dict):
        return
    headers, kind = metadata["packed"]["tensors"], rng.randrange(4)
    name = rng.choice(list(headers)) if headers else "a"
    if kind == 0:
        headers.pop(name, None)
    elif kind == 1 and headers:
        headers[rng.choice(["a", "z", "", "a.values"])] = copy.deepcopy(headers[name])
    elif kind == 2 and table:
        gone = rng.choice(list(table))
        table.pop(gone)
        body.pop(gone)
    else:
        table["z"] = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
        body["z"] = bytearray(4)


def fuzz(count, seed):
    """(refusals by reason, accepted messages that were changed, slowest seconds)."""
    rng, server, originals = random.Random(seed), Server(), messages()
    names = [list(load_packed(data)) for data in originals]
    refusals, accepted, slowest = Counter(), 0, 0.0
    for number in range(count):
        which = rng.randrange(len(originals))
        expect = {name: SHAPES[name] for name in names[which]} if rng.random() < 0.5 else None
        data = (forged if number % 2 else damaged)(originals[which], rng)
        begin = time.perf_counter()
        updates, reason = None, ""
        try:
            updates = load_packed(data, expect=expect, max_entries=1 << 16)
        except WireError as error:
            reason = str(error)
        if updates is None:
            assert reason, number
            assert server.untouched(), (number, reason)
            words = re.findall(r"\b[a-z]{3,}\b", reason)  # without names and numbers
            refusals[" ".join(words[:4])] += 1
        else:
            accepted += data != originals[which]
            check_valid(updates, server, number)
        slowest = max(slowest, time.perf_counter() - begin)
    assert server.untouched()
    return refusals, accepted, slowest


def check_valid(updates, server, number):
    """An accepted message says the same again, and adding it touches its own entries alone."""
    again = load_packed(dump_packed(updates), max_entries=1 << 16)
    assert list(again) == list(updates)
    for name, one in updates.items():
        assert torch.equal(again[name].values, one.values)
        assert torch.isfinite(one.values).all()
        positions = one.mask.positions() if isinstance(one, Packed) else one.positions()
        shape = one.mask.shape if isinstance(one, Packed) else one.shape
        assert len(positions) == len(one.values)
        if len(positions):
            assert int(positions[0]) >= 0
            assert int(positions[-1]) < int(np.prod(shape, dtype=np.int64))
            assert bool((positions[1:] > positions[:-1]).all())
    mine = {
        name: one
        for name, one in updates.items()
        if name in SHAPES
        and (one.mask.shape if isinstance(one, Packed) else one.shape) == SHAPES[name]
    }
    touched = server.add(mine)
    assert server.untouched(touched), number
    server.restore()


def assert_thorough(refusals, accepted, count):
    assert sum(refusals.values()) > 0.8 * count  # most faults are seen
    assert accepted > 0.01 * count  # and some messages are other, good ones
    assert len(refusals) > 40  # for many reasons


def test_mutated_messages():
    refusals, accepted, slowest = fuzz(2_000, seed=0)
    assert_thorough(refusals, accepted, 2_000)
    assert slowest < 30


@pytest.mark.slow
def test_a_hundred_thousand_mutated_messages():
    begin = time.perf_counter()
    refusals, accepted, slowest = fuzz(100_000, seed=1)
    assert_thorough(refusals, accepted, 100_000)
    assert slowest < 30
    print(
        f"\n{sum(refusals.values())} refused for {len(refusals)} reasons, {accepted} accepted, "
        f"{time.perf_counter() - begin:.0f} s, slowest {slowest * 1e3:.0f} ms"
    )


def test_the_guards_see_a_stray_write():
    server = Server()
    assert server.untouched()
    touched = server.add({"c": topk_pack(torch.ones(300), 4)})
    assert server.untouched(touched)
    assert not server.untouched()
    server.restore()
    server.memory[GUARD - 1] ^= 1
    assert not server.untouched(touched)
