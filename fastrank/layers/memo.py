"""Recognise a call that `plan` has already approved, in a fraction of the time that `plan` takes.

An approval is kept together with everything it rests on. The next call compares each of those
things, by identity or value, and takes the approved plan again only if none has changed. No rule
is repeated here, so the quick way can't allow what `plan` forbids. Refusals are never kept.

What changes a call and is compared each time: torch's modes, the layer's switches (active, merged
and disabled adapters, scaling, variants), the submodules, their classes, `forward` on an instance,
the parameter objects and their classes, dropout's settings. Two things are found out another way:

- hooks, by torch's counter of handles: it moves with every registration, and only then are the
  hook dictionaries read (a hook written into a dictionary by hand is not counted);
- what `.data = ` changes (shape, dtype, device), by the kernel: it checks its operands anyway, and
  the layer asks `plan` again when it refuses them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Part(NamedTuple):
    """A submodule whose call the fused call replaces, as it was when that was approved."""

    module: nn.Module
    forward: Callable  # what type(module).forward was
    weight: Tensor | None = None
    bias: Tensor | None = None


class Number(NamedTuple):
    """A frozen parameter of one element whose value the host knows."""

    tensor: Tensor
    version: int
    pointer: int
    value: float

    @classmethod
    def read(cls, tensor: Tensor) -> "Number":
        """Look at the value; on an accelerator this waits for the device."""
        return cls(tensor, _version(tensor), tensor.data_ptr(), tensor.item())

    def holds(self) -> bool:
        """Whether it is still frozen and the same, without waiting for a device.

        Writes that go around autograd's version counter (`tensor.data.fill_()`) are seen on the
        CPU alone.
        """
        tensor = self.tensor
        if tensor.requires_grad or _version(tensor) != self.version:
            return False
        if tensor.data_ptr() != self.pointer:
            return False
        return not tensor.is_cpu or tensor.item() == self.value


class Facts(NamedTuple):
    """What an approval rests on, besides the input.

    Args:
        active: the layer's `_active_adapter`, copied where it is a list.
        name: the one adapter that is active here.
        scaling: the object in `scaling[name]`.
        entries: (table, key, value): the layer's submodules and what its adapter dictionaries hold.
        parts: submodules whose calls are replaced.
        dropout: the adapter's dropout module, which is one of them.
        tensors: parameters that the call hands to the kernel.
        numbers: parameters that the scale was computed from.
    """

    active: Any
    name: str
    scaling: Any
    entries: tuple[tuple[dict[str, Any], str, Any], ...]
    parts: tuple[Part, ...]
    dropout: nn.Module
    tensors: tuple[Tensor, ...]
    numbers: tuple[Number, ...] = ()


class Memo:
    """An approved call, and what has to be unchanged for it to be approved again.

    Args:
        operands: of the approved call.
        facts: what the approval rests on.
        x: the input, of which dtype and device have to stay.
    """

    __slots__ = ("_device", "_draw", "_dtype", "_facts", "_handles", "_parts", "operands")

    def __init__(self, operands: tuple, facts: Facts, x: Tensor) -> None:
        self.operands = operands
        self._facts = facts
        self._dtype, self._device = x.dtype, x.device
        self._draw = _draw(facts.dropout)
        self._handles = RemovableHandle.next_id
        self._parts = tuple(
            (part.module, part.forward, vars(part.module), part.module._parameters, *part[2:])
            for part in facts.parts
        )

    def holds(self, own: dict[str, Any], x: Any) -> bool:
        """Whether a plain call on `x` of the layer with attributes `own` rests on the same."""
        facts = self._facts
        name = facts.name
        if (
            torch._C._is_tracing()
            or torch._C._are_functorch_transforms_active()
            or (type(x) is not Tensor and type(x) is not nn.Parameter)
            or x.dtype is not self._dtype
            or x.device != self._device
            or own["_disable_adapters"]
            or own["merged_adapters"]
            or own["_active_adapter"] != facts.active
            or own["scaling"].get(name) is not facts.scaling
            or name in own["lora_variant"]
            or not own.get("cast_input_dtype_enabled", True)
            or (RemovableHandle.next_id != self._handles and not self._unhooked())
        ):
            return False
        for table, key, value in facts.entries:
            if table.get(key) is not value:
                return False
        for module, forward, inner, parameters, weight, bias in self._parts:
            # a parametrized weight has left `_parameters`
            if (
                type(module).forward is not forward
                or "forward" in inner
                or parameters.get("weight") is not weight
                or parameters.get("bias") is not bias
            ):
                return False
        # torch.utils.swap_tensors gives a parameter another class under the same identity
        for tensor in facts.tensors:
            if type(tensor) is not nn.Parameter:
                return False
        for number in facts.numbers:
            if not number.holds():
                return False
        return self._draw is None or _draw(facts.dropout) == self._draw

    def _unhooked(self) -> bool:
        """Whether the hooks registered since the last look are all elsewhere."""
        count = RemovableHandle.next_id
        if _has_any_global_hook():
            return False
        for part in self._facts.parts:
            inner = vars(part.module)
            if any(inner[hooks] for hooks in _HOOKS):
                return False
        self._handles = count
        return True


def _draw(dropout: nn.Module) -> tuple[bool, float, bool] | None:
    """What decides how a dropout module draws; None for one without settings."""
    if type(dropout) is nn.Dropout:
        return dropout.training, dropout.p, dropout.inplace
    return None


def _version(tensor: Tensor) -> int:
    # tensors born in inference mode count no versions
    return -1 if tensor.is_inference() else tensor._version
