"""Sparse fine-tuning of the resident model: seeded masks, packed values, plain weights again.

The entries that train follow from (seed, parameter name) alone: one mask for all clients and rounds
(round 0's), and nothing but values crosses the wire. W0 is never written to, so its entries outside
the mask keep their bits whatever the optimizer does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastrank.errors import UsageError
from fastrank.federated.methods._stages import target_shapes
from fastrank.federated.methods.base import ServerState
from fastrank.kernels.packing.mask import LEAST_DENSITY, SCHEMES, SparseMask, cached_positions
from fastrank.layers.sparse import SparseLayer
from fastrank.sparsifying import sparsify, unsparsify

if TYPE_CHECKING:
    from fastrank.federated.model import ResidentModel

MASK_TARGETS = ("adapted", "all")


class ScatteredUpdate(nn.Module):
    """P -> P + S for a parameter that is no linear weight, trained through S's ``values``.

    A parametrization: the sum is formed whenever the parameter is read.

    Args:
        original: the parameter, any shape.
        mask: of its shape.
    """

    def __init__(self, original: Tensor, mask: SparseMask) -> None:
        super().__init__()
        self.mask = mask
        wide = torch.promote_types(original.dtype, torch.float32)
        self.values = nn.Parameter(torch.zeros(mask.nnz, dtype=wide, device=original.device))

    def forward(self, original: Tensor) -> Tensor:
        at = cached_positions(self.mask, original.device)
        flat = original.flatten()
        kept = flat.index_select(0, at).to(self.values.dtype) + self.values
        return flat.index_copy(0, at, kept.to(flat.dtype)).view_as(original)


def check_mask(method: str, density: float, mask: str, mask_targets: str) -> None:
    """Raise a UsageError for options that no mask can have."""
    for option, value, allowed in (
        ("mask", mask, SCHEMES),
        ("mask_targets", mask_targets, MASK_TARGETS),
    ):
        if value not in allowed:
            wanted = ", ".join(allowed)
            raise UsageError(f"{method}: {option} must be one of {wanted}; got {value!r}")
    whole = mask == "stratified" and 0.5 < density < 1
    if whole or not LEAST_DENSITY <= density <= 1:
        wanted = "at most 1/2, or 1" if mask == "stratified" else "in (0, 1]"
        raise UsageError(f"{method}: density of a {mask} mask must be {wanted}; got {density}")


def begin(
    model: ResidentModel,
    seed: int,
    *,
    target_modules: str | tuple[str, ...],
    density: float,
    mask: str,
    mask_targets: str,
) -> dict[str, SparseMask]:
    """Make the resident model train a seeded share of its entries.

    Args:
        target_modules: the linear layers, as for LoRA.
        mask_targets: "adapted" for these alone, "all" for every parameter outside the head.

    Returns:
        Parameter name -> mask of the packed values; see `masks_of`.
    """
    shapes = target_shapes(model, target_modules)
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    sparsify(model.model, density, seed, targets=list(shapes), scheme=mask)
    if mask_targets == "all":
        weights = {f"{name}.weight" for name in shapes}
        values = {f"{name}.values" for name in shapes}
        for name in model.base_names():
            if name not in weights | values:
                _scatter(model.model, name, density, seed, mask)
    return masks_of(model)


def _scatter(model: nn.Module, name: str, density: float, seed: int, scheme: str) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    original = getattr(module, leaf)
    if sum(p is original for m in model.modules() for p in m._parameters.values()) > 1:
        raise UsageError(
            f"mask_targets='all' can't mask {name}, which several layers share; use 'adapted'"
        )
    mask = SparseMask(tuple(original.shape), density, seed, name, 0, scheme)
    parametrize.register_parametrization(module, leaf, ScatteredUpdate(original, mask))


def masks_of(model: ResidentModel) -> dict[str, SparseMask]:
    """Parameter name -> mask of all packed values, in the model's order."""
    layers = (SparseLayer, ScatteredUpdate)
    return {
        f"{name}.values": module.mask
        for name, module in model.model.named_modules()
        if isinstance(module, layers)
    }


def end(model: ResidentModel, *, fold: bool) -> None:
    """Plain layers and parameters again.

    Args:
        fold: leave W + S in them, rounded once to their dtype; else they are W, bit for bit.
    """
    for module in list(model.model.modules()):
        if parametrize.is_parametrized(module):
            for leaf in list(module.parametrizations):
                parametrize.remove_parametrizations(module, leaf, leave_parametrized=fold)
    unsparsify(model.model, fold=fold)
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)


def parameter_of(values: str) -> str:
    """The parameter that packed values of this name belong to."""
    path, _, _ = values.rpartition(".")
    module, found, rest = path.partition(".parametrizations.")
    return f"{module}.{rest.removesuffix('.0')}" if found else f"{path}.weight"


def without_values(state: ServerState) -> dict[str, Tensor]:
    """The state's tensors with every packed update at zero."""
    return {
        name: value if name in state.head else torch.zeros_like(value)
        for name, value in state.tensors.items()
    }


def spread(values: Tensor, mask: SparseMask) -> Tensor:
    """Packed values as a dense fp32 tensor of the mask's shape."""
    dense = torch.zeros(mask.numel, dtype=torch.float32)
    return dense.index_copy_(0, cached_positions(mask), values.float()).view(mask.shape)
