"""How large a launch is: small rules shared by the launchers."""

import functools

import torch

# what a grid is sized for where there is no device to ask (interpreter)
_INTERPRETED_UNITS = 4


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def compute_units(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a device."""
    if device.type != "cuda":
        return _INTERPRETED_UNITS
    return torch.cuda.get_device_properties(device).multi_processor_count


def split_count(programs: int, pieces: int, most: int, units: int) -> int:
    """Into how many parts a reduction of `pieces` tiles is cut so that two programs run a unit."""
    return max(1, min(2 * units // max(programs, 1), pieces, most))


def is_hip() -> bool:
    return torch.version.hip is not None
