"""Bases that change from round to round by low-rank updates, and what clients are owed of them.

The server keeps the whole change since the first weights, dense, and the factors of recent rounds
for as long as they are together smaller than that. A client that takes part is sent what it has
missed: the rounds' factors, or the whole change where that is smaller. In both cases it can build
the round's base itself; a test does so from nothing but the payloads. (With a 16-bit wire_dtype
the whole change arrives rounded; all clients train on the server's all the same.)

State: server["change/MODULE"] `[N, K]` fp32; server["update/ROUND/MODULE/B"] `[N, Q]` and ".../A"
`[Q, K]` in the wire's dtype; extra["seen"] client -> the last round it took part in;
extra["rounds"] the rounds that changed the base, extra["kept"] those whose factors are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastrank.federated.methods._factors import Pair
from fastrank.federated.methods.base import ServerState
from fastrank.federated.ranks import is_factor

if TYPE_CHECKING:
    from fastrank.federated.model import ResidentModel

CATCH_UP = ("charge", "ignore")
_CHANGE, _UPDATE = "change/", "update/"


class Changes:
    """What methods that change the base say of it to clients in other processes."""

    public_server: ClassVar[tuple[str, ...]] = (_CHANGE,)

    def public_extra(self, extra: Mapping[str, Any], clients: Sequence[int]) -> dict[str, Any]:
        return {}  # who took part when is what downlinks are made from

    def replay(
        self,
        known: Mapping[str, Tensor],
        received: Mapping[str, Tensor],
        since: int,
        extra: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        return replayed(known, received, since)


def with_changes(state: ServerState, shapes: Mapping[str, tuple[int, int]]) -> ServerState:
    """The state of a base that has not changed yet."""
    zeros = {_CHANGE + module: torch.zeros(shape) for module, shape in shapes.items()}
    extra = {"seen": {}, "rounds": [], "kept": []}
    return replace(state, server={**state.server, **zeros}, extra={**state.extra, **extra})


def changes(state: ServerState) -> dict[str, Tensor]:
    """Adapted module -> what its weight has changed by, `[N, K]`."""
    return _under(_CHANGE, state.server)


def show(model: ResidentModel, state: ServerState) -> None:
    """Bring base and adapters into the model; `without` what clients trained, the first base."""
    tensors = dict(state.tensors)
    if any(is_factor(name) for name in tensors):
        model.change_base(changes(state))
    else:
        model.change_base({})
        factors = model.read(model.lora_names())
        tensors |= {n: torch.zeros_like(v) for n, v in factors.items() if ".lora_B." in n}
    model.load(tensors)


def without(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Global tensors that `show` takes for a model whose adapters have contributed nothing."""
    return {name: value for name, value in tensors.items() if not is_factor(name)}


def is_change(name: str) -> bool:
    """Whether a tensor of a payload is no parameter but part of the base's change."""
    return name.startswith((_CHANGE, _UPDATE))


def merged(
    state: ServerState,
    update: Mapping[str, Pair],
    round: int,
    clients: Iterable[int],
    dtype: torch.dtype,
) -> ServerState:
    """The state after a round that adds B A to every module's weight, seen by these clients.

    Args:
        update: of every adapted module; rounded to the wire's ``dtype`` first, as clients get it.
    """
    new = {
        f"{_UPDATE}{round}/{module}/{role}": value.to(dtype)
        for module, pair in update.items()
        for role, value in (("B", pair.B), ("A", pair.A))
    }
    total = applied(changes(state), new)
    size = sum(change.numel() for change in total.values())
    server = {**state.server, **new, **{_CHANGE + m: change for m, change in total.items()}}
    kept, room = [], size
    for q in [round, *reversed(state.extra["kept"])]:
        room -= sum(value.numel() for value in _under(f"{_UPDATE}{q}/", server).values())
        if room <= 0:  # from here on the whole change is no larger
            break
        kept.insert(0, q)
    server = {
        name: value
        for name, value in server.items()
        if not name.startswith(_UPDATE) or int(name.split("/")[1]) in kept
    }
    seen = {**state.extra["seen"], **{str(client): round for client in clients}}
    extra = {"seen": seen, "rounds": [*state.extra["rounds"], round], "kept": kept}
    return replace(state, server=server, extra={**state.extra, **extra})


def owed(state: ServerState, client: int, catch_up: str) -> dict[str, Tensor]:
    """What a client lacks of the present base: rounds' factors, or the whole change if smaller.

    Args:
        catch_up: "charge" sends all that it has missed since its last round, or since the start;
            "ignore" the last round alone, as if it had listened to every one.
    """
    rounds = state.extra["rounds"]
    if catch_up == "ignore":
        missed = rounds[-1:]
    else:
        last = state.extra["seen"].get(str(client), 0)
        missed = [q for q in rounds if q >= last]
    parts: dict[str, Tensor] = {}
    for q in missed:
        prefix = f"{_UPDATE}{q}/"
        parts |= {n: v for n, v in state.server.items() if n.startswith(prefix)}
    whole = {n: v for n, v in state.server.items() if n.startswith(_CHANGE)}
    # what is kept is smaller than the whole
    return parts if set(missed) <= set(state.extra["kept"]) else whole


def applied(base: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A client's change of base after a downlink: what it had, and what it was ``owed``."""
    whole = _under(_CHANGE, received)
    if whole:
        return {module: value.float() for module, value in whole.items()}
    found = dict(base)
    rounds = sorted({int(n.split("/")[1]) for n in received if n.startswith(_UPDATE)})
    for q in rounds:
        factors = _under(f"{_UPDATE}{q}/", received)
        for module, change in found.items():
            B, A = factors[f"{module}/B"].float(), factors[f"{module}/A"].float()
            found[module] = torch.addmm(change, B, A)
    return found


def replayed(
    known: Mapping[str, Tensor], received: Mapping[str, Tensor], since: int
) -> dict[str, Tensor]:
    """The server's change of the base, from the one before round ``since`` and from downlinks."""
    new = {
        name: value
        for name, value in received.items()
        if name.startswith(_UPDATE) and int(name.split("/")[1]) >= since
    }
    found = applied(_under(_CHANGE, known), new) if new else {}
    return {_CHANGE + module: value for module, value in found.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose names start so, by the rest of the name."""
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
