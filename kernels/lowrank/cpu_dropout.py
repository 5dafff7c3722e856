"""Dropout of the CPU path: masks of -1 (kept) and 0 (dropped), applied with a bitwise and.

Bernoulli draws and masked products cost PyTorch 5 to 8 ns an element on a CPU, more than all else
that a low-rank branch does. Sixteen-bit lanes of SFC64 words, compared by shifts, kept as one byte
an element and applied to the bits of x, cost about a quarter of that (measured on x86, AVX-512).
The probability is rounded to a multiple of 2**-15.
"""

import itertools

import numpy as np
import torch
from torch import Tensor

from fastrank.kernels.common import dropout_keep
from fastrank.kernels.common.scratch import scratch, widened
from fastrank.kernels.lowrank.arguments import Aux

_STEPS = 1 << 15
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _kept_steps(p: float) -> int:
    return max(round((1.0 - p) * _STEPS), 1)


class Dropout:
    """The draw of one call: kept elements `[M, columns]`, row block by row block.

    Row ids need a draw that depends on nothing else, so with them the words are Philox's, the same
    as on a GPU.

    Args:
        p: probability of dropping, in (0, 1).
        aux: seed, and row ids or None.
    """

    def __init__(self, p: float, rows: int, columns: int, aux: Aux) -> None:
        self.keep = torch.empty(rows, columns, dtype=torch.int8)
        self._philox = aux.row_ids is not None
        if self._philox:
            kept = dropout_keep(aux.seed, rows, columns, p, aux.row_ids)
            torch.neg(kept.view(torch.int8), out=self.keep)
        else:
            self._words = np.random.SFC64(int(aux.seed) & (2**64 - 1))
            self._p = p

    def draw(self, block: slice) -> "Mask":
        """The block's mask; blocks are drawn in order, once."""
        keep = self.keep[block]
        if self._philox:
            return Mask(keep)
        elements = keep.numel()
        lanes = _lanes(self._words, elements)[:elements]
        lanes = _kept_lanes(lanes, self._p).view(keep.shape)
        keep.copy_(lanes)
        return Mask(lanes)


def keyed_keep(seed: int, row_ids: Tensor | None, p: float, out: Tensor) -> None:
    """Fill out, int8 `[M, columns]`, with -1 (kept) and 0: a row depends on seed and id alone.

    Row i is a piece of a PCG64 stream that starts at word row_ids[i] * ceil(columns / 4), so
    consecutive ids cost one draw, and every gap one jump. A different draw from Philox's, at a
    fiftieth of its price in plain torch.

    Args:
        row_ids: int64 `[M]`; None for 0, 1, 2, ...
    """
    rows, columns = out.shape
    words = -(-columns // 4)
    stream = np.random.PCG64(seed & (2**64 - 1))
    if row_ids is None:
        drawn = stream.random_raw(rows * words)
    else:
        ids = row_ids.numpy()
        cuts = [0, *(np.flatnonzero(np.diff(ids) != 1) + 1).tolist(), rows]
        drawn, position = np.empty((rows, words), np.uint64), 0
        for start, stop in itertools.pairwise(cuts):
            first = int(ids[start]) * words
            stream.advance((first - position) % 2**128)
            drawn[start:stop] = stream.random_raw((stop - start) * words).reshape(-1, words)
            position = first + (stop - start) * words
    lanes = torch.from_numpy(drawn.view(np.int16)).view(rows, words * 4)[:, :columns]
    out.copy_(_kept_lanes(lanes, p))


def mean_factor(p: float, philox: bool = False) -> float:
    """1 / P(kept), for the probability that was drawn with."""
    return 1.0 / (1.0 - p) if philox else _STEPS / _kept_steps(p)


def draw_bits(p: float, x: Tensor) -> Tensor:
    """Bits of kept elements, of x's shape and width, by torch's default generator.

    For small x, where seeding a faster generator would cost more than the draw.
    """
    elements = x.numel()
    words = torch.empty((elements + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    lanes = words.view(torch.int16)[:elements]
    return _kept_lanes(lanes, p).view(x.shape).to(_BITS[x.itemsize])


def _lanes(words: np.random.BitGenerator, elements: int) -> Tensor:
    """At least so many random int16 lanes."""
    return torch.from_numpy(words.random_raw((elements + 3) // 4).view(np.int16))


def _kept_lanes(lanes: Tensor, p: float) -> Tensor:
    """-1 where the high 15 bits of a random int16 lane fall below P(kept), else 0; in place."""
    # the difference of two 15-bit numbers does not overflow, so its sign is the comparison
    lanes = lanes.bitwise_right_shift_(1).sub_(_kept_steps(p) - _STEPS // 2)
    return lanes.bitwise_right_shift_(15)


class Mask:
    """One block of kept elements, -1 or 0, in whichever width an operand needs."""

    def __init__(self, keep: Tensor) -> None:
        self._keep = keep

    def of(self, x: Tensor) -> Tensor:
        """x where kept, zeros elsewhere, in scratch memory: any float dtype, any strides."""
        bits = _BITS[x.itemsize]
        out = scratch(x, bits, slot=1)
        return torch.bitwise_and(x.view(bits), self._as(bits), out=out).view(x.dtype)

    def on_(self, x: Tensor) -> Tensor:
        """The same in place."""
        bits = _BITS[x.itemsize]
        x.view(bits).bitwise_and_(self._as(bits))
        return x

    def _as(self, bits: torch.dtype) -> Tensor:
        if self._keep.dtype != bits:
            self._keep = widened(self._keep, bits, slot=2 + bits.itemsize)  # apart from its source
        return self._keep
