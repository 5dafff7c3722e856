"""Masked low-rank matmul: x Wᵀ + bias + scale * ((drop(x) Aᵀ) ⊙ e ⊙ active) Bᵀ."""

from fastrank.kernels.lowrank.choices import load_choices
from fastrank.kernels.lowrank.op import lowrank_add, lowrank_linear

__all__ = ["load_choices", "lowrank_add", "lowrank_linear"]
