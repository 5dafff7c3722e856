"""Federated fine-tuning: a round loop, one file per method, real bytes on the wire.

from fastrank.federated import Simulation
result = Simulation(method="fedit", num_clients=20, num_rounds=10).run()
"""

from fastrank._lazy import lazy

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

__getattr__, __dir__ = lazy(globals(), _LAZY)
__all__ = sorted(_LAZY)
