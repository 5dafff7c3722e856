"""What a patched model does: one row for every adapted module, with counters of its calls."""

import io
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fastrank.layers import dispatch
from fastrank.layers.dispatch import Calls
from fastrank.layers.fused import FusedLayer
from fastrank.layers.registry import fast_classes

if TYPE_CHECKING:
    from rich.console import Console


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
        notes: what `patch` changed besides the class, such as "ranknum frozen".
    """

    name: str
    layer: str
    shape: str
    reason: str | None
    fused_calls: int
    delegated_calls: dict[str, int]
    traced: int
    notes: tuple[str, ...] = ()

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
                "\n".join(["fused" if row.fused else f"PEFT: {row.reason}", *row.notes]),
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
        entry.last = (kind(type(module)), _shape(module))
    reason = "no longer exists" if module is None else _reason(module)
    return PatchRow(
        name=entry.name,
        layer=entry.last[0],
        shape=entry.last[1],
        reason=reason,
        fused_calls=calls.fused if calls else 0,
        delegated_calls=dict(calls.delegated) if calls else {},
        traced=calls.traced if calls else 0,
        notes=tuple(module.notes()) if is_patched(module) else (),
    )


def is_patched(module: nn.Module | None) -> bool:
    """Whether a layer is one of ours at present."""
    return isinstance(module, FusedLayer) and "_fastrank" in module.__dict__


def _reason(module: nn.Module) -> str | None:
    """Why a plain call of an adapted module runs PEFT's own forward now, or None."""
    if is_patched(module):
        if "forward" in module.__dict__:
            return "its forward was replaced on the instance"
        plan = module.plan()
        if not isinstance(plan, str):
            return None
        # what is sharded between calls may be whole inside them: only calls can tell
        if dispatch.is_sharded(plan):
            return module._fastrank.calls.outcome(f"{plan}, so the first call will tell")
        return plan
    classes = fast_classes()
    if type(module) in classes:
        return "not patched: call patch again"
    for stock in classes:
        if isinstance(module, stock):
            return f"{type(module).__name__} is a subclass of {kind(stock)}"
    return f"{kind(type(module))} has no fused layer"


def kind(layer: type) -> str:
    """PEFT's name for a layer's class: the tuner's package and the stock class."""
    stock = layer.stock if issubclass(layer, FusedLayer) else layer
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
