"""Fixtures and helpers of the folder above; runs draw no curves, which take longer than they do."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    from fastrank.federated import rundir

    monkeypatch.setattr(rundir, "_draw_curve", lambda rows, path, title: False)
