"""The wire format: exact round trips and canonical bytes."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_cases import assert_same, sample

from fastrank.federated import wire
from fastrank.federated.wire import Payload, WireError, from_bytes, nonfinite, spec_of, to_bytes

DTYPES = sorted(wire._DTYPES.values(), key=str)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_survives_bit_for_bit(dtype):
    # arbitrary bit patterns: NaN payloads and negative zeros included
    noise = np.random.default_rng(1).integers(0, 256, 15 * dtype.itemsize, dtype=np.uint8)
    tensor = torch.from_numpy(noise % 2 if dtype == torch.bool else noise).view(dtype)
    payload = Payload({"x": tensor.reshape(3, 5), "empty": tensor[:0], "scalar": tensor[0]})
    data = to_bytes(payload)
    assert_same(payload, from_bytes(data, expect=spec_of(payload.tensors)))
    assert_same(payload, Payload(safetensors.torch.load(data)))


def test_strided_shared_conjugated_and_trained_tensors():
    base = torch.arange(24.0).reshape(4, 6)
    tied = torch.nn.Parameter(torch.randn(3, 3))
    payload = Payload(
        {
            "transposed": base.t()[::2],
            "broadcast": torch.tensor([1.0, 2.0]).expand(3, 2),
            "whole": base,
            "part": base[1:3],
            "a": tied,
            "b": tied,
            "conj": torch.randn(4, dtype=torch.complex64).conj(),
        }
    )
    back = from_bytes(to_bytes(payload))
    assert_same(payload, back)
    back.tensors["a"].add_(1.0)  # writable, and memory of its own
    assert torch.equal(back.tensors["b"], tied.detach())
    assert not any(t.requires_grad for t in back.tensors.values())


def test_equal_payloads_give_equal_bytes():
    payload = sample()
    shuffled = Payload(
        dict(reversed(payload.tensors.items())), dict(reversed(payload.metadata.items()))
    )
    assert to_bytes(payload) == to_bytes(shuffled) == to_bytes(from_bytes(to_bytes(payload)))
    changed = Payload(payload.tensors, {**payload.metadata, "round": 4})
    assert to_bytes(changed) != to_bytes(payload)


def test_bytes_do_not_depend_on_the_hash_seed():
    script = (
        "import hashlib, torch\n"
        "from fastrank.federated.wire import Payload, to_bytes\n"
        "names = {f'layer.{i}' for i in range(40)}\n"  # iterates in hash order
        "tensors = {n: torch.full((2,), float(n[6:])) for n in names}\n"
        "digest = hashlib.sha256(to_bytes(Payload(tensors, dict.fromkeys(names, 1)))).hexdigest()\n"
    )
    here: dict = {}
    exec(script, here)
    other_seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    there = subprocess.run(
        [sys.executable, "-c", script + "print(*names, digest)"],
        env={**os.environ, "PYTHONHASHSEED": other_seed},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert there[:-1] != list(here["names"])
    assert there[-1] == here["digest"]


def test_layout_is_pinned():
    # bytes on the wire are a format: a change needs a new version
    data = to_bytes(Payload({"b": torch.tensor([1, 2], dtype=torch.int16)}, {"k": 1}))
    digest = "3188ed30"
    header = data[8:-4].decode()
    assert struct.unpack("<Q", data[:8])[0] == len(header) == 240
    assert data[-4:] == b"\x01\x00\x02\x00"
    assert header.startswith(
        '{"__metadata__":{"fastrank":"{\\"format\\":\\"fastrank-payload\\",'
        '\\"metadata\\":{\\"k\\":1},\\"sha256\\":\\"' + digest
    )
    assert header.rstrip().endswith('"b":{"data_offsets":[0,4],"dtype":"I16","shape":[2]}}')


def test_data_is_aligned_for_readers_that_map_the_file():
    payload = Payload({str(i): torch.ones(3).to(dtype) for i, dtype in enumerate(DTYPES)})
    data = to_bytes(payload)
    length = struct.unpack("<Q", data[:8])[0]
    table = json.loads(data[8 : 8 + length])
    assert (8 + length) % 8 == 0
    for name, tensor in payload.tensors.items():
        assert table[name]["data_offsets"][0] % tensor.itemsize == 0


def test_sizes():
    payload = sample()
    assert payload.payload_bytes == 4 * 8 * 4 + 6 * 4 * 2 + 3 + 8
    assert payload.bytes_of(["mask", "steps", "mask", "absent"]) == 3 + 8
    assert len(to_bytes(payload)) > payload.payload_bytes
    assert Payload({}).payload_bytes == 0
    assert_same(Payload({}), from_bytes(to_bytes(Payload({})), expect={}))


def test_nonfinite_names_the_tensors():
    tensors = {
        "fine": torch.ones(3),
        "int": torch.ones(3, dtype=torch.int64),
        "empty": torch.empty(0),
        "nan16": torch.tensor([1.0, float("nan")]).bfloat16(),
        "inf": torch.tensor(float("-inf")),
        "nan8": torch.tensor([float("nan")]).to(torch.float8_e4m3fn),
        "complex": torch.tensor([complex(0, float("inf"))]),
    }
    assert nonfinite(Payload(tensors)) == ["complex", "inf", "nan16", "nan8"]
    # and they do cross the wire, so that the receiver can name client and round
    assert nonfinite(from_bytes(to_bytes(Payload(tensors)))) == ["complex", "inf", "nan16", "nan8"]


def test_check_sees_shapes_and_metadata_before_a_tensor_is_made(monkeypatch):
    payload, seen = sample(), []
    from_bytes(to_bytes(payload), check=lambda *given: seen.append(given))
    assert seen == [(spec_of(payload.tensors), payload.metadata)]

    def refuse(spec, metadata):
        raise WireError("not today")

    monkeypatch.setattr(wire, "_tensor", lambda *_: pytest.fail("made a tensor"))
    with pytest.raises(WireError, match="not today"):
        from_bytes(to_bytes(payload), check=refuse)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.dictionaries(names, st.lists(st.integers(0, 3), max_size=3), max_size=4),
    metadata=st.dictionaries(st.text(), json_values, max_size=3),
    dtype=st.sampled_from(DTYPES),
)
def test_round_trip_property(shapes, metadata, dtype):
    payload = Payload({n: torch.ones(s).to(dtype) for n, s in shapes.items()}, metadata)
    data = to_bytes(payload)
    back = from_bytes(data, expect=spec_of(payload.tensors))
    assert_same(payload, back)
    assert to_bytes(back) == data
