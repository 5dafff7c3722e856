"""Packed updates as messages: exact round trips, bytes as promised, refusal of everything else."""

import copy
import math

import pytest
import safetensors.torch
import torch

from fastrank.federated import packed_headers, wire
from fastrank.federated.packed_wire import (
    dump_packed,
    from_payload,
    load_packed,
    packed_spec,
    to_payload,
)
from fastrank.federated.wire import Payload, WireError, from_bytes, to_bytes
from fastrank.kernels.packing import Packed, SparseMask, TopK, aggregate, pack, topk_pack, unpack
from fastrank.kernels.packing import mask as mask_module

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
SHAPE = (40, 50)


def dense(shape=SHAPE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(dtype=torch.float32, shape=SHAPE, block=16, **fields):
    mask = SparseMask(shape, **{"density": 0.05, "seed": 2**64 - 1, "tensor_id": "a.é", **fields})
    return pack(dense(shape), mask, dtype=dtype, block=block)


def assert_same(a, b):
    assert type(a) is type(b)
    for field in ("values", "scale", "status", "code"):
        mine, theirs = getattr(a, field, None), getattr(b, field, None)
        assert (mine is None) == (theirs is None), field
        if mine is not None:
            assert mine.dtype == theirs.dtype, field
            assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)), field
    for field in ("mask", "block", "k", "shape"):
        assert getattr(a, field, None) == getattr(b, field, None), field


def forge(items, edit):
    """A message with a right checksum after `edit(tensors, record)` of a good one."""
    payload = to_payload(items)
    tensors, metadata = dict(payload.tensors), copy.deepcopy(payload.metadata)
    edit(tensors, metadata["packed"])
    return to_bytes(Payload(tensors, metadata))


@pytest.mark.parametrize("scheme", ["stratified", "bernoulli"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_round_trip(dtype, scheme):
    one = packed(dtype, scheme=scheme, round=2**24 - 1)
    data = dump_packed({"x": one}, client=7)
    back = load_packed(data, expect={"x": one.mask})
    assert_same(back["x"], one)
    assert dump_packed(back, client=7) == data
    assert from_bytes(data).metadata["client"] == 7
    back["x"].values.zero_()  # writable, and memory of its own
    assert_same(load_packed(data)["x"], one)


@pytest.mark.parametrize("dtype", packed_headers.TOPK_DTYPES, ids=str)
def test_topk_round_trip(dtype):
    one = topk_pack(dense().to(dtype), 20)
    assert_same(load_packed(dump_packed({"x": one}), expect={"x": SHAPE})["x"], one)


@pytest.mark.parametrize(
    "one",
    [
        packed(torch.int8, shape=(0, 4)),
        packed(torch.float32, shape=(3, 0), scheme="bernoulli"),
        packed(torch.float16, shape=(17,), density=1.0),
        packed(torch.bfloat16, shape=(5, 3), density=1.0, scheme="bernoulli"),
        packed(torch.float32, shape=(2, 3, 4, 5), density=0.5),
        topk_pack(dense(), 0),
        topk_pack(dense(), 2000),
        topk_pack(torch.zeros(0, 3), 0),
        topk_pack(torch.tensor(2.0), 1),
    ],
    ids=lambda one: f"{type(one).__name__}-{len(one.values)}",
)
def test_edges_round_trip(one):
    assert_same(load_packed(dump_packed({"x": one}))["x"], one)


def test_many_tensors_in_the_order_of_their_names():
    items = {
        "b": packed(torch.int8),
        "a": topk_pack(dense(), 9),
        "a.values": packed(),
        "ü": packed(),
    }
    data = dump_packed(items)
    back = load_packed(data, expect=dict.fromkeys(items, SHAPE))
    assert list(back) == ["a", "a.values", "b", "ü"]
    for name, one in items.items():
        assert_same(back[name], one)
    assert dump_packed(dict(reversed(items.items()))) == data
    assert load_packed(dump_packed({})) == {}


def test_counts_of_nonfinite_values_cross():
    values = dense()
    mask = SparseMask(SHAPE, 0.05)
    values.view(-1)[mask.positions()[:3]] = torch.tensor([math.nan, math.inf, -math.inf])
    one = pack(values, mask, dtype=torch.int8, nonfinite="zero")
    assert load_packed(dump_packed({"x": one}))["x"].status.tolist() == [1, 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_of_a_model_are_values_scales_and_a_kibibyte_a_tensor(dtype):
    layer = "base_model.model.bert.encoder.layer.{}.attention.self.{}.weight"
    names = [layer.format(i, part) for i in range(12) for part in ("query", "key", "value")]
    items = {n: packed(dtype, (768, 768), 256, density=0.01, tensor_id=n) for n in names}
    for chosen in (items, dict(list(items.items())[:1])):
        data = dump_packed(chosen, round=3, client=12345)
        bound = 0
        for one in chosen.values():
            nnz = math.ceil(768 * 768 / 100)
            scales = math.ceil(nnz / 256) if dtype in (torch.float16, torch.int8) else 0
            bound += nnz * dtype.itemsize + 4 * scales
            assert one.nbytes == nnz * dtype.itemsize + 4 * scales  # and no index bytes
        assert from_bytes(data).payload_bytes == bound
        assert len(data) <= bound + 1024 * len(chosen)


def test_bytes_of_a_top_k():
    big = dense((1000, 1000))
    data = dump_packed({"x" * 100: topk_pack(big, 10_000)})
    assert len(data) <= 10_000 * (4 + 9 / 8) + 1024


def test_layout_is_pinned():
    # bytes on the wire are a format: a change needs a new version
    mask = SparseMask((4, 4), 0.25, seed=5, tensor_id="t", round=6)
    one = Packed(torch.arange(4.0), None, torch.tensor([0, 1]), mask)
    data = dump_packed({"x": one})
    length = int.from_bytes(data[:8], "little")
    assert (
        r"\"packed\":{\"generator\":\"philox4x32-10/v1\",\"tensors\":{\"x\":{\"block\":256,"
        r"\"density\":0.25,\"nonfinite\":[0,1],\"round\":6,\"scheme\":\"stratified\",\"seed\":5,"
        r"\"shape\":[4,4],\"stratum\":4,\"tensor_id\":\"t\"}},\"version\":1}"
    ) in data[8 : 8 + length].decode()
    assert data[8 + length :] == one.values.numpy().tobytes()
    assert torch.equal(safetensors.torch.load(data)["x.values"], one.values)


def test_payloads_carry_packed_updates():
    # what a method's uplink returns and a server's aggregate reads
    mask = SparseMask((64, 64), 0.02, seed=1, tensor_id="w")
    updates = [pack(dense((64, 64), seed), mask, dtype=torch.bfloat16) for seed in range(3)]
    received = []
    for one in updates:
        payload = to_payload({"w": one})
        assert payload.payload_bytes == mask.nnz * 2
        received.append(from_payload(from_bytes(to_bytes(payload)), expect={"w": mask})["w"])
    mean, wanted = (unpack(aggregate(u, [1, 1, 1], normalize=True)) for u in (received, updates))
    assert torch.equal(mean, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spec_of_what_is_expected(dtype):
    one = packed(dtype, block=32)
    payload = to_payload({"w": one})
    assert packed_spec({"w": one.mask}, dtype, 32) == wire.spec_of(payload.tensors)
    from_bytes(to_bytes(payload), expect=packed_spec({"w": one.mask}, dtype, 32))


def test_unsendable():
    one = packed()
    spoilt = one.values.clone()
    spoilt[3] = math.inf
    bad = Packed(spoilt, None, one.status, one.mask)
    with pytest.raises(WireError, match=r"'x' holds values that are NaN or infinite: 1 of 100"):
        dump_packed({"x": bad})
    half = packed(torch.float16)
    large = Packed(half.values, torch.full_like(half.scale, 2.0**127), half.status, half.mask, 16)
    with pytest.raises(WireError, match="NaN or infinite"):  # once decoded
        dump_packed({"x": large})
    with pytest.raises(WireError, match="x is a Tensor"):
        dump_packed({"x": one.values})
    with pytest.raises(WireError, match="header 'packed'"):
        dump_packed({"x": one}, packed=1)
    with pytest.raises(WireError, match="can't name"):
        dump_packed({"": one})
    with pytest.raises(WireError, match="not valid Unicode"):
        dump_packed({"\ud800": one})
    with pytest.raises(WireError, match="metadata"):
        dump_packed({"x": one}, round=math.nan)


def test_expectations():
    one, two = packed(), topk_pack(dense(), 9)
    data = dump_packed({"x": one, "y": two})
    with pytest.raises(WireError, match=r"holds 2 \('x', 'y'\), but 1 \('x'\) are expected"):
        load_packed(data, expect={"x": SHAPE})
    with pytest.raises(WireError, match=r"'y' is of a tensor of \[40, 50\]; expected \[50, 40\]"):
        load_packed(data, expect={"x": SHAPE, "y": (50, 40)})
    other = SparseMask(SHAPE, 0.05, seed=3)
    with pytest.raises(WireError, match=r"'x' is packed by SparseMask\(.*expected SparseMask"):
        load_packed(data, expect={"x": other, "y": SHAPE})
    with pytest.raises(WireError, match=r"'y' is packed by top-k of \[40, 50\]; expected Spar"):
        load_packed(data, expect={"x": SHAPE, "y": other})


FLAWS = {
    "version": (lambda t, r: r.update(version=2), "packed version 2"),
    "version type": (lambda t, r: r.update(version=True), "packed version True"),
    "generator": (lambda t, r: r.update(generator="mt19937"), "the generator 'mt19937'"),
    "extra": (lambda t, r: r.update(more=1), r"the packed entry has 4 \("),
    "no tensors": (lambda t, r: r.update(tensors=[]), "the packed entry has"),
    "scheme": (lambda t, r: r["tensors"]["x"].update(scheme="magic"), "scheme 'magic'"),
    "scheme type": (lambda t, r: r["tensors"]["x"].update(scheme=[1]), r"scheme \[1\]"),
    "fields": (lambda t, r: r["tensors"].update(x=[1]), "scheme None"),
    "lacking": (lambda t, r: r["tensors"]["x"].pop("seed"), r"'x' has 8 \(.*; wanted 9"),
    "shape": (lambda t, r: r["tensors"]["x"].update(shape=[-1, 4]), "shape"),
    "shape type": (lambda t, r: r["tensors"]["x"].update(shape=[True, 4]), "shape"),
    "dims": (lambda t, r: r["tensors"]["x"].update(shape=[1] * 17), "shape"),
    "no dims": (lambda t, r: r["tensors"]["x"].update(shape=[]), "at least one dimension"),
    "absurd": (lambda t, r: r["tensors"]["x"].update(shape=[2**61, 2**61]), "below 2"),
    "density": (lambda t, r: r["tensors"]["x"].update(density=1.5), "density is 1.5"),
    "density type": (lambda t, r: r["tensors"]["x"].update(density=10**400), "no float"),
    "stratum": (lambda t, r: r["tensors"]["x"].update(stratum=21), "strata of 20"),
    "seed": (lambda t, r: r["tensors"]["x"].update(seed=2**64), "seed is 18446744073709551616"),
    "seed sign": (lambda t, r: r["tensors"]["x"].update(seed=-1), "seed is -1"),
    "seed type": (lambda t, r: r["tensors"]["x"].update(seed=1.0), "seed holds 1.0"),
    "round": (lambda t, r: r["tensors"]["x"].update(round=2**24), "round is 16777216"),
    "tensor_id": (lambda t, r: r["tensors"]["x"].update(tensor_id=3), "tensor_id is 3"),
    "surrogate": (lambda t, r: r["tensors"]["x"].update(tensor_id="\ud800"), "not valid Unicode"),
    "block": (lambda t, r: r["tensors"]["x"].update(block=17), "blocks of 17"),
    "counts": (lambda t, r: r["tensors"]["x"].update(nonfinite=[1]), r"counts \[1\]"),
    "count": (lambda t, r: r["tensors"]["x"].update(nonfinite=[99, 2]), r"\(99, 2\) non-finite"),
    "other shape": (lambda t, r: r["tensors"]["x"].update(shape=[40, 51]), "keeps 102 entries"),
    "values": (lambda t, r: t.update({"x.values": t["x.values"][:-1]}), "99 values, but its mask"),
    "2-d": (lambda t, r: t.update({"x.values": t["x.values"][None]}), "one dimension"),
    "no values": (lambda t, r: t.pop("x.values"), "one dimension"),
    "dtype": (lambda t, r: t.update({"x.values": t["x.values"].int()}), "values of torch.int32"),
    "no scale": (lambda t, r: t.pop("x.scale"), "the scale None"),
    "scales": (lambda t, r: t.update({"x.scale": t["x.scale"][1:]}), "need"),
    "scale dtype": (lambda t, r: t.update({"x.scale": t["x.scale"].double()}), "need"),
    "stray": (lambda t, r: t.update(z=torch.ones(1)), "'z' belongs to no packed tensor"),
    "not int8": (lambda t, r: t["x.values"].__setitem__(0, -128), "int8 values outside"),
    "nan scale": (lambda t, r: t["x.scale"].__setitem__(0, math.nan), "scales that are NaN, zero"),
    "zero scale": (lambda t, r: t["x.scale"].__setitem__(0, 0), "scales that are NaN, zero"),
    "inf scale": (lambda t, r: t["x.scale"].__setitem__(0, math.inf), "NaN or infinite: "),
    "k": (lambda t, r: r["tensors"]["y"].update(k=2001), "2001 values for a tensor"),
    "k count": (lambda t, r: r["tensors"]["y"].update(k=8), "9 values of torch.float32"),
    "topk shape": (lambda t, r: r["tensors"]["y"].update(shape=[2**31, 2**31]), "for a tensor"),
    "code": (lambda t, r: t["y.code"].__setitem__(-1, 255), "'y': the code"),
    "far": (lambda t, r: r["tensors"]["y"].update(shape=[9]), "'y': "),
    "no code": (lambda t, r: t.pop("y.code"), "no code"),
    "topk nan": (lambda t, r: t["y.values"].__setitem__(0, math.nan), "NaN or infinite: 1 of 9"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_malformed_messages_are_refused(flaw):
    edit, message = FLAWS[flaw]
    data = forge({"x": packed(torch.int8), "y": topk_pack(dense(), 9)}, edit)
    with pytest.raises(WireError, match=message):
        load_packed(data)


def test_other_scales_of_float16():
    data = forge({"x": packed(torch.float16)}, lambda t, r: t["x.scale"].__setitem__(2, 1.5))
    with pytest.raises(WireError, match="float16 scales that are no powers of two: 1 of 7"):
        load_packed(data)


def test_other_payloads_are_refused():
    with pytest.raises(WireError, match="no packed entry"):
        load_packed(to_bytes(Payload({"x": torch.ones(2)})))
    with pytest.raises(WireError, match="limit is 10"):
        load_packed(dump_packed({}), max_bytes=10)


def test_headers_are_checked_before_a_tensor_is_made(monkeypatch):
    data = forge({"x": packed()}, lambda t, r: r["tensors"]["x"].update(round=-1))
    monkeypatch.setattr(wire, "_tensor", lambda *_: pytest.fail("made a tensor"))
    with pytest.raises(WireError, match="round is -1"):
        load_packed(data)


@pytest.mark.parametrize("shape", [[2**40, 2], [1, 2**61]])
def test_absurd_shapes_draw_and_allocate_nothing(shape, monkeypatch):
    def edit(tensors, record):
        record["tensors"]["x"].update(shape=shape, density=2.0**-31)

    monkeypatch.setattr(mask_module, "_draw", lambda *_: pytest.fail("drew a mask"))
    # the limit, and where the shape was expected: the number of values
    data = forge_bernoulli(edit)
    with pytest.raises(WireError, match="limit is 67108864"):
        load_packed(data)
    with pytest.raises(WireError, match="keeps about"):
        load_packed(data, expect={"x": shape})
    topk = forge({"y": topk_pack(dense(), 9)}, lambda t, r: r["tensors"]["y"].update(shape=shape))
    with pytest.raises(WireError, match="limit is 67108864"):
        load_packed(topk)


def forge_bernoulli(edit):
    mask_module.clear_cache()
    one = Packed(torch.ones(40), None, torch.zeros(2, dtype=torch.int64), SparseMask((40,), 1.0))

    def both(tensors, record):
        record["tensors"]["x"]["scheme"] = "bernoulli"
        del record["tensors"]["x"]["stratum"]
        edit(tensors, record)

    return forge({"x": one}, both)


def test_deep_metadata_is_refused():
    deep = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(WireError, match="nested deeper than 64"):
        dump_packed({}, deep=deep)


def test_items_are_what_their_types_say():
    back = load_packed(dump_packed({"x": packed(), "y": topk_pack(dense(), 3)}))
    assert isinstance(back["x"], Packed)
    assert isinstance(back["y"], TopK)
