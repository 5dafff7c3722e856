"""`sparsify` a model in place so that its linear layers train a seeded share of their entries, and
`unsparsify` it again.

Only the class of a layer changes, and a parameter `values` comes to it: names of the others, hooks
on the layer and who holds it stay, so checkpoints of the base load both ways.
"""

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from fastrank.errors import UsageError
from fastrank.kernels.common import BACKENDS
from fastrank.kernels.packing.mask import SparseMask
from fastrank.kernels.packing.overlay import why_not_overlaid
from fastrank.kernels.packing.weight_grad import FLOATS
from fastrank.layers.sparse import SparseLayer, SparseLinear, conv1d_class, make_mask

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["SparsifyReport", "SparsifyRow", "sparsify", "unsparsify"]

# task heads under the names that transformers and timm give them
HEADS = frozenset(
    (
        "classifier",
        "score",
        "pre_classifier",
        "classification_head",
        "qa_outputs",
        "lm_head",
        "cls",
        "head",
    )
)


@dataclass(frozen=True)
class SparsifyRow:
    """One linear layer as `sparsify` found it.

    Args:
        name: path in the model.
        layer: class before the call.
        shape: (out_features, in_features).
        values: entries that are trained from now on; 0 where `reason` is given.
        reason: why the layer was left as it was, or None.
    """

    name: str
    layer: str
    shape: tuple[int, ...]
    values: int
    reason: str | None


@dataclass(frozen=True)
class SparsifyReport:
    """What `sparsify` did: one row for every linear layer, and the model's counts."""

    rows: tuple[SparsifyRow, ...]
    parameters: int  # of the model, the values not among them
    density: float

    @property
    def sparse(self) -> list[str]:
        """Names of the layers that train values now."""
        return [row.name for row in self.rows if row.reason is None]

    @property
    def skipped(self) -> dict[str, str]:
        """Name -> reason, for the linear layers that were left frozen as they were."""
        return {row.name: row.reason for row in self.rows if row.reason is not None}

    @property
    def values(self) -> int:
        """Entries that are trained, over all layers."""
        return sum(row.values for row in self.rows)

    def print(self, console: "Console | None" = None) -> None:
        """Print the table of layers and the totals.

        Args:
            console: where to; None prints to standard output.
        """
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(title="fastrank.sparsify", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("layer", overflow="fold")
        table.add_column("class", overflow="fold")
        table.add_column("shape")
        table.add_column("values", justify="right")
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            what = f"{row.values:,}" if row.reason is None else row.reason
            style = None if row.reason is None else "yellow"
            table.add_row(row.name, row.layer, shape, what, style=style)
        console = console or Console()
        console.print(table)
        console.print(self._summary(), highlight=False)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        self.print(Console(file=text, width=140, color_system=None))
        return text.getvalue().rstrip("\n")

    def _summary(self) -> str:
        share = self.values / max(self.parameters, 1)
        return (
            f"{len(self.sparse)} of {len(self.rows)} linear layers train {self.values:,} values, "
            f"{share:.2%} of the model's {self.parameters:,} parameters; the rest is frozen"
        )


def sparsify(
    model: nn.Module,
    density: float = 0.01,
    seed: int = 0,
    *,
    targets: str | Sequence[str] | None = None,
    round: int = 0,
    scheme: str = "stratified",
    backend: str = "auto",
) -> SparsifyReport:
    """Train a seeded share of the entries of the model's linear weights, and nothing else.

        >>> model = torch.nn.Sequential(torch.nn.Linear(256, 128))
        >>> report = fastrank.sparsify(model, density=0.01, seed=7)
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        328
        >>> model(torch.randn(4, 256)).sum().backward()  # train, evaluate, save as before
        >>> fastrank.unsparsify(model, fold=True)  # plain again, the update in their weights
        1

    Every `nn.Linear` (and transformers' Conv1D) becomes a `SparseLinear` in place: the same module,
    with a parameter `values` of one number for each kept entry, fp32 over 16-bit weights. Which
    entries are kept follows from (seed, qualified parameter name, round, shape, density, scheme)
    alone. All other parameters are frozen, as PEFT freezes them; call `requires_grad_(True)` on a
    task head that is to be trained too. Under `state_dict` the base keeps its names and bits and
    `values` stands beside `weight`, so a checkpoint of the base loads with strict=False.

    Args:
        model: any module; it may be a linear layer itself.
        density: share of the entries that are trained; see SparseMask.
        seed: in [0, 2**64).
        targets: which layers, as PEFT's target_modules: names (or last parts of names), or a
            regular expression that matches whole names. None takes all but task heads.
        round: other rounds have other masks.
        scheme: "stratified" or "bernoulli".
        backend: "auto", "triton" or "reference".

    Returns:
        A row for every linear layer: how many values it trains, or why it was left alone.

    Raises:
        UsageError: no layer to sparsify, a target that can't be or matches none, a model that is
            sparsified already, or a field that no mask can have. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"sparsify got {type(model).__name__}; pass a torch.nn.Module")
    if backend not in BACKENDS:
        raise UsageError(f"backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    if any(isinstance(module, SparseLayer) for module in model.modules()):
        raise UsageError("the model is sparsified already; call fastrank.unsparsify(model) first")
    chosen = _choose(model, targets)
    masks: dict[str, SparseMask] = {}
    for name, (module, reason) in chosen.items():
        if reason is None:
            tensor_id = f"{name}.weight" if name else "weight"
            masks[name] = make_mask(_shape(module), density, seed, tensor_id, round, scheme)
    rows = tuple(
        SparsifyRow(
            name,
            type(module).__name__,
            _shape(module),
            masks[name].nnz if reason is None else 0,
            reason,
        )
        for name, (module, reason) in chosen.items()
    )
    report = SparsifyReport(rows, sum(p.numel() for p in model.parameters()), density)
    _freeze(model)
    for name, mask in masks.items():
        module = chosen[name][0]
        module.__class__ = _sparse_class(module)
        module.become_sparse(mask, backend)
    return report


def unsparsify(model: nn.Module, *, fold: bool = False) -> int:
    """Give the layers that `sparsify` changed their class back, and parameters their trainability.

    Args:
        model: the model, sparsified or not.
        fold: leave W + S in the weights, rounded once to their dtype; otherwise they are what they
            were before `sparsify`, bit for bit, and the values are gone.

    Returns:
        How many layers were changed back.
    """
    layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
    for layer in layers:
        layer.become_stock(fold)
    thawed = model.__dict__.pop("_fastrank_thawed", ())
    for name, parameter in model.named_parameters():
        if name in thawed:
            parameter.requires_grad_(True)
    return len(layers)


def _freeze(model: nn.Module) -> None:
    """Freeze all parameters, and note on the model which ones weren't."""
    thawed = {name for name, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(False)
    model.__dict__["_fastrank_thawed"] = thawed


def _choose(
    model: nn.Module, targets: str | Sequence[str] | None
) -> dict[str, tuple[nn.Module, str | None]]:
    """name -> (linear layer, why it is left alone or None), in the model's order."""
    found = dict(_linears(model))
    head = _output_embeddings(model)
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    chosen: dict[str, tuple[nn.Module, str | None]] = {}
    for name, module in found.items():
        named = targets is not None and _matches(name, targets)
        reason = _why_not(model, name, module, uses)
        if named and reason is not None:
            raise UsageError(f"{name} can't be sparsified: {reason}; leave it out of targets")
        if targets is not None:
            reason = None if named else "not among targets"
        elif reason is None and (module is head or HEADS & set(name.split("."))):
            reason = "task head; name it in targets to sparsify it"
        chosen[name] = (module, reason)
    if all(reason is not None for _, reason in chosen.values()):
        raise UsageError(_nothing_to_sparsify(model, chosen, targets))
    if isinstance(targets, Sequence) and not isinstance(targets, str):
        for target in targets:
            if not any(_matches(name, [target]) for name in found):
                raise UsageError(f"target {target!r} matches no linear layer of the model")
    return chosen


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or _is_conv1d(module):
            yield name, module


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, without importing transformers for it."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _sparse_class(module: nn.Module) -> type[SparseLayer]:
    return conv1d_class() if _is_conv1d(module) else SparseLinear


def _shape(module: nn.Module) -> tuple[int, ...]:
    """(out_features, in_features)."""
    if _is_conv1d(module):
        return module.nf, module.nx
    return module.out_features, module.in_features


def _matches(name: str, targets: str | Sequence[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    """What transformers calls a language model's head."""
    ask = getattr(model, "get_output_embeddings", None)
    return ask() if callable(ask) else None


def _why_not(model: nn.Module, name: str, module: nn.Module, uses: Counter) -> str | None:
    """Why a linear layer can't become sparse, or None."""
    if type(module) is not nn.Linear and not _is_conv1d(module):
        return f"{type(module).__name__} is a subclass of Linear"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter"
    if type(weight) is not nn.Parameter or weight.dtype not in FLOATS or weight.dim() != 2:
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"its weight is a {weight.dim()}-d {type(weight).__name__} of {dtype}"
    if tuple(weight.shape) != (_shape(module)[::-1] if _is_conv1d(module) else _shape(module)):
        return f"its weight has shape {list(weight.shape)}"
    if weight.numel() == 0:
        return "its weight is empty"
    if uses[id(weight)] > 1:
        return "its weight is another module's too"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    # its fast path takes the weights of linear1 and linear2 and skips their forward
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
        return "torch.nn.TransformerEncoderLayer reads its weight without calling it"
    return why_not_overlaid(weight)


def _nothing_to_sparsify(
    model: nn.Module,
    chosen: dict[str, tuple[nn.Module, str | None]],
    targets: str | Sequence[str] | None,
) -> str:
    """One line saying what was looked for and what was there."""
    if targets is not None and chosen:
        some = ", ".join(repr(name) for name in list(chosen)[:4])
        return f"targets {targets!r} match none of the {len(chosen)} linear layers ({some}, ...)"
    if chosen:
        reasons = Counter(reason for _, reason in chosen.values())
        told = "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common(4))
        return f"none of the model's {len(chosen)} linear layers can be sparsified: {told}"
    leaves = Counter(
        type(m).__name__ for m in model.modules() if any(True for _ in m.parameters(recurse=False))
    )
    found = ", ".join(f"{count} {kind}" for kind, count in leaves.most_common(4)) or "no parameters"
    return f"no torch.nn.Linear or transformers Conv1D to sparsify: found {found}"
