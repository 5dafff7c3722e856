"""The definition of lowrank_linear in plain torch: specification, oracle and baseline at once.

    y = x Wᵀ + bias + scale * ((drop(x) Aᵀ) ⊙ e ⊙ active) Bᵀ

Every gradient is autograd's own, so float64 inputs pass gradcheck. The branch is computed in fp32
(fp64 for fp64 inputs) whatever the dtypes; the base is F.linear, autocast included.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrank.kernels.common import draw_seed, dropout_keep


def rank_mask(mask: Tensor | int | None, ranks: int, device: torch.device) -> Tensor | None:
    """`active` or `trainable` as bool `[R]` on the device; None for all of them."""
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 1:
        return mask.to(device)
    return torch.arange(ranks, device=device) < mask


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """A dropout seed as int64 `[1]` on the device, drawn from torch's generator for None."""
    if seed is None:
        return draw_seed(device)
    if isinstance(seed, Tensor):
        return seed
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def lowrank_branch(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    scale: float = 1.0,
    e: Tensor | None = None,
    active: Tensor | int | None = None,
    trainable: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    row_ids: Tensor | None = None,
) -> Tensor:
    """scale * ((drop(x) Aᵀ) ⊙ e ⊙ active) Bᵀ, in fp32 (fp64 for fp64 x); arguments as the op's."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    ranks, columns = A.shape
    x, A, B = x.to(wide), A.to(wide), B.to(wide)
    e = None if e is None else e.to(wide)

    # where, not a product: 0 * NaN is NaN, and a rank that is off must not leak
    on = rank_mask(active, ranks, x.device)
    if on is not None:
        A, B = torch.where(on[:, None], A, 0.0), torch.where(on, B, 0.0)
        e = None if e is None else torch.where(on, e, 0.0)
    trained = rank_mask(trainable, ranks, x.device)
    if trained is not None:
        A = torch.where(trained[:, None], A, A.detach())
        B = torch.where(trained, B, B.detach())
        e = None if e is None else torch.where(trained, e, e.detach())

    if dropout_p == 0.0:
        shrunk = F.linear(x, A)  # (..., R)
    else:
        flat = x.reshape(-1, columns)
        seed = seed_tensor(seed, x.device)
        keep = dropout_keep(seed, flat.shape[0], columns, dropout_p, row_ids).view(x.shape)
        shrunk = F.linear(torch.where(keep, x, 0.0) / (1.0 - dropout_p), A)
        if trained is not None:  # a rank that takes part without being trained reads x as it is
            shrunk = torch.where(trained, shrunk, F.linear(x, A))
    if on is not None:
        shrunk = torch.where(on, shrunk, 0.0)
    if e is not None:
        shrunk = shrunk * e
    return scale * F.linear(shrunk, B)


def lowrank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, **keywords
) -> Tensor:
    """x Wᵀ + bias + branch, in the dtype that F.linear returns here; keywords of lowrank_branch."""
    base = F.linear(x, weight, bias)
    return _add(base, x, A, B, **keywords)


def lowrank_add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, **keywords) -> Tensor:
    """y + branch, in y's dtype; keywords of lowrank_branch."""
    return _add(y, x, A, B, **keywords)


def _add(base: Tensor, x: Tensor, A: Tensor, B: Tensor, **keywords) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        if x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            branch = lowrank_branch(x, A, B, **keywords)
    else:
        branch = lowrank_branch(x, A, B, **keywords)
    return (base + branch).to(base.dtype)
