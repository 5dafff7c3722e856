"""Philox4x32-10 in plain torch: the words every backend draws, bit for bit.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
A word depends on (key, counter) alone, so tiling, padding and the device never change a draw.
The Triton twin is in jit.py.
"""

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor, rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four uint32 words, held in int64 tensors, for each counter.

    Args:
        counter: four int64 tensors of broadcastable shapes, each word in [0, 2**32).
        seed: int64 tensor that broadcasts against them; its low and high halves are the key.
        rounds: 10 for Philox4x32-10.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(rounds):
        # the 64-bit product wraps as a signed number; its bits, and so both halves, are right
        product_0, product_2 = c0 * ROUND_A, c2 * ROUND_B
        c0 = ((product_2 >> 32) & MASK32) ^ c1 ^ k0
        c2 = ((product_0 >> 32) & MASK32) ^ c3 ^ k1
        c1 = product_2 & MASK32
        c3 = product_0 & MASK32
        k0, k1 = (k0 + KEY_A) & MASK32, (k1 + KEY_B) & MASK32
    return c0, c1, c2, c3


def dropout_threshold(p: float) -> int:
    """A word below this many 2**-32 ths is dropped: floor(p * 2**32)."""
    return int(p * 2.0**32)


def row_words(seed: Tensor, row_ids: Tensor, columns: int) -> Tensor:
    """One word for each (row id, column): int64 `[M, columns]` holding uint32 values.

    Word `column & 3` of the block with counter (column >> 2, 0, row low, row high).

    Args:
        seed: int64 `[1]`.
        row_ids: int64 `[M]`.
        columns: how many columns.
    """
    block = torch.arange((columns + 3) // 4, device=row_ids.device)[None, :]
    row = row_ids[:, None]
    zero = torch.zeros_like(block)
    words = philox4x32((block, zero, row & MASK32, (row >> 32) & MASK32), seed)
    stacked = torch.stack(torch.broadcast_tensors(*words), dim=-1)  # (M, ceil(columns / 4), 4)
    return stacked.flatten(1)[:, :columns]


def dropout_keep(
    seed: Tensor, rows: int, columns: int, p: float, row_ids: Tensor | None = None
) -> Tensor:
    """The kept elements of a dropout of probability p: bool `[rows, columns]`, on seed's device.

    Args:
        seed: int64 `[1]`.
        row_ids: int64 `[rows]`; None for 0, 1, 2, ...
    """
    if row_ids is None:
        row_ids = torch.arange(rows, device=seed.device)
    return row_words(seed, row_ids, columns) >= dropout_threshold(p)


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator of this device: int64 `[1]`, no host sync."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
