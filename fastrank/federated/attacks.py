"""Hostile clients: what they upload instead of what they have learnt.

An attacker trains like everyone else and tampers with its upload after that, so that the server's
real validation, clipping and aggregation see it. With o the values it was sent and w its own:

    sign-flip     o - c (w - o)                    c = attack_scale, 1 by default
    scale         o + c (w - o)                    10 by default
    gaussian      o + c rms(w - o) N(0, 1)         10; rms of each tensor
    nan, inf      every value of the first tensor
    wrong-shape   a row more in the first tensor
    replay        a message of the round before; in round 1 an honest one

What is no parameter (FedARA's votes and scores) is sent as it is. The attackers are a pure function
of the seed, the noise one of (seed, round, client).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastrank.errors import UsageError
from fastrank.federated.cohort import derive_seed
from fastrank.federated.wire import Payload

if TYPE_CHECKING:
    from fastrank.federated.config import Config

_DEFAULT_SCALE = {"sign-flip": 1.0, "scale": 10.0, "gaussian": 10.0}


def check(config: Config) -> None:
    """Raise a UsageError for an attack without attackers, or the reverse."""
    if config.attack == "none" and config.attackers:
        raise UsageError(
            f"attackers is {config.attackers} but there is no attack; give --attack sign-flip or "
            "another, or leave --attackers out"
        )
    if config.attack != "none" and not config.attackers:
        raise UsageError(
            f"attack {config.attack} needs attackers: give the share of the clients that attack, "
            "such as --attackers 0.2"
        )
    if config.attack_scale is not None and config.attack not in _DEFAULT_SCALE:
        raise UsageError(
            f"attack_scale means nothing to attack {config.attack}; it belongs to "
            f"{', '.join(_DEFAULT_SCALE)}"
        )


@dataclass(frozen=True)
class Attack:
    """One kind of attack by a share of the clients.

    Attributes:
        kind: one of the list above.
        fraction: share of all clients that attack.
        scale: c; None for the attack's default.
        num_clients, seed: of the run.
    """

    kind: str
    fraction: float
    num_clients: int
    seed: int
    scale: float | None = None

    @classmethod
    def of(cls, config: Config, num_clients: int) -> Attack | None:
        """The attack a configuration asks for, if any.

        Raises:
            UsageError: the share comes to no client at all.
        """
        if config.attack == "none":
            return None
        attack = cls(config.attack, config.attackers, num_clients, config.seed, config.attack_scale)
        if not attack._hostile.any():
            raise UsageError(
                f"attackers {config.attackers} of {num_clients} clients is none; give at least "
                f"{1 / num_clients:.3g}"
            )
        return attack

    @functools.cached_property
    def _hostile(self) -> np.ndarray:
        """Does this client attack? bool `[num_clients]`: a megabyte for a million."""
        count = round(self.fraction * self.num_clients)
        rng = np.random.default_rng(derive_seed("attackers", self.seed))
        hostile = np.zeros(self.num_clients, dtype=bool)
        hostile[rng.permutation(self.num_clients)[:count]] = True
        return hostile

    @property
    def attackers(self) -> frozenset[int]:
        """round(fraction * num_clients) clients, drawn by the seed alone."""
        return frozenset(np.flatnonzero(self._hostile).tolist())

    def by(self, client: int) -> bool:
        return bool(self._hostile[client])

    def __call__(
        self, payload: Payload, start: Mapping[str, Tensor], client: int, round: int
    ) -> Payload:
        """What the attacker sends instead of its payload.

        Args:
            start: o, the values its parameters began with; names that are no parameters are not
                in it.
        """
        if self.kind == "replay":
            if round == 0:
                return payload
            return Payload(payload.tensors, {**payload.metadata, "round": round - 1})
        tensors = dict(payload.tensors)
        first = next(name for name, value in tensors.items() if value.is_floating_point())
        if self.kind in ("nan", "inf"):
            tensors[first] = torch.full_like(tensors[first], float(self.kind))
        elif self.kind == "wrong-shape":
            tensors[first] = torch.cat([tensors[first], tensors[first][:1]])
        else:
            noise = torch.Generator().manual_seed(derive_seed("attack", self.seed, round, client))
            for name in [name for name in tensors if name in start]:
                tensors[name] = self._bent(tensors[name], start[name], noise)
        return replace(payload, tensors=tensors)

    def _bent(self, value: Tensor, start: Tensor, noise: torch.Generator) -> Tensor:
        """One tensor under sign-flip, scale or gaussian, in its own dtype."""
        c = _DEFAULT_SCALE[self.kind] if self.scale is None else self.scale
        start = start.to(value.dtype).double()  # as it crossed the wire
        moved = value.double() - start
        if self.kind == "gaussian":
            drawn = torch.randn(value.shape, generator=noise, dtype=torch.float64)
            moved = moved.square().mean().sqrt() * drawn if moved.numel() else moved
        return (start + (-c if self.kind == "sign-flip" else c) * moved).to(value.dtype)
