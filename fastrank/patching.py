"""`patch` a PEFT model in place so that its LoRA layers run fused, and `unpatch` it again.

Only the class of a layer changes: parameters, their names, hooks on the layer and PEFT's methods
stay, so checkpoints are interchangeable both ways and `unpatch` leaves no trace.
"""

import io
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peft.tuners.adalora import SVDLinear
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fastrank.errors import UsageError
from fastrank.kernels.common import BACKENDS
from fastrank.layers.dispatch import Calls, LayerState
from fastrank.layers.lora import FastLoraLinear

if TYPE_CHECKING:
    from rich.console import Console

# PEFT's class -> ours; exact types only, since a subclass may have a forward of its own
_FAST: dict[type, type] = {PeftLinear: FastLoraLinear}
_STOCK = {fast: stock for stock, fast in _FAST.items()}
_PRECISIONS = ("peft", "compute")


def patch(model: nn.Module, *, backend: str = "auto", precision: str = "peft") -> "PatchReport":
    """Run the LoRA linear layers of `model` fused, in place and reversibly.

        model = peft.get_peft_model(base, LoraConfig(...))
        report = fastrank.patch(model)
        ...                                  # train, evaluate, save, merge as before
        report.print()                       # every adapted module: fused, or why not

    Outputs, gradients, `state_dict`, merging and saving stay PEFT's. What a layer can't fuse is
    decided at each call and goes through PEFT's own forward: disabled or merged adapters, several
    active adapters, DoRA and other variants, `lora_bias`, extra arguments such as `adapter_names`,
    hooks on what lies inside the layer, quantised or sharded weights. Patching a patched model
    keeps its counters, takes up layers added since, and sets the options given.

    Args:
        model: a `PeftModel`, or any module with PEFT's LoRA layers in it.
        backend: "auto" (Triton on CUDA and ROCm devices, plain torch elsewhere), "triton" or
            "reference".
        precision: "peft" computes the branch in the adapters' dtype as PEFT does; "compute" in the
            base's, which is cheaper with float32 adapters over a 16-bit base.

    Returns:
        A live report of the model's adapted modules.

    Raises:
        UsageError: the model has no LoRA layer, or an option is unknown.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"patch got {type(model).__name__}; pass a PEFT model (torch.nn.Module)")
    if backend not in BACKENDS:
        raise UsageError(f"backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    if precision not in _PRECISIONS:
        raise UsageError(f"precision is {precision!r}; choose one of {', '.join(_PRECISIONS)}")
    modules = list(model.named_modules())
    if not any(isinstance(module, LoraLayer) for _, module in modules):
        raise UsageError(_nothing_to_patch(modules))
    for name, module in modules:
        fast = _FAST.get(type(module))
        if fast is not None:
            module.__class__ = fast
            module._fastrank = LayerState(name)
        if isinstance(module, tuple(_STOCK)):
            module._fastrank.backend, module._fastrank.precision = backend, precision
    return PatchReport(model)


def unpatch(model: nn.Module) -> int:
    """Give every layer that `patch` changed its PEFT class back.

    Args:
        model: the model, patched or not.

    Returns:
        How many layers were changed back; 0 for a model that isn't patched.

    Raises:
        UsageError: a layer was given yet another class after `patch` (as `fully_shard` does).
    """
    patched = [(n, m) for n, m in model.named_modules() if isinstance(m, tuple(_STOCK))]
    for name, module in patched:
        if type(module) not in _STOCK:
            raise UsageError(
                f"{name} became a {type(module).__name__} after patch; "
                "undo that wrapper before unpatch"
            )
    for _, module in patched:
        module.__class__ = _STOCK[type(module)]
        del module._fastrank
    return len(patched)


@dataclass(frozen=True)
class PatchRow:
    """One adapted module as a `PatchReport` sees it now.

    Args:
        name: path in the model.
        layer: PEFT's kind of layer, such as "lora.Linear".
        shape: "in_features->out_features r", for layers that have them.
        reason: why a plain call would run PEFT's own forward now; None when it would run fused.
        fused_calls: calls that ran fused so far.
        delegated_calls: calls that ran PEFT's own forward so far, by reason. Calls of modules that
            `patch` left untouched are not counted.
        traced: times `torch.compile` traced the module; compiled calls are not counted.
    """

    name: str
    layer: str
    shape: str
    reason: str | None
    fused_calls: int
    delegated_calls: dict[str, int]
    traced: int

    @property
    def fused(self) -> bool:
        """Whether a plain call would run fused now."""
        return self.reason is None


@dataclass
class _Entry:
    """What the report keeps of a module: its counters strongly, the module itself weakly."""

    name: str
    module: weakref.ref
    calls: Calls | None
    last: tuple[str, str] = field(default=("", ""))


class PatchReport:
    """Live view of a patched model: which adapted modules run fused, which don't, and why.

    Nothing is a snapshot: every look reads the layers and their call counters as they are then.
    The report doesn't keep the model alive; counters stay readable after the model is gone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._entries: dict[int, _Entry] = {}
        self._refresh()

    def rows(self) -> list[PatchRow]:
        """One row for every adapted module, in the model's order."""
        self._refresh()
        return [_row(entry) for entry in self._entries.values()]

    @property
    def fused(self) -> list[str]:
        """Names of the modules that a plain call would run fused now."""
        return [row.name for row in self.rows() if row.fused]

    @property
    def delegated(self) -> dict[str, str]:
        """Name -> reason, for the modules that a plain call would leave to PEFT now."""
        return {row.name: row.reason for row in self.rows() if row.reason is not None}

    @property
    def fused_calls(self) -> int:
        """Calls that ran fused so far, over all modules."""
        return sum(row.fused_calls for row in self.rows())

    @property
    def delegated_calls(self) -> dict[str, int]:
        """Reason -> calls that ran PEFT's own forward so far, over all patched modules."""
        total: Counter[str] = Counter()
        for row in self.rows():
            total.update(row.delegated_calls)
        return dict(total)

    def print(self, console: "Console | None" = None) -> None:
        """Print the table of modules and the totals.

        Args:
            console: where to; None prints to standard output.
        """
        from rich import box
        from rich.console import Console
        from rich.table import Table

        rows = self.rows()
        prefix = _common_prefix([row.name for row in rows])
        table = Table(
            title=f"fastrank.patch: modules of {prefix}" if prefix else "fastrank.patch",
            title_justify="left",
            box=box.SIMPLE_HEAD,
        )
        table.add_column("module", overflow="fold")
        table.add_column("layer", overflow="fold")
        table.add_column("now", overflow="fold")
        table.add_column("fused", justify="right")
        table.add_column("delegated", overflow="fold")
        for row in rows:
            calls = [f"{count} {reason}" for reason, count in row.delegated_calls.items()]
            if row.traced:
                calls.append(f"compiled, traced {row.traced} times")
            table.add_row(
                row.name.removeprefix(f"{prefix}."),
                f"{row.layer} {row.shape}".rstrip(),
                "fused" if row.fused else f"PEFT: {row.reason}",
                str(row.fused_calls),
                "\n".join(calls) or "0",
                style=None if row.fused else "yellow",
            )
        console = console or Console()
        console.print(table)
        console.print(self._summary(rows), highlight=False)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        self.print(Console(file=text, width=140, color_system=None))
        return text.getvalue().rstrip("\n")

    def __repr__(self) -> str:
        return f"<PatchReport: {self._summary(self.rows())}>"

    def _summary(self, rows: list[PatchRow]) -> str:
        fused = sum(row.fused for row in rows)
        calls = sum(sum(row.delegated_calls.values()) for row in rows)
        return (
            f"{fused} of {len(rows)} adapted modules fused; calls so far: "
            f"{sum(row.fused_calls for row in rows)} fused, {calls} delegated"
        )

    def _refresh(self) -> None:
        """Take up modules that became adapted since the last look."""
        model = self._model()
        if model is None:
            return
        for name, module in model.named_modules():
            if not isinstance(module, BaseTunerLayer):
                continue
            entry = self._entries.get(id(module))
            state = module.__dict__.get("_fastrank")
            calls = None if state is None else state.calls
            # an id can be reused once its module is gone
            if entry is None or entry.module() is not module:
                self._entries[id(module)] = _Entry(name, weakref.ref(module), calls)
            elif calls is not None:
                entry.calls = calls


def _row(entry: _Entry) -> PatchRow:
    module, calls = entry.module(), entry.calls
    if module is not None:
        entry.last = (_kind(module), _shape(module))
    reason = "no longer exists" if module is None else _reason(module)
    return PatchRow(
        name=entry.name,
        layer=entry.last[0],
        shape=entry.last[1],
        reason=reason,
        fused_calls=calls.fused if calls else 0,
        delegated_calls=dict(calls.delegated) if calls else {},
        traced=calls.traced if calls else 0,
    )


def _reason(module: nn.Module) -> str | None:
    """Why a plain call of an adapted module runs PEFT's own forward now, or None."""
    if isinstance(module, FastLoraLinear):
        if "forward" in module.__dict__:
            return "its forward was replaced on the instance"
        plan = module.plan()
        return plan if isinstance(plan, str) else None
    if type(module) in _FAST:
        return "not patched: call patch again"
    if isinstance(module, SVDLinear):
        return "AdaLoRA layers are not fused yet"
    if isinstance(module, PeftLinear):
        return f"{type(module).__name__} is a subclass of lora.Linear"
    return "only lora.Linear is fused"


def _kind(module: nn.Module) -> str:
    """PEFT's name for the layer: the tuner's package and the stock class."""
    stock = _STOCK.get(type(module), type(module))
    parts = stock.__module__.split(".")
    tuner = parts[2] if parts[:2] == ["peft", "tuners"] and len(parts) > 2 else parts[0]
    return f"{tuner}.{stock.__name__}"


def _shape(module: nn.Module) -> str:
    if not isinstance(module, LoraLayer):
        return ""
    ranks = {module.r[name] for name in module.active_adapters if name in module.r}
    rank = " r" + "/".join(str(r) for r in sorted(ranks)) if ranks else ""
    return f"{module.in_features}->{module.out_features}{rank}"


def _common_prefix(names: list[str]) -> str:
    """The path that all names start with, whole components only, leaving each a name."""
    paths = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _nothing_to_patch(modules: list[tuple[str, nn.Module]]) -> str:
    """One line saying what was looked for and what was there."""
    looked_for = "peft.tuners.lora.Linear"
    tuners = Counter(_kind(m) for _, m in modules if isinstance(m, BaseTunerLayer))
    if tuners:
        found = ", ".join(f"{count} {kind}" for kind, count in tuners.most_common())
        return f"no LoRA layer ({looked_for}) to patch: found {found}; patch takes LoRA adapters"
    leaves = Counter(
        f"{type(m).__module__.split('.')[0]} {type(m).__name__}"
        for _, m in modules
        if any(True for _ in m.parameters(recurse=False))
    )
    found = ", ".join(f"{count} {kind}" for kind, count in leaves.most_common(4)) or "no parameters"
    return (
        f"no LoRA layer ({looked_for}) to patch: found {found}, none of them adapted; "
        "call peft.get_peft_model(model, LoraConfig(...)) first"
    )
