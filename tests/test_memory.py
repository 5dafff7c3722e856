"""Freed memory stays, in a process of its own: the setting can't be taken back."""

import subprocess
import sys

import pytest

from fastrank.memory import keep_freed_memory

COUNT = """
import resource, torch
from fastrank.memory import keep_freed_memory
kept = {kept} and keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(int(bool(kept)), faults())
"""


def count(kept: bool) -> list[int]:
    code = COUNT.format(kept=kept)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [int(word) for word in out.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_used_again():
    _, before = count(False)
    kept, after = count(True)
    if not kept:
        pytest.skip("no glibc")
    assert before > 1000
    assert after < before / 100


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert keep_freed_memory() is False
