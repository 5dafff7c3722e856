"""Calls of the grouped and packed-gradient paths as training makes them, for planning launches.

The ahead-of-time tests plan small ones that between them take every tile and flag, the static
report plans those of the published sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrank.kernels.packing import SparseMask
from fastrank.kernels.packing.overlay import places_of

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# (x and dy, adapters, precision, torch's switch for fp32 products)
MODES = {
    "bf16": (BF16, BF16, "peft", "highest"),
    "bf16-compute": (BF16, F32, "compute", "highest"),
    "fp16": (FP16, FP16, "peft", "highest"),
    "fp16-compute": (FP16, F32, "compute", "highest"),
    "bf16-fp32": (BF16, F32, "peft", "highest"),
    "fp16-fp32": (FP16, F32, "peft", "highest"),
    "fp32": (F32, F32, "peft", "highest"),
    "fp32-tf32": (F32, F32, "peft", "high"),
}


def grouped_step(
    mode: str = "bf16-fp32",
    rows: tuple[int, ...] = (64, 70),
    ranks: tuple[int, ...] = (8, 3),
    p: float = 0.1,
    masked: bool = False,
    ids: bool = False,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, True),
    on_device: bool = False,
    K: int = 256,
    N: int = 256,
    e: bool = True,
    device: str = "cpu",
) -> None:
    """Forward and backward of the path, launches planned and not run.

    Args:
        mode: a key of MODES.
        rows, ranks: of each group; on_device: whether only the device knows them.
        p: dropout's probability; ids: whether its rows are named.
        masked: whether an active mask is given; e: whether a diagonal is.
        needs: whose gradients are wanted: x, A, B, e.
        device: "meta" for wide tensors without memory; tables of tiles stay on the CPU.
    """
    from fastrank.kernels.lowrank import grouped_triton
    from fastrank.kernels.lowrank.grouped_arguments import GroupedAux, GroupedBranch, Layout

    dtype, adapters, precision, _ = MODES[mode]
    M, R, G = sum(rows), sum(ranks), len(rows)
    starts = (torch.tensor([0, *counts]).cumsum(0) for counts in (rows, ranks))
    known = (None, None) if on_device else (rows, ranks)
    layout = Layout(*known, *starts, R if on_device else max(ranks))
    branch = GroupedBranch(p, "triton", None, precision)
    aux = GroupedAux(
        torch.ones(G),
        torch.arange(G) if p else None,
        torch.arange(M) if ids else None,
        torch.ones(R, dtype=torch.bool) if masked else None,
        None,
    )

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    x, dy, weight = (zeros(*s, dtype=dtype) for s in ((M, K), (M, N), (N, K)))
    A, B = (zeros(*s, dtype=adapters) for s in ((R, K), (R, N)))
    diagonal = zeros(R, dtype=adapters) if e else None
    _, S, keep = grouped_triton.forward(x, weight, None, A, B, diagonal, layout, branch, aux)
    arguments = (dy, weight, x, A, B, diagonal, S, keep, layout, branch, aux, needs, dtype)
    grouped_triton.backward(*arguments)


def weight_grad_step(
    dtype: torch.dtype = BF16,
    M: int = 512,
    N: int = 512,
    K: int = 256,
    scheme: str = "stratified",
    density: float = 0.01,
    device: str = "cpu",
    **fields,
) -> None:
    """masked_weight_grad's launch, planned and not run.

    Args:
        device: "meta" for a stratified mask alone.
        fields: of the mask.
    """
    from fastrank.kernels.packing import launch_grad

    mask = SparseMask((N, K), density, scheme=scheme, **fields)
    dy, x = (torch.zeros(M, width, dtype=dtype, device=device) for width in (N, K))
    launch_grad.masked_gradient(dy, x, places_of(mask, torch.device(device)))
