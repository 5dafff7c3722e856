"""What can be decomposed, and what comes back.

A dense tensor `[G, N, K]`; a sum of thin products, which is never formed; packed values at the
positions of seed masks, straight from the wire.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastrank.kernels.packing.mask import SparseMask

# bits of TruncatedSVD.status
NONFINITE = 1  # the matrix holds NaN or Inf: its factors, values and energy are NaN
NOT_CONVERGED = 2  # the core's sweeps, or the passes, ended before their criterion was met

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TruncatedSVD(NamedTuple):
    """U diag(S) Vh of each of G matrices, in fp32 (float64 where the operand was)."""

    U: Tensor  # [G, N, r], orthonormal columns, the largest entry of each positive
    S: Tensor  # [G, r], non-increasing
    Vh: Tensor  # [G, r, K], orthonormal rows
    energy: Tensor  # [G]: ΣS² / ‖A‖_F², 1 for a zero matrix
    status: Tensor  # int32 [G]: 0, or bits NONFINITE, NOT_CONVERGED

    def factors(self) -> tuple[Tensor, Tensor]:
        """An adapter's factors: B = U √S `[G, N, r]` and A = √S Vh `[G, r, K]`."""
        root = self.S.sqrt()
        return self.U * root[:, None, :], root[:, :, None] * self.Vh


@dataclass(frozen=True)
class FactoredSum:
    """Σ_q weights_q b_q a_qᵀ, for G matrices at once.

    Several clients' adapters stand behind each other: B = [B_1 ... B_n] along columns, A likewise
    along rows, and each client's weight (times its scale) once per rank of it.

    Args:
        B: `[G, N, Q]`.
        A: `[G, Q, K]`, in B's dtype.
        weights: `[Q]` or `[G, Q]`, any sign, or None for ones.
    """

    B: Tensor
    A: Tensor
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        B, A, weights = self.B, self.A, self.weights
        check_floats(B=B, A=A, weights=weights)
        if B.ndim != 3 or A.ndim != 3:
            raise ValueError(
                f"FactoredSum takes B [G, N, Q] and A [G, Q, K], not {_shape(B)} and {_shape(A)};"
                " add the first dimension with B[None]"
            )
        if B.shape[0] != A.shape[0]:
            raise ValueError(f"B {_shape(B)} has {B.shape[0]} matrices, A {_shape(A)} {A.shape[0]}")
        if B.shape[2] != A.shape[1]:
            raise ValueError(
                f"B {_shape(B)} has inner size Q = {B.shape[2]} but A {_shape(A)} has"
                f" {A.shape[1]}; column q of B goes with row q of A"
            )
        if B.dtype != A.dtype or B.device != A.device:
            raise TypeError(
                f"B is {B.dtype} on {B.device} but A {A.dtype} on {A.device}; give both alike"
            )
        if weights is None:
            return
        if tuple(weights.shape) not in ((B.shape[2],), (B.shape[0], B.shape[2])):
            raise ValueError(
                f"weights have shape {_shape(weights)}, wanted [{B.shape[2]}] or"
                f" [{B.shape[0]}, {B.shape[2]}]: one a column of B {_shape(B)}"
            )
        if weights.device != B.device:
            raise ValueError(f"weights are on {weights.device}, B on {B.device}")

    @classmethod
    def of(
        cls, factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float] | None = None
    ) -> "FactoredSum":
        """Σ_i weights_i B_i A_i of one place in the model, ranks of any size.

        Args:
            factors: (B_i `[N, R_i]`, A_i `[R_i, K]`), at least one.
            weights: one number a pair; None for ones.
        """
        if not factors:
            raise ValueError("FactoredSum.of needs at least one (B, A)")
        if weights is not None and len(weights) != len(factors):
            raise ValueError(f"{len(weights)} weights for {len(factors)} pairs (B, A)")
        for i, (B, A) in enumerate(factors):
            if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
                raise ValueError(
                    f"pair {i}: B {_shape(B)} and A {_shape(A)}; wanted [N, R] and [R, K]"
                )
        B = torch.cat([b for b, _ in factors], dim=1)[None]
        A = torch.cat([a for _, a in factors], dim=0)[None]
        if weights is None:
            return cls(B, A)
        each = torch.tensor(list(weights), dtype=torch.float64)
        spread = each.repeat_interleave(torch.tensor([b.shape[1] for b, _ in factors]))
        dtype = torch.float64 if B.dtype == torch.float64 else torch.float32
        return cls(B, A, spread.to(B.device, dtype))

    @property
    def shape(self) -> tuple[int, int, int]:
        """G, N, K."""
        return self.B.shape[0], self.B.shape[1], self.A.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.B.dtype

    @property
    def device(self) -> torch.device:
        return self.B.device

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.B, self.A) if self.weights is None else (self.B, self.A, self.weights)


@dataclass(frozen=True)
class PackedSparse:
    """G matrices of one shape, each zero outside the positions of its mask.

    Args:
        values: of each matrix, `[nnz]` in the mask's order of positions, all of one dtype.
        masks: of each matrix, over a shape (N, K).
    """

    values: Sequence[Tensor]
    masks: Sequence[SparseMask]

    def __post_init__(self) -> None:
        values, masks = list(self.values), list(self.masks)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "masks", masks)
        if not values or len(values) != len(masks):
            raise ValueError(
                f"PackedSparse takes as many values as masks, at least one of each, not"
                f" {len(values)} and {len(masks)}"
            )
        first = masks[0]
        if len(first.shape) != 2:
            raise ValueError(f"mask 0 is over shape {first.shape}; wanted two dimensions, (N, K)")
        for i, (value, mask) in enumerate(zip(values, masks, strict=True)):
            check_floats(**{f"values[{i}]": value})
            if tuple(mask.shape) != tuple(first.shape):
                raise ValueError(
                    f"mask {i} is over {tuple(mask.shape)} but mask 0 over {tuple(first.shape)};"
                    " truncated_svd_many takes several shapes"
                )
            if value.ndim != 1 or value.numel() != mask.nnz:
                raise ValueError(
                    f"values[{i}] has shape {_shape(value)} but its mask over {tuple(mask.shape)}"
                    f" keeps {mask.nnz} entries; wanted [{mask.nnz}]"
                )
            if value.dtype != values[0].dtype or value.device != values[0].device:
                raise TypeError(
                    f"values[{i}] is {value.dtype} on {value.device}, values[0]"
                    f" {values[0].dtype} on {values[0].device}; give all alike"
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        """G, N, K."""
        return len(self.masks), *self.masks[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.values[0].dtype

    @property
    def device(self) -> torch.device:
        return self.values[0].device

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self.values)


Operand = Tensor | FactoredSum | PackedSparse


def check_floats(**tensors: Tensor | None) -> None:
    """Raises TypeError for what is not a tensor of real floating-point numbers."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, wanted a tensor")
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; wanted float32, bfloat16, float16 or float64"
            )


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
