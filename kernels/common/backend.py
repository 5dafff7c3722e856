"""Which implementation serves a call. The only place that reads a FASTRANK_* variable.

FASTRANK_BACKEND = auto (default) | triton | reference: what "auto" means where a caller left it so.
"""

import functools
import importlib.util
import logging
import os

import torch

BACKENDS = ("auto", "triton", "reference")
# what Triton's dot takes; float64 goes through plain torch
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_log = logging.getLogger("fastrank")


def interpreting() -> bool:
    """Whether Triton kernels decorated now run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason that Triton kernels can't run on tensors like these, or None."""
    if not _HAS_TRITON:
        return "the triton package is not installed"
    if dtype not in TRITON_DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {dtype}"
    if device.type == "cuda" or interpreting():
        return None
    return (
        f"tensors are on {device.type}; Triton needs a CUDA or ROCm device, or TRITON_INTERPRET=1"
    )


class Setting:
    """What "auto" stands for: read from the environment at first use, since every look at it costs
    as much as a small product."""

    backend: str | None = None

    @classmethod
    def read(cls) -> str:
        if cls.backend is None:
            cls.backend = os.environ.get("FASTRANK_BACKEND", "auto")
        return cls.backend


@functools.cache
def _log_once(device: str, chosen: str, reason: str | None) -> None:
    _log.info("kernels on %s: %s%s", device, chosen, f" ({reason})" if reason else "")


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "triton", "torch" (the plain-torch fast path of a CPU) or "reference".

    Args:
        backend: what the caller asked for, one of BACKENDS.
        device: where the tensors are.
        dtype: the dtype of the wide operand.

    Raises:
        ValueError: an unknown name, or a backend asked for by name that can't run here.
    """
    if backend == "auto":
        backend = Setting.read()
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return "reference"
    if backend == "auto" and device.type == "cpu":
        return "torch"
    reason = why_not_triton(device, dtype)
    if backend == "triton":
        if reason is not None:
            raise ValueError(f"backend 'triton' can't run: {reason}; pass backend='auto'")
        return "triton"
    chosen = "triton" if reason is None else "reference"
    if not torch.compiler.is_compiling():  # a log call would break the graph
        _log_once(device.type, chosen, reason)
    return chosen
