"""Adapters, clients and updates without a model: what servers do, against dense float64."""

import torch

from fastrank.federated.methods import FedExLoRA, FLoRA
from fastrank.federated.methods import _base_change as base_change
from fastrank.federated.methods._factors import pairs
from fastrank.federated.methods.base import Run, Update
from fastrank.federated.wire import from_bytes, to_bytes

# N = K, N > K, N < K; at rank 4 the last two have a side equal to the rank
SHAPES = {"net.0.q": (7, 7), "net.1.up": (9, 4), "net.1.down": (4, 9)}
WIDE = {"net.0.q": (40, 50), "net.1.up": (60, 40)}
HEAD = "head.weight"
COHORT = (0, 2, 3)  # of 6 clients; with i + 1 examples each
MIXED = (1, 2, 4)  # ranks


class Bare:
    """As much of a resident model as a method's ``init`` asks for."""

    def __init__(self, shapes=SHAPES):
        self.shapes = shapes

    def add_lora(self, *, r, seed, **options):
        generator = torch.Generator().manual_seed(seed)
        self.values = {}
        for module, (N, K) in self.shapes.items():
            drawn = torch.rand(r, K, generator=generator) - 0.5
            self.values[f"{module}.lora_A.default.weight"] = drawn
            self.values[f"{module}.lora_B.default.weight"] = torch.zeros(N, r)
        self.values[HEAD] = torch.zeros(3, 5)

    def lora_names(self):
        return [name for name in self.values if name != HEAD]

    def head_names(self):
        return [HEAD]

    def read(self, names):
        return {name: self.values[name].clone() for name in names}


def started(cls, shapes=SHAPES, clients=6, **options):
    """A method in a run of ten rounds, and its first state."""
    method = cls(**{"r": 4, "lora_alpha": 12.0, **options}).in_run(Run(10, clients, 3, 0))
    return method, method.init(Bare(shapes), seed=0)


def update_of(method, state, client, round=0, seed=None, examples=None):
    """A random update of the shape the server accepts, off the wire."""
    spec = method.uplink_spec(state, client, round)
    generator = torch.Generator().manual_seed(100 * round + (client if seed is None else seed))
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, (shape, dtype) in spec.items()
    }
    payload = from_bytes(to_bytes(method.pack(tensors, round)), expect=spec)
    return Update(client, payload, client + 1 if examples is None else examples, 1, 0.0)


def everything(method, state):
    """All factors by name: the state's, and those of the model that no state holds."""
    bare = Bare(SHAPES)
    bare.add_lora(r=method.r, seed=0)
    tensors = {**state.server, **state.tensors}
    if not any(".lora_A." in n for n in tensors):
        tensors |= {n: v for n, v in bare.values.items() if ".lora_A." in n}
    return {n: v for n, v in tensors.items() if n.endswith(".default.weight")}


def factors_of(update, method, state):
    """module -> (B, A) in float64; what is not sent (A, where it is frozen) is everyone's."""
    sent = {n: v for n, v in update.payload.tensors.items() if n != HEAD}
    found = pairs({**everything(method, state), **sent})
    return {m: (pair.B.double(), pair.A.double()) for m, pair in found.items()}


def mean_product(method, state, updates, scales=None):
    """module -> sum_i p_i s_i B_i A_i, dense float64."""
    total = sum(update.num_examples for update in updates)
    scales = [method.scale] * len(updates) if scales is None else scales
    result = {}
    for update, scale in zip(updates, scales, strict=True):
        for module, (B, A) in factors_of(update, method, state).items():
            share = update.num_examples / total * scale * (B @ A)
            result[module] = result.get(module, 0) + share
    return result


def product(method, tensors):
    """module -> s B A of a model's tensors, dense float64."""
    return {m: method.scale * (p.B.double() @ p.A.double()) for m, p in pairs(tensors).items()}


def norm(matrices):
    return float(sum(m.double().norm() ** 2 for m in matrices) ** 0.5)


def close(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    off = norm(found[m] - wanted[m] for m in wanted) / norm(wanted.values())
    assert off <= tolerance, off


def whole(method, state):
    """module -> what the global model adds to the first weights, dense float64."""
    if isinstance(method, FLoRA):
        return {m: c.double() for m, c in base_change.changes(state).items()}
    found = product(method, everything(method, state))
    if isinstance(method, FedExLoRA):
        found = {m: d + base_change.changes(state)[m] for m, d in found.items()}
    return found
