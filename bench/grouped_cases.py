"""Cases of `fastrank bench grouped`: their operands, variants, and the float64 loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrank.bench import harness
from fastrank.bench.accuracy import largest, relative_error
from fastrank.bench.cases import DTYPES, LayerStep
from fastrank.bench.variants import leaf
from fastrank.kernels.lowrank import grouped_lowrank_linear, lowrank_linear

_SHORT = {"float32": "", "bfloat16": "-bf16"}


@dataclass(frozen=True)
class GroupedCase:
    """One frozen layer and an adapter for each group of rows.

    Args:
        rows: of each group.
        ranks: of each group.
        K, N: in_features, out_features.
        dtype: of x and the base, "float32" or "bfloat16".
        precision: of the adapters: "16-bit" (the base's dtype), "autocast" (float32, the forward
            under bf16 autocast) or "peft" (float32 without autocast).
        dropout: always 0: what a group draws is the kernels' tests' business.
    """

    rows: tuple[int, ...]
    ranks: tuple[int, ...]
    K: int
    N: int
    dtype: str = "float32"
    precision: str = "peft"
    dropout: float = 0.0

    @property
    def name(self) -> str:
        width = f"d{self.K}" if self.K == self.N else f"K{self.K}-N{self.N}"
        low, high = min(self.ranks), max(self.ranks)
        ranks = f"R{low}" if low == high else f"R{low}to{high}"
        ragged = "" if len(set(self.rows)) == 1 else "-ragged"
        name = f"M{sum(self.rows)}-{width}-G{len(self.rows)}-{ranks}{ragged}{_SHORT[self.dtype]}"
        # 16 bits throughout is what the goal is about: it has the plain name
        plain = "peft" if self.dtype == "float32" else "16-bit"
        return name if self.precision == plain else f"{name}-{self.precision}"

    @property
    def scales(self) -> tuple[float, ...]:
        """lora_alpha of 16, whatever the rank."""
        return tuple(16.0 / rank for rank in self.ranks)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "M": sum(self.rows),
            "K": self.K,
            "N": self.N,
            "R": max(self.ranks),
            "G": len(self.rows),
            "rows": list(self.rows),
            "ranks": list(self.ranks),
            "dtype": self.dtype,
            "precision": self.precision,
            "dropout": self.dropout,
        }


def spread(low: int, high: int, count: int) -> tuple[int, ...]:
    """So many whole numbers from low to high, evenly, in an order without a trend."""
    even = [low + round((high - low) * i / max(1, count - 1)) for i in range(count)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return tuple(even[i] for i in order)


def cases(device: torch.device, quick: bool) -> list[GroupedCase]:
    """Uniform and ragged groups; on a GPU the goal's case first, with all kinds of adapters."""
    if device.type == "cuda":
        d, m = (1024, 32) if quick else (4096, 128)
        rows, ranks = (m,) * 64, spread(4, 64, 64)
        uneven = spread(m // 4, 2 * m - m // 4, 64)
        return [
            *(
                GroupedCase(rows, ranks, d, d, "bfloat16", precision)
                for precision in ("16-bit", "autocast", "peft")
            ),
            GroupedCase(uneven, ranks, d, d, "bfloat16", "16-bit"),
            GroupedCase(rows, (16,) * 64, d, d, "bfloat16", "16-bit"),
        ]
    if quick:
        return [
            GroupedCase((16,) * 4, (4,) * 4, 96, 96),
            GroupedCase((9, 30, 1, 24), (2, 8, 3, 5), 96, 64),
        ]
    eight, uneven = (8,) * 8, spread(32, 224, 8)
    return [
        GroupedCase((128,) * 8, eight, 384, 384),
        GroupedCase((128,) * 8, eight, 384, 1536),
        GroupedCase((64,) * 16, (8,) * 16, 128, 128),
        GroupedCase(uneven, spread(2, 16, 8), 384, 384),
        GroupedCase((32,) * 64, spread(4, 64, 64), 768, 768),
        GroupedCase((128,) * 8, eight, 384, 384, "bfloat16", "peft"),
        GroupedCase(uneven, spread(2, 16, 8), 384, 384, "bfloat16", "peft"),
    ]


@dataclass
class GroupedOperands:
    """What all variants of a case share.

    Args:
        x: `[M, K]`.
        dy: `[M, N]`.
        weight: `[N, K]`.
        bias: `[N]`.
        A: of each group, float32 `[R, K]`.
        B: of each group, float32 `[N, R]`, not zero.
    """

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    A: list[Tensor]
    B: list[Tensor]

    @staticmethod
    def of(case: GroupedCase, device: torch.device) -> GroupedOperands:
        """Normal draws, the same for every run of a case on a device; base and branch of size 1."""
        generator = torch.Generator(device).manual_seed(0)
        dtype, (K, N) = DTYPES[case.dtype], (case.K, case.N)

        def draw(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, device=device) * std

        return GroupedOperands(
            x=draw(sum(case.rows), K).to(dtype),
            dy=draw(sum(case.rows), N).to(dtype),
            weight=draw(N, K, std=K**-0.5).to(dtype),
            bias=draw(N).to(dtype),
            A=[draw(R, K, std=K**-0.5) for R in case.ranks],
            B=[draw(N, R, std=R**-0.5) / s for R, s in zip(case.ranks, case.scales, strict=True)],
        )


Builder = Callable[[GroupedCase, GroupedOperands], LayerStep]


def frozen(case: GroupedCase, operands: GroupedOperands) -> LayerStep:
    """The base alone, over all rows: F.linear forward, dX backward."""

    def layer(x: Tensor) -> Tensor:
        return F.linear(x, operands.weight, operands.bias)

    return _step(case, operands, layer, {})


def grouped(case: GroupedCase, operands: GroupedOperands) -> LayerStep:
    """All groups in one call, their factors packed."""
    dtype = _adapter_dtype(case)
    A = nn.Parameter(torch.cat(operands.A).to(dtype))
    B = nn.Parameter(torch.cat([b.t() for b in operands.B]).to(dtype))

    def layer(x: Tensor) -> Tensor:
        return grouped_lowrank_linear(
            x,
            operands.weight,
            operands.bias,
            A,
            B,
            rows=case.rows,
            ranks=case.ranks,
            scale=case.scales,
        )

    return _step(case, operands, layer, {"A": A, "B": B})


def loop(case: GroupedCase, operands: GroupedOperands) -> LayerStep:
    """A call for each group, on its own parameters."""
    dtype, groups = _adapter_dtype(case), range(len(case.rows))
    A, B = ([nn.Parameter(t.to(dtype)) for t in own] for own in (operands.A, operands.B))

    def layer(x: Tensor) -> Tensor:
        parts = x.split(case.rows)
        ys = [
            lowrank_linear(
                parts[g], operands.weight, operands.bias, A[g], B[g], scale=case.scales[g]
            )
            for g in groups
        ]
        return torch.cat(ys)

    own = {f"A{g}": A[g] for g in groups} | {f"B{g}": B[g] for g in groups}
    return _step(case, operands, layer, own)


BUILDERS: Mapping[str, Builder] = {"frozen": frozen, "loop": loop, "grouped": grouped}


def _adapter_dtype(case: GroupedCase) -> torch.dtype:
    return DTYPES[case.dtype] if case.precision == "16-bit" else torch.float32


def _step(
    case: GroupedCase,
    operands: GroupedOperands,
    layer: Callable[[Tensor], Tensor],
    trained: dict[str, Tensor],
) -> LayerStep:
    autocast = DTYPES[case.dtype] if case.precision == "autocast" else None
    x, held = leaf(operands.x), [operands.weight, operands.bias]
    return LayerStep(layer, x, operands.dy, trained, autocast=autocast, frozen=held)


class GroupedOracle:
    """Float64 results of one case, a group at a time.

    Args:
        case, operands: whose factors, rounded to a variant's dtype, are the exact ones.
    """

    def __init__(self, case: GroupedCase, operands: GroupedOperands) -> None:
        self.case, self.operands = case, operands

    def worst(self, step: LayerStep, dropout: float = 0.0) -> float:
        """The largest relative error over y, dx and every group's dA and dB.

        A variant that was given nothing to train is compared with the base.
        """
        found = step.outputs()
        if step.trained and "A" in step.trained:  # packed
            A, B = (found.pop(name).split(self.case.ranks) for name in ("A", "B"))
            found |= {f"A{g}": a for g, a in enumerate(A)}
            found |= {f"B{g}": b.t() for g, b in enumerate(B)}
        return largest(self._errors(found, trained=bool(step.trained)))

    def _errors(self, found: dict[str, Tensor], trained: bool) -> list[float]:
        given, case, errors = self.operands, self.case, []
        dtype, weight, bias = _adapter_dtype(case), given.weight.double(), given.bias.double()
        ys, dxs = found["y"].split(case.rows), found["dx"].split(case.rows)
        xs, dys = given.x.split(case.rows), given.dy.split(case.rows)
        for g, scale in enumerate(case.scales):
            if case.rows[g] == 0:
                continue
            x, dy = xs[g].double(), dys[g].double()
            y, dx = x @ weight.t() + bias, dy @ weight
            if trained:
                A, B = (own[g].to(dtype).double() for own in (given.A, given.B))
                S, U = x @ A.t(), scale * (dy @ B)
                y, dx = y + scale * (S @ B.t()), dx + U @ A
                errors.append(relative_error(found[f"A{g}"], U.t() @ x))
                errors.append(relative_error(found[f"B{g}"], scale * (dy.t() @ S)))
            errors += [relative_error(ys[g], y), relative_error(dxs[g], dx)]
        return errors


@dataclass
class GroupedCell(harness.Cell):
    """All variants of one case, built on the same operands."""

    case: GroupedCase
    builders: Mapping[str, Builder]

    def prepare(self) -> None:
        """Build every variant, then measure its error and memory: results before speed."""
        operands = GroupedOperands.of(self.case, self.device)
        oracle = GroupedOracle(self.case, operands)
        for name, build in self.builders.items():
            self.found[name] = harness.Measured()
            step = self._guarded(name, lambda build=build: build(self.case, operands))
            if step is not None:
                self.steps[name] = step
                self._guarded(name, lambda name=name: self._look_at(name, oracle))
        for name, entry in self.found.items():
            if entry.skipped is not None:
                self.steps.pop(name, None)
