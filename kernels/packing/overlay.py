"""Where a mask's entries lie in a weight, and W + S in W's own memory while a product reads it.

    originals = W[kept];  W[kept] = W[kept] + values;  product;  W[kept] = originals

Key decisions
- The originals are copies of bits, not differences, so what comes back is W bit for bit, whatever
  the values were (NaN included) and whether or not the product raised.
- The sum is formed in fp32 (fp64 over an fp64 weight) and rounded once to the weight's dtype.
- The writes go past autograd's version counter: between two uses the weight is what it was, so
  that graphs which saved it stay right. Several masks may share a weight.
- One overlay of a weight at a time: threads that share one wait for each other. Who reads the
  weight in another way meanwhile, from another thread or CUDA stream, may see W + S.
"""

import functools
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from fastrank.kernels.packing.mask import SparseMask, cached_positions

# a weight's lock is one of these, told by its address
_LOCKS = tuple(threading.Lock() for _ in range(64))


class Places:
    """Where the kept entries of a mask are, on one device. Shared: made by `places_of`."""

    def __init__(self, mask: SparseMask, device: torch.device) -> None:
        self.mask, self.device = mask, device
        self._offsets: dict[tuple[int, int], Tensor] = {}
        self._blocks: dict[int, list[tuple[slice, slice]]] = {}
        self._cuts: dict[int, Tensor] = {}
        self._csr: tuple[Tensor, Tensor] | None = None

    @functools.cached_property
    def positions(self) -> Tensor:
        """Flat positions in `[N, K]`, int64 `[nnz]`, sorted."""
        return cached_positions(self.mask, self.device)

    def offsets(self, stride: tuple[int, int]) -> Tensor:
        """Where the entries of a weight of this stride are, from its first on: int64 `[nnz]`."""
        columns = self.mask.shape[1]
        if stride == (columns, 1):
            return self.positions
        found = self._offsets.get(stride)
        if found is None:
            with torch.inference_mode(False):  # held across calls: not born an inference tensor
                row = torch.div(self.positions, columns, rounding_mode="floor")
                found = (self.positions - row * columns) * stride[1]
                found += row.mul_(stride[0])
            self._offsets[stride] = found
        return found

    def blocks(self, rows: int) -> list[tuple[slice, slice]]:
        """Blocks of this many rows of `[N, K]`, and where each one's entries are among the packed.

        Found with one host sync, and kept.
        """
        found = self._blocks.get(rows)
        if found is None:
            N, K = self.mask.shape
            ends = torch.arange(0, N + rows, rows, device=self.device) * K
            cuts = torch.searchsorted(self.positions, ends).tolist()
            found = [
                (slice(i * rows, min((i + 1) * rows, N)), slice(cuts[i], cuts[i + 1]))
                for i in range(len(cuts) - 1)
            ]
            self._blocks[rows] = found
        return found

    def csr(self) -> tuple[Tensor, Tensor]:
        """Where rows of `[N, K]` begin, and the column of each entry: int32 where that fits."""
        if self._csr is None:
            N, K = self.mask.shape
            dtype = torch.int32 if max(self.mask.nnz, K) < 1 << 31 else torch.int64
            with torch.inference_mode(False):  # held across calls: not born an inference tensor
                ends = torch.arange(N + 1, device=self.device) * K
                rows = torch.searchsorted(self.positions, ends)
                self._csr = rows.to(dtype), torch.remainder(self.positions, K).to(dtype)
        return self._csr

    def cuts(self, columns: int) -> Tensor:
        """Where the entries of each row of each tile of this many columns begin: int64.

        Row n's tile t is entry n * tiles + t; the next entry is where it ends.
        """
        found = self._cuts.get(columns)
        if found is None:
            N, K = self.mask.shape
            with torch.inference_mode(False):  # held across calls: not born an inference tensor
                rows = torch.arange(N, device=self.device)[:, None] * K
                begins = (rows + torch.arange(0, K, columns, device=self.device)).view(-1)
                begins = torch.cat([begins, begins.new_full((1,), N * K)])
                found = torch.searchsorted(self.positions, begins)
            self._cuts[columns] = found
        return found

    def __deepcopy__(self, memo: dict) -> "Places":
        return self

    def __reduce__(self) -> tuple:
        return places_of, (self.mask, self.device)


_live: "weakref.WeakValueDictionary[tuple, Places]" = weakref.WeakValueDictionary()


def places_of(mask: SparseMask, device: torch.device) -> Places:
    """The places of a mask, one object for all who hold it at a time."""
    key = (mask, device)
    found = _live.get(key)
    if found is None:
        found = _live[key] = Places(mask, device)
    return found


def why_not_overlaid(weight: Tensor) -> str | None:
    """Why entries of a weight `[N, K]` can't be written one by one, or None."""
    (N, K), (s0, s1) = weight.shape, weight.stride()
    if min(N, K) <= 1 or s1 * K <= s0 or s0 * N <= s1:
        return None if 0 not in (s0, s1) else "an expanded weight"
    return f"a weight of strides {(s0, s1)}, whose rows overlap"


def memory_of(weight: Tensor) -> Tensor:
    """The memory of weight `[N, K]`, from its first entry on, in one dimension.

    Writes count as autograd's versions of the weight; give weight.data for some that don't.
    """
    (N, K), (s0, s1) = weight.shape, weight.stride()
    return weight.as_strided(((N - 1) * s0 + (K - 1) * s1 + 1,), (1,))


def sums(originals: Tensor, values: Tensor) -> Tensor:
    """originals + values, formed in the wider dtype and rounded once to originals'."""
    found = originals + values
    return found if found.dtype == originals.dtype else found.to(originals.dtype)


def overlaid(
    weight: Tensor,
    values: Tensor,
    places: Places,
    product: Callable[[], Tensor],
    base: Tensor | None = None,
) -> Tensor:
    """product() while weight `[N, K]` is W + S; after it the weight is W, bit for bit.

    Args:
        weight: any strides without overlap, any float dtype.
        values: `[nnz]`, fp32, or fp64 over an fp64 weight.
        places: of the mask.
        product: reads the weight and returns a tensor of its own.
        base: what values are added to, `[nnz]`; None for what is in the weight.
    """
    if values.numel() == 0:
        return product()
    offsets = places.offsets(weight.stride())
    address = weight.untyped_storage().data_ptr()
    with torch.no_grad(), _LOCKS[(address >> 6) % len(_LOCKS)]:
        memory = memory_of(weight.data)
        originals = memory.index_select(0, offsets)
        try:
            memory.index_copy_(0, offsets, sums(originals if base is None else base, values))
            return product()
        finally:
            try:
                memory.index_copy_(0, offsets, originals)
            except BaseException:
                # an interrupt may come between two instructions here; not twice in a microsecond
                memory.index_copy_(0, offsets, originals)
                raise
