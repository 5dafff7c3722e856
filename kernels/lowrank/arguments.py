"""What a call of lowrank_linear or lowrank_add asks for: checked, and put in one form.

Every error says what came, what was wanted and what to do.
"""

import functools
import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

PRECISIONS = ("peft", "compute")
_FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


class Branch(NamedTuple):
    """The plain part of a call."""

    scale: float
    dropout_p: float
    kept: int  # ranks that take part, after compaction of a host-side mask
    trained: int  # the first of them that receive gradients, as far as the host knows
    backend: str  # "triton" or "torch"
    autocast: torch.dtype | None  # what F.linear would cast x, weight and bias to
    precision: str


class Aux(NamedTuple):
    """The tensors of a call that receive no gradient."""

    seed: Tensor | None  # int64 [1]
    row_ids: Tensor | None  # int64 [M]
    index: Tensor | None  # int64 [kept]: ranks after compaction, trained ones first; None: in order
    active: Tensor | None  # bool [R]: a mask that lives on the device
    trainable: Tensor | None  # likewise


NO_AUX = Aux(None, None, None, None, None)


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def plainly_right(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, e: Tensor | None
) -> bool:
    """Whether check_tensors would pass: cheap, and False wherever it is not sure."""
    try:
        (N, K), (R, columns) = weight.shape, A.shape
        device, adapters = x.device, A.dtype
        return (
            x.shape[-1] == K == columns != 0 != N
            and B.shape == (N, R)
            and x.dtype in _FLOATS
            and weight.dtype in _FLOATS
            and adapters in _FLOATS
            and adapters is B.dtype
            and weight.device == device == A.device == B.device
            and (bias is None or _is_vector(bias, N, device))
            and (e is None or _is_vector(e, R, device))
        )
    except (AttributeError, IndexError, TypeError, ValueError):
        return False


def _is_vector(tensor: Tensor, length: int, device: torch.device) -> bool:
    return tensor.shape == (length,) and tensor.dtype in _FLOATS and tensor.device == device


def check_tensors(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    y: Tensor | None = None,
) -> None:
    """Shapes, dtypes and devices; ValueError or TypeError."""
    given = {"x": x, "weight": weight, "bias": bias, "A": A, "B": B, "e": e, "y": y}
    for name, tensor in given.items():
        if tensor is None and name not in ("x", "A", "B"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} has type {type(tensor).__name__}; pass a torch.Tensor")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} has dtype {tensor.dtype}; cast it to a floating dtype")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x on {x.device}; move one of them")

    if x.dim() == 0:
        raise ValueError("x is 0-d; pass x of shape [..., K]")
    if A.dim() != 2 or B.dim() != 2:
        raise ValueError(f"A has shape {_shape(A)} and B {_shape(B)}; pass A [R, K] and B [N, R]")
    if A.shape[0] != B.shape[1]:
        raise ValueError(
            f"A has rank dim {A.shape[0]} but B has {B.shape[1]}; pass adapters of equal rank"
        )
    if A.dtype != B.dtype:
        raise TypeError(f"A has dtype {A.dtype} but B {B.dtype}; cast one of them")
    if A.shape[1] == 0 or B.shape[0] == 0:
        raise ValueError(f"A has shape {_shape(A)} and B {_shape(B)}; K and N must be positive")
    if x.shape[-1] != A.shape[1]:
        raise ValueError(
            f"x has {x.shape[-1]} columns but A {A.shape[1]}; pass x [..., K] and A [R, K]"
        )
    if e is not None and e.shape != A.shape[:1]:
        raise ValueError(f"e has shape {_shape(e)}; pass one value a rank, [{A.shape[0]}]")
    if y is not None and (y.dim() != x.dim() or y.shape[:-1] != x.shape[:-1]):
        raise ValueError(f"y has shape {_shape(y)} but x {_shape(x)}; all but the last must agree")
    if y is not None and y.shape[-1] != B.shape[0]:
        raise ValueError(f"y has {y.shape[-1]} columns but B {B.shape[0]} rows; pass B [N, R]")
    if weight is not None and weight.shape != (B.shape[0], A.shape[1]):
        raise ValueError(
            f"weight has shape {_shape(weight)} but A and B make [{B.shape[0]}, {A.shape[1]}]; "
            "pass weight [N, K] (transpose a Conv1D weight)"
        )
    if bias is not None and bias.shape != B.shape[:1]:
        raise ValueError(f"bias has shape {_shape(bias)}; pass [{B.shape[0]}]")


def check_base_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Without autocast the base needs one dtype, as F.linear does."""
    if weight.dtype is x.dtype and (bias is None or bias.dtype is x.dtype):
        return
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(
                f"{name} has dtype {tensor.dtype} but x {x.dtype}; cast one or use torch.autocast"
            )


def check_options(
    scale: float,
    dropout_p: float,
    seed: int | Tensor | None,
    row_ids: Tensor | None,
    precision: str,
    x: Tensor,
) -> None:
    """Numbers and the dropout draw; ValueError or TypeError."""
    plain = type(scale) is float and type(dropout_p) is float and seed is None is row_ids
    # compared, not math.isfinite: torch.compile may hold the numbers as symbols
    finite = plain and -math.inf < scale < math.inf
    if finite and 0.0 <= dropout_p < 1.0 and precision in PRECISIONS:
        return
    if not isinstance(scale, Real) or not isinstance(dropout_p, Real):
        name, value = ("scale", scale) if not isinstance(scale, Real) else ("dropout_p", dropout_p)
        raise TypeError(f"{name} has type {type(value).__name__}; pass a Python float")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale is {scale}; pass a finite number")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; pass 0 <= p < 1")
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.shape != (1,) or seed.device != x.device:
            raise ValueError(
                f"seed is {seed.dtype} {_shape(seed)} on {seed.device}; "
                f"pass an int or an int64 tensor [1] on {x.device}"
            )
    elif seed is not None:
        if not isinstance(seed, int):
            raise TypeError(f"seed has type {type(seed).__name__}; pass an int, a tensor or None")
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed is {seed}; pass a signed 64-bit integer")
    if row_ids is not None:
        rows = x.numel() // max(x.shape[-1], 1)
        if not isinstance(row_ids, Tensor):
            raise TypeError(
                f"row_ids has type {type(row_ids).__name__}; pass an int64 tensor [{rows}]"
            )
        if row_ids.dtype != torch.int64 or row_ids.shape != (rows,) or row_ids.device != x.device:
            raise ValueError(
                f"row_ids is {row_ids.dtype} {_shape(row_ids)} on {row_ids.device}; "
                f"pass int64 [{rows}] on {x.device}"
            )


def check_masks(active: Tensor | int | None, trainable: Tensor | None, ranks: int) -> None:
    """The forms a rank mask may have; ValueError or TypeError."""
    if active is None is trainable:
        return
    for name, mask in (("active", active), ("trainable", trainable)):
        if mask is None:
            continue
        if isinstance(mask, Tensor):
            if mask.dim() == 1 and mask.dtype == torch.bool and mask.shape[0] == ranks:
                continue
            integral = not (mask.dtype.is_floating_point or mask.dtype.is_complex)
            if name == "active" and mask.dim() == 0 and integral and mask.dtype != torch.bool:
                continue
            raise ValueError(
                f"{name} is {mask.dtype} {_shape(mask)} for {ranks} ranks; pass bool [{ranks}]"
                + (", an int or a 0-d integer tensor" if name == "active" else "")
            )
        if name == "trainable" or isinstance(mask, bool) or not isinstance(mask, int):
            raise TypeError(
                f"{name} has type {type(mask).__name__}; pass a bool tensor [{ranks}]"
                + (" or an int" if name == "active" else "")
            )
        if not 0 <= mask <= ranks:
            raise ValueError(f"active is a prefix of {mask} ranks; A has {ranks}, pass 0..{ranks}")


@functools.lru_cache(maxsize=1024)
def _compact(
    active: tuple[bool, ...] | int, trainable: tuple[bool, ...] | None, ranks: int, device: str
) -> tuple[int, int, Tensor | None]:
    """Kept ranks with the trained ones first: (kept, trained, index or None for 0, 1, 2, ...)."""
    on = range(active) if isinstance(active, int) else [j for j in range(ranks) if active[j]]
    trained = [j for j in on if trainable is None or trainable[j]]
    order = trained + [j for j in on if trainable is not None and not trainable[j]]
    if order == list(range(len(order))):
        return len(order), len(trained), None
    # cached across calls, so it must not be born an inference tensor
    with torch.inference_mode(False):
        index = torch.tensor(order, dtype=torch.int64, device=device)
    return len(order), len(trained), index


def resolve_masks(
    active: Tensor | int | None, trainable: Tensor | None, ranks: int, device: torch.device
) -> tuple[int, int, Tensor | None, Tensor | None, Tensor | None]:
    """(kept, trained, index, active on the device, trainable on the device).

    Masks that the host can read are compacted, and cost nothing that is off; a mask on another
    device is handed on as it is and costs no sync.
    """
    if active is None and trainable is None:
        return ranks, ranks, None, None, None
    host = all(not isinstance(m, Tensor) or m.device.type == "cpu" for m in (active, trainable))
    if host:
        if active is None:
            active = ranks
        elif isinstance(active, Tensor):
            listed = active.tolist()
            active = tuple(listed) if active.dim() else min(max(listed, 0), ranks)
        trained = None if trainable is None else tuple(trainable.tolist())
        kept, trained, index = _compact(active, trained, ranks, str(device))
        return kept, trained, index, None, None

    if active is not None and not (isinstance(active, Tensor) and active.dim() == 1):
        active = torch.arange(ranks, device=device) < active
    active = None if active is None else active.to(device, non_blocking=True)
    trainable = None if trainable is None else trainable.to(device, non_blocking=True)
    return ranks, ranks, None, active, trainable
