"""A frozen linear layer with a trainable low-rank branch, for models that don't use PEFT."""

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastrank.errors import UsageError
from fastrank.kernels.lowrank import lowrank_linear
from fastrank.layers.frozen_base import FrozenBase


class LowRankLinear(FrozenBase):
    """`y = x Wᵀ + bias + (lora_alpha / r) · ((drop(x) Aᵀ) ⊙ e ⊙ active) Bᵀ` in one fused call.

    W `[out_features, in_features]` and bias `[out_features]` are frozen; A `[r, in_features]`,
    B `[out_features, r]` and, with `use_diagonal`, e `[r]` are trained. B starts at zero (e at
    one), so a new layer computes its base. x `[..., in_features]` -> `[..., out_features]`.

        >>> layer = fastrank.LowRankLinear.from_linear(torch.nn.Linear(64, 32), r=8, lora_alpha=16)
        >>> layer.active = 4  # only the first four ranks exist from now on
        >>> layer(torch.randn(2, 64)).sum().backward()
        >>> layer.B.grad[:, 4:].any().item()
        False
        >>> layer.merge()
        Linear(in_features=64, out_features=32, bias=True)

    Args:
        in_features: width of x.
        out_features: width of y.
        r: rank, 0 or more.
        lora_alpha: the branch is scaled by lora_alpha / r; None means r, so a scale of 1.
        dropout_p: dropout on the branch's input while training, in [0, 1).
        bias: whether the base has a bias.
        use_diagonal: train e `[r]` between the factors, as AdaLoRA's singular values.
        device: where parameters live.
        dtype: dtype of W and bias.
        adapter_dtype: dtype of A, B and e; None keeps 16-bit bases' adapters in float32, as PEFT
            does, and follows `dtype` otherwise.
        backend: "auto", "triton" or "reference".

    Raises:
        UsageError: a size, alpha or probability out of range, or a mask of the wrong length.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        lora_alpha: float | None = None,
        dropout_p: float = 0.0,
        bias: bool = True,
        use_diagonal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        if in_features < 1 or out_features < 1 or r < 0:
            raise UsageError(
                f"in_features={in_features}, out_features={out_features}, r={r}: "
                "sizes must be positive and r at least 0"
            )
        alpha = float(r if lora_alpha is None else lora_alpha)
        if r and not (math.isfinite(alpha) and alpha > 0):
            raise UsageError(f"lora_alpha is {lora_alpha}; pass a finite number above 0")
        super().__init__(
            in_features,
            out_features,
            r,
            (out_features, r),
            dropout_p=dropout_p,
            bias=bias,
            use_diagonal=use_diagonal,
            device=device,
            dtype=dtype,
            adapter_dtype=adapter_dtype,
            backend=backend,
        )
        self.r, self.lora_alpha, self.scale = r, alpha, alpha / r if r else 0.0
        self._active: Tensor | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, r: int, **options: Any) -> Self:
        """A layer around `linear`, sharing its weight's and bias's memory (frozen here).

        Args:
            linear: the base, weight `[out_features, in_features]`; itself left as it is.
            r: rank.
            **options: `lora_alpha`, `dropout_p`, `use_diagonal`, `adapter_dtype`, `backend`.

        Raises:
            UsageError: `linear` is not a torch.nn.Linear with a floating-point weight.
        """
        return cls._around(linear, r, options)

    @property
    def active(self) -> Tensor | None:
        """Ranks that exist, bool `[r]`, or None for all; saved with the state_dict when set.

        Assign None, a bool mask `[r]` (list or tensor), or an int n for the first n ranks. A
        tensor stays on its device: one on the host lets the kernel skip the other ranks, one on an
        accelerator can change without a sync. A rank that is off adds nothing and gets exactly
        zero gradients.
        """
        return self._active

    @active.setter
    def active(self, mask: "Tensor | list[bool] | int | None") -> None:
        if mask is None:
            self._active = None
            return
        if isinstance(mask, int) and not isinstance(mask, bool):
            if not 0 <= mask <= self.r:
                raise UsageError(f"active is {mask}; a prefix must lie in [0, {self.r}]")
            mask = torch.arange(self.r) < mask
        mask = torch.as_tensor(mask)
        if mask.dtype != torch.bool or mask.shape != (self.r,):
            raise UsageError(
                f"active is {str(mask.dtype).removeprefix('torch.')} of shape "
                f"{list(mask.shape)}; pass a bool mask of shape [{self.r}], an int or None"
            )
        self._active = mask

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in_features]` -> `[..., out_features]`."""
        return lowrank_linear(
            x,
            self.weight,
            self.bias,
            self.A,
            self.B,
            scale=self.scale,
            e=self.e,
            active=self._active,
            dropout_p=self.dropout_p if self.training else 0.0,
            backend=self.backend,
        )

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A new `nn.Linear` with the active ranks folded into the weight, summed in float32."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        a, b = self.A.to(wide), self.B.to(wide)
        if self.e is not None:
            a = a * self.e.to(wide)[:, None]
        if self._active is not None:
            # selecting, not multiplying: a rank that is off may hold anything, NaN included
            kept = self._active.to(a.device).nonzero()[:, 0]
            a, b = a[kept], b[:, kept]
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        linear.weight.copy_(torch.addmm(self.weight.to(wide), b, a, alpha=self.scale))
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        parts = [
            f"in_features={self.in_features}",
            f"out_features={self.out_features}",
            f"r={self.r}",
            f"lora_alpha={self.lora_alpha:g}",
            f"bias={self.bias is not None}",
        ]
        if self.dropout_p:
            parts.append(f"dropout_p={self.dropout_p:g}")
        if self.e is not None:
            parts.append("use_diagonal=True")
        return ", ".join(parts)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._active is not None:
            destination[prefix + "active"] = self._active

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # a saved mask replaces ours, and so does its absence; args end with
        # (missing_keys, unexpected_keys, error_messages)
        key = prefix + "active"
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.active = state_dict[key].clone() if key in state_dict else None
        unexpected_keys = args[-2]
        if key in unexpected_keys:
            unexpected_keys.remove(key)
