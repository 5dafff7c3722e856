"""What a call of grouped_lowrank_linear asks for: checked, and put in one form.

Every error says what came, what was wanted and what to do, and names the group where one is wrong.
Rows, ranks and scales that the host holds are checked; on an accelerator they are trusted, clamped
and never waited for.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Which rows of x and which ranks of A and B belong to which group."""

    rows: tuple[int, ...] | None  # of each group; None where they are on the device only
    ranks: tuple[int, ...] | None  # likewise
    row_starts: Tensor  # int64 [G + 1] on x's device
    rank_starts: Tensor  # int64 [G + 1] on x's device
    max_rank: int  # most ranks of a group (ΣR where they are on the device)


class GroupedBranch(NamedTuple):
    """The plain part of a call."""

    dropout_p: float
    backend: str  # "triton" or "torch"
    autocast: torch.dtype | None  # what F.linear would cast x, weight and bias to
    precision: str
    one_scale: float | None = None  # of all groups, where the host knows that it is the same


class GroupedAux(NamedTuple):
    """The tensors of a call that receive no gradient."""

    scale: Tensor  # fp32 [G] on x's device (fp64 for fp64 x)
    seeds: Tensor | None  # int64 [G] on x's device
    row_ids: Tensor | None  # int64 [M]; None: a row's index within its group
    active: Tensor | None  # bool [ΣR]: a mask that lives on the device
    trainable: Tensor | None  # bool [ΣR]


def _is_on_host(values: Sequence | Tensor) -> bool:
    return not isinstance(values, Tensor) or values.device.type == "cpu"


def _counts(name: str, values: Sequence[int] | Tensor) -> tuple[int, ...]:
    """Host counts as a tuple of ints; TypeError or ValueError."""
    if isinstance(values, Tensor):
        if values.dim() != 1 or values.dtype.is_floating_point or values.dtype == torch.bool:
            raise ValueError(
                f"{name} is {values.dtype} {list(values.shape)}; pass integers, one a group"
            )
        values = values.tolist()
    elif isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(
            f"{name} has type {type(values).__name__}; pass a sequence of ints or an integer tensor"
        )
    for group, count in enumerate(values):
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"{name} of group {group} is {count!r}; pass an int")
        if count < 0:
            raise ValueError(f"{name} of group {group} is {count}; pass 0 or more")
    return tuple(values)


def _starts(counts: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int64, device=device)


def _device_starts(counts: Tensor, total: int, device: torch.device) -> Tensor:
    """Clamped, so that no wrong count reads or writes out of bounds."""
    counts = counts.to(device, torch.int64, non_blocking=True).clamp(0, total)
    return torch.nn.functional.pad(counts.cumsum(0).clamp(max=total), (1, 0))


# every layer of a model asks for the same few
@functools.lru_cache(maxsize=256)
def _host_layout(rows: tuple[int, ...], ranks: tuple[int, ...], device: torch.device) -> Layout:
    with torch.inference_mode(False):  # cached across calls: not born an inference tensor
        starts = _starts(rows, device), _starts(ranks, device)
    return Layout(rows, ranks, *starts, max(ranks, default=0))


def make_layout(
    rows: Sequence[int] | Tensor,
    ranks: Sequence[int] | Tensor,
    M: int,
    total: int,
    device: torch.device,
) -> Layout:
    """The layout of M rows and `total` ranks.

    Raises:
        ValueError, TypeError: counts that are negative, don't sum to M and `total`, or aren't as
            many as each other.
    """
    found = []
    for name, values, wanted, what in (
        ("rows", rows, M, "x has {} rows"),
        ("ranks", ranks, total, "A and B hold {} ranks"),
    ):
        if not _is_on_host(values):
            found.append(None)
            continue
        counts = values if _is_plain(values) else _counts(name, values)
        if sum(counts) != wanted:
            raise ValueError(
                f"{name} of the {len(counts)} groups sum to {sum(counts)}, but "
                f"{what.format(wanted)}; pass counts that sum to {wanted}"
            )
        found.append(counts)
    if len(rows) != len(ranks):
        raise ValueError(
            f"rows has {len(rows)} entries and ranks {len(ranks)}; pass one of each a group"
        )
    host_rows, host_ranks = found
    if host_rows is not None and host_ranks is not None:
        return _host_layout(host_rows, host_ranks, device)
    row_starts = (
        _starts(host_rows, device) if host_rows is not None else _device_starts(rows, M, device)
    )
    rank_starts = (
        _starts(host_ranks, device)
        if host_ranks is not None
        else _device_starts(ranks, total, device)
    )
    most = total if host_ranks is None else max(host_ranks, default=0)
    return Layout(host_rows, host_ranks, row_starts, rank_starts, most)


def _is_plain(counts: Sequence[int] | Tensor) -> bool:
    """A tuple of ints that are 0 or more."""
    return type(counts) is tuple and all(type(count) is int and count >= 0 for count in counts)


@functools.lru_cache(maxsize=256)
def _host_scale(scale: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    for group, value in enumerate(scale):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"scale of group {group} has type {type(value).__name__}; pass a float")
        if not math.isfinite(value):
            raise ValueError(f"scale of group {group} is {value}; pass a finite number")
    with torch.inference_mode(False):
        return torch.tensor(scale, dtype=dtype, device=device)


def make_scale(
    scale: float | Sequence[float] | Tensor, groups: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Scales as a tensor `[G]`; one number serves all groups.

    Raises:
        ValueError, TypeError: a number that is not finite, or not one a group.
    """
    if isinstance(scale, int | float):
        scale = (float(scale),) * groups
    if len(scale) != groups:
        raise ValueError(f"scale has {len(scale)} entries for {groups} groups; pass one a group")
    if _is_on_host(scale):
        values = scale.tolist() if isinstance(scale, Tensor) else scale
        return _host_scale(tuple(values), dtype, device)
    return scale.to(device, dtype)


def one_scale(scale: float | Sequence[float] | Tensor) -> float | None:
    """The scale of all groups, if the host can tell that it is one."""
    if isinstance(scale, int | float):
        return float(scale)
    if isinstance(scale, Tensor) or len(scale) == 0:
        return None
    first = scale[0]
    return float(first) if all(value == first for value in scale) else None


def check_operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, e: Tensor | None
) -> None:
    """Shapes, dtypes and devices of the tensors; ValueError or TypeError."""
    named = {"x": x, "weight": weight, "bias": bias, "A": A, "B": B, "e": e}
    for name, tensor in named.items():
        if tensor is None and name in ("bias", "e"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} has type {type(tensor).__name__}; pass a tensor")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; pass a floating-point tensor")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; put them on one")
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x is {list(x.shape)} and weight {list(weight.shape)}; pass x [..., K], weight [N, K]"
        )
    N, K = weight.shape
    if N == 0 or K == 0:
        raise ValueError(f"weight is {[N, K]}; N and K must be positive")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias is {list(bias.shape)}; pass [{N}] for weight {[N, K]}")
    if A.dim() != 2 or B.dim() != 2 or A.shape[1] != K or B.shape[1] != N:
        raise ValueError(
            f"A is {list(A.shape)} and B {list(B.shape)} for weight {[N, K]}; "
            f"pass A [ΣR, {K}] and B, rank-major, [ΣR, {N}]"
        )
    if A.shape[0] != B.shape[0]:
        raise ValueError(f"A holds {A.shape[0]} ranks, B {B.shape[0]}; pass as many of each")
    if A.dtype != B.dtype or (e is not None and e.dtype != A.dtype):
        found = ", ".join(str(t.dtype) for t in (A, B, e) if t is not None)
        raise TypeError(f"A, B and e are {found}; pass one dtype")
    if e is not None and e.shape != A.shape[:1]:
        raise ValueError(f"e is {list(e.shape)}; pass [{A.shape[0]}], one a rank")


def check_mask(name: str, mask: Tensor | None, total: int) -> None:
    """`active` or `trainable`: bool `[ΣR]` or None; ValueError or TypeError."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} has type {type(mask).__name__}; pass a bool tensor [{total}]")
    if mask.dtype != torch.bool or mask.shape != (total,):
        raise ValueError(
            f"{name} is {mask.dtype} {list(mask.shape)} for {total} ranks; pass bool [{total}]"
        )


def make_seeds(seeds: Sequence[int] | Tensor | None, groups: int, device: torch.device) -> Tensor:
    """Dropout seeds as int64 `[G]` on the device; None draws them from torch's generator.

    Raises:
        ValueError, TypeError: not one signed 64-bit integer a group.
    """
    if seeds is None:
        return torch.randint(2**63 - 1, (groups,), dtype=torch.int64, device=device)
    if isinstance(seeds, Tensor):
        if seeds.dtype != torch.int64 or seeds.shape != (groups,):
            raise ValueError(
                f"seeds is {seeds.dtype} {list(seeds.shape)} for {groups} groups; "
                f"pass int64 [{groups}]"
            )
        return seeds.to(device, non_blocking=True)
    if isinstance(seeds, str) or not isinstance(seeds, Sequence):
        raise TypeError(f"seeds has type {type(seeds).__name__}; pass a sequence of ints")
    if len(seeds) != groups:
        raise ValueError(f"seeds has {len(seeds)} entries for {groups} groups; pass one a group")
    for group, seed in enumerate(seeds):
        if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed of group {group} is {seed!r}; pass a signed 64-bit integer")
    return torch.tensor(seeds, dtype=torch.int64, device=device)
