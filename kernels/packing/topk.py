"""topk_pack, topk_unpack: the entries of largest magnitude, with their positions in 9 bits or less.

What is not sent can be kept and added the next time (error feedback: Stich, Cordonnier, Jaggi,
"Sparsified SGD with memory", 2018): residual + dense is what the largest are chosen from, and the
new residual is what is left of it.

Entries of equal magnitude are taken from the lowest index on, so that every device chooses alike.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrank.kernels.packing.codec import decode_positions, encode_positions
from fastrank.kernels.packing.packed import POLICIES

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# from this size on a sample tells about where the k-th magnitude lies
_LARGE = 1 << 18
_SAMPLE = 1 << 16


@dataclass(frozen=True, eq=False)
class TopK:
    """The k entries of largest magnitude.

    Args:
        values: `[k]`, in the order of their positions.
        code: uint8, their positions as codec.py writes them.
        k: how many.
        shape: of the tensor.

    Raises:
        ValueError, TypeError: parts that don't go together. The code is looked at when it is used.
    """

    values: Tensor
    code: Tensor
    k: int
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if min(self.shape, default=0) < 0 or not 0 <= self.k <= self.numel:
            raise ValueError(f"k is {self.k} for a tensor of shape {list(self.shape)}")
        if self.values.shape != (self.k,) or not self.values.is_floating_point():
            raise ValueError(
                f"values are {self.values.dtype} {list(self.values.shape)}; pass floats [{self.k}]"
            )
        if self.code.dtype != torch.uint8 or self.code.dim() != 1:
            raise TypeError(
                f"code is {self.code.dtype} {list(self.code.shape)}; pass one dimension of uint8"
            )
        if self.code.device != self.values.device:
            raise ValueError(
                f"values are on {self.values.device} but code on {self.code.device}; move one"
            )

    @property
    def numel(self) -> int:
        """Entries of the tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of values and code: what a payload carries."""
        return self.values.nbytes + self.code.nbytes

    def positions(self) -> Tensor:
        """Rising flat positions: int64 `[k]`, checked to lie inside the tensor.

        Raises:
            ValueError: a code that is damaged or of another tensor.
        """
        return decode_positions(self.code, self.k, self.numel)


def topk_pack(
    dense: Tensor, k: int, *, residual: Tensor | None = None, nonfinite: str = "raise"
) -> TopK:
    """The k entries of largest magnitude of dense, or of residual + dense.

        >>> from fastrank.kernels.packing import topk_pack, topk_unpack
        >>> memory = torch.zeros(4)  # what was not sent yet
        >>> sent = topk_pack(torch.tensor([0.1, -3.0, 0.2, 2.0]), k=2, residual=memory)
        >>> topk_unpack(sent).tolist()
        [0.0, -3.0, 0.0, 2.0]
        >>> memory.count_nonzero().item()
        2

    Args:
        dense: float tensor, any shape and strides.
        k: from 0 to its size.
        residual: error feedback: a tensor of dense's shape and dtype, updated in place to what of
            residual + dense was not sent.
        nonfinite: "raise", or "zero" to take entries that are NaN or infinite for zeros.

    Returns:
        TopK with values in dense's dtype. Entries of equal magnitude: the lowest index first.

    Raises:
        ValueError: arguments that don't fit, or non-finite entries; the residual is then as before.
    """
    _check(dense, k, residual, nonfinite)
    total = dense.detach() if residual is None else residual.detach() + dense.detach()
    flat = total.reshape(-1)
    magnitude = flat.abs()
    # the largest of all is NaN where any is
    if len(flat) and not math.isfinite(magnitude.max()):
        if nonfinite == "raise":
            nan, infinite = int(flat.isnan().sum()), int(flat.isinf().sum())
            raise ValueError(
                f"a tensor of shape {list(dense.shape)} holds {nan} NaN and {infinite} infinite "
                "entries; pass nonfinite='zero' to take them for zeros"
            )
        flat = flat.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        magnitude = flat.abs()
    positions = _largest(magnitude, k)
    values = flat.index_select(0, positions)
    if residual is not None:
        rest = flat.index_fill(0, positions, 0)
        residual.detach().copy_(rest.view(residual.shape))
    return TopK(values, encode_positions(positions), k, tuple(dense.shape))


def topk_unpack(packed: TopK) -> Tensor:
    """The tensor with the k values in place and zeros elsewhere, in the values' dtype.

    Raises:
        ValueError: a code that is damaged or of another tensor, before anything is written.
    """
    positions = packed.positions()
    flat = packed.values.new_zeros(packed.numel)
    return flat.index_copy_(0, positions, packed.values).view(packed.shape)


def _largest(magnitude: Tensor, k: int) -> Tensor:
    """Rising positions of the k largest, among equal ones of those of lowest index."""
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=magnitude.device)
    candidates = _candidates(magnitude, k)
    if candidates is None:
        among, indices = magnitude, None
    else:
        indices = candidates
        among = magnitude.index_select(0, indices)
    least = torch.topk(among, k, sorted=False).values.min()
    chosen = (among >= least).nonzero().squeeze(1)
    if len(chosen) > k:  # of those equal to the least the first are taken
        equal = among.index_select(0, chosen) == least
        spare = len(chosen) - k
        chosen = chosen[~equal | (equal.cumsum(0) <= equal.sum() - spare)]
    return chosen if indices is None else indices.index_select(0, chosen)


def _candidates(magnitude: Tensor, k: int) -> Tensor | None:
    """Rising positions that include the k largest and all equal to the k-th; None for all.

    A regular sample guesses a bound a little below the k-th magnitude. Whether at least k entries
    reach it is counted, so the guess only costs time where it is wrong.
    """
    size = len(magnitude)
    if size < _LARGE or k > size // 8:
        return None
    sample = magnitude[:: size // _SAMPLE]
    share = k * len(sample) / size
    rank = int(share + 4 * math.sqrt(share) + 4)
    bound = torch.topk(sample, rank, sorted=False).values.min()
    found = (magnitude >= bound).nonzero().squeeze(1)
    return found if k <= len(found) <= size // 4 else None


def _check(dense: Tensor, k: int, residual: Tensor | None, nonfinite: str) -> None:
    if not isinstance(dense, Tensor) or dense.dtype not in _DTYPES:
        given = dense.dtype if isinstance(dense, Tensor) else type(dense).__name__
        raise TypeError(f"dense is {given}; pass a float32, bfloat16, float16 or float64 tensor")
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= dense.numel():
        raise ValueError(f"k is {k!r}; pass an int from 0 to {dense.numel()}, dense's entries")
    if nonfinite not in POLICIES:
        raise ValueError(f"unknown policy {nonfinite!r}; nonfinite is one of {', '.join(POLICIES)}")
    if residual is None:
        return
    wanted = (dense.shape, dense.dtype, dense.device)
    if (residual.shape, residual.dtype, residual.device) != wanted:
        raise ValueError(
            f"residual is {residual.dtype} {list(residual.shape)} on {residual.device} but dense "
            f"{dense.dtype} {list(dense.shape)} on {dense.device}; make it zeros_like(dense)"
        )
    if residual.requires_grad and torch.is_grad_enabled():
        raise ValueError("residual requires grad; call under torch.no_grad(), or detach it")
