"""What layers of our own share: a frozen base, trained factors beside it, and how both begin."""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import nn

from fastrank.errors import UsageError


class FrozenBase(nn.Module):
    """Frozen W `[out_features, in_features]` and bias `[out_features]`; trained A, B and e.

    Args:
        in_features: width of x.
        out_features: width of y.
        ranks: rows of A, and elements of e.
        shape_B: B's, which layers hold one way or the other.
        dropout_p: dropout on the branch's input while training, in [0, 1).
        bias: whether the base has a bias.
        use_diagonal: whether there is an e.
        device: where parameters live.
        dtype: dtype of W and bias.
        adapter_dtype: dtype of A, B and e; None keeps 16-bit bases' adapters in float32, as PEFT
            does, and follows `dtype` otherwise.
        backend: "auto", "triton" or "reference".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: int,
        shape_B: tuple[int, int],
        *,
        dropout_p: float,
        bias: bool,
        use_diagonal: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        adapter_dtype: torch.dtype | None,
        backend: str,
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout_p < 1.0:
            raise UsageError(f"dropout_p is {dropout_p}; pass a probability in [0, 1)")
        self.in_features, self.out_features = in_features, out_features
        self.dropout_p, self.backend = dropout_p, backend
        base = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        if adapter_dtype is None:
            adapter_dtype = torch.promote_types(base["dtype"], torch.float32)
        side = {"device": device, "dtype": adapter_dtype}
        weight = torch.empty(out_features, in_features, **base)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = (
            nn.Parameter(torch.empty(out_features, **base), requires_grad=False) if bias else None
        )
        self.A = nn.Parameter(torch.empty(ranks, in_features, **side))
        self.B = nn.Parameter(torch.empty(shape_B, **side))
        self.e = nn.Parameter(torch.empty(ranks, **side)) if use_diagonal else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W and bias as `nn.Linear` does, and start the adapters anew."""
        bound = 1.0 / math.sqrt(self.in_features)
        self.weight.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)
        self.reset_adapters()

    @torch.no_grad()
    def reset_adapters(self) -> None:
        """Draw A as `nn.Linear` draws a weight; B = 0 and e = 1, so the adapters add nothing."""
        bound = 1.0 / math.sqrt(self.in_features)
        self.A.uniform_(-bound, bound)
        self.B.zero_()
        if self.e is not None:
            self.e.fill_(1.0)

    @classmethod
    def _around(
        cls, linear: nn.Linear, ranks: int | Sequence[int], options: dict[str, Any]
    ) -> Self:
        """A layer of these ranks that shares the memory of `linear`, which is left as it is."""
        if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
            raise UsageError(
                f"from_linear got {type(linear).__name__}; "
                "pass a torch.nn.Linear with a floating-point weight"
            )
        weight, bias = linear.weight, linear.bias
        layer = cls(
            linear.in_features,
            linear.out_features,
            ranks,
            bias=bias is not None,
            device="meta",  # a base of its own would be drawn only to be dropped
            dtype=weight.dtype,
            **options,
        )
        layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        for name in ("A", "B", "e"):
            if (parameter := getattr(layer, name)) is not None:
                empty = torch.empty_like(parameter, device=weight.device)
                setattr(layer, name, nn.Parameter(empty))
        layer.reset_adapters()
        return layer.train(linear.training)
