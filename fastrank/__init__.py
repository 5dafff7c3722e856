"""fastrank: fused low-rank adapter kernels, drop-in PEFT layers and a federated simulator.

Importing this package is silent, asks no device anything and loads neither PEFT nor transformers;
each public name is loaded when it is first used.
"""

from fastrank._lazy import lazy
from fastrank._version import __version__

# public name -> module that defines it
_LAZY = {
    "patch": "fastrank.patching",
    "unpatch": "fastrank.patching",
    "PatchReport": "fastrank.patching",
    "sparsify": "fastrank.sparsifying",
    "unsparsify": "fastrank.sparsifying",
    "merge_adapters": "fastrank.merging",
    "LowRankLinear": "fastrank.layers",
    "SparseLinear": "fastrank.layers.sparse",
    "Simulation": "fastrank.federated.simulation",
}

__getattr__, __dir__ = lazy(globals(), _LAZY)
__all__ = [
    "LowRankLinear",
    "PatchReport",
    "Simulation",
    "SparseLinear",
    "__version__",
    "merge_adapters",
    "patch",
    "sparsify",
    "unpatch",
    "unsparsify",
]
