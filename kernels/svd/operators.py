"""A batch of matrices as two products with blocks of vectors, scaled to entries of about 1.

What a range finder needs of a matrix: A X, Aᵀ Y and ‖A‖_F. Scales are powers of two, so they round
nothing; a matrix with NaN or Inf becomes zero here, and its result is made NaN at the end.
"""

import warnings
from typing import Protocol

import torch
from torch import Tensor

from fastrank.kernels.svd.operands import FactoredSum
from fastrank.kernels.svd.sparse import SparseBatch

# beyond this a power of two has no fp32 reciprocal
_MOST_EXPONENT = 120


class Operator(Protocol):
    """G matrices (N, K), each divided by its scale."""

    shape: tuple[int, int, int]
    dtype: torch.dtype  # of the products
    device: torch.device
    scale: Tensor  # float64 [G], powers of two
    finite: Tensor  # bool [G]

    def apply(self, X: Tensor, minus: Tensor | None = None) -> Tensor:
        """A X for X `[G, K, q]`; A X - minus, written into minus, where that is given."""

    def apply_t(self, Y: Tensor) -> Tensor:
        """Aᵀ Y for Y `[G, N, q]`."""

    def norm2(self) -> Tensor:
        """‖A‖_F², float64 `[G]`."""


def power_of_two(largest: Tensor) -> Tensor:
    """The power of two just above each number, 1 for 0: float64."""
    _, exponent = torch.frexp(largest.double())
    exponent = exponent.clamp(-_MOST_EXPONENT, _MOST_EXPONENT)
    return torch.ldexp(torch.ones_like(largest, dtype=torch.float64), exponent)


def scaled(tensor: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(tensor / scale, scale [G], finite [G]); zeros where a matrix isn't finite.

    Args:
        tensor: `[G, ...]`.
        dims: all its dimensions but the first.
    """
    if tensor.numel() == 0:
        one = torch.ones(tensor.shape[0], dtype=torch.float64, device=tensor.device)
        return tensor, one, one.bool()
    largest = _largest(tensor)
    finite = largest.isfinite()
    scale = power_of_two(torch.where(finite, largest, 1.0))
    shape = (-1,) + (1,) * len(dims)
    factor = scale.reciprocal().to(tensor.dtype).view(shape)
    if finite.all():
        return tensor * factor, scale, finite
    return torch.where(finite.view(shape), tensor * factor, 0.0), scale, finite


class Dense:
    """A dense batch `[G, N, K]`, copied once to be scaled."""

    def __init__(self, A: Tensor) -> None:
        working = torch.promote_types(A.dtype, torch.float32)
        self.A, self.scale, self.finite = scaled(A.to(working), (1, 2))
        self.shape, self.dtype, self.device = tuple(A.shape), working, A.device

    def apply(self, X: Tensor, minus: Tensor | None = None) -> Tensor:
        return self.A @ X if minus is None else minus.baddbmm_(self.A, X, beta=-1)

    def apply_t(self, Y: Tensor) -> Tensor:
        return self.A.mT @ Y

    def norm2(self) -> Tensor:
        return self.A.flatten(1).double().square().sum(1)


class Sparse:
    """A sparse batch as one block-diagonal matrix in compressed rows, and its transpose likewise:
    one product serves all matrices, and a row's sum has one order."""

    def __init__(self, batch: SparseBatch) -> None:
        G, N, K = self.shape = batch.shape
        device = self.device = batch.values.device
        self.dtype = batch.values.dtype
        counts = batch.row_starts[::N].diff()
        each = torch.arange(G, device=device)
        matrix = each.repeat_interleave(counts, output_size=len(batch.values))
        largest = torch.zeros(G, dtype=batch.values.dtype, device=device)
        largest = largest.scatter_reduce(0, matrix, batch.values.abs(), "amax")
        self.finite = largest.isfinite()
        self.scale = power_of_two(torch.where(self.finite, largest, 1.0))
        factor = self.scale.reciprocal().to(batch.values.dtype)[matrix]
        values = torch.where(self.finite[matrix], batch.values * factor, 0.0)
        self._matrix, self._values = matrix, values
        columns = batch.columns + (matrix * K).int()
        self._rows = _csr(batch.row_starts, columns, values, (G * N, G * K))
        order = batch.order
        rows = batch.rows + (matrix[order] * N).int()
        self._columns = _csr(batch.column_starts, rows, values[order], (G * K, G * N))

    def apply(self, X: Tensor, minus: Tensor | None = None) -> Tensor:
        return _product(self._rows, X, minus)

    def apply_t(self, Y: Tensor) -> Tensor:
        return _product(self._columns, Y, None)

    def norm2(self) -> Tensor:
        zero = torch.zeros(self.shape[0], dtype=torch.float64, device=self._values.device)
        return zero.index_add(0, self._matrix, self._values.double().square())


class Factored:
    """A sum of thin products in float64, multiplied factor by factor."""

    def __init__(self, operand: FactoredSum) -> None:
        self.B, self.A, self.weights, self.scale, self.finite = widened(operand)
        self.A = self.weights[:, :, None] * self.A
        self.shape, self.dtype, self.device = operand.shape, torch.float64, operand.device

    def apply(self, X: Tensor, minus: Tensor | None = None) -> Tensor:
        X = self.A @ X
        return self.B @ X if minus is None else minus.baddbmm_(self.B, X, beta=-1)

    def apply_t(self, Y: Tensor) -> Tensor:
        return self.A.mT @ (self.B.mT @ Y)

    def norm2(self) -> Tensor:
        # ‖BA‖² = tr(BᵀB AAᵀ)
        return ((self.B.mT @ self.B) * (self.A @ self.A.mT)).sum((1, 2))


def widened(operand: FactoredSum) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(B, A, weights `[G, Q]`, scale, finite) in float64: B diag(weights) A = the sum / scale.

    The exponents of 32 and 16-bit factors leave float64 room for every product of three.
    """
    B, A = operand.B.double(), operand.A.double()
    G, _, Q = B.shape
    weights = B.new_ones(G, Q) if operand.weights is None else operand.weights.double().expand(G, Q)
    if operand.dtype == torch.float64:
        B, scale_b, finite_b = scaled(B, (1, 2))
        A, scale_a, finite_a = scaled(A, (1, 2))
        weights, scale_w, finite_w = scaled(weights, (1,))
        return B, A, weights, scale_b * scale_a * scale_w, finite_b & finite_a & finite_w
    # sums of entries are NaN or infinite where an entry is; finite ones can't overflow float64
    finite = torch.stack([t.flatten(1).sum(1).isfinite() for t in (B, A, weights)]).all(0)
    if not finite.all():
        B, A, weights = (
            torch.where(finite.view(-1, *(1,) * (t.ndim - 1)), t, 0.0) for t in (B, A, weights)
        )
    return B, A, weights, torch.ones_like(weights[:, 0]) if Q else B.new_ones(G), finite


def _largest(tensor: Tensor) -> Tensor:
    """The largest magnitude of each matrix, NaN where there is one; 0 for one without entries."""
    if tensor[0].numel() == 0:
        return tensor.new_zeros(tensor.shape[0])
    return torch.linalg.vector_norm(tensor.flatten(1), ord=torch.inf, dim=1)


def _product(A: Tensor, X: Tensor, minus: Tensor | None) -> Tensor:
    """A X - minus of a block-diagonal A and X `[G, k, q]`."""
    G, _, q = X.shape
    X = X.reshape(-1, q)
    # torch's own A @ X fills the result with zeros and copies it before the product
    out = X.new_empty(A.shape[0], q) if minus is None else minus.view(-1, q)
    torch.addmm(out, A, X, beta=0 if minus is None else -1, out=out)
    return out.view(G, -1, q)


def _csr(starts: Tensor, indices: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    # 32-bit indices are MKL's own: others are copied at every product
    parts = starts.int(), indices, values, size
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(*parts, check_invariants=False)
