"""`fastrank bench svd`, the merge: ten LoRA adapters of a model into one, against PEFT's own.

PEFT's `add_weighted_adapter(combination_type="svd")` forms every module's dense update and takes
its whole SVD. Both variants add the merged adapter to the same model, and take it away again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrank.bench import harness
from fastrank.bench.cases import Unavailable
from fastrank.bench.memory import measure
from fastrank.bench.variants import has_peft

# a merged update whose energy is below this share of the best computes something else
WORST = 0.99
# modules whose best approximation is computed to judge by
JUDGED = 2


@dataclass(frozen=True)
class MergeCase:
    """LoRA adapters on the query and value projections of an encoder.

    Args:
        layers, hidden: of the encoder.
        adapters: how many.
        R: of each, and of the merged one.
    """

    model: str
    layers: int
    hidden: int
    adapters: int
    R: int

    @property
    def name(self) -> str:
        return f"merge-{self.model}-{self.adapters}"

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, **vars(self), "kind": "merge", "dtype": "float32"}


def cases(device: torch.device, quick: bool) -> list[MergeCase]:
    if quick:
        return [MergeCase("tiny", 1, 64, 3, 2)]
    return [MergeCase("bert-base", 12, 768, 10, 8)]


def build(case: MergeCase, device: torch.device) -> nn.Module:
    """A random encoder with that many trained-looking adapters: B isn't zero."""
    if not has_peft():
        raise Unavailable("peft is not installed")
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128,
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=max(1, case.hidden // 64),
        intermediate_size=4 * case.hidden,
        max_position_embeddings=64,
    )
    lora = LoraConfig(r=case.R, lora_alpha=2 * case.R, target_modules=["query", "value"])
    model = get_peft_model(BertModel(config), lora, adapter_name="adapter0")
    for i in range(1, case.adapters):
        model.add_adapter(f"adapter{i}", lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model.to(device)


class MergeCell(harness.Cell):
    """PEFT's merge and ours in one model. `error` is 1 minus the merged update's share of the best
    energy, in the worst of the modules judged."""

    case: MergeCase

    def prepare(self) -> None:
        case = self.case
        self.found = {name: harness.Measured() for name in self.builders}
        try:
            model = build(case, self.device)
        except Unavailable as reason:
            for entry in self.found.values():
                entry.skipped = str(reason)
            return
        self.best = _best(model, case)
        for name, builder in self.builders.items():
            self.steps[name] = step = _undone(model, builder(case, model))
            self._guarded(name, lambda name=name, step=step: self._judge(name, step, model))
            if self.found[name].skipped is not None:
                del self.steps[name]

    def _judge(self, name: str, step: Callable[[bool], None], model: nn.Module) -> None:
        entry = self.found[name]
        entry.memory = measure(step, model.parameters(), self.device)
        step(keep=True)
        deltas = [layer.get_delta_weight("merged").double() for layer in _layers(model)[:JUDGED]]
        model.delete_adapter("merged")
        share = torch.stack([delta.square().sum() for delta in deltas]).cpu() / self.best.cpu()
        if not (float(share.min()) > WORST and float(share.max()) < 1 + 1e-4):
            raise harness.WrongResult(f"share of the best energy {float(share.min()):.4f}")
        entry.error = max(0.0, 1 - float(share.min()))


def fastrank(case: MergeCase, model: nn.Module) -> Callable[[], object]:
    from fastrank.merging import merge_adapters

    names, weights = _named(case)
    return lambda: merge_adapters(names, weights, case.R, model=model, name="merged")


def peft(case: MergeCase, model: nn.Module) -> Callable[[], object]:
    names, weights = _named(case)
    return lambda: model.add_weighted_adapter(
        names, weights, "merged", combination_type="svd", svd_rank=case.R
    )


BUILDERS: Mapping[str, Callable] = {"fastrank": fastrank, "peft-merge": peft}


def _named(case: MergeCase) -> tuple[list[str], list[float]]:
    count = case.adapters
    return [f"adapter{i}" for i in range(count)], [1.0 / count] * count


def _undone(model: nn.Module, merge: Callable[[], object]) -> Callable[..., None]:
    def step(keep: bool = False) -> None:
        merge()
        if not keep:
            model.delete_adapter("merged")

    return step


def _layers(model: nn.Module) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _best(model: nn.Module, case: MergeCase) -> Tensor:
    names, weights = _named(case)
    energies = []
    for layer in _layers(model)[:JUDGED]:
        deltas = zip(weights, names, strict=True)
        dense = sum(w * layer.get_delta_weight(n).detach().double() for w, n in deltas)
        energies.append(torch.linalg.svdvals(dense)[: case.R].square().sum())
    return torch.stack(energies)
