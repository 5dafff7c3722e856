"""Peers of one layer beside stock PEFT: PEFT under torch.compile or FlagGems, and schedules.

The schedules are our own implementations of what others published, for where their code can't run.
They repeat which tensors a published design reads and writes and in which order, not its code, and
are named so in every result: "unsloth-schedule" and "lorafusion-schedule", both with adapters in
the base's dtype as the originals have them, and "peft-schedule" where PEFT is not installed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrank.bench import variants
from fastrank.bench.cases import DTYPES, Case, LayerStep, Operands, Unavailable
from fastrank.bench.variants import LORA_ALPHA, autocast, leaf


class _UnslothSchedule(torch.autograd.Function):
    """Vendor products and in-place adds; S is not kept and dY B is computed for dA and for dx."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        y = F.linear(x, weight, bias)
        y.addmm_(x @ A.t(), B.t(), alpha=scale)
        ctx.save_for_backward(x, weight, A, B)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, A, B = ctx.saved_tensors
        dA = (x.t() @ (dy @ B)).t() * ctx.scale
        dB = ((x @ A.t()).t() @ dy).t() * ctx.scale
        dx = dy @ weight
        dx.addmm_(dy @ B, A, alpha=ctx.scale)
        return dx, None, None, dA, dB, None


def unsloth_schedule(case: Case, operands: Operands) -> LayerStep:
    """The single-layer Function of Unsloth's fast LoRA path; it has no dropout."""
    if case.dropout:
        raise Unavailable("Unsloth's fast path has no dropout; with it PEFT's own forward runs")
    return _step(_UnslothSchedule, case, operands)


def lorafusion_schedule(case: Case, operands: Operands) -> LayerStep:
    """LoRAFusion's split at S, its stored dropout and its two fused products, in Triton."""
    from fastrank.kernels.common.backend import why_not_triton

    reason = why_not_triton(operands.x.device, operands.x.dtype)
    if reason is not None:
        raise Unavailable(reason)
    if case.bias:
        raise Unavailable("this schedule has no bias")
    from fastrank.bench.lorafusion import LoraFusionSchedule

    return _step(LoraFusionSchedule, case, operands)


def peft_schedule(case: Case, operands: Operands) -> LayerStep:
    """PEFT's forward in plain torch: cast, dropout, two products, scaling, sum, cast."""
    dtype = DTYPES[case.dtype] if case.precision == "16-bit" else torch.float32
    scale = LORA_ALPHA / case.R
    a, b = (nn.Parameter(t.to(dtype)) for t in (operands.A, operands.B))

    def layer(x: Tensor) -> Tensor:
        y = F.linear(x, operands.weight, operands.bias)
        kept = F.dropout(x.to(a.dtype), case.dropout) if case.dropout else x.to(a.dtype)
        return (y + F.linear(F.linear(kept, a), b) * scale).to(y.dtype)

    trained, frozen = {"dA": a, "dB": b}, [operands.weight]
    x, dy = leaf(operands.x), operands.dy
    return LayerStep(layer, x, dy, trained, scale, autocast(case), frozen)


def peft_compiled(case: Case, operands: Operands) -> LayerStep:
    """PEFT's layer under torch.compile, whole and for this shape alone.

    Compiled code of earlier cases is dropped: past torch's limit of recompilations a layer would
    run uncompiled without a word.
    """
    step = variants.peft(case, operands)
    torch._dynamo.reset()
    return replace(step, layer=torch.compile(step.layer, fullgraph=True, dynamic=False))


class _FlagGemsStep(LayerStep):
    """A step whose operators, the backward's too, are FlagGems' Triton kernels."""

    def __call__(self) -> Tensor:
        import flag_gems

        with flag_gems.use_gems():
            return super().__call__()


def flaggems(case: Case, operands: Operands) -> LayerStep:
    """PEFT's layer with torch's operators replaced by FlagGems', as its README has it."""
    return _FlagGemsStep(**vars(variants.peft(case, operands)))


def _step(function: type, case: Case, operands: Operands) -> LayerStep:
    dtype = DTYPES[case.dtype]
    scale = LORA_ALPHA / case.R
    a, b = (nn.Parameter(t.to(dtype)) for t in (operands.A, operands.B))
    extra = () if function is _UnslothSchedule else (case.dropout,)

    def layer(x: Tensor) -> Tensor:
        return function.apply(x, operands.weight, operands.bias, a, b, scale, *extra)

    trained = {"dA": a, "dB": b}
    x, dy = leaf(operands.x), operands.dy
    return LayerStep(layer, x, dy, trained, scale, frozen=[operands.weight])
