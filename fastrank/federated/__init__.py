"""Federated fine-tuning: a round loop, one file per method, real bytes on the wire.

from fastrank.federated import Simulation
result = Simulation(method="fedit", num_clients=20, num_rounds=10).run()
"""

import importlib
from typing import Any

_LAZY = {
    "Callback": "fastrank.federated.callbacks",
    "Config": "fastrank.federated.config",
    "ConsoleReport": "fastrank.federated.callbacks",
    "METHODS": "fastrank.federated.methods",
    "Method": "fastrank.federated.methods",
    "Payload": "fastrank.federated.wire",
    "RunResult": "fastrank.federated.simulation",
    "Simulation": "fastrank.federated.simulation",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastrank.federated' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
