"""Counters of every draw on sparse updates, and fast words on a CPU.

One layout for all of them, so that a few integers name a draw on any device: Philox4x32-10 with

    key = 64-bit seed (low, high)
    c0, c1 = position block (low, high)
    c2 = first 4 bytes, little-endian, of SHA-256(tensor id)
    c3 = purpose << 24 | round

and word j & 3 of block j >> 2 for item j. Torch's generators are no use here: the same seed gives
other numbers on a CPU, and on GPUs of another size.

kernels/common/philox.py has the same function for tensors of any device; here numpy draws long runs
of consecutive blocks, whose c1, c2 and c3 are plain numbers, and in pieces that fit a cache.
"""

import functools
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastrank.kernels.common.philox import KEY_A, KEY_B, MASK32, ROUND_A, ROUND_B, philox4x32

# what a draw is for: the top byte of c3
MASK, ROUNDING, SKETCH, REFILL = 1, 2, 3, 4

# the range of c3's low bits
ROUNDS = 1 << 24

# blocks drawn at a time: seven arrays of 64 KiB, which stay in a core's own cache and come from
# memory that a process has already; in long draws longer ones, whose fresh pages pay
_PIECE, _LONG_PIECE = 8192, 32768
_LONG = 32 * _PIECE

_A, _B = np.uint64(ROUND_A), np.uint64(ROUND_B)
_LOW, _HALF = np.uint64(MASK32), np.uint64(32)


class Stream(NamedTuple):
    """A run of words, one for each item 0, 1, 2, ..."""

    seed: int  # in [0, 2**64)
    c2: int
    c3: int

    @property
    def key(self) -> tuple[int, int]:
        return self.seed & MASK32, self.seed >> 32


@functools.lru_cache(maxsize=4096)
def tensor_word(tensor_id: str) -> int:
    """c2 of a tensor's draws."""
    return int.from_bytes(hashlib.sha256(tensor_id.encode()).digest()[:4], "little")


def stream(seed: int, tensor_id: str, purpose: int, round: int) -> Stream:
    """The words of one purpose for one tensor in one round."""
    return Stream(seed, tensor_word(tensor_id), purpose << 24 | round)


def signed_seed(seed: int) -> int:
    """The int64 with the bits of a seed in [0, 2**64)."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def words_at(source: Stream, items: Tensor) -> Tensor:
    """The word of each item, uint32 values in int64, of items' shape and device.

    Args:
        source: which stream.
        items: int64, at least 0.
    """
    block = items >> 2
    seed, c2, c3 = (
        torch.tensor(n, device=items.device)
        for n in (signed_seed(source.seed), source.c2, source.c3)
    )
    w0, w1, w2, w3 = philox4x32((block & MASK32, block >> 32, c2, c3), seed)
    odd = (items & 1).bool()
    return torch.where((items & 2).bool(), torch.where(odd, w3, w2), torch.where(odd, w1, w0))


def blocks(source: Stream, first: int, count: int) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
    """Consecutive blocks of four words, in pieces: (first block of the piece, w0, w1, w2, w3).

    Args:
        source: which stream.
        first, count: which blocks.

    Yields:
        the words as uint32 values in uint64 arrays, valid until the next piece is asked for.
    """
    size = _PIECE if count < _LONG else _LONG_PIECE
    memory = _Memory(min(count, size))
    end = first + count
    while first < end:
        # a piece has one c1
        stop = min(end, first + size, ((first >> 32) + 1) << 32)
        yield first, memory.draw(source, first, stop - first)
        first = stop


def words(source: Stream, first: int, count: int) -> np.ndarray:
    """The words of consecutive items: uint32 `[count]`.

    Args:
        source: which stream.
        first: the first item, a multiple of 4.
        count: how many.
    """
    if first % 4:
        raise ValueError(f"first is {first}; words come in blocks of 4, start at a multiple")
    number = -(-count // 4)
    found = np.empty((number, 4), dtype=np.uint32)
    start = first // 4
    for at, piece in blocks(source, start, number):
        rows = found[at - start : at - start + len(piece[0])]
        for i, word in enumerate(piece):
            rows[:, i] = word
    return found.reshape(-1)[:count]


class _Memory:
    """Arrays that the ten rounds of a piece are computed in."""

    def __init__(self, size: int) -> None:
        self.count = np.arange(size, dtype=np.uint64)
        self.held = [np.empty(size, dtype=np.uint64) for _ in range(6)]

    def draw(self, source: Stream, first: int, count: int) -> tuple[np.ndarray, ...]:
        c0, high0, c2, high2, low0, low2 = (array[:count] for array in self.held)
        keys = [
            (np.uint64((k0 + i * KEY_A) & MASK32), np.uint64((k1 + i * KEY_B) & MASK32))
            for k0, k1 in [source.key]
            for i in range(10)
        ]
        np.add(self.count[:count], np.uint64(first & MASK32), out=c0)
        c1, c2_number, c3 = np.uint64(first >> 32), np.uint64(source.c2), np.uint64(source.c3)

        # the first two rounds, where half of the words still are numbers
        (k0, k1), (k2, k3) = keys[:2]
        np.multiply(c0, _A, out=low0)
        product = c2_number * _B
        n0, n1 = (product >> _HALF) ^ c1 ^ k0, product & _LOW
        np.right_shift(low0, _HALF, out=c2)
        np.bitwise_xor(c2, c3 ^ k1, out=c2)
        np.bitwise_and(low0, _LOW, out=low0)  # c3 from here on
        product = n0 * _A
        np.multiply(c2, _B, out=low2)
        np.right_shift(low2, _HALF, out=c0)
        np.bitwise_xor(c0, n1 ^ k2, out=c0)
        np.bitwise_and(low2, _LOW, out=low2)  # c1 from here on
        np.bitwise_xor(low0, (product >> _HALF) ^ k3, out=c2)
        low0[:] = product & _LOW

        for k0, k1 in keys[2:]:
            np.multiply(c0, _A, out=high0)
            np.multiply(c2, _B, out=high2)
            np.right_shift(high2, _HALF, out=c0)
            np.bitwise_xor(c0, low2, out=c0)
            np.bitwise_xor(c0, k0, out=c0)
            np.right_shift(high0, _HALF, out=c2)
            np.bitwise_xor(c2, low0, out=c2)
            np.bitwise_xor(c2, k1, out=c2)
            np.bitwise_and(high2, _LOW, out=low2)
            np.bitwise_and(high0, _LOW, out=low0)
        return c0, low2, c2, low0
