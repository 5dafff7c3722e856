"""Masked low-rank matmul: x Wᵀ + bias + scale * ((drop(x) Aᵀ) ⊙ e ⊙ active) Bᵀ."""

from fastrank.kernels.lowrank.choices import load_choices
from fastrank.kernels.lowrank.grouped import grouped_lowrank_linear
from fastrank.kernels.lowrank.op import lowrank_add, lowrank_linear
from fastrank.kernels.lowrank.shared import Projection, lowrank_linears

__all__ = [
    "Projection",
    "grouped_lowrank_linear",
    "load_choices",
    "lowrank_add",
    "lowrank_linear",
    "lowrank_linears",
]
