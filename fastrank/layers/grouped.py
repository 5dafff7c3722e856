"""One frozen linear layer with many low-rank branches, each for its own rows of the batch."""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastrank.errors import UsageError
from fastrank.kernels.lowrank import grouped_lowrank_linear
from fastrank.layers.frozen_base import FrozenBase


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


class GroupedLowRankLinear(FrozenBase):
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
        sizes = tuple(int(rank) for rank in ranks)
        scales = list(scale) if isinstance(scale, Sequence) else [scale] * len(sizes)
        if in_features < 1 or out_features < 1 or not sizes or min(sizes) < 0:
            raise UsageError(
                f"in_features={in_features}, out_features={out_features}, ranks={list(ranks)}: "
                "sizes must be positive, and every adapter's rank at least 0"
            )
        if len(scales) != len(sizes) or not all(map(math.isfinite, scales)):
            raise UsageError(
                f"scale is {scale} for {len(sizes)} adapters; pass a finite number for each, or one"
            )
        super().__init__(
            in_features,
            out_features,
            sum(sizes),
            (sum(sizes), out_features),
            dropout_p=dropout_p,
            bias=bias,
            use_diagonal=use_diagonal,
            device=device,
            dtype=dtype,
            adapter_dtype=adapter_dtype,
            backend=backend,
        )
        self.ranks, self.scale = sizes, tuple(map(float, scales))
        self.groups = Groups() if groups is None else groups

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
        return cls._around(linear, ranks, options)

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
