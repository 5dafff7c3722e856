"""One frozen linear layer with many low-rank branches, each for its own rows of the batch."""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastrank.errors import UsageError
from fastrank.kernels.lowrank import grouped_lowrank_linear


class Groups:
    """Whose the examples of a batch are; one object that all layers of a model read.

        >>> from fastrank.layers import Groups
        >>> groups = Groups([2, 0, 1])  # two examples of adapter 0, none of 1, one of 2
        >>> groups.rows(torch.zeros(3, 5, 64))  # of five tokens each
        [10, 0, 5]

    Args:
        examples: of each adapter, in the order of the batch.
    """

    def __init__(self, examples: Sequence[int] = ()) -> None:
        self.examples = examples

    @property
    def examples(self) -> tuple[int, ...]:
        """Examples of each adapter in the forwards to come; assign before each batch."""
        return self._examples

    @examples.setter
    def examples(self, examples: Sequence[int]) -> None:
        counts = tuple(examples)
        if any(type(count) is not int or count < 0 for count in counts):
            raise UsageError(f"examples are {list(counts)}; give a whole number for each adapter")
        self._examples = counts

    def rows(self, x: Tensor) -> list[int]:
        """Rows of each adapter in an activation `[..., K]` with equally many of each example.

        Raises:
            UsageError: nobody has an example, or the rows don't divide among them.
        """
        count, examples = x.shape[:-1].numel(), sum(self._examples)
        if not examples or count % examples:
            raise UsageError(
                f"x {list(x.shape)} has {count} rows, examples are {list(self._examples)}; assign "
                "each adapter's number of examples to the layer's groups.examples first"
            )
        return [number * (count // examples) for number in self._examples]


class GroupedLowRankLinear(nn.Module):
    """`y = x Wᵀ + bias + scale_g · ((drop(x) A_gᵀ) ⊙ e_g) B_g` for the rows of each adapter g.

    One pass of the base for all adapters, whatever their ranks. Factors lie behind each other:
    A `[Σr, in_features]`, B `[Σr, out_features]` (rank-major, unlike a single layer's) and, with
    `use_diagonal`, e `[Σr]` are trained; W and bias are frozen. B starts at zero, e at one. Rows
    of x have to be sorted by adapter.

        >>> from fastrank.layers import GroupedLowRankLinear
        >>> layer = GroupedLowRankLinear.from_linear(torch.nn.Linear(64, 32), ranks=[8, 4, 2])
        >>> layer.groups.examples = [1, 2, 0]
        >>> layer(torch.randn(3, 5, 64)).shape
        torch.Size([3, 5, 32])
        >>> A, B, e = layer.adapter(1)  # [4, 64] and [32, 4], as a layer of its own has them
        >>> layer.load_adapter(1, A, torch.ones(32, 4))

    Args:
        in_features: width of x.
        out_features: width of y.
        ranks: of each adapter, 0 or more.
        scale: of each adapter's branch, or one number for all.
        groups: whose rows are whose; layers of one model share one. None makes one.
        dropout_p: dropout on the branches' input while training, in [0, 1).
        bias: whether the base has a bias.
        use_diagonal: train e between the factors, as AdaLoRA's singular values.
        device: where parameters live.
        dtype: dtype of W and bias.
        adapter_dtype: dtype of A, B and e; None keeps 16-bit bases' adapters in float32, as PEFT
            does, and follows `dtype` otherwise.
        backend: "auto", "triton" or "reference".

    Raises:
        UsageError: a size, scale or probability out of range, or another number of scales.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: Sequence[int],
        *,
        scale: float | Sequence[float] = 1.0,
        groups: Groups | None = None,
        dropout_p: float = 0.0,
        bias: bool = True,
        use_diagonal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.ranks = tuple(int(rank) for rank in ranks)
        scales = list(scale) if isinstance(scale, Sequence) else [scale] * len(self.ranks)
        if in_features < 1 or out_features < 1 or not self.ranks or min(self.ranks) < 0:
            raise UsageError(
                f"in_features={in_features}, out_features={out_features}, ranks={list(ranks)}: "
                "sizes must be positive, and every adapter's rank at least 0"
            )
        if len(scales) != len(self.ranks) or not all(map(math.isfinite, scales)):
            raise UsageError(
                f"scale is {scale} for {len(self.ranks)} adapters; pass a finite number for each, "
                "or one"
            )
        if not 0.0 <= dropout_p < 1.0:
            raise UsageError(f"dropout_p is {dropout_p}; pass a probability in [0, 1)")
        self.in_features, self.out_features = in_features, out_features
        self.scale, self.dropout_p, self.backend = tuple(map(float, scales)), dropout_p, backend
        self.groups = Groups() if groups is None else groups
        base = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        if adapter_dtype is None:
            adapter_dtype = torch.promote_types(base["dtype"], torch.float32)
        side, total = {"device": device, "dtype": adapter_dtype}, sum(self.ranks)
        weight = torch.empty(out_features, in_features, **base)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = (
            nn.Parameter(torch.empty(out_features, **base), requires_grad=False) if bias else None
        )
        self.A = nn.Parameter(torch.empty(total, in_features, **side))
        self.B = nn.Parameter(torch.empty(total, out_features, **side))
        self.e = nn.Parameter(torch.empty(total, **side)) if use_diagonal else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W and bias as `nn.Linear` does, and start all branches anew."""
        bound = 1.0 / math.sqrt(self.in_features)
        self.weight.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)
        self.reset_adapters()

    @torch.no_grad()
    def reset_adapters(self) -> None:
        """Draw A as `nn.Linear` draws a weight; B = 0 and e = 1, so the branches add nothing."""
        bound = 1.0 / math.sqrt(self.in_features)
        self.A.uniform_(-bound, bound)
        self.B.zero_()
        if self.e is not None:
            self.e.fill_(1.0)

    @classmethod
    def from_linear(cls, linear: nn.Linear, ranks: Sequence[int], **options: Any) -> Self:
        """A layer around `linear`, sharing its weight's and bias's memory (frozen here).

        Args:
            linear: the base, weight `[out_features, in_features]`; itself left as it is.
            ranks: of each adapter.
            **options: `scale`, `groups`, `dropout_p`, `use_diagonal`, `adapter_dtype`, `backend`.

        Raises:
            UsageError: `linear` is not a torch.nn.Linear with a floating-point weight.
        """
        if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
            raise UsageError(
                f"from_linear got {type(linear).__name__}; "
                "pass a torch.nn.Linear with a floating-point weight"
            )
        weight, bias = linear.weight, linear.bias
        sizes = linear.in_features, linear.out_features
        # on meta: a base of its own would be drawn only to be dropped
        options |= {"bias": bias is not None, "device": "meta", "dtype": weight.dtype}
        layer = cls(*sizes, ranks, **options)
        layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        for name in ("A", "B", "e"):
            if (parameter := getattr(layer, name)) is not None:
                empty = torch.empty_like(parameter, device=weight.device)
                setattr(layer, name, nn.Parameter(empty))
        layer.reset_adapters()
        return layer.train(linear.training)

    def adapter(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """One adapter's A `[r, in_features]`, B `[out_features, r]` and e `[r]`, in its memory.

        Raises:
            UsageError: there is no such adapter.
        """
        if not 0 <= index < len(self.ranks):
            raise UsageError(f"adapter {index} of {len(self.ranks)}")
        start = sum(self.ranks[:index])
        own = slice(start, start + self.ranks[index])
        e = None if self.e is None else self.e.detach()[own]
        return self.A.detach()[own], self.B.detach()[own].t(), e

    @torch.no_grad()
    def load_adapter(self, index: int, A: Tensor, B: Tensor, e: Tensor | None = None) -> None:
        """Copy an adapter in, in the shapes of `adapter`.

        Raises:
            UsageError: no such adapter, other shapes, or e where the layer has none (or the other
                way round).
        """
        own = self.adapter(index)
        given, wanted = (
            [None if t is None else list(t.shape) for t in s] for s in ((A, B, e), own)
        )
        if given != wanted:
            raise UsageError(
                f"adapter {index} takes A, B, e of shapes {wanted}, these are of {given}"
            )
        for place, value in zip(own, (A, B, e), strict=True):
            if value is not None:
                place.copy_(value)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in_features]`, sorted by adapter -> `[..., out_features]`."""
        return grouped_lowrank_linear(
            x,
            self.weight,
            self.bias,
            self.A,
            self.B,
            rows=self.groups.rows(x),
            ranks=self.ranks,
            scale=self.scale,
            e=self.e,
            dropout_p=self.dropout_p if self.training else 0.0,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        parts = [
            f"in_features={self.in_features}",
            f"out_features={self.out_features}",
            f"ranks={list(self.ranks)}",
            f"bias={self.bias is not None}",
        ]
        if self.dropout_p:
            parts.append(f"dropout_p={self.dropout_p:g}")
        if self.e is not None:
            parts.append("use_diagonal=True")
        return ", ".join(parts)
