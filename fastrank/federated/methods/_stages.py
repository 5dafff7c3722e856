"""Runs of several stages: how long each lasts, which clients missed what, names under PEFT.

Parameters are named after the plain model until PEFT wraps it; then an adapted module's weight is
its ``base_layer``'s and the task head is a copy below ``modules_to_save``. Every translation is
checked against the model: a name without a counterpart raises, nothing is skipped.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastrank.errors import UsageError
from fastrank.federated.cohort import derive_seed, sample_cohort
from fastrank.federated.methods.base import Run

if TYPE_CHECKING:
    from fastrank.federated.model import ResidentModel

_WRAPPED = "base_model.model."


# -- lengths and turns ----------------------------------------------------------------------------


def check_fraction(method: str, option: str, value: float) -> None:
    """Raise a UsageError unless the value is a share of the run."""
    if not 0 <= value <= 1:
        raise UsageError(f"{method}: {option} is a share of the rounds in [0, 1], got {value}")


def rounds_of(fraction: float, rounds: int) -> int:
    """Rounds of a stage: none for 0, else at least one."""
    return min(rounds, max(1, round(fraction * rounds))) if fraction > 0 else 0


def last_turn(client: int, round: int, run: Run) -> int | None:
    """The last round before this one in which the client was sampled; None if there is none."""
    return next((t for t in reversed(range(round)) if client in _cohort(run, t)), None)


@functools.lru_cache(maxsize=4096)
def _cohort(run: Run, round: int) -> frozenset[int]:
    return frozenset(sample_cohort(run.num_clients, run.clients_per_round, run.seed, round))


# -- the matrices a method works on ---------------------------------------------------------------


def target_shapes(
    model: ResidentModel, target_modules: str | Iterable[str]
) -> dict[str, tuple[int, int]]:
    """Linear layers that a plain model's ``target_modules`` selects, and their (N, K).

    Raises:
        UsageError: one of them belongs to the task head, which is trained whole.
    """
    ends = model.target_modules(target_modules)
    head = {name.rpartition(".")[0] for name in model.head_names()}
    found = {}
    for name, module in model.model.named_modules():
        if not any(name == end or name.endswith("." + end) for end in ends):
            continue
        if name in head:
            raise UsageError(
                f"target_modules selects {name}, a part of the task head, which is trained whole; "
                "name the other modules more exactly"
            )
        weight = module.weight
        turned = not isinstance(module, nn.Linear)  # transformers' Conv1D holds [K, N]
        found[name] = tuple(weight.shape[::-1] if turned else weight.shape)
    return found


def transposed(model: ResidentModel, modules: Iterable[str]) -> list[str]:
    """Those of the modules that hold their weight as [K, N]: transformers' Conv1D."""
    return [n for n in modules if not isinstance(model.model.get_submodule(n), nn.Linear)]


def check_rank(method: str, option: str, rank: int, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise a UsageError for a rank that some matrix can't be decomposed to."""
    for name, shape in shapes.items():
        if rank > min(shape):
            raise UsageError(
                f"{method}: {option} must be from 1 to {min(shape)}, the smaller side of {name} "
                f"{list(shape)}; got {rank}"
            )


def seeded_A(shape: tuple[int, int], *ids: int) -> Tensor:
    """A's first values `[R, K]`: kaiming_uniform(sqrt 5) drawn from the ids."""
    generator = torch.Generator().manual_seed(derive_seed("init", *ids))
    bound = (1.0 / shape[1]) ** 0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


# -- names under PEFT -----------------------------------------------------------------------------


def adapters_of(model: ResidentModel, modules: Iterable[str]) -> dict[str, str]:
    """Plain module name -> its name under PEFT, for exactly the modules that carry adapters.

    Raises:
        RuntimeError: a module without an adapter, or an adapter of no module: its first values
            would be lost in silence.
    """
    found = {name: _WRAPPED + name for name in modules}
    adapted = set(model.adapted_modules())
    if lost := sorted(set(found.values()) ^ adapted):
        raise RuntimeError(
            f"{len(found)} matrices were prepared and {len(adapted)} carry adapters; "
            f"{lost[0]} has no counterpart"
        )
    return found


def unwrapped(module: str) -> str:
    """A module's plain name, from the one under PEFT."""
    return module.removeprefix(_WRAPPED)


def factor_names(module: str) -> tuple[str, str]:
    """Parameters A and B of a module under PEFT."""
    return f"{module}.lora_A.default.weight", f"{module}.lora_B.default.weight"


def wrapped_base(model: ResidentModel, names: Iterable[str]) -> dict[str, str]:
    """Plain name of a frozen parameter -> its name in the wrapped model.

    Raises:
        RuntimeError: the model has no such parameter.
    """
    adapted = set(model.adapted_modules())
    known = {name for name, _ in model.model.named_parameters()}
    found = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        inner = f"{module}.base_layer" if _WRAPPED + module in adapted else module
        found[name] = f"{_WRAPPED}{inner}.{leaf}"
        if found[name] not in known:
            raise RuntimeError(f"{name} should be {found[name]} under PEFT, which isn't there")
    return found


def wrapped_head(model: ResidentModel, names: Iterable[str]) -> dict[str, str]:
    """Plain name of a head's parameter -> the trained copy's name in the wrapped model.

    Raises:
        RuntimeError: the two heads differ.
    """
    found = {}
    for name in names:
        module, _, rest = name.partition(".")
        found[name] = f"{_WRAPPED}{module}.modules_to_save.default.{rest}"
    if found and set(found.values()) != set(model.head_names()):
        raise RuntimeError(
            f"the plain head {sorted(found)} is not the wrapped one {sorted(model.head_names())}"
        )
    return found


@torch.no_grad()
def add_to(model: ResidentModel, name: str, update: Tensor) -> None:
    """Add to a frozen parameter of the wrapped model, rounded once to its dtype.

    Args:
        name: the parameter's.
        update: of the linear map's shape (N, K), also where the layer holds it transposed.
    """
    parameter = model.parameters([name])[name]
    if name.endswith(".base_layer.weight"):
        layer = model.model.get_submodule(name.removesuffix(".weight"))
        update = update if isinstance(layer, nn.Linear) else update.t()
    wide = torch.promote_types(parameter.dtype, torch.float32)
    parameter.copy_(parameter.to(wide) + update.to(parameter.device, wide))


def settle_head(model: ResidentModel) -> None:
    """Give the base under PEFT the trained head's values.

    The base keeps the head it had when it was wrapped; after a first stage that is whatever client
    came last, and after a resumption another one.
    """
    known = dict(model.model.named_parameters())
    for name in model.head_names():
        original = name.replace(".modules_to_save.default.", ".original_module.")
        known[original].data.copy_(known[name].data)
