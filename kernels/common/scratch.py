"""Row blocks for the CPU path, and the memory that their temporaries share.

A block is small enough for the caches, and its temporaries are written over the same few megabytes
each time: fresh memory would cost a page fault for every 4 KiB, several times the arithmetic.
"""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

# elements of a block
BLOCK = 1 << 19
_MINIMUM_ROWS = 32


class _Memory(threading.local):
    def __init__(self) -> None:
        self.slots: dict[int | str, Tensor] = {}


_memory = _Memory()


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(_MINIMUM_ROWS, BLOCK // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def scratch(like: Tensor, dtype: torch.dtype, slot: int | str) -> Tensor:
    """Contiguous memory of like's shape, valid until this thread asks for the same slot again."""
    size = like.numel() * dtype.itemsize
    held = _memory.slots.get(slot)
    if held is None or held.numel() < size:
        with torch.inference_mode(False):
            held = torch.empty(size, dtype=torch.uint8)
        _memory.slots[slot] = held
    return held[:size].view(dtype).view(like.shape)


def widened(block: Tensor, dtype: torch.dtype, slot: int = 0) -> Tensor:
    """The block in this dtype: itself, or a copy in scratch memory."""
    if block.dtype == dtype:
        return block
    return scratch(block, dtype, slot).copy_(block)
