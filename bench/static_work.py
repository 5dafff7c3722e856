"""What a launch of each kernel moves and multiplies, from its arguments.

Bytes: every tensor that a kernel touches moves once, whole; of tensors that it picks entries from,
a sector of 32 bytes for each entry. Flops: two for every multiply-add of the products, padding of
ranks included, by what multiplies (see static_machine.predicted); drawing random words, rounding
and comparing count as nothing. Where values decide how much is done: Jacobi is one sweep of the few
that it takes, and matrices that may need another orthogonalisation all need it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor

_SECTOR = 32


class Work(NamedTuple):
    """Of one launch."""

    read: int  # bytes
    written: int  # bytes
    flops: dict[str, float]


# kernel -> arguments that it writes
_OUTPUTS: dict[str, tuple[str, ...]] = {
    "grouped_shrink": ("part_ptr",),
    "grouped_expand": ("out_ptr",),
    "grouped_gram": ("out_ptr", "de_ptr"),
    "grouped_finish": ("out_ptr", "de_ptr"),
    "masked_gradient": ("part_ptr",),
    "packing_positions": ("out_ptr",),
    "packing_bernoulli": ("out_ptr",),
    "packing_pack": ("out_ptr", "scale_ptr", "status_ptr"),
    "packing_unpack": ("dense_ptr",),
    "packing_aggregate": ("out_ptr",),
    "packing_aggregate_masks": ("out_ptr",),
    "svd_measure": ("largest_ptr", "square_ptr"),
    "svd_scale": ("multiplier_ptr", "norm2_ptr", "status_ptr"),
    "svd_entries": ("by_row_ptr", "by_column_ptr"),
    "svd_draw": ("out_ptr",),
    "svd_finish": ("out_u_ptr", "out_s_ptr", "out_vh_ptr", "energy_ptr", "status_ptr"),
    "svd_jacobi": ("u_ptr", "status_ptr"),
    "svd_jacobi_memory": ("u_ptr", "status_ptr", "line_ptr", "length_ptr"),
    "svd_factor": ("lower_ptr", "inverse_ptr", "r_ptr", "r_inverse_ptr", "scale_ptr", "length_ptr",
                   "dropped_ptr", "again_ptr"),
    "svd_filter": ("coefficients_ptr", "mode_ptr"),
    "svd_sparse": ("out_ptr",),
    "svd_product": ("out_ptr",),
    "svd_gram": ("part_ptr",),
    "svd_apply": ("out_ptr",),
}  # fmt: skip


def work(name: str, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> Work:
    """Of a launch of the kernel called `name` (without "_kernel").

    Raises:
        KeyError: the kernel is not known here.
    """
    tensors = {n: t for n, t in arguments.items() if isinstance(t, Tensor)}
    outputs = _OUTPUTS[name]
    read = {n: _bytes(t) for n, t in tensors.items() if n not in outputs}
    written = {n: _bytes(tensors[n]) for n in outputs if n in tensors}
    if name in _MOVED:
        _MOVED[name](arguments, read, written)
    flops = _FLOPS[name](arguments) if name in _FLOPS else {}
    return Work(sum(read.values()), sum(written.values()), flops)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _kind(a: Mapping[str, Any]) -> str:
    return "half" if a["DOT"] != tl.float32 else a["PRECISION"]


def _grouped(wide: str) -> Callable[[Mapping[str, Any]], dict[str, float]]:
    """Of a product of each group's rows with its ranks, padded to whole blocks."""

    def flops(a: Mapping[str, Any]) -> dict[str, float]:
        rows, ranks = (a[n].diff().tolist() for n in ("row_starts_ptr", "rank_starts_ptr"))
        block = a["BLOCK_R"]
        padded = sum(m * (-(-r // block) * block) for m, r in zip(rows, ranks, strict=True))
        return {_kind(a): 2.0 * padded * a[wide]}

    return flops


def _per_matrix(a: Mapping[str, Any], name: str) -> int:
    return a[name].shape[0]


def _sweep(a: Mapping[str, Any]) -> dict[str, float]:
    """Every pair of columns: three inner products and a rotation, 6 and 6 flops an entry."""
    q = a["q"]
    return {"fma": _per_matrix(a, "x_ptr") * q * (q - 1) / 2 * 12.0 * q}


def _power_steps(a: Mapping[str, Any]) -> dict[str, float]:
    """Vectors times R, its inverse and their transposes, forth and back."""
    return {"fma": _per_matrix(a, "r_ptr") * a["times"] * 8.0 * a["q"] ** 2}


_FLOPS: dict[str, Callable[[Mapping[str, Any]], dict[str, float]]] = {
    "grouped_shrink": _grouped("W"),
    "grouped_expand": _grouped("W"),
    "grouped_gram": _grouped("W"),
    "masked_gradient": lambda a: {_kind(a): 2.0 * a["M"] * a["N"] * a["K"]},
    "svd_product": lambda a: {
        a["PRECISION"]: 2.0 * _per_matrix(a, "a_ptr") * a["M"] * a["K"] * a["q"]
    },
    "svd_apply": lambda a: {
        a["PRECISION"]: 2.0 * _per_matrix(a, "x_ptr") * a["M"] * a["q"] ** 2
    },
    "svd_gram": lambda a: {"fp64": 2.0 * _per_matrix(a, "x_ptr") * a["M"] * a["q"] ** 2},
    # Cholesky and the inverse of a triangle, q³/3 multiply-adds together
    "svd_factor": lambda a: {"fp64": 2.0 / 3.0 * _per_matrix(a, "r_ptr") * a["q"] ** 3},
    "svd_sparse": lambda a: {"fma": 2.0 * a["values_ptr"].numel() * a["q"]},
    "svd_jacobi": _sweep,
    "svd_jacobi_memory": _sweep,
    "svd_filter": _power_steps,
}  # fmt: skip


def _pack(a: Mapping[str, Any], read: dict[str, int], written: dict[str, int]) -> None:
    read["dense_ptr"] = min(read["dense_ptr"], _SECTOR * a["nnz"])


def _unpack(a: Mapping[str, Any], read: dict[str, int], written: dict[str, int]) -> None:
    touched = min(written["dense_ptr"], _SECTOR * a["nnz"])
    read["dense_ptr"] = written["dense_ptr"] = touched


def _clients(a: Mapping[str, Any], read: dict[str, int], written: dict[str, int]) -> None:
    """Values and scales that the table of addresses points to."""
    scales = 4 * -(-a["nnz"] // a["BLOCK"]) if a["SCALED"] else 0
    read["clients"] = a["clients"] * (a["nnz"] * a["TYPE"].primitive_bitwidth // 8 + scales)


def _expand(a: Mapping[str, Any], read: dict[str, int], written: dict[str, int]) -> None:
    """What it adds to."""
    read["out_ptr"] = written["out_ptr"]


def _line(a: Mapping[str, Any], read: dict[str, int], written: dict[str, int]) -> None:
    """A sweep's columns, each read and written in every one of its steps but from a cache: once."""
    read["line_ptr"] = written["line_ptr"]


_MOVED: dict[str, Callable[[Mapping[str, Any], dict[str, int], dict[str, int]], None]] = {
    "packing_pack": _pack,
    "packing_unpack": _unpack,
    "packing_aggregate": _clients,
    "packing_aggregate_masks": _clients,
    "grouped_expand": _expand,
    "svd_jacobi_memory": _line,
}
