"""Where a result comes from: device, versions, commit, date, threads."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastrank._version import __version__
from fastrank.errors import UsageError

_PACKAGES = ("torch", "triton", "peft", "transformers")


def environment(device: torch.device) -> dict[str, Any]:
    """The `environment` entry of a results file; a package that is missing is null."""
    commit, dirty = _commit()
    return {
        "device": device_name(device),
        "cpu": _cpu_model(),
        **{package: _version(package) for package in _PACKAGES},
        "fastrank": __version__,
        "python": platform.python_version(),
        "commit": commit,
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
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # with the build (+cpu, +cu130), which metadata may lack
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool | None]:
    """The checkout's commit and whether files differ from it; None for an installed wheel."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None, None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit, bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None  # no git here, or it refuses a folder of another owner


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
