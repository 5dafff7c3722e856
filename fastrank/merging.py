"""`merge_adapters`: one LoRA that stands for a weighted sum of several, by truncated SVD.

What PEFT's `add_weighted_adapter(combination_type="svd")` computes, the best approximation of
Σ weight_i scaling_i B_i A_i of a given rank in every module, but from the thin factors: no module's
dense update is formed, modules of one shape are decomposed together, and the share of the sum that
the rank keeps is reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrank.errors import UsageError
from fastrank.kernels.svd import FactoredSum, TruncatedSVD, truncated_svd_many
from fastrank.kernels.svd.presets import PRESETS


class Pair(NamedTuple):
    """An adapter's factors in one module; delta = scaling B A in PEFT's terms."""

    B: Tensor
    A: Tensor
    scaling: float


@dataclass(frozen=True)
class MergedModule:
    """
    Args:
        name: path of the module.
        shape: (out, in) of its update.
        adapters: how many of the adapters have this module.
        energy: ‖merged‖² / ‖weighted sum‖², 1 where nothing was lost.
    """

    name: str
    shape: tuple[int, int]
    adapters: int
    energy: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge kept, module by module."""

    rank: int
    modules: tuple[MergedModule, ...]

    @property
    def energy(self) -> float:
        """The lowest of all modules."""
        return min((m.energy for m in self.modules), default=1.0)

    def print(self) -> None:
        """A line a module."""
        width = max((len(m.name) for m in self.modules), default=6)
        print(f"{'module':<{width}}  {'update':>12}  adapters  energy at rank {self.rank}")
        for m in self.modules:
            shape = f"{m.shape[0]}x{m.shape[1]}"
            print(f"{m.name:<{width}}  {shape:>12}  {m.adapters:>8}  {m.energy:.6f}")


def merge_adapters(
    adapters: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    *,
    model: nn.Module | None = None,
    name: str = "merged",
    out: str | Path | None = None,
    accuracy: str = "default",
    backend: str = "auto",
) -> MergeReport:
    """Merge LoRA adapters into one of rank `rank`, the best approximation of their weighted sum.

        >>> from peft import LoraConfig, get_peft_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(32, 16))
        >>> config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(net, config, adapter_name="en")
        >>> model.add_adapter("de", config)
        >>> report = fastrank.merge_adapters(["en", "de"], [0.7, 0.3], 8, model=model)
        >>> sorted(model.peft_config), round(report.energy, 4)  # two of rank 4 fit into rank 8
        (['de', 'en', 'merged'], 1.0)

    From folders to a folder: `fastrank.merge_adapters(["runs/a/adapter", "runs/b/adapter"],
    out="merged")`.

    With a model, the adapters are names in it and the result is a further adapter there, frozen and
    not active, as PEFT leaves it. Without one they are folders of saved adapters, and the result is
    such a folder; no base model is needed. Adapters may differ in rank and scaling; one that lacks
    a module adds nothing there. The merged adapter has lora_alpha = r and B = U S, A = Vh.

    Args:
        adapters: names, or folders with adapter_config.json; at least one.
        weights: one a adapter, any sign; None for equal ones that sum to 1.
        rank: of the result; None for the largest of the adapters'. Where a module's sum has a lower
            rank, or is smaller, the rest is zero.
        model: a `PeftModel` with LoRA adapters.
        name: of the new adapter in the model.
        out: the folder to write, where there is no model.
        accuracy: of `truncated_svd`, for sums of more ranks than a module has columns; the others
            are decomposed exactly.
        backend: "auto", "triton" or "reference".

    Returns:
        The energy kept in every module.

    Raises:
        UsageError: adapters that aren't there, are no plain LoRA, or can't be merged; a rank or a
            weight out of range; a name or folder that is taken. Nothing is changed then.
    """
    adapters = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    if not adapters:
        raise UsageError("merge_adapters got no adapter; name at least one")
    weights = _weights(weights, len(adapters))
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise UsageError(f"rank is {rank!r}; give an int of at least 1")
    if accuracy not in PRESETS:
        raise UsageError(f"accuracy is {accuracy!r}; choose one of {', '.join(PRESETS)}")
    options = {"accuracy": accuracy, "backend": backend}
    if model is not None:
        if out is not None:
            raise UsageError("give a model or out, not both; save_pretrained writes the adapter")
        return _merge_in_model(model, [str(a) for a in adapters], weights, rank, name, options)
    if out is None:
        raise UsageError("merge_adapters needs a model with the adapters, or out for a folder")
    return _merge_folders([Path(a) for a in adapters], weights, rank, Path(out), options)


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0 / count] * count
    weights = [float(w) for w in weights]
    if len(weights) != count:
        raise UsageError(f"{len(weights)} weights for {count} adapters; give one each")
    for i, w in enumerate(weights):
        if not torch.isfinite(torch.tensor(w)):
            raise UsageError(f"weight {i} is {w}; give a finite number")
    return weights


def _merged(
    modules: dict[str, list[tuple[float, Pair]]], rank: int, options: dict[str, str]
) -> tuple[dict[str, tuple[Tensor, Tensor]], MergeReport]:
    """(module -> (B `[N, rank]`, A `[rank, K]`), report) for weighted pairs."""
    sums = {
        path: FactoredSum.of(
            [(p.B.detach().flatten(1), p.A.detach().flatten(1)) for _, p in parts],
            [w * p.scaling for w, p in parts],
        )
        for path, parts in modules.items()
    }
    ranks = [min(rank, *s.shape[1:]) for s in sums.values()]
    found = truncated_svd_many(list(sums.values()), ranks, **options)
    for path, each in zip(sums, found, strict=True):
        if each.status.item():
            raise UsageError(f"{path}: the adapters' factors hold NaN or Inf; nothing was merged")
    factors = {path: _factors(each, rank) for path, each in zip(sums, found, strict=True)}
    rows = [
        MergedModule(path, sums[path].shape[1:], len(modules[path]), float(each.energy))
        for path, each in zip(sums, found, strict=True)
    ]
    return factors, MergeReport(rank, tuple(rows))


def _factors(found: TruncatedSVD, rank: int) -> tuple[Tensor, Tensor]:
    B, A = found.U[0] * found.S[0], found.Vh[0]
    more = rank - B.shape[1]
    # a module narrower than the rank: the rest adds nothing, and zero rows are its honest form
    return nn.functional.pad(B, (0, more)), nn.functional.pad(A, (0, 0, 0, more))


# in a model


def _merge_in_model(
    model: nn.Module,
    adapters: list[str],
    weights: list[float],
    rank: int | None,
    name: str,
    options: dict[str, str],
) -> MergeReport:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if not isinstance(model, PeftModel):
        raise UsageError(f"model is a {type(model).__name__}; pass a peft.PeftModel")
    configs = model.peft_config
    missing = [a for a in adapters if a not in configs]
    if missing:
        raise UsageError(f"the model has no adapter {missing[0]!r}; it has {', '.join(configs)}")
    if name in configs:
        raise UsageError(f"the model has an adapter {name!r} already; give another name")
    for adapter in adapters:
        _check_config(configs[adapter], adapter)
    _check_saved_modules(model, adapters)
    chosen = rank or max(_most_rank(configs[a]) for a in adapters)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    modules: dict[str, list[tuple[float, Pair]]] = {}
    for path, layer in layers.items():
        pairs = [(w, _pair(layer, a)) for a, w in zip(adapters, weights, strict=True)]
        parts = [(w, pair) for w, pair in pairs if pair is not None]
        if parts:
            modules[path] = parts
    if not modules:
        raise UsageError(f"no module of the model has LoRA factors of {', '.join(adapters)}")
    factors, report = _merged(modules, chosen, options)
    active = list(model.active_adapters)
    model.add_adapter(name, _merged_config(configs, adapters, chosen))
    try:
        for path, layer in layers.items():
            _write(layer, name, factors.get(path))
    except BaseException:
        model.delete_adapter(name)
        raise
    model.base_model.set_adapter(active)
    return report


def _pair(layer: Any, adapter: str) -> Pair | None:
    if adapter in layer.lora_A:
        return Pair(
            layer.lora_B[adapter].weight, layer.lora_A[adapter].weight, layer.scaling[adapter]
        )
    if adapter in layer.lora_embedding_A:
        factors = layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
        return Pair(*factors, layer.scaling[adapter])
    return None


@torch.no_grad()
def _write(layer: Any, name: str, factors: tuple[Tensor, Tensor] | None) -> None:
    """Set an adapter's factors; zero where the sum has no part in the module."""
    pair = _pair(layer, name)
    if pair is None:
        return
    for parameter, value in zip((pair.B, pair.A), factors or (None, None), strict=True):
        if value is None:
            parameter.zero_()
        else:
            parameter.copy_(value.view_as(parameter))
        parameter.requires_grad_(False)


def _check_config(config: Any, adapter: str | Path) -> None:
    from peft import LoraConfig

    # AdaLoRA's is a subclass with factors of another meaning
    if type(config) is not LoraConfig:
        raise UsageError(
            f"adapter {adapter} is {type(config).__name__}; merge_adapters takes LoRA (LoraConfig)"
        )
    for option, what in (
        ("use_dora", "DoRA, whose update is no product of two factors"),
        ("lora_bias", "lora_bias, which a sum of products has no place for"),
        ("target_parameters", "target_parameters"),
    ):
        if getattr(config, option, None):
            raise UsageError(f"adapter {adapter} uses {what}; it can't be merged")


def _check_saved_modules(model: nn.Module, adapters: list[str]) -> None:
    from peft.utils.other import ModulesToSaveWrapper

    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            own = [a for a in adapters if a in module.modules_to_save]
            if len(own) > 1:
                raise UsageError(
                    f"{path} is a module that {' and '.join(own)} each saved whole"
                    " (modules_to_save); whole modules can't be merged"
                )


def _most_rank(config: Any) -> int:
    return max([config.r, *(config.rank_pattern or {}).values()])


def _merged_config(configs: dict, adapters: Sequence[Any], rank: int) -> Any:
    first = configs[adapters[0]]
    targets = [configs[a].target_modules for a in adapters]
    if all(isinstance(t, str) for t in targets):
        union: Any = targets[0] if len(set(targets)) == 1 else "|".join(f"({t})" for t in targets)
    elif any(isinstance(t, str) for t in targets):
        raise UsageError(
            "some adapters name target_modules by a pattern, others by a list; load them with one"
            " form to merge them"
        )
    else:
        union = sorted(set().union(*targets))
    return dataclasses.replace(
        first,
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        init_lora_weights=True,
        target_modules=union,
        rank_pattern={},
        alpha_pattern={},
    )


# folders

# how factors B and A are named behind their module's path
_LINEAR = (".lora_B.weight", ".lora_A.weight")
_EMBEDDING = (".lora_embedding_B", ".lora_embedding_A")


def _merge_folders(
    folders: list[Path],
    weights: list[float],
    rank: int | None,
    out: Path,
    options: dict[str, str],
) -> MergeReport:
    from peft import PeftConfig
    from peft.utils import load_peft_weights
    from safetensors.torch import save_file

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"out {out} is there already; give a new folder")
    configs: dict[Path, Any] = {}
    modules: dict[str, list[tuple[float, Pair]]] = {}
    names: dict[str, tuple[str, str]] = {}
    rest: dict[str, Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        if not (folder / "adapter_config.json").is_file():
            raise UsageError(
                f"{folder} holds no adapter_config.json; give a saved adapter's folder"
            )
        if not (folder / "adapter_model.safetensors").is_file():
            raise UsageError(
                f"{folder} holds no adapter_model.safetensors; pickled weights (adapter_model.bin) "
                "are not read: save the adapter again as safetensors"
            )
        config = configs[folder] = PeftConfig.from_pretrained(str(folder))
        _check_config(config, folder)
        state = load_peft_weights(str(folder), device="cpu")
        for path, found in _names_in(state, folder).items():
            B, A = (state.pop(path + name) for name in found)
            modules.setdefault(path, []).append((weight, Pair(B, A, _scaling(config, path, A))))
            names[path] = found
        if twice := sorted(rest.keys() & state.keys()):
            raise UsageError(
                f"{twice[0]} is saved whole by more than one adapter (modules_to_save);"
                " whole modules can't be merged"
            )
        rest |= state
    if not modules:
        raise UsageError(f"no LoRA factors in {', '.join(map(str, folders))}")
    chosen = rank or max(_most_rank(c) for c in configs.values())
    factors, report = _merged(modules, chosen, options)
    config = _merged_config(configs, folders, chosen)
    tensors = dict(rest)
    for path, (B, A) in factors.items():
        like = modules[path][0][1]
        b, a = names[path]
        # a convolution's factors have its kernel's dimensions behind these two
        tensors[path + b] = B.reshape(len(B), chosen, *like.B.shape[2:]).to(like.B.dtype)
        tensors[path + a] = A.reshape(chosen, *like.A.shape[1:]).to(like.A.dtype)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(out))
    return report


def _names_in(state: dict[str, Tensor], folder: Path) -> dict[str, tuple[str, str]]:
    """Module path -> the names of its two factors."""
    found = {}
    for b, a in (_LINEAR, _EMBEDDING):
        for key in state:
            path = key.removesuffix(a)
            if path == key:
                continue
            if path + b not in state:
                raise UsageError(f"{folder}: there is {key} but no {path + b}")
            found[path] = (b, a)
    return found


def _scaling(config: Any, path: str, A: Tensor) -> float:
    from peft.utils.other import get_pattern_key

    alphas = config.alpha_pattern or {}
    module = path.removeprefix("base_model.model.")
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), config.lora_alpha)
    return alpha / (A.shape[0] ** 0.5 if config.use_rslora else A.shape[0])
