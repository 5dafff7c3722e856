"""Which calls may leave PEFT's own forward, and the counters that record what each call did.

Every check returns the reason for delegating, in words a user can act on, or None. They run at each
call because adapters, hooks, dtypes and devices change after patching. None of them reads a
tensor's values, so none can cost a device sync.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastrank.layers.memo import Memo, Number

if TYPE_CHECKING:
    from fastrank.layers.siblings import Siblings

FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_PLAIN = (Tensor, nn.Parameter)
NOT_MATRICES = "weights are sharded or not matrices"


@dataclass(eq=False)
class Calls:
    """What the calls of one layer did.

    Args:
        fused: calls that ran through the kernel.
        delegated: calls that ran PEFT's own forward, by reason.
        traced: times `torch.compile` traced the layer (compiled calls are not counted one by one).
    """

    fused: int = 0
    delegated: dict[str, int] = field(default_factory=dict)
    traced: int = 0
    _last: tuple[str, int] | None = None  # the last refusal, and how many calls were fused then

    def count(self, reason: str | None) -> None:
        """Record one call: fused when `reason` is None, else delegated for that reason."""
        if torch.compiler.is_compiling():
            # a counter inside the graph would be guarded on, and recompile at every call
            _count_trace(self)
        elif reason is None:
            self.fused += 1
        else:
            self.delegated[reason] = self.delegated.get(reason, 0) + 1
            self._last = (reason, self.fused)

    def outcome(self, unknown: str) -> str | None:
        """Why the last call was delegated, None if it was fused, `unknown` if there was none."""
        if self._last is None or self.fused > self._last[1]:
            return None if self.fused else unknown
        return self._last[0]


@dataclass(eq=False)
class LayerState:
    """What a patched layer carries besides PEFT's own attributes.

    Args:
        name: path of the layer in the model that was patched.
        backend: "auto", "triton" or "reference", handed to the kernel.
        precision: "peft" or "compute", handed to the kernel.
        calls: the counters, which a report may outlive the layer with.
        memo: the last approved call, for the next one to recognise.
        number: the last one-element parameter read (AdaLoRA's ranknum).
        frozen: adapters whose ranknum was trainable before `patch` froze it.
        siblings: the layers under the same parent, where some may share an input.
        trainable: ranks that learn, bool `[r]`; None for all. The others keep their values.
    """

    name: str = ""
    backend: str = "auto"
    precision: str = "peft"
    calls: Calls = field(default_factory=Calls)
    memo: Memo | None = None
    number: Number | None = None
    frozen: list[str] = field(default_factory=list)
    siblings: "Siblings | None" = None
    trainable: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the layer has parts of its own
        return self.__dict__ | {"memo": None, "number": None, "siblings": None}


@torch.compiler.assume_constant_result
def _count_trace(calls: Calls) -> int:
    calls.traced += 1
    return 0


def context_reason() -> str | None:
    """Why no call at all may be fused at this moment, or None."""
    if _has_any_global_hook():
        return "global module hooks"
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return "torch.jit tracing or torch.export"
    if torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform"
    return None


def call_reason(x: Any, args: tuple, kwargs: Mapping[str, Any]) -> str | None:
    """Why this call's arguments ask for PEFT's own forward, or None."""
    if args or kwargs:
        named = ", ".join(sorted(kwargs)) or f"{len(args)} positional"
        return f"extra arguments: {named}"
    if type(x) not in _PLAIN:
        return f"input is a {type(x).__name__}"
    if x.dtype not in FLOATS:
        return f"input dtype {dtype_name(x.dtype)}"
    if x.dim() == 0:
        return "input has no dimensions"
    return None


def submodule_reason(label: str, module: nn.Module, forward: Callable) -> str | None:
    """Why reading `module`'s parameters would differ from calling it, or None.

    Args:
        label: the attribute's name, for the reason.
        module: the submodule whose call is about to be skipped.
        forward: the plain function that `type(module).forward` must be.
    """
    if type(module).forward is not forward:
        return f"{label} is a {type(module).__name__}"
    own = module.__dict__
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        return f"hooks on {label}"
    if "forward" in own:
        return f"forward of {label} replaced on the instance"
    if "parametrizations" in own["_modules"]:
        return f"{label} is parametrized"
    return None


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """`module.<name>`, several times faster: `nn.Module.__getattr__` costs a microsecond."""
    own = module.__dict__
    value = own["_parameters"].get(name)
    # the replicas of nn.DataParallel hold their tensors as plain attributes
    return own.get(name) if value is None else value


def dropout_reason(module: nn.Module) -> str | None:
    """Why this dropout module can't be drawn inside the kernel, or None."""
    if type(module) not in (nn.Identity, nn.Dropout):
        return f"lora_dropout is a {type(module).__name__}"
    reason = submodule_reason("lora_dropout", module, type(module).forward)
    if reason is None and type(module) is nn.Dropout and (module.inplace or module.p >= 1.0):
        return "lora_dropout is in place" if module.inplace else "lora_dropout with p = 1"
    return reason


def dropout_probability(module: nn.Module) -> float:
    """The probability a call in the module's present mode drops with."""
    return module.p if type(module) is nn.Dropout and module.training else 0.0


def tensor_reason(tensors: Mapping[str, Tensor | None], device: torch.device) -> str | None:
    """Why these parameters can't be handed to a kernel on `device`, or None.

    Args:
        tensors: label -> parameter; None values are skipped.
        device: where the call's input lives.
    """
    for label, tensor in tensors.items():
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN:
            return f"{label} is a {type(tensor).__name__}"
        if tensor.dtype not in FLOATS:
            return f"{label} has dtype {dtype_name(tensor.dtype)}"
        if tensor.device != device:
            return f"{label} on {tensor.device}, not with the rest on {device}"
    if device.type == "meta":
        return "meta tensors"
    return None


def is_sharded(reason: str) -> bool:
    """Whether a refusal may be due to parameters being gathered for calls alone."""
    return reason == NOT_MATRICES or reason.endswith(" is a DTensor")


def scale_reason(scale: Any) -> str | None:
    """Why the kernel can't take this scale, or None."""
    if isinstance(scale, Tensor) and torch.compiler.is_compiling():
        return None
    if not isinstance(scale, (int, float)):
        return "scaling is no number"
    # not math.isfinite: torch.compile may hold the number as a symbol
    return None if -math.inf < scale < math.inf else f"scaling is {scale!r}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
