"""Several clients in one model: each trainable layer holds every client's own values, stacked.

Rows of an activation are sorted by client: the first ``sizes[0]`` examples are client 0's. Adapted
layers run `grouped_lowrank_linear`, heads and norms a product or an affine map per client; all
other layers are frozen, shared, and never know. Nothing of the model itself changes: the stacked
layers answer in place of the modules' own ``forward`` while a ``Stack`` is entered, and no longer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrank.kernels.common.products import pack
from fastrank.kernels.lowrank import grouped_lowrank_linear
from fastrank.layers.fused import FusedLayer, Operands, diagonal

_MASK = 2**64 - 1


class Pass:
    """What the stacked layers know of the forward that is running.

    Attributes:
        sizes: examples of each client, in the order of the rows.
        seeds: a seed for each client's dropout in this step; None where nothing is dropped.
    """

    def __init__(self) -> None:
        self.sizes: tuple[int, ...] = ()
        self.seeds: tuple[int, ...] | None = None
        self._rows: dict[int, tuple[int, ...]] = {}
        self._ids: dict[int, Tensor] = {}

    def begin(self, sizes: Sequence[int], seeds: Sequence[int] | None = None) -> None:
        """Say what the next forward holds."""
        self.sizes = tuple(sizes)
        self.seeds = None if seeds is None else tuple(seeds)
        self._rows, self._ids = {}, {}

    def rows(self, count: int) -> tuple[int, ...]:
        """Rows of each client in an activation of so many.

        Raises:
            ValueError: they don't divide among the examples.
        """
        if count in self._rows:
            return self._rows[count]
        examples = sum(self.sizes)
        each, rest = divmod(count, examples)
        if rest:
            raise ValueError(f"{count} rows don't divide among {examples} examples")
        self._rows[count] = rows = tuple(size * each for size in self.sizes)
        return rows

    def row_ids(self, count: int, device: torch.device) -> Tensor:
        """int64 `[count]`: example within its client's batch << 32 | position in the example."""
        if count not in self._ids:
            each = count // sum(self.sizes)
            examples = torch.cat([torch.arange(size) for size in self.sizes])
            ids = (examples[:, None] << 32) | torch.arange(each)[None, :]
            self._ids[count] = ids.flatten().to(device)
        return self._ids[count]

    def layer_seeds(self, layer: int) -> list[int]:
        """Each client's seed for one layer, signed 64-bit."""
        return [_mixed(seed, layer) for seed in self.seeds]


def _mixed(seed: int, layer: int) -> int:
    """SplitMix64's output function (Steele, Lea, Flood, OOPSLA 2014) of the layer-th state."""
    z = (seed + (layer + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


class StackedTensor:
    """One parameter of every client, behind each other along dim 0.

    Attributes:
        name: the parameter's.
        values: `[sum(parts), ...]`, all clients'.
        parts: how much of dim 0 is each client's.
        trainable: whether it gets gradients.
        leaf: the part of the clients that are still in training, for autograd.
    """

    def __init__(self, name: str, clients: Sequence[Tensor], like: Tensor, trainable: bool):
        self.name, self.trainable = name, trainable
        self.parts = tuple(value.shape[0] for value in clients)
        self.values = torch.cat([value.detach().to(like.device, like.dtype) for value in clients])
        self.leaf = self.values
        self.narrow(len(clients))

    def narrow(self, clients: int) -> None:
        """Keep the first so many."""
        values = self.values[: sum(self.parts[:clients])]
        self.leaf = values.detach().requires_grad_(self.trainable)

    def of(self, client: int) -> Tensor:
        start = sum(self.parts[:client])
        return self.values[start : start + self.parts[client]]


class _Stacked(ABC):
    """One module with every client's parameters."""

    def __init__(self, module: nn.Module, running: Pass) -> None:
        self.module, self.running = module, running
        self.tensors: dict[str, StackedTensor] = {}

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """What the module gives for rows sorted by client."""

    @abstractmethod
    def read(self, name: str, client: int) -> Tensor:
        """A client's value in the parameter's own shape."""


class StackedLora(_Stacked):
    """A fused PEFT layer; a client's rank is that of the values it brings."""

    def __init__(
        self,
        module: FusedLayer,
        running: Pass,
        operands: Operands,
        names: Mapping[str, str],
        clients: Sequence[Mapping[str, Tensor]],
        trainable: frozenset[str],
        scales: Sequence[float | None],
        masks: Sequence[Tensor | None],
        index: int,
    ) -> None:
        super().__init__(module, running)
        self._operands, self._names, self._index = operands, names, index
        self.dropout_p = operands.dropout_p
        _, scale = diagonal(operands.E, operands.scale)
        self._scales = tuple(scale if own is None else own for own in scales)
        weight = operands.weight.detach()
        self._packed = pack(weight.T if operands.transposed else weight)
        for role, name in names.items():
            like = getattr(operands, role)
            values = [_turned(role, client.get(name, like)) for client in clients]
            self.tensors[role] = StackedTensor(name, values, like, name in trainable)
        self.ranks = self.tensors["A"].parts
        self.trained_ranks = None
        if any(mask is not None for mask in masks):
            pairs = zip(masks, self.ranks, strict=True)
            self.trained_ranks = torch.cat(
                [torch.ones(r, dtype=torch.bool) if mask is None else mask for mask, r in pairs]
            )

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, transposed, _, _, _, _, dropout_p = self._operands
        running, n = self.running, len(self.running.sizes)
        drops = dropout_p > 0.0 and running.seeds is not None
        count = x.numel() // x.shape[-1]
        e = self.tensors.get("E")
        state = self.module._fastrank
        return grouped_lowrank_linear(
            x,
            weight.T if transposed else weight,
            bias,
            self.tensors["A"].leaf,
            self.tensors["B"].leaf,
            rows=running.rows(count),
            ranks=self.ranks[:n],
            scale=self._scales[:n],
            e=None if e is None else e.leaf.flatten(),
            trainable=self._trained(n),
            dropout_p=dropout_p if drops else 0.0,
            seeds=running.layer_seeds(self._index) if drops else None,
            row_ids=running.row_ids(count, x.device) if drops else None,
            backend=state.backend,
            precision=state.precision,
            packed=self._packed,
        )

    def _trained(self, clients: int) -> Tensor | None:
        mask = self.trained_ranks
        return None if mask is None else mask[: sum(self.ranks[:clients])]

    def read(self, name: str, client: int) -> Tensor:
        role = next(role for role, own in self._names.items() if own == name)
        return _turned(role, self.tensors[role].of(client))


def _turned(role: str, value: Tensor) -> Tensor:
    """B as `[R, N]`, rank-major; its own inverse."""
    return value.t() if role == "B" else value


class StackedLinear(_Stacked):
    """A linear layer of which each client has its own weight, bias or both."""

    def __init__(self, module: nn.Linear, running: Pass, tensors: Mapping[str, StackedTensor]):
        super().__init__(module, running)
        self.tensors = dict(tensors)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (
            self.tensors[name].leaf if name in self.tensors else getattr(self.module, name)
            for name in ("weight", "bias")
        )
        rows = self.running.rows(x.numel() // x.shape[-1])
        flat = x.reshape(-1, x.shape[-1])
        if "weight" in self.tensors:
            y = _client_products(flat, weight, rows)
        else:
            y = F.linear(flat, weight)
        if bias is not None:
            y = y + (_by_row(bias, rows) if "bias" in self.tensors else bias)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def read(self, name: str, client: int) -> Tensor:
        return self.tensors[name.rpartition(".")[2]].of(client)[0]


class StackedNorm(StackedLinear):
    """A LayerNorm of which each client has its own weight, bias or both."""

    def forward(self, x: Tensor) -> Tensor:
        module: nn.LayerNorm = self.module
        rows = self.running.rows(x.numel() // x.shape[-1])
        y = F.layer_norm(x, module.normalized_shape, eps=module.eps).reshape(-1, x.shape[-1])
        for name, combine in (("weight", torch.mul), ("bias", torch.add)):
            own = self.tensors.get(name)
            value = getattr(module, name) if own is None else _by_row(own.leaf, rows)
            y = y if value is None else combine(y, value)
        return y.reshape(x.shape)


def _client_products(x: Tensor, weight: Tensor, rows: tuple[int, ...]) -> Tensor:
    """x `[M, K]` times each client's own weight `[G, N, K]`."""
    if len(set(rows)) == 1:
        y = torch.bmm(x.view(len(rows), rows[0], -1), weight.transpose(1, 2))
        return y.flatten(0, 1)
    return torch.cat([part @ own.t() for part, own in zip(x.split(rows), weight, strict=True)])


def _by_row(value: Tensor, rows: tuple[int, ...]) -> Tensor:
    """value `[G, N]` once for every row of its client."""
    parts = [own.expand(count, -1) for own, count in zip(value, rows, strict=True)]
    return torch.cat(parts)


class Stack:
    """Every client's trainable values over one model; enter it to let them answer.

        stack = Stack(model, names, [values_of_0, values_of_1])
        with stack:
            stack.running.begin(sizes=[4, 4])
            logits = model(...)                   # rows 0 to 3 by client 0, 4 to 7 by client 1

    Args:
        model: holds layers that `patch` has fused; left as it is.
        names: parameters that are trained, as ``model.named_parameters()`` names them.
        clients: each client's values by name; what is missing is the model's own. Factors of
            another rank than the model's are fine.
        scales: of each client's branches; None for the model's own.
        masks: gives, for a module's path, the ranks of each client that learn: bool `[R]`, or None
            for all.

    Raises:
        ValueError: a parameter that can't be stacked; `why_not` says it without raising.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        clients: Sequence[Mapping[str, Tensor]],
        scales: Sequence[float | None] | None = None,
        masks: Callable[[str], Sequence[Tensor | None]] | None = None,
    ) -> None:
        names = frozenset(names)
        owners = _owners(model, names)
        if isinstance(owners, str):
            raise ValueError(owners)
        self.running = Pass()
        self.clients = len(clients)
        self._modules: list[_Stacked] = []
        self._home: dict[str, _Stacked] = {}
        scales = [None] * len(clients) if scales is None else list(scales)
        for index, (module, own) in enumerate(owners):
            if isinstance(module, FusedLayer):
                operands = module.plan().operands
                path = own["A"].partition(".lora_A")[0]
                trained = [None] * len(clients) if masks is None else masks(path)
                stacked = StackedLora(
                    module, self.running, operands, own, clients, names, scales, trained, index
                )
            else:
                like = {role: getattr(module, role) for role in own}
                tensors = {
                    role: StackedTensor(
                        name,
                        [client.get(name, like[role])[None] for client in clients],
                        like[role],
                        True,
                    )
                    for role, name in own.items()
                }
                kind = StackedNorm if isinstance(module, nn.LayerNorm) else StackedLinear
                stacked = kind(module, self.running, tensors)
            self._modules.append(stacked)
            self._home.update(dict.fromkeys(own.values(), stacked))
        self.trained = [
            tensor
            for stacked in self._modules
            for tensor in stacked.tensors.values()
            if tensor.trainable
        ]

    def narrow(self, clients: int) -> None:
        """Let the first so many clients alone go on."""
        if clients != self.clients:
            for stacked in self._modules:
                for tensor in stacked.tensors.values():
                    tensor.narrow(clients)
            self.clients = clients

    @property
    def drops(self) -> bool:
        """Whether any adapter draws a dropout, and `Pass.begin` needs seeds."""
        return any(isinstance(s, StackedLora) and s.dropout_p > 0.0 for s in self._modules)

    def read(self, name: str, client: int) -> Tensor:
        """A client's value of a parameter, in the parameter's own shape."""
        return self._home[name].read(name, client)

    def __enter__(self) -> Self:
        for stacked in self._modules:
            stacked.module.forward = stacked.forward
        return self

    def __exit__(self, *exception: Any) -> None:
        for stacked in self._modules:
            del stacked.module.forward


def why_not(model: nn.Module, names: Iterable[str]) -> str | None:
    """Why these parameters of the model can't be stacked, or None."""
    owners = _owners(model, frozenset(names))
    return owners if isinstance(owners, str) else None


def _owners(
    model: nn.Module, names: frozenset[str]
) -> list[tuple[nn.Module, dict[str, str]]] | str:
    """The modules that hold these parameters and the names by role, or why they can't be stacked.

    A fused layer with any trained factor is there with all of them.
    """
    known = {id(p): name for name, p in model.named_parameters()}
    left = set(names)
    found: list[tuple[nn.Module, dict[str, str]]] = []
    inside: set[int] = set()  # modules within a fused layer
    for path, module in model.named_modules():
        if isinstance(module, FusedLayer):
            inside.update(id(m) for m in module.modules() if m is not module)
            held = {known[id(p)] for p in module.parameters() if id(p) in known}
            if not held & names:
                continue
            plan = module.plan()
            if isinstance(plan, str):
                return f"{path} does not run fused ({plan})"
            roles = {
                role: known[id(value)]
                for role in ("A", "B", "E")
                if (value := getattr(plan.operands, role)) is not None
            }
            if stray := sorted((held & names) - set(roles.values())):
                return f"{stray[0]} is trained and not a factor of the adapter"
            found.append((module, roles))
            left -= set(roles.values())
            continue
        own = {
            role: known[id(p)]
            for role, p in module._parameters.items()
            if p is not None and known.get(id(p)) in names
        }
        if not own or id(module) in inside:
            continue
        if type(module).forward not in (nn.Linear.forward, nn.LayerNorm.forward):
            return f"{path} is a {type(module).__name__}, which is trained"
        if "forward" in vars(module):
            return f"{path} has a forward of its own"
        if taken := sorted(set(own.values()) - left):
            return f"{taken[0]} belongs to several layers"
        found.append((module, own))
        left -= set(own.values())
    return f"{min(left)} belongs to no layer that can be stacked" if left else found


class KeyedDropout:
    """A lone client's adapters, dropping what they would drop in a stack.

    Enter it around the client's steps and call ``running.begin`` before each forward.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.running = Pass()
        owners = _owners(model, frozenset(names))
        self._layers = []
        for index, (module, _) in enumerate([] if isinstance(owners, str) else owners):
            if isinstance(module, FusedLayer) and module.plan().operands.dropout_p > 0.0:
                self._layers.append((module, index))

    def __bool__(self) -> bool:
        return bool(self._layers)

    def __enter__(self) -> Self:
        for module, index in self._layers:
            module.forward = _KeyedForward(module, index, self.running)
        return self

    def __exit__(self, *exception: Any) -> None:
        for module, _ in self._layers:
            del module.forward


class _KeyedForward:
    def __init__(self, module: FusedLayer, index: int, running: Pass) -> None:
        self.module, self.index, self.running = module, index, running

    def __call__(self, x: Tensor) -> Tensor:
        plan, running = self.module.plan(x), self.running
        if isinstance(plan, str):
            raise RuntimeError(f"an adapter stopped running fused in the middle of a step: {plan}")
        weight, bias, transposed, a, b, e, scale, dropout_p = plan.operands
        e, scale = diagonal(e, scale)
        count = x.numel() // x.shape[-1]
        state = self.module._fastrank
        return grouped_lowrank_linear(
            x,
            weight.T if transposed else weight,
            bias,
            a,
            b.t(),
            rows=(count,),
            ranks=(a.shape[0],),
            scale=scale,
            e=e,
            trainable=state.trainable,
            dropout_p=dropout_p,
            seeds=running.layer_seeds(self.index) if dropout_p else None,
            row_ids=running.row_ids(count, x.device) if dropout_p else None,
            backend=state.backend,
            precision=state.precision,
        )
