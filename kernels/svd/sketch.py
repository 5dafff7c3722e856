"""Random blocks of the range finder, the same on every device.

Entry (k, j) of the sketch Ω is word · 2⁻³¹ - 1, uniform in [-1, 1), where word is word j & 3 of the
Philox block with key `seed` and counter (k low, j >> 2, 0, purpose << 24). One sketch serves a
whole batch: what comes of a matrix doesn't depend on its place among others.
"""

import torch
from torch import Tensor

from fastrank.kernels.common.philox import MASK32, philox4x32
from fastrank.kernels.packing.draws import REFILL, SKETCH

__all__ = ["REFILL", "SKETCH", "sketch"]


def sketch(
    seed: int, rows: int, width: int, *, purpose: int = SKETCH, device: torch.device | None = None
) -> Tensor:
    """Ω `[rows, width]`, fp32.

    Args:
        seed: 64 bits, signed or not.
        purpose: SKETCH, or REFILL for columns in the place of those that depended on others.
    """
    key = torch.tensor([_signed(seed)], dtype=torch.int64, device=device)
    k = torch.arange(rows, device=device)[:, None]
    block = torch.arange((width + 3) // 4, device=device)[None, :]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox4x32((k & MASK32, block, zero, zero + (purpose << 24)), key)
    flat = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :width]
    return (flat.double() * 2.0**-31 - 1.0).float()


def _signed(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63
