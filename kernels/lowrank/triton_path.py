"""The GPU path: the low-rank kernels around, or with, the base's products.

Same functions as addmm.py, which serve the same calls; see there for the maths. Whether the
vendor's product or the kernel of gemm.py makes y and dx is a matter of data: choices.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrank.kernels.lowrank.arguments import Aux, Branch
from fastrank.kernels.lowrank.calls import Call, start
from fastrank.kernels.lowrank.compaction import scatter
from fastrank.kernels.lowrank.launchers import (
    dual,
    expand_,
    finish,
    gemm,
    gram,
    reads_once,
    shrink,
    takes_gemm,
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    branch: Branch,
    aux: Aux,
) -> tuple[Tensor, Tensor, None]:
    """Base and branch: y `[M, N]`, then what add_ returns."""
    call, A, B, e = start(x.dtype, A, B, e, branch, aux)
    S = shrink(call, x, A, A.stride(), call.dropout)
    return base_and_branch(call, x, weight, bias, S, B, e), S, None


def base_and_branch(
    call: Call,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    S: Tensor,
    B: Tensor,
    e: Tensor | None,
) -> Tensor:
    """y `[M, N]` for an S that is there, B and e compacted."""
    B_strides = B.stride()[::-1]
    if takes_gemm(call, "forward", x, weight.t(), dropout=False):
        return gemm(call, x, weight.t(), bias, S, B, B_strides, e, dropout=False)
    y = F.linear(x, weight, bias)
    expand_(call, y, S, B, B_strides, e, call.branch.scale, dropout=False, add=True)
    return y


def add_(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    branch: Branch,
    aux: Aux,
) -> tuple[Tensor, None]:
    """Add the branch to y `[M, N]` in place; return S `[M, kept]`. Arguments as addmm.add_."""
    call, A, B, e = start(x.dtype, A, B, e, branch, aux)
    S = shrink(call, x, A, A.stride(), call.dropout)
    expand_(call, y, S, B, B.stride()[::-1], e, branch.scale, dropout=False, add=True)
    return S, None


def backward(
    dy: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    A: Tensor,
    B: Tensor,
    e: Tensor | None,
    S: Tensor | None,
    keep: None,
    branch: Branch,
    aux: Aux,
    needs: tuple[bool, bool, bool, bool],
    dx_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA, dB and de, None where not needed. Arguments as addmm.backward."""
    x_dtype = (branch.autocast or dx_dtype) if x is None else x.dtype
    layer = Gradients(dy, weight, A, B, e, S, branch, aux, needs, x_dtype)
    layer.read_dy()
    if layer.need_dA:
        layer.finish_dA(gram(layer.call, x, layer.U, layer.call.dropout))
    dx = layer.add_dx(None, dx_dtype) if needs[0] else None
    return dx, *layer.grads()


class Gradients:
    """The gradients of one layer, in steps: each reads one of its wide matrices.

    Several layers of one x take the steps side by side (shared_input.py).
    """

    def __init__(
        self,
        dy: Tensor,
        weight: Tensor | None,
        A: Tensor,
        B: Tensor,
        e: Tensor | None,
        S: Tensor | None,
        branch: Branch,
        aux: Aux,
        needs: tuple[bool, bool, bool, bool],
        x_dtype: torch.dtype,
    ):
        """Arguments as backward's; x_dtype: of x as the forward read it."""
        self._like, self._aux, self._wanted = (A, B, e), aux, needs[1:]
        self.call, self._A, self._B, self._e = start(x_dtype, A, B, e, branch, aux)
        # another dtype: lowrank_add under autocast to an fp32 y
        self._dy = dy if self.call.dot == torch.float32 else dy.to(self.call.dot)
        self._weight, self._S = weight, S
        self._need_dx = needs[0]
        self.need_dA, self._need_dB, self._need_de = (
            need and branch.trained > 0 for need in self._wanted
        )
        self.U = self._dA = self._dB = self._de = None

    def read_dy(self) -> None:
        """U where something needs it, dB, and de where dB or nothing else is asked for."""
        call, dy, S = self.call, self._dy, self._S
        B, B_strides, G = self._B, self._B.stride()[::-1], None
        from_rows = self._need_de and not (self.need_dA or self._need_dB)
        need_U = self._need_dx or self.need_dA or from_rows
        if need_U and self._need_dB and reads_once(call, *dy.shape):
            self.U, G = dual(call, dy, S, B, B_strides)
        else:
            if need_U:
                self.U = shrink(call, dy, B, B_strides, dropout=False)
            if self._need_dB:
                G = gram(call, dy, S, dropout=False)
        if self._need_dB:
            self._dB, written = _room_for(self._like[1], 1, B.shape[1], self._aux)
            strides = written.stride()[::-1]
            self._de = finish(call, G, written, strides, B, B_strides, self._e, self._need_de)
        elif from_rows:
            self._de = _masked_row_sum(call, self.U, S)

    def finish_dA(self, H: Tensor) -> None:
        """dA from the parts of drop(x)ᵀ U; de too, where dB is not asked for."""
        A = self._A
        self._dA, written = _room_for(self._like[0], 0, A.shape[0], self._aux)
        want_de = self._need_de and not self._need_dB
        strides = written.stride(), A.stride()
        de = finish(self.call, H, written, strides[0], A, strides[1], self._e, want_de)
        self._de = de if want_de else self._de

    def add_dx(self, dx: Tensor | None, dx_dtype: torch.dtype) -> Tensor:
        """dx with this layer's share, added in place where there is one already."""
        call, dy, weight, A = self.call, self._dy, self._weight, self._A
        branch = (self.U, A, A.stride(), self._e)
        if weight is not None and dx is None:
            if takes_gemm(call, "dx", dy, weight, call.dropout):
                return gemm(call, dy, weight, None, *branch, call.dropout)
            dx = dy @ weight
        elif weight is not None:
            dx.addmm_(dy, weight)
        add = dx is not None
        if not add:
            dx = torch.empty(dy.shape[0], A.shape[1], dtype=dx_dtype, device=dy.device)
        expand_(call, dx, *branch, call.branch.scale, call.dropout, add)
        return dx

    def grads(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dA, dB and de of all ranks; None where not needed."""
        found = zip((self._dA, self._dB, self._de), (0, 1, 0), self._like, strict=True)
        dA, dB, de = (
            scatter(grad, dim, like, self._aux) if wanted else None
            for (grad, dim, like), wanted in zip(found, self._wanted, strict=True)
        )
        return dA, dB, de


def _room_for(like: Tensor, dim: int, kept: int, aux: Aux) -> tuple[Tensor, Tensor]:
    """Where a gradient goes: what scatter() takes, and its part for the ranks that are kept.

    Of a prefix that part is a view, so that nothing is copied and its strides don't follow kept.
    """
    shape = list(like.shape)
    if aux.index is not None:
        shape[dim] = kept
    make = torch.empty if kept == shape[dim] else torch.zeros
    whole = make(shape, dtype=like.dtype, device=like.device)
    return whole, whole.narrow(dim, 0, kept)


def _masked_row_sum(call: Call, U: Tensor, S: Tensor) -> Tensor:
    """de = scale Σ_M U∘S where neither dA nor dB is asked for."""
    de = (U * S).sum(0) * call.branch.scale
    ranks = torch.arange(de.shape[0], device=de.device)
    trained = ranks < call.branch.trained
    if call.masked:
        trained &= (call.masks[0] != 0) & (call.masks[1] != 0)
    return torch.where(trained, de, 0.0)
