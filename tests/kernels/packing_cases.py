"""What the tests of packing share: definitions written out slowly, and tensors."""

import hashlib
import math

import torch
from torch import Tensor

from fastrank.kernels.common import philox4x32
from fastrank.kernels.packing import SparseMask
from fastrank.kernels.packing.draws import signed_seed

F32, BF16, FP16, INT8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
F64 = torch.float64
FORMATS = (F32, BF16, FP16, INT8)
SCHEMES = ("stratified", "bernoulli")
# half a step of each format relative to the largest of its block, whatever that is
STEPS = {F32: 0.0, BF16: 2.0**-8, FP16: 2.0**-11, INT8: 0.5 / 127}


def word(seed: int, tensor_id: str, purpose: int, round: int, item: int) -> int:
    """One word, from the counter as it is documented."""
    hashed = int.from_bytes(hashlib.sha256(tensor_id.encode()).digest()[:4], "little")
    block = item >> 2
    counter = (block & 0xFFFFFFFF, block >> 32, hashed, purpose << 24 | round)
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), torch.tensor([signed_seed(seed)]))
    return int(words[item & 3])


def slow_positions(mask: SparseMask) -> list[int]:
    """A mask by its definition, one entry at a time."""
    numel = math.prod(mask.shape)
    draw = (mask.seed, mask.tensor_id, 1, mask.round)
    if mask.scheme == "bernoulli":
        threshold = int(mask.density * 2**32)
        return [e for e in range(numel) if mask.density == 1 or word(*draw, e) < threshold]
    S = round(1 / mask.density)
    found = []
    for j, begin in enumerate(range(0, numel, S)):
        found.append(begin + (word(*draw, j) * min(S, numel - begin) >> 32))
    return found


def values(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def at(dense: Tensor, mask: SparseMask) -> Tensor:
    """A tensor's kept entries."""
    return dense.flatten()[mask.positions()]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shapes, dtypes and bits, NaN and signs of zeros included."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))
