"""Makes the helper modules of this folder importable (lowrank_cases); a shared fixture."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def launches():
    """Names of the low-rank kernels launched."""
    from fastrank.kernels.common.launch import plan_launches  # not for tests without Triton

    seen = []

    def run_and_note(kernel, grid, arguments):
        seen.append(kernel.__name__.removeprefix("lowrank_").removesuffix("_kernel"))
        kernel[grid](**arguments)

    with plan_launches(run_and_note):
        yield seen
