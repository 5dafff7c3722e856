"""Which tests a process runs, one thread, and fixtures that every folder shares."""

import os

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")

# two busy threads on shared cores are slower than one, and one gives the same bits everywhere
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """A process interprets kernels or compiles them: Triton decides when one is decorated."""
    compiled_only = pytest.mark.skip(reason="TRITON_INTERPRET is set: only interpret tests run")
    interpret_only = pytest.mark.skip(reason="needs TRITON_INTERPRET=1 and its own process")
    no_gpu = pytest.mark.skip(reason="no CUDA or ROCm device")
    for item in items:
        interprets = item.get_closest_marker("interpret") is not None
        if interprets and not INTERPRET:
            item.add_marker(interpret_only)
        elif INTERPRET and not interprets:
            item.add_marker(compiled_only)
        elif item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture
def device() -> torch.device:
    """A GPU for tests marked so, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRET else "cpu")


@pytest.fixture
def poisoned_empty():
    """Fresh memory holds NaN (or the largest integer), so an output nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from one state of torch's generators."""
    torch.manual_seed(0)
