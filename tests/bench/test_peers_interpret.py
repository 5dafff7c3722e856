"""The Triton schedule that others published, in the interpreter, against float64."""

import pytest
import torch

from fastrank.bench.accuracy import Oracle
from fastrank.bench.cases import Case, Operands

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["p0", "p0.25"])
@pytest.mark.parametrize(("M", "K", "N", "R"), [(40, 36, 70, 4), (130, 70, 33, 24)])
def test_lorafusion_schedule(M, K, N, R, p):
    from fastrank.bench.peers import lorafusion_schedule

    case = Case(M, K, N, R, "float32", p, bias=False, precision="16-bit")
    operands = Operands.of(case, torch.device("cpu"))
    oracle = Oracle(operands.x, operands.dy, operands.weight, None)
    assert oracle.worst(lorafusion_schedule(case, operands), p) < 2e-6
