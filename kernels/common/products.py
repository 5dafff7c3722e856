"""Matrix products of a CPU, by whichever of the two libraries inside PyTorch is faster there.

torch.mm and F.linear in fp32 are MKL's, and MKL gives CPUs that aren't Intel's its AVX2 code even
where they have AVX-512. oneDNN, which PyTorch uses for 16-bit products, gives them AVX-512: twice
the speed and more on an AMD Zen 5 (bench/results/README.md). A Zen 4 runs AVX-512 in two halves and
gains 5 to 10 % by whole products, less than the chunks below cost.

oneDNN adds up the whole of K in one chain, which for K of 2048 doubles the rounding error (5.7e-7
relative, MKL's 2.5e-7). In chunks of 256, added up, it is 2.9e-7 and still 1.7 times as fast. A
call costs 10 us more than torch.mm, and about 1.5 ms once for every new shape, so small products
stay with MKL.
"""

import functools
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrank.kernels.common.scratch import scratch

# Multiply-adds of a chunk from which a product is worth the dearer calls (measured, AMD Zen 5, two
# cores), and from which it is worth copies of the chunks of a weight [N, K], or pays where MKL is
# nearly as fast: chains of up to _SHORT, and few columns N.
_LEAST, _LEAST_COPIED, _SHORT = 1 << 23, 1 << 24, 128
# fewest rows where x isn't itself a transpose; fewest rows and columns where columns are few
_LEAST_ROWS, _MANY_ROWS, _LEAST_COLUMNS, _FEW_COLUMNS = 96, 1024, 64, 96
# longest chain of additions; rows of a block, or elements of it, whose partial sums stay in the
# cache; elements of weight that are copied at a time
_CHAIN, _ROWS, _PARTIAL, _COPIED = 256, 512, 1 << 18, 1 << 22


# AMD's first CPU family with units of 512 bits: Zen 5
_AMD_WIDE = 26


@functools.cache
def _maker() -> tuple[str, int]:
    """Vendor and family of the CPU, as Linux gives them ("AuthenticAMD", 26), or ("", 0)."""
    try:
        facts = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "", 0
    vendor = re.search(r"^vendor_id\s*:\s*(\S+)", facts, re.MULTILINE)
    family = re.search(r"^cpu family\s*:\s*(\d+)", facts, re.MULTILINE)
    return (vendor[1], int(family[1])) if vendor and family else ("", 0)


@functools.cache
def bf16_units() -> bool:
    """Whether this CPU multiplies bf16 matrices faster than fp32 ones (x86 AMX or AVX512-BF16)."""
    return bf16_tiles() or torch.cpu._is_avx512_bf16_supported()


@functools.cache
def bf16_tiles() -> bool:
    """Whether it does so many times faster (AMX) and not just twice."""
    return torch.cpu._is_amx_tile_supported()


@functools.cache
def prefers_onednn() -> bool:
    """Whether large fp32 products go to oneDNN: wide units of AVX-512 that MKL leaves half idle."""
    vendor, family = _maker()
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and vendor == "AuthenticAMD"
        and family >= _AMD_WIDE
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack(weight: Tensor) -> list[Tensor] | None:
    """Copies of a weight `[N, K]` that `linear` would make in every call; None where it makes none.

    As large as the weight itself, and right for as long as it isn't written to.
    """
    if not prefers_onednn() or weight.dtype is not torch.float32 or not weight.is_cpu:
        return None
    chunks = _chunks(weight.shape[1])
    if len(chunks) == 1 or not weight.is_contiguous():
        return None
    return [weight[:, chunk].contiguous() for chunk in chunks]


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, packed: list[Tensor] | None = None
) -> Tensor:
    """x weightᵀ + bias for x `[M, K]` and weight `[N, K]`; not differentiable.

    Operands of other dtypes, sizes and strides than oneDNN is good at go to F.linear.

    Args:
        packed: from ``pack(weight)``, or None.
    """
    if _suits(x, weight) and (bias is None or bias.dtype is torch.float32):
        return _onednn(x, weight, bias, packed)
    return F.linear(x, weight, bias)


def mm(P: Tensor, Q: Tensor) -> Tensor:
    """P Q for `[M, K]` and `[K, N]`; not differentiable."""
    return _onednn(P, Q.t(), None) if suits(P, Q) else torch.mm(P, Q)


def add_mm_(out: Tensor | None, P: Tensor, Q: Tensor, alpha: float = 1.0) -> Tensor:
    """out + alpha P Q in place, or alpha P Q where there is no out yet; not differentiable."""
    if out is None:
        product = mm(P, Q)
        return product if alpha == 1.0 else product.mul_(alpha)
    if suits(P, Q):
        return out.add_(mm(P, Q), alpha=alpha)
    return out.addmm_(P, Q, alpha=alpha)


def suits(P: Tensor, Q: Tensor) -> bool:
    """Whether `mm` of these takes oneDNN, which has no product that adds in place."""
    # most calls end here, and a view costs as much as all the other checks
    return prefers_onednn() and P.shape[0] * Q.numel() >= _LEAST and _suits(P, Q.t())


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        prefers_onednn()
        and x.dtype is torch.float32
        and x.is_cpu
        and weight.dtype is torch.float32
        and x.shape[1] == weight.shape[1]
        and _is_worth_it(x, weight)
    )


def _is_worth_it(x: Tensor, weight: Tensor) -> bool:
    (M, K), N = x.shape, weight.shape[0]
    work = M * N * min(K, _CHAIN)
    if work < _LEAST or (M < _LEAST_ROWS and x.stride(1) == 1):
        return False
    turned = weight.t().is_contiguous()
    if not (turned or weight.is_contiguous()):  # takes oneDNN a thousand times as long
        return False
    if len(_chunks(K)) == 1:
        return K > _SHORT or work >= _LEAST_COPIED
    if N < _FEW_COLUMNS:
        return N >= _LEAST_COLUMNS and M >= _MANY_ROWS and work >= _LEAST_COPIED
    return turned or work >= _LEAST_COPIED


@functools.cache
def _chunks(K: int) -> list[slice]:
    """Even parts of at most `_CHAIN` columns, shorter where MKL's error is that of shorter ones."""
    parts = -(-K // (_CHAIN if K >= 3 * _CHAIN else _CHAIN * 3 // 4))
    step = -(-K // (parts * 16)) * 16
    return [slice(k, min(k + step, K)) for k in range(0, K, step)]


def _onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, packed: list[Tensor] | None = None
) -> Tensor:
    product = torch.ops.mkldnn._linear_pointwise.default
    (M, K), N = x.shape, weight.shape[0]
    chunks = _chunks(K)
    if len(chunks) == 1:
        return product(x, weight, bias, "none", [], "")
    copies = packed is None and weight.is_contiguous()
    step = max(1, _COPIED // K) if copies else N
    rows_each = max(_ROWS, _PARTIAL // N)
    if rows_each >= M and step >= N:
        return _summed(x, chunks, packed or _parts(weight, chunks), bias)
    y = torch.empty(M, N)
    for n in range(0, N, step):
        columns = slice(n, n + step)
        parts = packed or _parts(weight[columns], chunks)
        bias_part = None if bias is None else bias[columns]
        for m in range(0, M, rows_each):
            rows = slice(m, m + rows_each)
            y[rows, columns] = _summed(x[rows], chunks, parts, bias_part)
    return y


def _parts(weight: Tensor, chunks: list[slice]) -> list[Tensor]:
    """The chunks of weight `[N, K]`, each contiguous or the transpose of what is."""
    if not weight.is_contiguous():
        return [weight[:, chunk] for chunk in chunks]
    memory = scratch(weight, weight.dtype, slot="products").flatten()
    parts, place = [], 0
    for chunk in chunks:
        size = weight.shape[0] * (chunk.stop - chunk.start)
        part = memory[place : place + size].view(weight.shape[0], -1)
        parts.append(part.copy_(weight[:, chunk]))
        place += size
    return parts


def _summed(x: Tensor, chunks: list[slice], parts: list[Tensor], bias: Tensor | None) -> Tensor:
    product = torch.ops.mkldnn._linear_pointwise.default
    y = product(x[:, chunks[0]], parts[0], bias, "none", [], "")
    for chunk, part in zip(chunks[1:], parts[1:], strict=True):
        y.add_(product(x[:, chunk], part, None, "none", [], ""))
    return y
