"""SLoRA: sparse fine-tuning first, its update's truncated SVD as the start of LoRA.

Our reading of Babakniya et al., "SLoRA: Federated Parameter Efficient Fine-Tuning of Language
Models" (arXiv 2308.06522), also called Primed-LoRA:

    stage 1, t < R1: sparse fine-tuning          # sft.py: one seeded mask, packed delta, no indices
    switch, once, on the server:
        U, sigma, V = truncated_svd(scatter(delta_l), r)       # s = lora_alpha / r
        svd_split="B":         B = U diag(sigma) / s,         A = V^T
        svd_split="balanced":  B = U sqrt(sigma) / sqrt(s),   A = sqrt(sigma) V^T / sqrt(s)
        base = W0                                # or, keep_residual: W0 + delta - s B A
    stage 2, t >= R1: FedIT on A, B, head

It is no top-k sparsified LoRA and no padding of unequal ranks, which others call by this name. The
update at a random mask has a nearly flat spectrum, so rank r keeps little of it: expect accuracy to
drop at the switch. Kept energies and the accuracy just before and after are recorded.

Unknown, hence options: the mask's law, R1 (``stage1``), the split, which tensors the mask covers,
and what becomes of the rest of delta (``keep_residual``, our variant).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastrank.errors import UsageError
from fastrank.federated.methods import _sparse, _stages
from fastrank.federated.methods.base import (
    WIRE_DTYPES,
    LocalPlan,
    Method,
    ServerState,
    Update,
)
from fastrank.federated.methods.fedit import FedIT
from fastrank.federated.methods.sft import SFT
from fastrank.kernels.packing.mask import SparseMask
from fastrank.kernels.svd.operands import PackedSparse
from fastrank.kernels.svd.refactor import SPLITS, refactor

if TYPE_CHECKING:
    from fastrank.federated.model import ResidentModel
    from fastrank.federated.wire import Payload

_DELTA = "delta/"  # stage 1's packed result, in server state and payloads of keep_residual
_START = "start/"  # the factors at the switch, from which that base is formed


@dataclass(frozen=True)
class SLoRA(FedIT):
    """Sparse fine-tuning, then FedIT from its best rank-r approximation.

    Attributes:
        stage1: share of the rounds that stage 1 lasts (R1 = max(1, round(share * T))); 0: none.
        density: share of the entries of each tensor that trains in stage 1.
        mask: "stratified" (one entry in every round(1/density)) or "bernoulli" (independent draws).
        mask_targets: "adapted" masks the matrices of ``target_modules``, "all" every parameter
            outside the head.
        svd_split: where the singular values go: "B", or "balanced" for their roots in both factors.
        keep_residual: keep what rank r leaves of delta in stage 2's base.
        stage2_learning_rate: client rate of A and B (learning_rate is that of stage 1's values).
    """

    stage1: float = 0.1
    density: float = 0.01
    mask: str = "stratified"
    mask_targets: str = "adapted"
    svd_split: str = "B"
    keep_residual: bool = False
    stage2_learning_rate: float = FedIT.default_learning_rate

    name: ClassVar[str] = "slora"
    default_learning_rate: ClassVar[float] = SFT.default_learning_rate
    public_server: ClassVar[tuple[str, ...]] = (_DELTA, _START)

    def __post_init__(self) -> None:
        super().__post_init__()
        _sparse.check_mask(self.name, self.density, self.mask, self.mask_targets)
        _stages.check_fraction(self.name, "stage1", self.stage1)
        self.check("svd_split", self.svd_split, SPLITS)
        if not 0 < self.stage2_learning_rate < float("inf"):
            raise UsageError(
                f"stage2_learning_rate must be above 0 and finite, got {self.stage2_learning_rate}"
            )

    @property
    def switch_round(self) -> int:
        """R1, the first round of stage 2."""
        return _stages.rounds_of(self.stage1, self.run.num_rounds)

    # -- stages -----------------------------------------------------------------------------------

    def init(self, model: ResidentModel, seed: int) -> ServerState:
        if self.switch_round == 0:
            return replace(super().init(model, seed), extra={"stage": 2})
        shapes = _stages.target_shapes(model, self.target_modules)
        if self.switch_round < self.run.num_rounds:
            _stages.check_rank(self.name, "r", self.r, shapes)
        masks = _sparse.begin(
            model,
            seed,
            target_modules=self.target_modules,
            density=self.density,
            mask=self.mask,
            mask_targets=self.mask_targets,
        )
        head = model.head_names() if self.head == "train" else []
        return ServerState(model.read([*masks, *head]), tuple(head), extra={"stage": 1})

    def switches(self, round: int) -> bool:
        return round == self.switch_round > 0

    def switch(
        self, model: ResidentModel, state: ServerState, round: int
    ) -> tuple[ServerState, dict[str, Any]]:
        """Stage 1's delta as A and B: one truncated SVD a matrix, in the run."""
        dtype = WIRE_DTYPES[self.wire_dtype]
        # with keep_residual clients form the base themselves, from what crosses the wire
        delta = {
            name: state.tensors[name].to(dtype).float() if self.keep_residual else value
            for name, value in state.tensors.items()
            if name not in state.head
        }
        masks = self._enter_stage2(model)
        tensors, energy = self._factors_of(model, delta, masks)
        server = {}
        if self.keep_residual:
            server = {_DELTA + name: value for name, value in delta.items()}
            server |= {_START + name: value for name, value in tensors.items()}
        heads = _stages.wrapped_head(model, state.head)
        tensors |= {heads[name]: state.tensors[name] for name in state.head}
        switched = ServerState(tensors, tuple(heads.values()), server, {"stage": 2})
        self._put_residual(model, switched, masks)
        return switched, {
            "stage": 2,
            "switch_matrices": len(energy),
            "switch_energy": sum(energy.values()) / len(energy),
            "switch_energy_by_module": energy,
        }

    def _factors_of(
        self, model: ResidentModel, delta: Mapping[str, Tensor], masks: Mapping[str, SparseMask]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """A and B of every matrix by parameter name, and the share of delta's energy they keep."""
        modules = _stages.adapters_of(
            model, [n.removesuffix(".values") for n in delta if ".parametrizations." not in n]
        )
        names = {plain: _stages.factor_names(wrapped) for plain, wrapped in modules.items()}
        first = model.read(A for A, _ in names.values())
        updates = {}
        for plain in modules:
            values = delta[f"{plain}.values"].to(model.device)
            updates[plain] = PackedSparse([values], [masks[f"{plain}.values"]])
        found = refactor(
            updates,
            self.r,
            scaling=self.scale,
            split=self.svd_split,
            keep={plain: first[A].to(model.device) for plain, (A, _) in names.items()},
            accuracy="tight",
        )
        tensors: dict[str, Tensor] = {}
        for plain, (A, B) in names.items():
            tensors[A], tensors[B] = found[plain].A.float().cpu(), found[plain].B.float().cpu()
        return tensors, {plain: float(each.energy) for plain, each in found.items()}

    def arrange(self, model: ResidentModel, state: ServerState, round: int) -> None:
        self._shape(model, state)

    def show(self, model: ResidentModel, state: ServerState) -> None:
        self._shape(model, state)
        super().show(model, state)

    def finish(self, model: ResidentModel, state: ServerState) -> None:
        """A LoRA over W0 (over a base of its own with keep_residual), or W0 + delta in stage 1."""
        self.show(model, state)
        if state.extra["stage"] == 1:
            _sparse.end(model, fold=True)
        elif self.switch_round > 0:
            _stages.settle_head(model)
            model.base_changed |= bool(state.server)

    def _shape(self, model: ResidentModel, state: ServerState) -> None:
        """The model in the state's stage; nothing if it is there."""
        if state.extra["stage"] == 2 and model.report is None:
            masks = self._enter_stage2(model)
            self._put_residual(model, state, masks)

    def _enter_stage2(self, model: ResidentModel) -> dict[str, SparseMask]:
        """Plain pristine layers again, and adapters on them; the masks that were."""
        masks = _sparse.masks_of(model)
        _sparse.end(model, fold=False)
        super().init(model, self.run.seed)
        return masks

    @torch.no_grad()
    def _put_residual(
        self, model: ResidentModel, state: ServerState, masks: Mapping[str, SparseMask]
    ) -> None:
        """W0 + delta - s B A in the base, B and A as of the switch; the base must be W0."""
        if not state.server:
            return
        owners = {_sparse.parameter_of(name): name for name in masks}
        for plain, wrapped in _stages.wrapped_base(model, owners).items():
            update = _sparse.spread(state.server[_DELTA + owners[plain]], masks[owners[plain]])
            module = wrapped.removesuffix(".base_layer.weight")
            if module != wrapped:
                A, B = (state.server[_START + name] for name in _stages.factor_names(module))
                update -= self.scale * (B @ A)
            _stages.add_to(model, wrapped, update)

    # -- rounds -----------------------------------------------------------------------------------

    def shares_base(self, round: int) -> bool:
        return round >= self.switch_round

    def downlink(self, state: ServerState, client: int, round: int) -> Payload:
        payload = super().downlink(state, client, round)
        last = _stages.last_turn(client, round, self.run)
        if not state.server or (last is not None and last >= self.switch_round):
            return payload
        # a client's first turn in stage 2: delta, from which it forms the base as the server did
        delta = {n: value for n, value in state.server.items() if n.startswith(_DELTA)}
        return replace(payload, tensors={**payload.tensors, **self.pack(delta, round).tensors})

    def received(self, payload: Payload) -> Mapping[str, Tensor]:
        found = super().received(payload)
        return {name: value for name, value in found.items() if not name.startswith(_DELTA)}

    def local(self, state: ServerState, client_state: Any, client: int, round: int) -> LocalPlan:
        plan = super().local(state, client_state, client, round)
        if state.extra["stage"] == 1:
            return plan
        factors = {n: self.stage2_learning_rate for n in state.tensors if n not in state.head}
        return replace(plan, learning_rates={**plan.learning_rates, **factors})

    def reduction(self, round: int) -> str:
        first = round < self.switch_round
        return Method.reduction(self, round) if first else super().reduction(round)

    def aggregate(
        self, state: ServerState, updates: Iterable[Update], round: int
    ) -> tuple[ServerState, dict[str, Any]]:
        if state.extra["stage"] == 1:  # packed values: a plain mean
            return Method.aggregate(self, state, updates, round)
        return super().aggregate(state, updates, round)

    def without_adapters(self, state: ServerState) -> dict[str, Tensor]:
        if state.extra["stage"] == 1:
            return _sparse.without_values(state)
        return super().without_adapters(state)
