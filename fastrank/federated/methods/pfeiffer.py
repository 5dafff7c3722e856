"""Pfeiffer adapters: FedAvg of one small bottleneck in every block, after its feed-forward part.

Our reading of Pfeiffer et al., "AdapterFusion: Non-Destructive Task Composition for Transfer
Learning" (arXiv 2005.00247, the single-task adapter found there), averaged by FedAvg: houlsby.py
with the adapter after attention left out, at half the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastrank.federated.methods.houlsby import Houlsby


@dataclass(frozen=True)
class Pfeiffer(Houlsby):
    """FedAvg of one bottleneck a block."""

    name: ClassVar[str] = "pfeiffer"
    places: ClassVar[tuple[str, ...]] = ("feed-forward",)
