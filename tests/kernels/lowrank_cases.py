"""Inputs, PEFT's computation and error measures that the low-rank tests share."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrank.kernels.common import dropout_keep
from fastrank.kernels.lowrank import reference

NAMES = ("x", "weight", "bias", "A", "B", "e")
F64, F32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

# err(ours) <= RATIO * err(PEFT) + FLOOR, both against float64. The floor is a few fp32 roundings:
# where PEFT happens to be exact to that, the order of a sum decides.
RATIO = 1.2
FLOOR = {F64: 2e-15, F32: 3e-7, BF16: 3e-7, FP16: 3e-7}

# (x and weight, adapters, autocast): PEFT's precision modes
MODES = {
    "fp32": (F32, F32, None),
    "bf16": (BF16, BF16, None),
    "fp16": (FP16, FP16, None),
    "bf16-fp32-adapters": (BF16, F32, None),
    "fp16-fp32-adapters": (FP16, F32, None),
    "autocast-bf16": (F32, F32, BF16),
    "autocast-bf16-model": (BF16, F32, BF16),
    "fp64": (F64, F64, None),
}
# ranks that are on, and ranks that learn
ON = torch.tensor([1, 0, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
TRAINED = torch.tensor([0, 1, 1, 1, 0, 1, 1, 1], dtype=torch.bool)


@dataclass
class Case:
    """One call: dtypes, shapes and keywords."""

    M: int = 48
    K: int = 40
    N: int = 56
    R: int = 8
    dtype: torch.dtype = F32
    adapters: torch.dtype = F32
    autocast: torch.dtype | None = None
    with_e: bool = False
    with_bias: bool = True
    keywords: dict = field(default_factory=dict)
    device: str = "cpu"
    seed: int = 0
    frozen_base: bool = False

    def inputs(self) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, dtype: torch.dtype, gain: float = 1.0) -> Tensor:
            values = torch.randn(*shape, generator=g, dtype=F64) * gain
            return values.to(dtype).to(self.device).requires_grad_()

        M, K, N, R = self.M, self.K, self.N, self.R
        given = {
            "x": draw(M, K, dtype=self.dtype),
            "weight": draw(N, K, dtype=self.dtype, gain=K**-0.5),
            "bias": draw(N, dtype=self.dtype),
            "A": draw(R, K, dtype=self.adapters, gain=K**-0.5),
            "B": draw(N, R, dtype=self.adapters, gain=max(R, 1) ** -0.5),
            "e": draw(R, dtype=self.adapters),
        }
        if not self.with_e:
            given["e"] = None
        if not self.with_bias:
            given["bias"] = None
        if self.frozen_base:
            for name in ("weight", "bias"):
                given[name] = None if given[name] is None else given[name].detach()
        return given

    def dy(self) -> Tensor:
        """Values that every dtype holds exactly, so that all sides differentiate the same sum."""
        g = torch.Generator().manual_seed(self.seed + 1)
        dy = torch.randint(-128, 129, (self.M, self.N), generator=g)
        return (dy / 64).to(F64).to(self.device)


def make(mode: str, **changes) -> Case:
    """A case in one of PEFT's precision modes."""
    dtype, adapters, autocast = MODES[mode]
    return Case(dtype=dtype, adapters=adapters, autocast=autocast, **changes)


def run(function, case: Case, **changes) -> dict[str, Tensor]:
    """y and every gradient of function(x, weight, bias, A, B, e=..., **keywords)."""
    given = case.inputs() | changes
    keywords = dict(case.keywords)
    if given["e"] is not None:
        keywords["e"] = given["e"]
    arguments = [given[n] for n in NAMES[:5]]
    with torch.autocast(case.device, case.autocast, enabled=case.autocast is not None):
        y = function(*arguments, **keywords)
    wanted = {n: t for n, t in given.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), case.dy().to(y.dtype))
    return {"y": y.detach()} | dict(zip((f"d{n}" for n in wanted), grads, strict=True))


def truth(case: Case) -> dict[str, Tensor]:
    """The same in float64, from the same rounded inputs."""
    given = case.inputs()
    wide = {
        n: None if t is None else t.detach().to(F64).requires_grad_(t.requires_grad)
        for n, t in given.items()
    }
    plain = Case(**(vars(case) | {"autocast": None}))
    return run(reference.lowrank_linear, plain, **wide)


def peft(x, weight, bias, A, B, *, scale=1.0, e=None, dropout_p=0.0, seed=None, row_ids=None):
    """What PEFT's Linear (e None) and SVDLinear compute, step by step, with a given dropout draw.

    x is cast to the adapters' dtype, every product rounds, the sum is cast to the base's dtype.
    """
    result = F.linear(x, weight, bias)
    base_dtype = result.dtype
    h = x.to(A.dtype)
    if dropout_p > 0.0:
        keep = dropout_keep(torch.full((1,), seed, device=x.device), *x.shape, dropout_p, row_ids)
        h = h * keep / (1.0 - dropout_p)
    if e is None:
        branch = F.linear(F.linear(h, A), B) * scale
    else:
        branch = (h @ (A * e[:, None]).T @ B.T) * scale
    return (result + branch).to(base_dtype)


def errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative Frobenius and relative max-norm error."""
    difference = got.to(F64) - exact
    if exact.numel() == 0:
        return 0.0, 0.0
    norm, peak = exact.norm().item(), exact.abs().max().item()
    if norm == 0.0:
        return difference.norm().item(), difference.abs().max().item()
    return difference.norm().item() / norm, difference.abs().max().item() / peak


def assert_as_good_as(
    got: dict[str, Tensor],
    baseline: dict[str, Tensor],
    exact: dict[str, Tensor],
    ratio: float = RATIO,
) -> None:
    """Every output's error is at most ratio times the baseline's, in both norms."""
    assert got.keys() == baseline.keys() == exact.keys()
    for name, value in got.items():
        assert value.dtype == baseline[name].dtype, name
        assert value.shape == exact[name].shape, name
        assert value.isfinite().all(), name
        floor = FLOOR[value.dtype]
        pairs = zip(errors(value, exact[name]), errors(baseline[name], exact[name]), strict=True)
        for norm, (ours, theirs) in zip(("Frobenius", "max"), pairs, strict=True):
            # the largest of many roundings is a noisier figure than their root mean square
            slack = ratio if norm == "Frobenius" else ratio * 1.5
            assert ours <= slack * theirs + floor, (
                f"{name}: {norm} error {ours:.3g} against PEFT's {theirs:.3g}"
            )


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Same dtype, shape and bits, NaN included."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def assert_any_dy(y: Tensor, leaves: list[Tensor]) -> None:
    """dy as .sum(), transposes and slices send it does what its dense copy does; y is `[M, N]`."""
    dense = torch.arange(y.numel(), dtype=F32).view(y.shape).remainder(7.0)
    for dy in (
        torch.ones(()).expand(y.shape),
        dense.T.contiguous().T,
        torch.cat([dense, dense], 1)[:, : y.shape[1]],
    ):
        got = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        exact = torch.autograd.grad(y, leaves, dy.contiguous(), retain_graph=True)
        for name, a, b in zip(NAMES, got, exact, strict=True):
            assert errors(a, b.to(F64))[0] < 1e-6, name
