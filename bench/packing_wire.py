"""Works of `fastrank bench packing` on a message's way: masks, packing, sums, top-k codes."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import zlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrank.bench.accuracy import relative_error
from fastrank.bench.cases import Unavailable
from fastrank.bench.harness import WrongResult
from fastrank.bench.packing_cases import Work
from fastrank.bench.timing import Step
from fastrank.kernels.packing import (
    Packed,
    SparseMask,
    aggregate,
    aggregate_dense,
    pack,
    topk_pack,
    unpack,
    unpack_add_,
)
from fastrank.kernels.packing.codec import decode_positions, encode_positions
from fastrank.kernels.packing.mask import clear_cache

# what a random access moves at least: a cache line of a CPU, a sector of a GPU
_LINE = {"cpu": 64, "cuda": 32}
# elements that the blocked dense average adds at a time: they stay in a core's cache
_PIECE = 1 << 16

Builders = Mapping[str, Callable[[], Step]]


class MaskWork(Work):
    """Kept positions drawn afresh. `bernoulli-philox` draws a word for every entry, with the same
    generator; `torch.rand` is torch's own generator, whose draws no other device repeats."""

    def variants(self) -> Builders:
        shape, density = (self.case.N, self.case.K), self.case.density

        def seeded(scheme: str) -> Step:
            mask = SparseMask(shape, density, seed=1, tensor_id="layer", scheme=scheme)
            return lambda: mask.positions(self.device)

        def drawn() -> Step:
            generator = torch.Generator(self.device).manual_seed(1)

            def run() -> Tensor:
                words = torch.rand(shape, generator=generator, device=self.device)
                return (words.view(-1) < density).nonzero().squeeze(1)

            return run

        return {
            "fastrank": lambda: seeded("stratified"),
            "bernoulli-philox": lambda: seeded("bernoulli"),
            "torch.rand": drawn,
        }

    def error(self, name: str, result: Tensor) -> float | None:
        numel, mean = self.case.N * self.case.K, self.case.N * self.case.K * self.case.density
        if name == "torch.rand":
            scheme = None
        else:
            scheme = "stratified" if name == "fastrank" else "bernoulli"
            mask = SparseMask(
                (self.case.N, self.case.K), self.case.density, 1, "layer", scheme=scheme
            )
            # membership is computed one by one, not the way positions are
            if not bool(mask.contains(result).all()):
                raise WrongResult("positions that the mask does not keep")
        count = len(result)
        if abs(count - mean) > (1 if scheme == "stratified" else 6 * mean**0.5):
            raise WrongResult(f"{count} positions, about {mean:.0f} expected")
        if not bool((result[1:] > result[:-1]).all()) or int(result[-1]) >= numel:
            raise WrongResult("positions that are not sorted or outside")
        return 0.0


class _Masked(Work):
    """A dense tensor, its mask, and a copy of as many bytes as a step has to move."""

    graph = ("fastrank", "gather", "index_add", "copy")

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        case = self.case
        self.dense = self.randn(case.N, case.K)
        self.mask = SparseMask((case.N, case.K), case.density, seed=1, tensor_id="layer")
        self.positions = self.mask.positions(self.device)
        self.exact = self.dense.view(-1)[self.positions]
        self.packed = pack(self.dense, self.mask, dtype=case.torch_dtype)

    def copy(self, accesses: int) -> Step:
        """A contiguous copy of the bytes of `accesses` random accesses and the packed values, half
        of them read and half written."""
        moved = accesses * self.mask.nnz * _LINE[self.device.type] + self.packed.nbytes
        source = torch.zeros(moved // 2, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)


class PackWork(_Masked):
    """Gather and convert. `gather` takes positions that are held and knows no scales;
    `masked_select` takes a Boolean mask of the tensor's size."""

    def variants(self) -> Builders:
        dtype, flat = self.case.torch_dtype, self.dense.view(-1)

        def masked_select() -> Step:
            kept = torch.zeros_like(self.dense, dtype=torch.bool)
            kept.view(-1)[self.positions] = True
            return lambda: torch.masked_select(self.dense, kept).to(dtype)

        found: dict[str, Callable[[], Step]] = {
            # counts what is not finite without waiting for it
            "fastrank": lambda: lambda: pack(self.dense, self.mask, dtype=dtype, nonfinite="zero"),
            "gather": lambda: lambda: flat.index_select(0, self.positions).to(dtype),
            "copy": lambda: self.copy(1),
        }
        if self.device.type == "cpu":  # waits for its count on a GPU
            found["masked_select"] = masked_select
        return found

    def error(self, name: str, result: Any) -> float | None:
        if name == "copy":
            return None
        if isinstance(result, Packed):
            return relative_error(unpack(result), self.exact)
        # without a scale int8 holds nothing: its time is a floor
        return None if result.dtype == torch.int8 else relative_error(result, self.exact)


class UnpackWork(_Masked):
    """Decode and add into a dense tensor. `index_add` takes positions that are held and values that
    are decoded already."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.out = torch.zeros_like(self.dense)

    def reset(self) -> None:
        self.out.zero_()

    def variants(self) -> Builders:
        values = unpack(self.packed)
        return {
            "fastrank": lambda: lambda: unpack_add_(self.out, self.packed),
            "index_add": lambda: lambda: self.out.view(-1).index_add_(0, self.positions, values),
            "copy": lambda: self.copy(2),
        }

    def error(self, name: str, result: Tensor) -> float | None:
        if name == "copy":
            return None
        if int(self.out.count_nonzero()) > self.mask.nnz:
            raise WrongResult("entries outside the mask were written")
        return relative_error(self.out.view(-1)[self.positions], self.exact)


class AggregateWork(Work):
    """A weighted mean of the clients' updates: packed where they share a mask, dense otherwise.

    `dense` averages the same updates as dense deltas, one client after another; `dense-blocked`
    does it block by block, so that sums stay in a cache. `to-dense` ends with a dense tensor where
    fastrank doesn't. Masks that are needed are drawn each time, as new rounds have new ones.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        case = self.case
        self.updates, self.deltas = [], []
        for client in range(case.clients):
            seed = client if case.own_masks else 0
            mask = SparseMask((case.N, case.K), case.density, seed=seed, tensor_id="layer")
            delta = torch.zeros(case.N, case.K, device=self.device)
            delta.view(-1)[mask.positions(self.device)] = self.randn(mask.nnz)
            self.deltas.append(delta)
            self.updates.append(pack(delta, mask, dtype=case.torch_dtype))
        self.weights = [1.0 + client % 7 for client in range(case.clients)]
        self.shares = [weight / sum(self.weights) for weight in self.weights]
        self.out = torch.empty(case.N, case.K, device=self.device)
        exact = torch.zeros(case.N, case.K, dtype=torch.float64, device=self.device)
        for share, delta in zip(self.shares, self.deltas, strict=True):
            exact.add_(delta, alpha=share)
        self.exact = exact

    def variants(self) -> Builders:
        def fastrank() -> Tensor | Packed:
            clear_cache()
            return aggregate(self.updates, self.weights, normalize=True)

        def to_dense() -> Tensor:
            clear_cache()
            return aggregate_dense(self.updates, self.weights, normalize=True, out=self.out)

        def dense() -> Tensor:
            return self._average(self.out, self.deltas)

        def blocked() -> Tensor:
            flat = [delta.view(-1).split(_PIECE) for delta in (self.out, *self.deltas)]
            for piece, *parts in zip(*flat, strict=True):
                self._average(piece, parts)
            return self.out

        found = {"fastrank": lambda: fastrank, "dense": lambda: dense}
        if self.device.type == "cpu":
            found["dense-blocked"] = lambda: blocked
        if not self.case.own_masks:
            found["to-dense"] = lambda: to_dense
        return found

    def _average(self, out: Tensor, parts: Any) -> Tensor:
        for index, (share, part) in enumerate(zip(self.shares, parts, strict=True)):
            if index == 0:
                torch.mul(part, share, out=out)
            else:
                out.add_(part, alpha=share)
        return out

    def error(self, name: str, result: Any) -> float | None:
        if isinstance(result, Packed):
            out = torch.zeros_like(self.out)
            result = unpack_add_(out, result)
        return relative_error(result, self.exact)


class TopKWork(Work):
    """The 1 % of largest magnitude of Gaussian entries, with their positions coded. `torch.topk`
    gives values and 64-bit indices in no order."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.dense = self.randn(self.case.N, self.case.K)
        self.k = round(self.case.N * self.case.K * self.case.density)

    def variants(self) -> Builders:
        flat = self.dense.view(-1)

        def theirs() -> tuple[Tensor, Tensor]:
            found = torch.topk(flat.abs(), self.k, sorted=False).indices
            return flat.index_select(0, found), found

        return {
            "fastrank": lambda: lambda: topk_pack(self.dense, self.k),
            "torch.topk": lambda: theirs,
        }

    def error(self, name: str, result: Any) -> float | None:
        if isinstance(result, tuple):
            values = result[0]
        else:
            values = result.values
            if not torch.equal(self.dense.view(-1)[result.positions()], values):
                raise WrongResult("values that are not those at the positions")
        best = torch.topk(self.dense.view(-1).abs(), self.k).values
        if not torch.equal(values.abs().sort(descending=True).values, best):
            raise WrongResult("not the largest magnitudes")
        return 0.0


class CodecWork(Work):
    """Positions of random 1 %, as top-k of Gaussian entries has them, to bytes. The others compress
    a bitmap, a bit an entry, which is made before the clock starts; from a GPU it is copied to the
    host first, within it. Decoding ends with positions."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        numel = self.case.N * self.case.K
        dense = self.randn(numel)
        best = torch.topk(dense.abs(), round(numel * self.case.density)).indices
        self.positions, self.numel = best.sort().values, numel
        kept = np.zeros(numel, dtype=bool)
        kept[self.positions.cpu().numpy()] = True
        self.bitmap = torch.from_numpy(np.packbits(kept)).to(self.device)
        self.sizes: dict[str, int] = {}

    def compressors(self) -> dict[str, Callable[[], tuple[Callable, Callable]]]:
        """Name -> what gives (compress, decompress), or raises Unavailable."""
        return {
            "zlib-bitmap": lambda: (functools.partial(zlib.compress, level=6), zlib.decompress),
            "zstd-bitmap": zstd,
        }

    def extras(self, name: str) -> dict[str, float]:
        return {"bits_per_index": 8 * self.sizes[name] / len(self.positions)}


class EncodeWork(CodecWork):
    """Positions to bytes."""

    def variants(self) -> Builders:
        def theirs(given: Callable) -> Step:
            compress = given()[0]
            return lambda: compress(self.bitmap.cpu().numpy().tobytes())

        found = {"fastrank": lambda: lambda: encode_positions(self.positions)}
        return found | {n: lambda c=c: theirs(c) for n, c in self.compressors().items()}

    def error(self, name: str, result: Any) -> float | None:
        self.sizes[name] = len(result)
        if name == "fastrank":
            back = decode_positions(result, len(self.positions), self.numel)
            same = torch.equal(back, self.positions)
        else:
            decompress = self.compressors()[name]()[1]
            same = decompress(result) == self.bitmap.cpu().numpy().tobytes()
        if not same:
            raise WrongResult("other positions come back")
        return 0.0


class DecodeWork(CodecWork):
    """Bytes to positions."""

    def variants(self) -> Builders:
        def ours() -> Step:
            code, count = encode_positions(self.positions), len(self.positions)
            self.sizes["fastrank"] = len(code)
            return lambda: decode_positions(code, count, self.numel)

        def theirs(name: str, given: Callable) -> Step:
            compress, decompress = given()
            data = compress(self.bitmap.cpu().numpy().tobytes())
            self.sizes[name] = len(data)

            def run() -> Tensor:
                bits = np.unpackbits(np.frombuffer(decompress(data), dtype=np.uint8))
                found = np.flatnonzero(bits[: self.numel].view(bool))
                return torch.from_numpy(found).to(self.device)

            return run

        found = {"fastrank": ours}
        return found | {n: lambda n=n, c=c: theirs(n, c) for n, c in self.compressors().items()}

    def error(self, name: str, result: Tensor) -> float | None:
        if not torch.equal(result, self.positions):
            raise WrongResult("other positions come back")
        return 0.0


def zstd() -> tuple[Callable, Callable]:
    """(compress, decompress) of Zstandard at its default level: Python's, or the zstandard package.

    Raises:
        Unavailable: there is neither.
    """
    for name in ("compression.zstd", "zstandard"):
        module = _module(name)
        if module is not None:
            return functools.partial(module.compress, level=3), module.decompress
    raise Unavailable("Python before 3.14 has no zstd (pip install zstandard)")


def _module(name: str) -> ModuleType | None:
    parent = name.partition(".")[0]
    if importlib.util.find_spec(parent) is None or importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module(name)
