"""What a federated method is: a frozen dataclass of options with a handful of pure functions.

A method never sees an executor, and an executor never knows a method's name. Rounds are counted
from 0 here, as t in the papers; ``rounds.csv`` counts from 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from fastrank.errors import UsageError
from fastrank.federated.ranks import RankMask
from fastrank.federated.wire import Payload

if TYPE_CHECKING:
    from fastrank.federated.model import ResidentModel

WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Run(NamedTuple):
    """What a method may know of the run it is part of."""

    num_rounds: int
    num_clients: int
    clients_per_round: int
    seed: int


@dataclass(frozen=True)
class ServerState:
    """What the server keeps between rounds; all of it is saved in every checkpoint.

    Attributes:
        tensors: global values, fp32 on the CPU, by parameter name.
        head: the names among them that belong to the task head (the ledger counts its share apart).
        server: tensors that never leave the server (momenta, masks), by names of the method's own.
        extra: plain JSON facts a method needs to go on (a stage, a budget).
    """

    tensors: dict[str, Tensor]
    head: tuple[str, ...] = ()
    server: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LocalPlan:
    """What a client trains, from where, and how fast.

    ``trainable`` names parameters; those outside it are frozen. ``start`` overrides received values
    (what a client keeps for itself). ``learning_rates`` maps a parameter name to its rate.
    ``scale`` is what this client's adapter branches are multiplied by; None leaves the model's own.
    ``penalty`` maps the live parameters to a number that is added to every step's loss; clients
    that have one train one after another. ``ranks`` are the adapters' ranks that learn (a bool mask
    for all modules, or one each): the others take part, without dropout, and keep every bit.
    ``scores`` asks how much each rank matters (one of `ranks.SCORES`); the answer is in the result.
    ``notes`` is what `local` tells `uplink`, on the same client.
    """

    trainable: tuple[str, ...]
    learning_rates: Mapping[str, float]
    start: Mapping[str, Tensor] = field(default_factory=dict)
    scale: float | None = None
    penalty: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    ranks: RankMask | None = None
    scores: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LocalResult:
    """What local training left behind: trained values (CPU) and plain measurements.

    ``scores``: factor name -> a score for each of its ranks, where the plan asked for them.
    ``notes`` are the plan's.
    """

    client: int
    round: int
    tensors: dict[str, Tensor]
    num_examples: int
    num_steps: int
    train_loss: float
    scores: dict[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """A client's contribution as the server received and validated it."""

    client: int
    payload: Payload
    num_examples: int
    num_steps: int
    train_loss: float


@dataclass(frozen=True)
class Method(ABC):
    """Options every method has; see the subclass for its own.

    Attributes:
        weighting: server weights: "samples" (n_i / sum n_j) or "uniform".
        head: "train" trains, sends and averages the task head; "freeze" leaves it as initialised.
        learning_rate: client rate; by default what suits the method.
        head_learning_rate: client rate of the task head; by default what suits the method.
        wire_dtype: dtype of values on the wire: "float32", "bfloat16" or "float16".
        run: the run it is part of, set by the simulation; no option.
    """

    weighting: str = "samples"
    head: str = "train"
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    wire_dtype: str = "float32"
    run: Run | None = field(default=None, repr=False, kw_only=True, metadata={"hidden": True})

    name: ClassVar[str] = ""
    weightings: ClassVar[tuple[str, ...]] = ("samples", "uniform")
    default_learning_rate: ClassVar[float] = 1e-3
    default_head_learning_rate: ClassVar[float] = 3e-3

    def __post_init__(self) -> None:
        self.check("weighting", self.weighting, self.weightings)
        self.check("head", self.head, ("train", "freeze"))
        self.check("wire_dtype", self.wire_dtype, tuple(WIRE_DTYPES))
        for rate in ("learning_rate", "head_learning_rate"):
            if getattr(self, rate) is None:
                object.__setattr__(self, rate, getattr(type(self), f"default_{rate}"))
            elif not 0 < getattr(self, rate) < float("inf"):
                raise UsageError(f"{rate} must be above 0 and finite, got {getattr(self, rate)}")

    def check(self, option: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            wanted = ", ".join(allowed)
            raise UsageError(f"{self.name}: {option} must be one of {wanted}; got {value!r}")

    def in_run(self, run: Run) -> Self:
        """This method as part of a run; called before `init`.

        Raises:
            UsageError: options that don't fit the run, such as a stage longer than it.
        """
        placed = replace(self, run=run)
        placed.check_run()
        return placed

    def check_run(self) -> None:  # noqa: B027  a hook, empty unless options depend on the run
        """Raise a UsageError where options don't fit ``self.run``."""

    # -- the server's side ---------------------------------------------------------------------

    @abstractmethod
    def init(self, model: ResidentModel, seed: int) -> ServerState:
        """Give the resident model its trainable parts and return their first values."""

    def arrange(  # noqa: B027  a hook, empty unless a method changes shape between rounds
        self, model: ResidentModel, state: ServerState, round: int
    ) -> None:
        """Bring the resident model into the shape this round needs (nothing, for most methods)."""

    def switches(self, round: int) -> bool:
        """Does the server change the form of its state before this round (`switch`)?"""
        return False

    def switch(
        self, model: ResidentModel, state: ServerState, round: int
    ) -> tuple[ServerState, dict[str, Any]]:
        """The state in its new form and what is recorded of the change, before ``arrange``.

        Called once, in the rounds that ``switches`` names; the model is judged on both sides of it.
        """
        raise NotImplementedError(f"{self.name} names rounds in switches() but has no switch()")

    def show(self, model: ResidentModel, state: ServerState) -> None:
        """Bring the global model into the resident one, to be evaluated or exported."""
        model.load(state.tensors)

    def finish(self, model: ResidentModel, state: ServerState) -> None:
        """Bring the result into a form that PEFT or transformers loads; the run is over."""
        self.show(model, state)

    def shares_base(self, round: int) -> bool:
        """May the clients of this round go through one frozen base?"""
        return True

    def reduction(self, round: int) -> str:
        """ "sum" if a weighted sum of the updates is all that aggregation needs, else "gather"."""
        return "sum"

    def downlink(self, state: ServerState, client: int, round: int) -> Payload:
        """What the server sends. Methods that send everyone the same share one payload."""
        return self.pack(state.tensors, round)

    def received(self, payload: Payload) -> Mapping[str, Tensor]:
        """Parameter values that a client reads from a downlink, which may hold more."""
        return payload.tensors

    def uplink_spec(
        self, state: ServerState, client: int, round: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names, shapes and dtypes the server accepts from this client."""
        dtype = WIRE_DTYPES[self.wire_dtype]
        return {name: (tuple(value.shape), dtype) for name, value in state.tensors.items()}

    def aggregate(
        self, state: ServerState, updates: Iterable[Update], round: int
    ) -> tuple[ServerState, dict[str, Any]]:
        """New global tensors from the round's valid updates (at least one), read lazily.

        Also what the method wants recorded of the round, plain JSON values: metrics.jsonl.
        """
        mean = weighted_mean(updates, self.weighting)
        return replace(state, tensors={**state.tensors, **mean}), {}

    def without_adapters(self, state: ServerState) -> dict[str, Tensor] | None:
        """Global tensors with the adapters' contribution removed; None if there are no adapters."""
        return None

    def personal(
        self, state: ServerState, client_states: Mapping[int, Mapping[str, Tensor]]
    ) -> list[dict[str, Tensor]]:
        """Values of each client's own model, for methods that have no global one.

        Each test example is then judged by one of them, and their mean is what is saved.
        """
        return []

    def trainable_params(self, state: ServerState) -> int:
        """Values that a client trains."""
        return sum(value.numel() for value in state.tensors.values())

    # -- the client's side ---------------------------------------------------------------------

    def local(self, state: ServerState, client_state: Any, client: int, round: int) -> LocalPlan:
        """What the client trains after it has loaded the downlink."""
        rates = dict.fromkeys(state.tensors, self.learning_rate)
        rates.update(dict.fromkeys(state.head, self.head_learning_rate))
        return LocalPlan(trainable=tuple(state.tensors), learning_rates=rates)

    def uplink(self, result: LocalResult) -> tuple[Payload, Any]:
        """What the client sends, and what it keeps for its next turn (None: nothing)."""
        return self.pack(result.tensors, result.round), None

    def pack(self, tensors: Mapping[str, Tensor], round: int) -> Payload:
        dtype = WIRE_DTYPES[self.wire_dtype]
        return Payload(
            tensors={name: value.to(dtype) for name, value in tensors.items()},
            metadata={"method": self.name, "round": round},
        )


def mean_of(views: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Plain mean of several models' values."""
    return {name: torch.stack([view[name] for view in views]).mean(0) for name in views[0]}


def weighted_mean(updates: Iterable[Update], weighting: str) -> dict[str, Tensor]:
    """Weighted mean of the payloads' tensors: a running sum in float64, rounded once to fp32.

    Only one update is held at a time. The order is the order of arrival, which executors keep equal
    to the cohort's; float64 makes the result independent of it for all practical cohort sizes.
    """
    total: dict[str, Tensor] = {}
    weight = 0.0
    for update in updates:
        w = float(update.num_examples) if weighting == "samples" else 1.0
        weight += w
        for name, value in update.payload.tensors.items():
            if name in total:
                total[name].add_(value.double(), alpha=w)
            else:
                total[name] = value.double().mul_(w)
    return {name: value.div_(weight).float() for name, value in total.items()}
