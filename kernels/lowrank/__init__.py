"""Masked low-rank matmul: x Wᵀ + bias + scale * ((drop(x) Aᵀ) ⊙ e ⊙ active) Bᵀ."""

from fastrank.kernels.lowrank.op import lowrank_add, lowrank_linear

__all__ = ["lowrank_add", "lowrank_linear"]
