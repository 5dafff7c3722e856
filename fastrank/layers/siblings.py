"""Layers that a model calls with one input, one after another (q, k, v; gate, up), as one call.

The first of them computes all results with `lowrank_linears`, which reads the input once; the
others hand theirs out when they are called. Nothing is assumed about a model's code: which layers
share is seen in a first forward, and a result is handed out only for the very tensor, unchanged
since, in the same autograd and autocast modes. Layers that break the pattern once go alone from
then on.

Inside a backward (activation checkpointing runs forwards there) layers go the way they went in the
last forward outside of one, so that a recomputation saves the same tensors.
"""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastrank.kernels.lowrank import lowrank_linears

if TYPE_CHECKING:
    from fastrank.layers.fused import FusedLayer


class _Held(NamedTuple):
    """Results that wait for their layers' calls."""

    x: Tensor
    mark: tuple
    results: dict[int, Tensor]  # by place of the layer
    in_backward: bool  # where a recomputation may stop before the other layers are called


class Siblings:
    """The fused layers of one parent module.

    Args:
        layers: at least two, with as many input features.
    """

    def __init__(self, layers: "Sequence[FusedLayer]") -> None:
        self._layers = tuple(layers)
        self._places = {id(layer): place for place, layer in enumerate(layers)}
        self._group: tuple[int, ...] = ()  # places, in the order of their calls
        self._refused = False
        self._held: _Held | None = None
        self._seen: list[int] = []
        self._seen_x: weakref.ref | None = None
        self._seen_mark: tuple = ()
        self._share = False  # what the group's first layer did when last called outside a backward

    @property
    def together(self) -> "list[FusedLayer]":
        """The layers that share a call, as far as is known."""
        return [] if self._refused else [self._layers[place] for place in self._group]

    def take(self, layer: "FusedLayer", x: Tensor) -> Tensor | None:
        """The result of an approved call `layer(x)`, or None where the layer goes alone."""
        place = self._places.get(id(layer))
        if place is None:  # a copy of the layer
            return None
        mark = _mark(x)
        in_backward = torch._C._current_graph_task_id() != -1
        held = self._held
        if held is not None:
            if held.x is x and held.mark == mark and place in held.results:
                result = held.results.pop(place)
                if not held.results:
                    self._held = None
                return result
            self._held = None
            if not held.in_backward:
                self._refused = True
        if not in_backward:
            if not self._group:
                self._learn(place, x, mark)
            if self._group and place == self._group[0]:
                self._share = not self._refused
        if self._share and place == self._group[0]:
            return self._compute(x, mark, in_backward)
        return None

    def _learn(self, place: int, x: Tensor, mark: tuple) -> None:
        """Note which layers are called with the same input; a group is known at the next input."""
        same = self._seen_x is not None and self._seen_x() is x and self._seen_mark == mark
        if same and place not in self._seen:
            self._seen.append(place)
            return
        if not same and len(self._seen) > 1:
            self._group = tuple(self._seen)
        self._seen, self._seen_x, self._seen_mark = [place], weakref.ref(x), mark

    def _compute(self, x: Tensor, mark: tuple, in_backward: bool) -> Tensor | None:
        layers = [self._layers[place] for place in self._group]
        projections = []
        for layer in layers:
            projection = layer.projection(x)
            # on a CPU the draw of a dropout costs more than reading x, and is not shared
            if projection is None or (projection.dropout_p and x.is_cpu):
                return None
            projections.append(projection)
        state = layers[0]._fastrank
        try:
            first, *rest = lowrank_linears(
                x, projections, backend=state.backend, precision=state.precision
            )
        except (TypeError, ValueError):
            return None  # the layer on its own will say what is wrong
        results = dict(zip(self._group[1:], rest, strict=True))
        self._held = _Held(x, mark, results, in_backward)
        return first


def _mark(x: Tensor) -> tuple[Any, ...]:
    """What must be equal for a result of x to be right a moment later."""
    kind = x.device.type
    return (
        -1 if x.is_inference() else x._version,
        torch.is_grad_enabled(),
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
    )
