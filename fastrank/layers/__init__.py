"""Layers on top of the kernels: for PEFT models, and the same layer for people without PEFT.

Each class is loaded when it is first used, so that `LowRankLinear` alone never imports PEFT.
"""

import importlib
from typing import Any

# public name -> module that defines it
_LAZY = {
    "FastAdaLoraLinear": "fastrank.layers.adalora",
    "FastLoraLinear": "fastrank.layers.lora",
    "LowRankLinear": "fastrank.layers.low_rank",
    "SparseLinear": "fastrank.layers.sparse",
}

__all__ = [
    "FastAdaLoraLinear",
    "FastLoraLinear",
    "LowRankLinear",
    "SparseLinear",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastrank.layers' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
