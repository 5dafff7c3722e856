"""What the tests of the wire format share: a payload and comparisons."""

import torch

from fastrank.federated.wire import Payload


def raw(tensor):
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def assert_same(a: Payload, b: Payload):
    assert a.metadata == b.metadata
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert b.tensors[name].dtype == tensor.dtype, name
        assert b.tensors[name].shape == tensor.shape, name
        assert torch.equal(raw(b.tensors[name]), raw(tensor)), name


def sample() -> Payload:
    generator = torch.Generator().manual_seed(0)
    return Payload(
        {
            "encoder.0.query.A": torch.randn(4, 8, generator=generator),
            "encoder.0.query.B": torch.randn(6, 4, generator=generator).bfloat16(),
            "mask": torch.tensor([True, False, True]),
            "steps": torch.tensor(7),
            "none": torch.empty(0, 3),
        },
        {"round": 3, "name": "fedit", "weights": [0.25, None, True], "nested": {"a": 1}},
    )
