"""Accuracy levels: how wide the block is, how it is filtered, and when it is good enough.

Chosen on the hardest operands there are, 1 % masked Gaussian matrices of 768 x 768 and 4096 x 4096,
whose spectra are almost flat (bench/svd.py measures the energy that each level reaches).
"""

from typing import NamedTuple


class Preset(NamedTuple):
    """A filtered subspace iteration."""

    passes: int  # filters, each followed by an orthogonalisation; a CPU adds more where needed
    degree: int  # of the filter's polynomial in A Aᵀ
    extra: int  # columns of the block beyond the rank
    missing: float  # share of the best energy that may be missing

    def width(self, rank: int, rows: int, columns: int) -> int:
        return min(rank + self.extra, rows, columns)


PRESETS = {
    "fast": Preset(2, 4, 16, 2e-2),
    "default": Preset(2, 8, 16, 1e-3),
    "tight": Preset(3, 8, 32, 1e-5),
}


def preset_of(accuracy: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: there is none.
    """
    if accuracy not in PRESETS:
        raise ValueError(f"unknown accuracy {accuracy!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[accuracy]
