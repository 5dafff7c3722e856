"""The example method: unregistered, with tensors that stay on the server, and resumable."""

import importlib.util
import sys
from pathlib import Path

import pytest

from fastrank.federated import Callback, Simulation
from fastrank.federated.config import resolve
from fastrank.federated.export import digest

EXAMPLE = Path(__file__).parents[2] / "examples" / "federated.py"


class Stop(Exception):
    pass


class StopAfterTwo(Callback):
    def on_round_end(self, row):
        if row["round"] == 2:
            raise Stop


@pytest.fixture
def momentum(monkeypatch):
    spec = importlib.util.spec_from_file_location("federated_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.FedItMomentum


def test_momentum_survives_a_resume_and_changes_the_result(options, tmp_path, momentum):
    def run(name: str, value: float, *callbacks: Callback) -> dict[str, str]:
        folder = tmp_path / name
        config, _ = resolve({**options, "num_rounds": 4, "output_dir": str(folder)})
        Simulation(config, momentum(momentum=value), callbacks=callbacks).run()
        return digest(folder / "adapter")

    whole = run("whole", 0.5)
    with pytest.raises(Stop):
        run("stopped", 0.5, StopAfterTwo())
    Simulation.resume(tmp_path / "stopped", method=momentum)
    assert digest(tmp_path / "stopped" / "adapter") == whole
    assert run("plain", 0.0) != whole
