"""Where a result comes from: device, versions, commit, date, threads."""

from __future__ import annotations

import datetime
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastrank._version import __version__
from fastrank.checkout import commit
from fastrank.errors import UsageError

_PACKAGES = ("torch", "triton", "peft", "transformers")
_NUMBERS = {"cpu family": "family", "model": "model"}


def environment(device: torch.device) -> dict[str, Any]:
    """The `environment` entry of a results file; a package that is missing is null."""
    found, dirty = commit()
    return {
        "device": device_name(device),
        "device_type": device.type,
        "cpu": _cpu_model(),
        **{package: _version(package) for package in _PACKAGES},
        "fastrank": __version__,
        "python": platform.python_version(),
        "commit": found,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
    }


def pick_device(name: str) -> torch.device:
    """A device that can run here.

    Raises:
        UsageError: it is neither cpu nor cuda, or there is none.
    """
    if name not in ("cpu", "cuda"):
        raise UsageError(f"device is {name!r}; choose cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "no CUDA or ROCm device that torch can see; run on a machine with one, "
            "or measure the CPU with --device cpu"
        )
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_model()


def _cpu_model() -> str:
    """As Linux names it, with family and model: hosted CPUs of several generations share a name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        facts = {}
        for line in cpuinfo.read_text().partition("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            facts[key.strip()] = value.strip()
        if "model name" in facts:
            numbers = [f"{key} {facts[full]}" for full, key in _NUMBERS.items() if full in facts]
            return facts["model name"] + (f" ({', '.join(numbers)})" if numbers else "")
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # with the build (+cpu, +cu130), which metadata may lack
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
