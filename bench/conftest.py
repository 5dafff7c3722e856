"""`pytest bench/ --benchmark-only`: the benchmarks of test_speed.py, and nothing without it."""

import pytest

_WHY = "measures time: pytest bench/ --benchmark-only (needs pytest-benchmark)"


def pytest_addoption(parser):
    parser.addoption(
        "--bench-device",
        choices=("cpu", "cuda"),
        help="where bench/ is measured (default: a GPU if there is one)",
    )


def pytest_collection_modifyitems(config, items):
    """Without --benchmark-only nothing is measured: a test run is no quiet machine."""
    if not config.getoption("--benchmark-only", default=False):
        for item in items:
            item.add_marker(pytest.mark.skip(reason=_WHY))
