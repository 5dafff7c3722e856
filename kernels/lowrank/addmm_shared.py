"""Several adapted layers that read one x (q, k and v; gate and up) on a CPU.

    S = x [A_1; A_2; ...]ᵀ    H = [U_1, U_2, ...]ᵀ x
    dx = Σ dY_i W_i + [U_1, U_2, ...] [s_1 c_1∘A_1; s_2 c_2∘A_2; ...]

One product each for all layers, so x is read, and widened, once; dx is added up in place. Same two
functions as shared_input.py, for layers that `fits` allows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrank.kernels.common import products
from fastrank.kernels.lowrank import addmm
from fastrank.kernels.lowrank.shared_layer import Layer

_Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def fits(layers: Sequence[Layer]) -> bool:
    """Whether the layers' branches can be computed behind each other: no masks, no dropout."""
    first = layers[0]
    return all(
        layer.branch.dropout_p == 0.0
        and layer.aux.index is None
        and layer.branch.trained == layer.branch.kept == layer.A.shape[0]
        and layer.A.dtype == first.A.dtype
        for layer in layers
    )


def linears(x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor]]:
    """y_i `[M, N_i]` and S_i `[M, R_i]` of every layer, for x `[M, K]`."""
    dtype = addmm.compute_dtype(x.dtype, layers[0].A.dtype, layers[0].branch)
    S = addmm.shrink(x, torch.cat([layer.A for layer in layers]).to(dtype))
    Ss = list(S.split([layer.A.shape[0] for layer in layers], 1))
    ys = []
    for layer, part in zip(layers, Ss, strict=True):
        y = products.linear(x, layer.weight, layer.bias)
        T = part if layer.e is None else part * layer.e
        addmm.add_product(y, T.to(dtype), layer.B.to(dtype).t(), layer.branch.scale)
        ys.append(y)
    return ys, Ss


def backward(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    layers: Sequence[Layer],
    Ss: Sequence[Tensor | None],
    needs: Sequence[tuple[bool, bool, bool, bool]],
    dx_dtype: torch.dtype,
) -> tuple[Tensor | None, list[_Grads]]:
    """dx, summed over the layers, and (dA, dB, de) of each; None where not needed.

    Args:
        dys: `[M, N_i]`; None for a y that nobody used, whose layer then has no gradients.
        x: `[M, K]`; may be None where no dA is needed.
        Ss: from linears().
        needs: for each layer which of dx, dA, dB and de; dx of all or of none.
        dx_dtype: of the result.
    """
    branch, A_dtype = layers[0].branch, layers[0].A.dtype
    x_dtype = (branch.autocast or dx_dtype) if x is None else x.dtype
    dtype = addmm.compute_dtype(x_dtype, A_dtype, branch)
    used = [i for i, dy in enumerate(dys) if dy is not None]
    grads: list[_Grads] = [(None, None, None)] * len(layers)
    dx, Us = None, {}
    for i in used:
        layer, (need_dx, need_dA, need_dB, need_de) = layers[i], needs[i]
        S = Ss[i] if need_dB or need_de else None
        U, G = addmm.read_dy(dys[i], layer.B, S if need_dB or not need_dA else None, dtype)
        Us[i] = U
        factor = layer.branch.scale
        dB = de = None
        if need_de and not need_dA:
            de = (layer.B.t() * G).sum(1).mul_(factor).to(layer.e.dtype)
        if need_dB:
            dB = torch.empty(layer.B.shape, dtype=layer.B.dtype)
            torch.mul(G.t(), factor if layer.e is None else layer.e * factor, out=dB)
        grads[i] = None, dB, de
        if need_dx:
            dx = products.add_mm_(dx, dys[i], layer.weight)
    if dx is not None:
        rows = [_scaled_A(layers[i]) for i in used]
        addmm.add_product(dx, torch.cat([Us[i] for i in used], 1), torch.cat(rows).to(dtype), 1.0)
    of_A = [i for i in used if needs[i][1]]
    if of_A:
        H = addmm.gram_x(torch.cat([Us[i] for i in of_A], 1), x, dtype)
        for i, part in zip(of_A, H.split([layers[i].A.shape[0] for i in of_A]), strict=True):
            grads[i] = _finish_A(layers[i], part, needs[i][3], grads[i])
    return dx, grads


def _scaled_A(layer: Layer) -> Tensor:
    A = layer.A * layer.branch.scale
    return A if layer.e is None else A * layer.e[:, None]


def _finish_A(layer: Layer, H: Tensor, need_de: bool, found: _Grads) -> _Grads:
    """dA = s c∘H, and de = s Σ_K A∘H where it is wanted."""
    factor, de = layer.branch.scale, found[2]
    if need_de:
        de = (H * layer.A).sum(1).mul_(factor).to(layer.e.dtype)
    dA = H * (factor if layer.e is None else layer.e[:, None] * factor)
    return dA.to(layer.A.dtype), found[1], de
