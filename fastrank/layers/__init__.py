"""Layers on top of the kernels: for PEFT models, and the same layers for people without PEFT.

Each class is loaded when it is first used, so that `LowRankLinear` alone never imports PEFT.
"""

from fastrank._lazy import lazy

# public name -> module that defines it
_LAZY = {
    "FastAdaLoraLinear": "fastrank.layers.adalora",
    "FastLoraLinear": "fastrank.layers.lora",
    "GroupedLowRankLinear": "fastrank.layers.grouped",
    "Groups": "fastrank.layers.grouped",
    "LowRankLinear": "fastrank.layers.low_rank",
    "SparseLinear": "fastrank.layers.sparse",
}

__getattr__, __dir__ = lazy(globals(), _LAZY)
__all__ = [
    "FastAdaLoraLinear",
    "FastLoraLinear",
    "GroupedLowRankLinear",
    "Groups",
    "LowRankLinear",
    "SparseLinear",
]
