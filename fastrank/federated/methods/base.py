"""What a federated method is: a frozen dataclass of options with a handful of pure functions.

A method never sees an executor, and an executor never knows a method's name. Rounds are counted
from 0 here, as t in the papers; ``rounds.csv`` counts from 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from fastrank.errors import UsageError
from fastrank.federated.averaging import weighted_mean
from fastrank.federated.ranks import RankMask
from fastrank.federated.wire import Payload, from_bytes

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
    ``penalty`` maps the live parameters to a number, a 0-dimensional tensor, that is added to every
    step's loss. It neither changes nor keeps them: with clients side by side they are views of this
    client's part in what all train. ``ranks`` are the adapters' ranks that learn (a bool mask for
    all modules, or one each): the others take part, without dropout, and keep every bit.
    ``scores`` asks how much each rank matters (one of `ranks.SCORES`); the answer is in the result.
    ``notes`` is what `local` tells `uplink`, on the same client. ``max_steps`` cuts the client's
    optimizer steps (a straggler that reports by the deadline); no method sets it.
    """

    trainable: tuple[str, ...]
    learning_rates: Mapping[str, float]
    start: Mapping[str, Tensor] = field(default_factory=dict)
    scale: float | None = None
    penalty: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    ranks: RankMask | None = None
    scores: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    max_steps: int | None = None


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


class Rule:
    """What the server does with a round's updates beside averaging them (robust.py, privacy.py).

    A rule sees all updates of a round at once: ``Method.reduction`` is "gather" under one.
    """

    is_mean: ClassVar[bool] = True  # is `combine` the weighted mean of what `select` lets through?

    def select(
        self, method: Method, state: ServerState, updates: list[Update], round: int
    ) -> tuple[list[Update], dict[str, Any]]:
        """The updates that may take part (at least one), and what is recorded of the choice."""
        return updates, {}

    def combine(
        self, method: Method, state: ServerState, updates: list[Update], round: int
    ) -> dict[str, Tensor]:
        """One value for each tensor that the clients sent."""
        return weighted_mean(updates, method.weighting)


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
        rule: how the server combines updates, if not by their mean; set by the simulation.
    """

    weighting: str = "samples"
    head: str = "train"
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    wire_dtype: str = "float32"
    run: Run | None = field(default=None, repr=False, kw_only=True, metadata={"hidden": True})
    rule: Rule | None = field(default=None, repr=False, kw_only=True, metadata={"hidden": True})

    name: ClassVar[str] = ""
    weightings: ClassVar[tuple[str, ...]] = ("samples", "uniform")
    default_learning_rate: ClassVar[float] = 1e-3
    default_head_learning_rate: ClassVar[float] = 3e-3
    # rules that make sense for what the server does with updates; whether products B A may be
    # compared (an update holds both factors); whether the result is the clients' mean and nothing
    # else that depends on single clients, so that noise on it makes it private
    aggregations: ClassVar[tuple[str, ...]] = (
        "mean", "median", "trimmed-mean", "krum", "multi-krum",
    )  # fmt: skip
    sends_products: ClassVar[bool] = False
    private_mean: ClassVar[bool] = True
    # beginnings of names in `state.server` that clients build their model from, and may be told
    public_server: ClassVar[tuple[str, ...]] = ()

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
        """The state in its new form and what is recorded of the change (most have one form).

        Called once, before ``arrange``, in the rounds that ``switches`` names; the model is judged
        on both sides of it.
        """
        return state, {}

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
        """ "sum" if a weighted sum of the updates is all that aggregation needs, else "gather".

        With "sum", `aggregate` may do nothing with its updates but give them to `weighted_mean`,
        with the method's ``weighting``; clients then all send tensors of the same shapes.
        """
        return "sum" if self.rule is None else "gather"

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

    def accept(self, data: bytes, state: ServerState, client: int, round: int) -> Payload:
        """What the server reads off the wire; methods whose clients choose what they send differ.

        Raises:
            WireError: anything else than this client may send.
        """
        return from_bytes(data, expect=self.uplink_spec(state, client, round))

    def aggregate(
        self, state: ServerState, updates: Iterable[Update], round: int
    ) -> tuple[ServerState, dict[str, Any]]:
        """New global tensors from the round's valid updates (at least one), read lazily.

        Also what the method wants recorded of the round, plain JSON values: metrics.jsonl.
        """
        mean = self.combine(state, updates, round)
        return replace(state, tensors={**state.tensors, **mean}), {}

    def combine(
        self, state: ServerState, updates: Iterable[Update], round: int
    ) -> dict[str, Tensor]:
        """One value for each tensor that clients sent: their weighted mean, or ``rule``'s."""
        if self.rule is None:
            return weighted_mean(updates, self.weighting)
        return self.rule.combine(self, state, list(updates), round)

    @property
    def measurable(self) -> bool:
        """Whether `origin` fits every update: not where clients choose what they send."""
        return True

    def origin(self, state: ServerState, client: int, round: int) -> Mapping[str, Tensor]:
        """Where the client's parameters began, by name and in the shapes of its update.

        What an update changed is measured from here: norm clipping, hostile clients, privacy. Names
        that are no parameters (votes) are not in it.
        """
        return state.tensors

    def whole(self, state: ServerState, update: Update, round: int) -> Mapping[str, Tensor]:
        """The client's whole model of what it sent, where it sent only a part that it chose."""
        return update.payload.tensors

    def scale_for(self, state: ServerState, client: int) -> float:
        """What the client's B A is multiplied by, where it has such."""
        return 1.0

    def without_adapters(self, state: ServerState) -> dict[str, Tensor] | None:
        """Global tensors with the adapters' contribution removed; None if there are no adapters."""
        return None

    def personal(
        self, state: ServerState, client_states: Mapping[int, Mapping[str, Tensor]]
    ) -> Sequence[dict[str, Tensor]]:
        """Values of each client's own model, for methods that have no global one.

        Each test example is then judged by one of them, and their mean is what is saved.
        """
        return []

    def trainable_params(self, state: ServerState) -> int:
        """Values that a client trains; the clients' mean where their ranks differ."""
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

    # -- clients in other processes --------------------------------------------------------------
    # `arrange` and `local` are handed the server's state. Where that is elsewhere (flower), it is
    # put together from the first values, the payloads, and what these say of it

    def public_extra(self, extra: Mapping[str, Any], clients: Sequence[int]) -> dict[str, Any]:
        """What these clients have to know of ``state.extra``; all of it by default."""
        return dict(extra)

    def replay(
        self,
        known: Mapping[str, Tensor],
        received: Mapping[str, Tensor],
        since: int,
        extra: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """``public_server`` tensors that follow from older ones and from downlinks.

        A value that is not given here, or is not the server's, has to be asked for: bytes, no harm.

        Args:
            known: the server's tensors as they were before round ``since``.
            received: all tensors that the present downlinks hold, of clients that have missed
                different rounds, perhaps some before ``since``.
            extra: the server's present ``public_extra``.
        """
        return {}

    def pack(self, tensors: Mapping[str, Tensor], round: int) -> Payload:
        dtype = WIRE_DTYPES[self.wire_dtype]
        return Payload(
            tensors={name: value.to(dtype) for name, value in tensors.items()},
            metadata={"method": self.name, "round": round},
        )


def mean_of(views: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Plain mean of several models' values, one after another: a running sum in float64."""
    total: dict[str, Tensor] = {}
    for view in views:
        for name, value in view.items():
            if name in total:
                total[name].add_(value)
            else:
                total[name] = value.to(torch.float64, copy=True)
    return {name: value.div_(len(views)).float() for name, value in total.items()}


class PersonalModels(Sequence):
    """Clients' own models, in the order of the clients, each made when it is asked for.

    Args:
        client_states: what each client keeps; may lie on disk.
        shared: values that all have in common.
    """

    def __init__(
        self, client_states: Mapping[int, Mapping[str, Tensor]], shared: Mapping[str, Tensor]
    ) -> None:
        self._states, self._shared = client_states, shared
        self._clients = sorted(client_states)

    def __len__(self) -> int:
        return len(self._clients)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {**self._states[self._clients[place]], **self._shared}
