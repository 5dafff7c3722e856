"""Adapters of SVD form, W0 + s B diag(E) A, on the resident model, and back to plain LoRA.

PEFT's AdaLoRA layers hold them (lora_A `[r, K]`, lora_E `[r, 1]`, lora_B `[N, r]`), fused by
`patch`; none of AdaLoRA's own allocation runs. A result is exported as LoRA: E goes into B, a rank
that is gone is gone, and modules without any rank have no adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrank.federated.cohort import derive_seed
from fastrank.federated.quiet import quiet

if TYPE_CHECKING:
    from fastrank.federated.model import ResidentModel

STD = 0.02  # of A and B at the start; PEFT's AdaLoRA


def add_svd_lora(
    model: ResidentModel,
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    target_modules: str | Iterable[str] = "all-linear",
    seed: int = 0,
) -> None:
    """Attach adapters with E = 0 and A, B ~ N(0, 0.02²) drawn from (seed, factor index).

    The branch is scaled by lora_alpha / r, whatever ranks are removed later.
    """
    from peft import AdaLoraConfig

    config = AdaLoraConfig(
        task_type=model.peft_task(),
        init_r=r,
        target_r=r,
        tinit=0,
        tfinal=0,
        total_step=1,  # PEFT wants a schedule; its allocator is never called
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=model.target_modules(target_modules),
        modules_to_save=list(model.head_modules) or None,
    )
    model.attach(config)
    factors = sorted((name, p) for name, p in model.parameters(model.lora_names()).items())
    for index, (name, parameter) in enumerate(factors):
        if ".lora_E." in name:
            parameter.data.zero_()
            continue
        generator = torch.Generator().manual_seed(derive_seed("init", seed, index))
        parameter.data.copy_(STD * torch.randn(parameter.shape, generator=generator))


def as_lora(model: ResidentModel, tensors: Mapping[str, Tensor], lora_alpha: float, r: int) -> None:
    """Turn the resident model's adapters into PEFT LoRA with the same product.

    Args:
        tensors: factors of SVD form by parameter name, of any ranks, and the head.
        lora_alpha, r: of the run; the scale lora_alpha / r stays.
    """
    modules = {}
    for name, A in tensors.items():
        head, found, _ = name.partition(".lora_A.")
        if found and len(A):
            E, B = (tensors[f"{head}.lora_{role}.default"] for role in "EB")
            modules[head] = (A, B * E.flatten())
    with quiet():
        base = model.model.unload()
    model.reset(base)
    paths = {head: head.removeprefix("base_model.model.") for head in modules}
    ranks = {paths[head]: len(A) for head, (A, _) in modules.items()}
    model.add_lora(
        r=r,
        lora_alpha=lora_alpha,
        target_modules=sorted(ranks),
        rank_pattern=ranks,
        # a layer's scale is its alpha over its rank
        alpha_pattern={path: lora_alpha * rank / r for path, rank in ranks.items()},
    )
    values = {name: value for name, value in tensors.items() if ".lora_" not in name}
    for head, (A, B) in modules.items():
        values[f"{head}.lora_A.default.weight"] = A
        values[f"{head}.lora_B.default.weight"] = B
    model.load(values)
