"""One of several layers that read the same x: what core.forward takes of it, all but x."""

from typing import NamedTuple

from torch import Tensor

from fastrank.kernels.lowrank.arguments import Aux, Branch


class Layer(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    e: Tensor | None
    branch: Branch
    aux: Aux
