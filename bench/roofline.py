"""What a training step of one adapted layer should take: the frozen layer plus bytes it moves.

A schedule is counted in passes over tensors of the input's size (M×K) and of the output's size
(M×N), both 16-bit; a pass is one read or one write of all of it, and a float32 tensor counts twice.
The adapters, S and the weight are small beside them and are left out, and so is any overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastrank.bench.cases import Case

_ITEM = 2  # bytes of a 16-bit element; float32 tensors are counted as two passes


@dataclass(frozen=True)
class Schedule:
    """Passes beyond the frozen layer's own.

    Args:
        x_forward, y_forward: over M×K and M×N tensors in the forward.
        x_backward, y_backward: the same in the backward.
    """

    x_forward: float
    y_forward: float
    x_backward: float
    y_backward: float

    @property
    def forward(self) -> float:
        return self.x_forward + self.y_forward

    @property
    def backward(self) -> float:
        return self.x_backward + self.y_backward

    def bytes(self, M: int, K: int, N: int) -> float:
        """Moved beyond the frozen layer's own, forward and backward."""
        x, y = self.x_forward + self.x_backward, self.y_forward + self.y_backward
        return _ITEM * M * (x * K + y * N)


_NOTHING = Schedule(0, 0, 0, 0)
SCHEDULES = {
    "frozen": _NOTHING,
    # S inside the forward GEMM, dS and dB from the dX GEMM's reads of dY; X once for dA
    "floor": Schedule(0, 0, 1, 0),
    # X -> S; dY -> dS and dB; X -> dA; both adds inside the GEMMs
    "split": Schedule(1, 0, 1, 1),
    # X -> X̂ and its mask, X̂ -> S; dY -> dS and dB, X̂ -> dA, the mask
    "lorafusion-dropout": Schedule(3.5, 0, 1.5, 1),
    # X -> S, y += T Bᵀ; dY -> dS and dB, X -> dA, dX += dS A
    "add-single-read": Schedule(1, 2, 3, 1),
    # the same, dY read for dS and again for dB
    "add": Schedule(1, 2, 3, 2),
    # X -> S, y += ; X -> dA, X -> S again, dY three times, dX +=
    "unsloth": Schedule(1, 2, 4, 3),
    # X -> S, L, L * scaling, y + L; scaling, dS, dB, dA, dX_l, dX + dX_l
    "peft-16-bit": Schedule(1, 6, 5, 4),
    # ... and X̂ with its mask each way
    "peft-16-bit-dropout": Schedule(3.5, 6, 7.5, 4),
    # X to float32 and back to 16 bits for the product, each way; dropout on the float32 copy
    "peft-autocast": Schedule(7, 6, 11, 4),
    "peft-autocast-dropout": Schedule(11.5, 6, 15.5, 4),
    # every tensor of the branch in float32, the sum too
    "peft": Schedule(5, 14, 10, 14),
    "peft-dropout": Schedule(9.5, 14, 14.5, 14),
}


def schedule_of(variant: str, case: Case) -> str | None:
    """The schedule that a variant of the benchmark follows, or None where none is counted.

    fastrank is held against the best design counted here, "split".
    """
    drops = "-dropout" if case.dropout else ""
    if variant in ("frozen", "fastrank"):
        return {"frozen": "frozen", "fastrank": "split"}[variant]
    if variant in ("peft", "peft-schedule"):
        return ("peft" if case.precision == "peft" else f"peft-{case.precision}") + drops
    if variant == "unsloth-schedule":
        return "unsloth"
    if variant == "lorafusion-schedule":
        return "lorafusion-dropout" if drops else "split"
    return None


def frozen_seconds(M: int, K: int, N: int, flops_per_second: float) -> float:
    """Forward and dX of the frozen layer, bound by its two products."""
    return 4.0 * M * K * N / flops_per_second


def seconds(
    schedule: str, M: int, K: int, N: int, flops_per_second: float, bytes_per_second: float
) -> float:
    """A full step under one of SCHEDULES."""
    extra = SCHEDULES[schedule].bytes(M, K, N) / bytes_per_second
    return frozen_seconds(M, K, N, flops_per_second) + extra


def overhead(
    schedule: str, M: int, K: int, N: int, flops_per_second: float, bytes_per_second: float
) -> float:
    """Predicted time over the frozen layer's, minus one."""
    whole = seconds(schedule, M, K, N, flops_per_second, bytes_per_second)
    return whole / frozen_seconds(M, K, N, flops_per_second) - 1.0
