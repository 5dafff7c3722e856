"""SparseMask: which entries of a tensor are kept, told by a few fields on every device alike.

stratified: the flattened tensor is cut into strata of S = round(1/density) entries, and one of each
is kept,

    position j = j S + umulhi(word_j, S),    umulhi(w, S) = (w S) >> 32,

so the count follows from the shape, positions come sorted, an entry's membership costs one word,
and only one word a *kept* entry is drawn. It is not an independent draw: an entry is kept with
probability 1/S (to within S/2**32), but two entries of one stratum never are together. The last
stratum is drawn over its own length.

bernoulli: entry e is kept iff word_e < floor(density 2**32), each independently, as papers write
it; a word for every entry, and the count is known only after drawing.
"""

import math
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastrank.kernels.common import choose_backend
from fastrank.kernels.packing import draws

SCHEMES = ("stratified", "bernoulli")
# below it no 32-bit word is kept, and a stratum is too long for one word
LEAST_DENSITY = 2.0**-31

# bytes of positions and row starts held for masks used again; the positions of a mask of 16.8 M
# entries at 1 % take 1.3 MB
CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class SparseMask:
    """Kept positions of a tensor: a pure function of the fields.

        >>> from fastrank.kernels.packing import SparseMask
        >>> mask = SparseMask((768, 3072), density=0.01, seed=7, tensor_id="layer.3.query")
        >>> mask.nnz, mask.positions()[:3].tolist()  # the same on every device, in every process
        (23593, [84, 103, 204])

    Args:
        shape: of the tensor, at least one dimension; any may be 0.
        density: share of the entries that are kept. Stratified: at most 1/2, or exactly 1, and
            rounded to one in round(1/density). At least 2**-31.
        seed: in [0, 2**64).
        tensor_id: the tensor's qualified name; other names have other masks.
        round: in [0, 2**24); other rounds have other masks.
        scheme: "stratified" or "bernoulli", see the top of this file.

    Raises:
        ValueError, TypeError: a field out of range or of another type.
    """

    shape: tuple[int, ...]
    density: float = 0.01
    seed: int = 0
    tensor_id: str = ""
    round: int = 0
    scheme: str = "stratified"

    def __post_init__(self) -> None:
        fields = _checked(self)
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def numel(self) -> int:
        """Entries of the tensor."""
        return math.prod(self.shape)

    @property
    def stratum(self) -> int:
        """S, the entries of a stratum; 1 where everything is kept. Bernoulli masks have none."""
        if self.scheme != "stratified":
            raise ValueError(f"a {self.scheme} mask has no strata; use scheme='stratified'")
        return round(1 / self.density)

    @property
    def last_stratum(self) -> int:
        """Entries of the last stratum: S or fewer; 0 for an empty tensor."""
        return self.numel - max(self.nnz - 1, 0) * self.stratum

    @property
    def threshold(self) -> int:
        """floor(density 2**32): a word of a Bernoulli mask below it is kept."""
        return int(self.density * 2.0**32)

    @property
    def nnz(self) -> int:
        """Kept entries. Those of a Bernoulli mask are counted by drawing it, on a CPU unless a GPU
        has drawn it before: some 6 ns for each entry of the tensor, once."""
        if self.scheme == "stratified":
            return -(-self.numel // self.stratum)
        if self.density == 1:
            return self.numel
        known = _counts.get(self)
        if known is None:
            known = int(_bernoulli_row_starts(self)[-1])  # which are asked for as well, mostly
            _counts.put(self, known)
        return known

    @property
    def stream(self) -> draws.Stream:
        """The words that positions are drawn from."""
        return draws.stream(self.seed, self.tensor_id, draws.MASK, self.round)

    def positions(self, device: torch.device | str = "cpu", *, backend: str = "auto") -> Tensor:
        """Sorted flat positions: int64 `[nnz]`, the same on every device.

        Args:
            device: where they are wanted.
            backend: "auto", "triton" or "reference".
        """
        device = torch.device(device)
        if choose_backend(backend, device, torch.float32) != "triton":
            return _draw(self).to(device)
        if self.density == 1 or self.numel == 0:
            return torch.arange(self.numel, device=device)
        from fastrank.kernels.packing import launchers

        found = launchers.positions(self, device)
        if self.scheme == "bernoulli":
            _counts.put(self, len(found))
        return found

    def row_starts(self) -> Tensor:
        """Where each row's kept entries begin among all: int64 `[rows + 1]` on the CPU.

        A row is a run of shape[-1] entries. Shared: read it, never write into it.
        """
        if self.scheme == "bernoulli":
            return _bernoulli_row_starts(self)
        return _count_rows(self, cached_positions(self))

    def contains(self, positions: Tensor) -> Tensor:
        """Which flat positions are kept: bool, of positions' shape and device; one word for each.

        Args:
            positions: int64; one outside the tensor is not kept.
        """
        if positions.dtype != torch.int64:
            raise TypeError(f"positions are {positions.dtype}; pass int64")
        inside = (positions >= 0) & (positions < self.numel)
        at = torch.where(inside, positions, 0)
        if self.density == 1 or self.numel == 0:
            return inside
        if self.scheme == "bernoulli":
            return inside & (draws.words_at(self.stream, at) < self.threshold)
        j = torch.div(at, self.stratum, rounding_mode="floor")
        length = torch.where(j == self.nnz - 1, self.last_stratum, self.stratum)
        # a word and a length both below 2**32: the product may wrap, so its bits are shifted as
        # an unsigned number's
        chosen = ((draws.words_at(self.stream, j) * length) >> 32) & 0xFFFFFFFF
        return inside & (chosen == at - j * self.stratum)


def _checked(mask: SparseMask) -> dict:
    """The fields in their own types.

    Raises:
        ValueError, TypeError: what SparseMask says.
    """
    if isinstance(mask.shape, str) or not hasattr(mask.shape, "__iter__"):
        raise TypeError(f"shape is {mask.shape!r}; pass a tuple of ints such as (768, 3072)")
    shape = tuple(_integer(size, "shape") for size in mask.shape)
    if not shape:
        raise ValueError("shape is (); pass at least one dimension, (1,) for a single entry")
    if min(shape) < 0 or math.prod(shape) >= 1 << 62:
        raise ValueError(f"shape is {shape}; sizes are at least 0 and their product below 2**62")
    if isinstance(mask.density, bool) or not isinstance(mask.density, (int, float)):
        raise TypeError(f"density is {mask.density!r}; pass a number such as 0.01")
    density = float(mask.density)
    if mask.scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {mask.scheme!r}; choose one of {', '.join(SCHEMES)}")
    if not LEAST_DENSITY <= density <= 1:
        raise ValueError(f"density is {density}; it must be in [2**-31, 1]")
    if mask.scheme == "stratified" and 0.5 < density < 1:
        raise ValueError(
            f"density is {density}; a stratified mask keeps at most 1/2, or everything with 1: "
            "pass scheme='bernoulli' for a share between"
        )
    seed, round = _integer(mask.seed, "seed"), _integer(mask.round, "round")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}; it must be in [0, 2**64): seed % 2**64 wraps one")
    if not 0 <= round < draws.ROUNDS:
        raise ValueError(f"round is {round}; it must be in [0, 2**24)")
    if not isinstance(mask.tensor_id, str):
        raise TypeError(f"tensor_id is {mask.tensor_id!r}; pass the tensor's qualified name")
    try:
        mask.tensor_id.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"tensor_id {mask.tensor_id!r} is not valid Unicode") from error
    return {"shape": shape, "density": density, "seed": seed, "round": round}


def _integer(value: object, name: str) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} holds {value!r}; pass an int")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} holds {value!r}; pass an int") from None


def _draw(mask: SparseMask) -> Tensor:
    """Positions on the CPU."""
    if mask.density == 1:
        return torch.arange(mask.numel)
    if mask.scheme == "bernoulli":
        return torch.from_numpy(_draw_bernoulli(mask))
    return torch.from_numpy(_draw_stratified(mask))


def _draw_stratified(mask: SparseMask) -> np.ndarray:
    nnz, S = mask.nnz, mask.stratum
    found = np.empty((-(-nnz // 4), 4), dtype=np.int64)
    length, half = np.uint64(S), np.uint64(32)
    word = None
    for first, piece in draws.blocks(mask.stream, 0, len(found)):
        rows = found[first : first + len(piece[0])]
        begins = np.arange(first, first + len(rows), dtype=np.int64) * (4 * S)
        for i, word in enumerate(piece):
            if first + len(rows) == len(found) and i == (nnz - 1) & 3:
                last = int(word[-1])
            np.multiply(word, length, out=word)
            np.right_shift(word, half, out=word)
            np.add(begins, word.view(np.int64), out=rows[:, i])
            begins += S
    found = found.reshape(-1)[:nnz]
    if nnz:
        found[-1] = (nnz - 1) * S + ((last * mask.last_stratum) >> 32)
    return found


def _draw_bernoulli(mask: SparseMask) -> np.ndarray:
    threshold, parts = np.uint64(mask.threshold), []
    for first, piece in draws.blocks(mask.stream, 0, -(-mask.numel // 4)):
        kept = np.empty((len(piece[0]), 4), dtype=bool)
        for i, word in enumerate(piece):
            np.less(word, threshold, out=kept[:, i])
        # the last block may go beyond the tensor
        parts.append(np.flatnonzero(kept.reshape(-1)[: mask.numel - 4 * first]) + 4 * first)
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _count_rows(mask: SparseMask, positions: Tensor) -> Tensor:
    columns = mask.shape[-1]
    rows = math.prod(mask.shape[:-1])
    return torch.searchsorted(positions, torch.arange(rows + 1) * columns)


def _bernoulli_row_starts(mask: SparseMask) -> Tensor:
    def count() -> Tensor:
        return _count_rows(mask, cached_positions(mask, backend="reference"))

    return _cache.get((mask, "row starts"), count)


class _Cache:
    """What was last computed of masks, within CACHE_BYTES; no tensor of over a quarter of that."""

    def __init__(self) -> None:
        self.held: OrderedDict[tuple, Tensor] = OrderedDict()
        self.bytes = 0
        self.lock = threading.Lock()

    def get(self, key: tuple, make: Callable[[], Tensor]) -> Tensor:
        with self.lock:
            if key in self.held:
                self.held.move_to_end(key)
                return self.held[key]
        with torch.inference_mode(False):  # held across calls: not born an inference tensor
            found = make()
        with self.lock:
            if key not in self.held and found.nbytes <= CACHE_BYTES // 4:
                self.held[key] = found
                self.bytes += found.nbytes
                while self.bytes > CACHE_BYTES:
                    self.bytes -= self.held.popitem(last=False)[1].nbytes
        return found

    def clear(self) -> None:
        with self.lock:
            self.held.clear()
            self.bytes = 0


class _Counts:
    """nnz of the Bernoulli masks counted last."""

    most = 4096

    def __init__(self) -> None:
        self.held: OrderedDict[SparseMask, int] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, mask: SparseMask) -> int | None:
        return self.held.get(mask)

    def put(self, mask: SparseMask, count: int) -> None:
        with self.lock:
            self.held[mask] = count
            if len(self.held) > self.most:
                self.held.popitem(last=False)


_cache, _counts = _Cache(), _Counts()


def cached_positions(
    mask: SparseMask, device: torch.device | str = "cpu", backend: str = "auto"
) -> Tensor:
    """mask.positions(device), held for the next call. Shared: read it, never write into it."""
    device = torch.device(device)
    return _cache.get((mask, device), lambda: mask.positions(device, backend=backend))


def clear_cache() -> None:
    """Forget what cached_positions and nnz hold."""
    _cache.clear()
    _counts.held.clear()
