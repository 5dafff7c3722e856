"""Clipping ends at its limit, keeps directions and leaves alone what is no parameter."""

import pytest
import torch
from lora_cases import started, update_of
from robust_cases import attacked, dense, fedara

from fastrank.federated.clipping import Clip, norm_of
from fastrank.federated.methods import FedIT
from fastrank.federated.methods.base import Update
from fastrank.federated.robust import products_of
from fastrank.federated.wire import Payload


def test_clipping_keeps_direction_and_shortens_to_the_limit():
    method, state = started(FedIT)
    update = update_of(method, state, 0)
    long = Clip(2.0)(update, state.tensors, 1.0).payload.tensors
    moved = {n: v - state.tensors[n].double() for n, v in long.items()}
    before = {n: v.double() - state.tensors[n] for n, v in update.payload.tensors.items()}
    assert norm_of(moved) == pytest.approx(2.0, rel=1e-12)
    share = 2.0 / norm_of(before)
    for name, value in moved.items():
        torch.testing.assert_close(value, share * before[name], rtol=1e-9, atol=1e-12)
    assert Clip(1e3)(update, state.tensors, 1.0) is update


@pytest.mark.parametrize("kind", ["sign-flip", "scale", "gaussian"])
def test_clipping_and_attacks_leave_votes_alone(kind):
    method, state = fedara()
    votes = torch.tensor([1, 2], dtype=torch.uint8)
    payload = method.pack(state.tensors, 5)
    payload.tensors["votes"] = votes
    origin = method.origin(state, 0, 5)
    bent = attacked(kind)(payload, {n: v - 1 for n, v in origin.items()}, 0, 5)
    assert bent.tensors["votes"] is votes
    assert not torch.equal(bent.tensors["head.weight"], payload.tensors["head.weight"])
    clipped = Clip(0.1)(Update(0, bent, 1, 1, 0.0), origin, method.scale_for(state, 0))
    assert clipped.payload.tensors["votes"] is votes


@pytest.mark.parametrize("form", ["lora", "svd"])
@pytest.mark.parametrize("limit", [1e-3, 0.5, 20.0])
def test_product_clipping_ends_at_the_limit(form, limit):
    generator = torch.Generator().manual_seed(4)
    shapes = {"net.q.lora_A.default": (3, 7), "net.q.lora_B.default": (9, 3), "head.weight": (2, 2)}
    if form == "svd":
        shapes["net.q.lora_E.default"] = (3, 1)
    start = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    sent = {n: v + torch.randn(v.shape, generator=generator) for n, v in start.items()}
    update = Update(0, Payload(sent), 1, 1, 0.0)

    def step(tensors):
        gap = dense(products_of(tensors)["net.q"]) - dense(products_of(start)["net.q"])
        head = tensors["head.weight"].double() - start["head.weight"].double()
        return float((9.0 * gap.square().sum() + head.square().sum()).sqrt())  # s = 3

    assert step(sent) > 20.0
    clipped = Clip(limit, "products")(update, start, 3.0).payload.tensors
    assert step(clipped) == pytest.approx(limit, rel=1e-9)
    assert Clip(step(sent) * 1.01, "products")(update, start, 3.0) is update
