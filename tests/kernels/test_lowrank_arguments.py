"""Bad arguments: what came, what was wanted and what to do, before any work."""

import math

import pytest
import torch
from lowrank_cases import Case

from fastrank.kernels.common import choose_backend
from fastrank.kernels.common.backend import Setting
from fastrank.kernels.lowrank import lowrank_add, lowrank_linear

CASE = Case(M=6, K=5, N=4, R=3)


def call(**changes):
    given = {n: None if t is None else t.detach() for n, t in CASE.inputs().items()}
    names = ("x", "weight", "bias", "A", "B")
    given |= {n: v for n, v in changes.items() if n in given}
    keywords = {n: v for n, v in changes.items() if n not in given}
    return lowrank_linear(*(given[n] for n in names), e=given["e"], **keywords)


F = torch.zeros
BAD = {
    "x not a tensor": ({"x": [1.0]}, TypeError, "x has type list"),
    "integer x": ({"x": torch.ones(6, 5, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
    "0-d x": ({"x": F(())}, ValueError, r"x is 0-d"),
    "columns of x": ({"x": F(6, 7)}, ValueError, "x has 7 columns but A 5"),
    "1-d A": ({"A": F(5)}, ValueError, r"A has shape \[5\]"),
    "ranks differ": ({"A": F(4, 5)}, ValueError, "A has rank dim 4 but B has 3"),
    "no columns at all": (
        {"x": F(6, 0), "A": F(3, 0), "weight": F(4, 0)},
        ValueError,
        "K and N must be positive",
    ),
    "no columns": ({"x": F(6, 0), "A": F(3, 0)}, ValueError, "K and N must be positive"),
    "dtypes differ": ({"A": F(3, 5).half()}, TypeError, "A has dtype torch.float16 but B"),
    "e too long": ({"e": F(4)}, ValueError, r"e has shape \[4\]; pass one value a rank, \[3\]"),
    "no weight": ({"weight": None}, TypeError, "use lowrank_add"),
    "Conv1D weight": ({"weight": F(5, 4)}, ValueError, "transpose a Conv1D weight"),
    "bias": ({"bias": F(5)}, ValueError, r"bias has shape \[5\]; pass \[4\]"),
    "base dtypes": ({"weight": F(4, 5).half()}, TypeError, "weight has dtype torch.float16 but x"),
    "device": ({"A": torch.zeros(3, 5, device="meta")}, ValueError, "A is on meta but x on cpu"),
    "scale type": ({"scale": torch.tensor(1.0)}, TypeError, "scale has type Tensor; pass a Python"),
    "scale nan": ({"scale": math.nan}, ValueError, "scale is nan; pass a finite number"),
    "scale inf": ({"scale": math.inf}, ValueError, "scale is inf"),
    "p one": ({"dropout_p": 1.0}, ValueError, r"dropout_p is 1.0; pass 0 <= p < 1"),
    "p negative": ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
    "p nan": ({"dropout_p": math.nan}, ValueError, "dropout_p is nan"),
    "p type": ({"dropout_p": "0.1"}, TypeError, "dropout_p has type str"),
    "seed float": ({"seed": 1.0}, TypeError, "seed has type float"),
    "seed large": ({"seed": 2**63}, ValueError, "signed 64-bit"),
    "seed shape": ({"seed": torch.tensor(1)}, ValueError, r"int64 tensor \[1\] on cpu"),
    "row ids": ({"row_ids": torch.arange(5)}, ValueError, r"row_ids is torch.int64 \[5\]"),
    "row ids dtype": ({"row_ids": F(6)}, ValueError, r"pass int64 \[6\]"),
    "row ids type": ({"row_ids": [0]}, TypeError, "row_ids has type list"),
    "mask length": ({"active": torch.ones(4, dtype=torch.bool)}, ValueError, r"pass bool \[3\]"),
    "mask dtype": ({"active": torch.ones(3)}, ValueError, r"active is torch.float32 \[3\]"),
    "mask type": ({"active": [True]}, TypeError, r"pass a bool tensor \[3\] or an int"),
    "mask bool": ({"active": True}, TypeError, "active has type bool"),
    "prefix large": ({"active": 4}, ValueError, r"prefix of 4 ranks; A has 3, pass 0..3"),
    "prefix negative": ({"active": -1}, ValueError, "prefix of -1 ranks"),
    "trainable int": ({"trainable": 2}, TypeError, "trainable has type int"),
    "trainable 0-d": ({"trainable": torch.tensor(2)}, ValueError, "trainable is torch.int64"),
    "backend": ({"backend": "cuda"}, ValueError, "choose one of auto, triton, reference"),
    "triton on CPU": ({"backend": "triton"}, ValueError, "tensors are on cpu"),
    "precision": ({"precision": "high"}, ValueError, "choose one of peft, compute"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_in_one_line(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        call(**changes)
    assert "\n" not in str(caught.value)


def test_what_is_accepted():
    base = call()
    assert torch.equal(call(scale=1), base)
    assert torch.equal(call(active=torch.tensor(3, dtype=torch.int32)), base)
    assert torch.equal(call(seed=-(2**63), dropout_p=0.0), base)
    assert call(dropout_p=0.5, seed=torch.tensor([4])).shape == base.shape
    assert torch.equal(call(dropout_p=0.5, seed=torch.tensor([4])), call(dropout_p=0.5, seed=4))


def test_add_checks_its_base():
    given = CASE.inputs()
    x, A, B = given["x"], given["A"], given["B"]
    with pytest.raises(ValueError, match=r"y has shape \[5, 4\] but x \[6, 5\]"):
        lowrank_add(torch.zeros(5, 4), x, A, B)
    with pytest.raises(ValueError, match=r"y has 5 columns but B 4 rows"):
        lowrank_add(torch.zeros(6, 5), x, A, B)
    with pytest.raises(TypeError, match=r"y has dtype torch\.int64"):
        lowrank_add(torch.zeros(6, 4, dtype=torch.int64), x, A, B)


def test_inplace_refuses_leaves_and_views():
    given = CASE.inputs()
    x, A, B = given["x"], given["A"], given["B"]
    with pytest.raises(ValueError, match="y is a leaf that requires grad"):
        lowrank_add(torch.zeros(6, 4, requires_grad=True), x, A, B, inplace=True)
    with pytest.raises(ValueError, match="y is a view"):
        lowrank_add(torch.zeros(4, 6).T, x, A, B, inplace=True)


@pytest.fixture
def variable(monkeypatch):
    def set_to(value: str) -> None:
        monkeypatch.setenv("FASTRANK_BACKEND", value)
        monkeypatch.setattr(Setting, "backend", None)

    return set_to


def test_backend_variable(variable):
    cpu = torch.device("cpu")
    assert choose_backend("auto", cpu, torch.float32) == "torch"
    variable("reference")
    assert choose_backend("auto", cpu, torch.float32) == "reference"
    variable("fast")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        call()
    variable("auto")
    cuda = torch.device("cuda")
    assert choose_backend("auto", cuda, torch.bfloat16) == "triton"
    assert choose_backend("auto", cuda, torch.float64) == "reference"
    assert choose_backend("auto", torch.device("mps"), torch.float32) == "reference"
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        choose_backend("triton", cuda, torch.float64)
