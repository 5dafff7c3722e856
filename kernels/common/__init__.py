"""Shared by the ops: backend choice, Philox, launch sizes. Importing this never loads Triton."""

from fastrank.kernels.common.backend import BACKENDS, choose_backend, interpreting, why_not_triton
from fastrank.kernels.common.philox import (
    draw_seed,
    dropout_keep,
    dropout_threshold,
    philox4x32,
    row_words,
)

__all__ = [
    "BACKENDS",
    "choose_backend",
    "draw_seed",
    "dropout_keep",
    "dropout_threshold",
    "interpreting",
    "philox4x32",
    "row_words",
    "why_not_triton",
]
