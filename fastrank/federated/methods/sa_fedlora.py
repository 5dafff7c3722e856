"""SA-FedLoRA: a few rounds of full fine-tuning, then LoRA whose rank anneals.

Our reading of Yang et al., "SA-FedLora: Adaptive Parameter Allocation for Efficient Federated
Learning with LoRA Tuning" (arXiv 2405.09394):

    initiating, t < T_i: all weights are trained and sent
        client: min_w loss_i(w) + lam / 2 ||w - w^t||^2;    server: w = sum p_i w_i
    at T_i: freeze W; LoRA of rank r(T_i), A seeded, B = 0; the head goes on
    annealing, t >= T_i:
        client: A, B (rank r(t)), head;                     server: means of A and of B
        if r(t+1) < r(t): the server reduces every adapter

    r(t) = round(rank_min + (rank_max - rank_min) g(u))
    u = clip((t - T_i - T_h) / (T - T_i - T_h - T_c), 0, 1)     # heat T_h, shrink, cool T_c rounds

Both sides know r(t) from t. "Annealing" is read as this budget: no Metropolis step, no score. s is
lora_alpha / rank_max for the whole run. Unknown, hence options: the penalty's form and weight, T_i,
g (``schedule``), the ranks, T_h, T_c, and how adapters are reduced (``shrink``).

Bytes: full rounds e |theta| each way; the first annealing round e |theta| down, since A and B
follow from the seed; then e (r(t) P + H) each way. A client that comes later is sent the frozen
weights in its first turn, and with shrink="merge" whatever it missed of merges, or the dense
weights where that is less.

Recorded of annealing rounds: the rank they had, ranks by module after them (none while initiating),
agg_noise as FedIT's, and the energy that a reduction kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastrank.errors import UsageError
from fastrank.federated.methods import _stages
from fastrank.federated.methods._factors import pair_names
from fastrank.federated.methods.base import WIRE_DTYPES, LocalPlan, ServerState, Update
from fastrank.federated.methods.fedavg import FedAvg
from fastrank.federated.methods.fedit import FedIT
from fastrank.federated.methods.fedprox import proximal
from fastrank.kernels.svd.operands import FactoredSum
from fastrank.kernels.svd.refactor import refactor

if TYPE_CHECKING:
    from fastrank.federated.model import ResidentModel
    from fastrank.federated.wire import Payload

_BASE = "base/"  # the frozen weights, by plain name, where they are not W0
_MERGED = "merged/"  # round and factor name: what a reduction by merging added to the base

# g(u), from 1 to 0; c is cooling_c
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cubic": lambda u, c: (1 - u) ** 3,
    "linear": lambda u, c: 1 - u,
    "cosine": lambda u, c: (1 + math.cos(math.pi * u)) / 2,
    "exp": lambda u, c: (math.exp(-c * u) - math.exp(-c)) / (1 - math.exp(-c)),
}


@dataclass(frozen=True)
class SAFedLoRA(FedAvg):
    """FedAvg with a proximal term, then FedIT at ranks that shrink.

    Attributes:
        initiating: share of the rounds that train all weights (T_i).
        reg: the initiating stage's penalty: "prox" (toward w^t), or "none".
        lam: its weight; 0: none.
        schedule: g: "cubic", "linear", "cosine" or "exp".
        cooling_c: how fast "exp" falls: g is exp(-c u), shifted and scaled to end at 0.
        rank_max: rank of the first annealing rounds.
        rank_min: rank of the last ones.
        heating: share of the annealing rounds at rank_max (T_h).
        cooling: share of the annealing rounds at rank_min (T_c).
        shrink: "svd" (best lower-rank approximation), "drop" (the last ranks go) or "merge" (s B A
            goes into W, and a new adapter starts).
        lora_alpha: LoRA numerator; the branch is scaled by lora_alpha / rank_max.
        lora_dropout: dropout on the branch's input while training.
        target_modules: "all-linear" (every linear of the repeated blocks) or module-name endings.
        stage2_learning_rate: client rate of A and B (learning_rate is that of all weights).
    """

    initiating: float = 0.06
    reg: str = "prox"
    lam: float = 0.01
    schedule: str = "cubic"
    cooling_c: float = 4.0
    rank_max: int = 16
    rank_min: int = 4
    heating: float = 0.10
    cooling: float = 0.20
    shrink: str = "svd"
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    stage2_learning_rate: float = FedIT.default_learning_rate

    name: ClassVar[str] = "sa-fedlora"
    sends_products: ClassVar[bool] = True
    public_server: ClassVar[tuple[str, ...]] = (_BASE,)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("reg", self.reg, ("prox", "none"))
        self.check("schedule", self.schedule, tuple(SCHEDULES))
        self.check("shrink", self.shrink, ("svd", "drop", "merge"))
        for option in ("initiating", "heating", "cooling"):
            _stages.check_fraction(self.name, option, getattr(self, option))
        if self.heating + self.cooling > 1:
            raise UsageError(
                f"{self.name}: heating + cooling must be at most 1, the annealing rounds; got "
                f"{self.heating} + {self.cooling}"
            )
        if not 1 <= self.rank_min <= self.rank_max:
            raise UsageError(
                f"{self.name}: ranks must have 1 <= rank_min <= rank_max; got rank_min "
                f"{self.rank_min}, rank_max {self.rank_max}"
            )
        if not 0 <= self.lam < math.inf:
            raise UsageError(f"{self.name}: lam must be at least 0 and finite, got {self.lam}")
        if not 0 < self.cooling_c < math.inf:
            raise UsageError(f"{self.name}: cooling_c must be above 0, got {self.cooling_c}")
        if not 0 < self.stage2_learning_rate < math.inf:
            raise UsageError(
                f"stage2_learning_rate must be above 0 and finite, got {self.stage2_learning_rate}"
            )
        _ = self.lora  # FedIT checks the options they share

    @property
    def lora(self) -> FedIT:
        """The annealing stage's rounds, but for the rank."""
        return FedIT(
            weighting=self.weighting,
            head=self.head,
            learning_rate=self.stage2_learning_rate,
            head_learning_rate=self.head_learning_rate,
            wire_dtype=self.wire_dtype,
            r=self.rank_max,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules,
            run=self.run,
            rule=self.rule,
        )

    @property
    def switch_round(self) -> int:
        """T_i, the first annealing round."""
        return _stages.rounds_of(self.initiating, self.run.num_rounds)

    def rank_at(self, round: int) -> int:
        """r(t) of an annealing round: a pure function of t."""
        annealing = self.run.num_rounds - self.switch_round
        heat, cool = (_stages.rounds_of(f, annealing) for f in (self.heating, self.cooling))
        t, interval = round - self.switch_round, annealing - heat - cool
        if t < heat:
            u = 0.0
        else:
            u = min(1.0, (t - heat) / interval) if interval > 0 else 1.0
        g = SCHEDULES[self.schedule](u, self.cooling_c)
        # halves go up, whatever the parity
        return math.floor(self.rank_min + (self.rank_max - self.rank_min) * g + 0.5)

    # -- stages -----------------------------------------------------------------------------------

    def init(self, model: ResidentModel, seed: int) -> ServerState:
        shapes = _stages.target_shapes(model, self.target_modules)
        if self.switch_round < self.run.num_rounds:
            _stages.check_rank(self.name, "rank_max", self.rank_max, shapes)
        extra = {
            "stage": 1 if self.switch_round else 2,
            "fresh": False,  # A and B are as the seed has them
            "merges": [],  # rounds that ended with one
            "adapted": [f"{name}.weight" for name in shapes],
            "turned": [f"{name}.weight" for name in _stages.transposed(model, shapes)],
        }
        if self.switch_round:
            return replace(super().init(model, seed), extra=extra)
        base = model.read(extra["adapted"]) if self.shrink == "merge" else {}
        server = {_BASE + name: value for name, value in base.items()}
        state = self.lora.init(model, seed)
        tensors = cut(state.tensors, self.rank_at(0))
        return replace(state, tensors=tensors, server=server, extra=extra)

    def switches(self, round: int) -> bool:
        return round == self.switch_round > 0

    def switch(
        self, model: ResidentModel, state: ServerState, round: int
    ) -> tuple[ServerState, dict[str, Any]]:
        """Freeze W, attach seeded adapters, keep the head."""
        dtype = WIRE_DTYPES[self.wire_dtype]
        # what everyone trains on from now on is what crossed the wire
        base = {
            _BASE + name: value.to(dtype).float()
            for name, value in state.tensors.items()
            if name not in state.head
        }
        lora = self.lora.init(model, self.run.seed)
        heads = _stages.wrapped_head(model, state.head)
        tensors = {name: value for name, value in lora.tensors.items() if name not in lora.head}
        tensors |= {heads[name]: state.tensors[name] for name in state.head}
        extra = {**state.extra, "stage": 2, "fresh": True}
        tensors = cut(tensors, self.rank_at(round))
        switched = ServerState(tensors, tuple(heads.values()), base, extra)
        return switched, {"stage": 2, "rank": rank_of(switched)}

    def arrange(self, model: ResidentModel, state: ServerState, round: int) -> None:
        self._shape(model, state)

    def show(self, model: ResidentModel, state: ServerState) -> None:
        self._shape(model, state)
        super().show(model, state)

    def finish(self, model: ResidentModel, state: ServerState) -> None:
        """A LoRA of the last rank over its base; the whole model if all rounds were initiating."""
        self.show(model, state)
        if state.extra["stage"] == 1:
            return
        if self.switch_round > 0:
            _stages.settle_head(model)
        model.base_changed |= bool(_base_of(state))
        rank, config = rank_of(state), model.model.peft_config["default"]
        config.r, config.lora_alpha = rank, self.lora.scale * rank

    def _shape(self, model: ResidentModel, state: ServerState) -> None:
        """The model in the state's stage, over the state's base."""
        if state.extra["stage"] == 1:
            return
        if model.report is None:
            self.lora.init(model, self.run.seed)
        base = _base_of(state)
        names = _stages.wrapped_base(model, base)
        model.load({names[name]: value for name, value in base.items()})

    # -- rounds -----------------------------------------------------------------------------------

    def shares_base(self, round: int) -> bool:
        return round >= self.switch_round

    def downlink(self, state: ServerState, client: int, round: int) -> Payload:
        if state.extra["stage"] == 1:
            return super().downlink(state, client, round)
        own = set(state.head) if state.extra["fresh"] else set(state.tensors)
        tensors = {name: value for name, value in state.tensors.items() if name in own}
        return self.pack({**tensors, **self._missed(state, client, round)}, round)

    def _missed(self, state: ServerState, client: int, round: int) -> dict[str, Tensor]:
        """What a client lacks of the base: frozen weights, or merged adapters."""
        dense = {n: v for n, v in state.server.items() if n.startswith(_BASE)}
        last = _stages.last_turn(client, round, self.run)
        if self.switch_round > 0 and (last is None or last < self.switch_round):
            return dense
        since = [m for m in state.extra["merges"] if last is None or m >= last]
        if not since:
            return {}
        starts = tuple(f"{_MERGED}{m}/" for m in since)
        factors = {n: v for n, v in state.server.items() if n.startswith(starts)}
        weights = {_BASE + name: state.server[_BASE + name] for name in state.extra["adapted"]}
        return factors if _size(factors) <= _size(weights) else weights

    def received(self, payload: Payload) -> Mapping[str, Tensor]:
        found = super().received(payload)
        return {n: v for n, v in found.items() if not n.startswith((_BASE, _MERGED))}

    def local(self, state: ServerState, client_state: Any, client: int, round: int) -> LocalPlan:
        if state.extra["stage"] == 1:
            plan = super().local(state, client_state, client, round)
            if self.reg == "none" or self.lam == 0:
                return plan
            wire = WIRE_DTYPES[self.wire_dtype]  # the client knows w^t as it came
            received = {name: state.tensors[name].to(wire) for name in plan.trainable}
            return replace(plan, penalty=proximal(received, self.lam))
        plan = self.lora.local(state, client_state, client, round)
        if not state.extra["fresh"]:
            return plan
        # A and B follow from the seed and are not sent
        return replace(plan, start={n: v for n, v in state.tensors.items() if n not in state.head})

    def reduction(self, round: int) -> str:
        first = round < self.switch_round
        return super().reduction(round) if first else self.lora.reduction(round)

    def aggregate(
        self, state: ServerState, updates: Iterable[Update], round: int
    ) -> tuple[ServerState, dict[str, Any]]:
        if state.extra["stage"] == 1:
            state, metrics = super().aggregate(state, updates, round)
            return state, {**metrics, "ranks": {}}
        state, metrics = self.lora.aggregate(state, updates, round)
        state = replace(state, extra={**state.extra, "fresh": False})
        metrics["rank"] = rank_of(state)
        last = round + 1 == self.run.num_rounds
        if not last and self.rank_at(round + 1) < metrics["rank"]:
            state, found = self.reduced(state, self.rank_at(round + 1), round)
            metrics |= found
        metrics["ranks"] = dict.fromkeys(pair_names(state.tensors), rank_of(state))
        return state, metrics

    def reduced(
        self, state: ServerState, rank: int, round: int
    ) -> tuple[ServerState, dict[str, Any]]:
        """Every adapter at a lower rank, and what is recorded of it."""
        pairs = pair_names(state.tensors)
        if self.shrink == "merge":
            return self._merged(state, rank, round), {"merged": len(pairs)}
        if self.shrink == "drop":
            return replace(state, tensors=cut(state.tensors, rank)), {}
        tensors = dict(state.tensors)
        updates = {m: FactoredSum.of([(tensors[B], tensors[A])]) for m, (B, A) in pairs.items()}
        # while B is 0 there is no direction to keep, and the seeded rows stay
        keep = {module: tensors[A][:rank] for module, (_, A) in pairs.items()}
        found = refactor(updates, rank, keep=keep, accuracy="tight")
        for module, (B, A) in pairs.items():
            tensors[B], tensors[A] = found[module].B.contiguous(), found[module].A.contiguous()
        energy = [float(each.energy) for each in found.values()]
        metrics = {"shrink_energy": sum(energy) / len(energy), "shrink_energy_min": min(energy)}
        return replace(state, tensors=tensors), metrics

    def _merged(self, state: ServerState, rank: int, round: int) -> ServerState:
        """s B A in the base, and new seeded adapters with B = 0."""
        wire = WIRE_DTYPES[self.wire_dtype]
        tensors, server = dict(state.tensors), dict(state.server)
        for index, (module, (B, A)) in enumerate(sorted(pair_names(state.tensors).items())):
            # clients form the new base from what crosses the wire
            b, a = (tensors[name].to(wire).float() for name in (B, A))
            server[f"{_MERGED}{round}/{B}"], server[f"{_MERGED}{round}/{A}"] = b, a
            plain = f"{_stages.unwrapped(module)}.weight"
            server[_BASE + plain] = self._with(server[_BASE + plain], b, a, plain, state.extra)
            tensors[A] = _stages.seeded_A((rank, a.shape[1]), self.run.seed, index, round + 1)
            tensors[B] = torch.zeros(b.shape[0], rank)
        merges = [*state.extra["merges"], round]
        extra = {**state.extra, "merges": merges, "fresh": True}
        return replace(state, tensors=tensors, server=server, extra=extra)

    def _with(
        self, weight: Tensor, B: Tensor, A: Tensor, plain: str, extra: Mapping[str, Any]
    ) -> Tensor:
        """A weight of the base with s B A in it, as it would cross the wire."""
        added = self.lora.scale * (B.float() @ A.float())
        new = weight + (added.t() if plain in extra["turned"] else added)
        return new.to(WIRE_DTYPES[self.wire_dtype]).float()

    def replay(
        self,
        known: Mapping[str, Tensor],
        received: Mapping[str, Tensor],
        since: int,
        extra: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """The base after the merges from round ``since`` on."""
        base = {n: v for n, v in known.items() if n.startswith(_BASE)}
        merged = {n: v for n, v in received.items() if n.startswith(_MERGED)}
        for m in sorted({int(name.split("/")[1]) for name in merged}):
            start = f"{_MERGED}{m}/"
            names = pair_names(n.removeprefix(start) for n in merged if n.startswith(start))
            for module, (B, A) in names.items() if m >= since else ():
                plain = f"{_stages.unwrapped(module)}.weight"
                if (weight := base.get(_BASE + plain)) is not None:
                    parts = merged[start + B], merged[start + A]
                    base[_BASE + plain] = self._with(weight, *parts, plain, extra)
        return base

    def scale_for(self, state: ServerState, client: int) -> float:
        return self.lora.scale

    def without_adapters(self, state: ServerState) -> dict[str, Tensor] | None:
        return None if state.extra["stage"] == 1 else self.lora.without_adapters(state)


def rank_of(state: ServerState) -> int:
    """The adapters' present rank."""
    return next(value.shape[0] for name, value in state.tensors.items() if ".lora_A." in name)


def cut(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The first ranks of every adapter."""
    kept = dict(tensors)
    for B, A in pair_names(tensors).values():
        kept[B], kept[A] = tensors[B][:, :rank].contiguous(), tensors[A][:rank].contiguous()
    return kept


def _base_of(state: ServerState) -> dict[str, Tensor]:
    """Frozen weights that are not W0, by plain name."""
    return {n.removeprefix(_BASE): v for n, v in state.server.items() if n.startswith(_BASE)}


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.numel() for value in tensors.values())
