"""`patch` a PEFT model in place so that its LoRA layers run fused, and `unpatch` it again.

Only the class of a layer changes: parameters, their names, hooks on the layer and PEFT's methods
stay, so checkpoints are interchangeable both ways and `unpatch` leaves no trace.
"""

from collections import Counter

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fastrank.errors import UsageError
from fastrank.kernels.common import BACKENDS
from fastrank.layers.dispatch import LayerState
from fastrank.layers.registry import LOOKED_FOR, fast_classes
from fastrank.layers.report import PatchReport, PatchRow, is_patched, kind
from fastrank.layers.siblings import Siblings

__all__ = ["PatchReport", "PatchRow", "patch", "unpatch"]

_PRECISIONS = ("peft", "compute")


def patch(
    model: nn.Module,
    *,
    backend: str = "auto",
    precision: str = "peft",
    share_inputs: bool = True,
) -> "PatchReport":
    """Run the LoRA and AdaLoRA linear layers of `model` fused, in place and reversibly.

        >>> from peft import LoraConfig, get_peft_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(16, 8))
        >>> model = get_peft_model(net, LoraConfig(r=4, target_modules=["0"]))
        >>> report = fastrank.patch(model)
        >>> model(torch.randn(2, 16)).sum().backward()  # train, evaluate, save, merge as before
        >>> report  # report.print() shows every adapted module: fused, or why not
        <PatchReport: 1 of 1 adapted modules fused; calls so far: 1 fused, 0 delegated>

    Outputs, gradients, `state_dict`, merging, saving and AdaLoRA's allocation of ranks stay PEFT's.
    Over bitsandbytes' 4-bit and 8-bit bases the base runs its own forward and the branch is fused.
    Layers that the model calls with one input, as q, k and v, are found in the first forward and
    computed together from then on. What a layer can't fuse is decided at each call and goes through
    PEFT's own forward: disabled or merged adapters, several active adapters, DoRA and other
    variants, `lora_bias`, extra arguments such as `adapter_names`, hooks on what lies inside the
    layer, other quantised weights, weights that are sharded inside the call. AdaLoRA's `ranknum`,
    which PEFT leaves trainable unless the base is float32, is frozen until `unpatch`; the report
    notes it. Patching a patched model keeps its counters, takes up layers added since, and sets the
    options given.

    Args:
        model: a `PeftModel`, or any module with PEFT's LoRA or AdaLoRA layers in it.
        backend: "auto" (Triton on CUDA and ROCm devices, plain torch elsewhere), "triton" or
            "reference".
        precision: "peft" computes the branch in the adapters' dtype as PEFT does; "compute" in the
            base's, which is cheaper with float32 adapters over a 16-bit base.
        share_inputs: compute layers of one input together. Gradients of the input are then added up
            in another order from the second forward on; pass False where a run that is stopped and
            resumed has to give the same bits as one that is not.

    Returns:
        A live report of the model's adapted modules.

    Raises:
        UsageError: the model has no LoRA layer, or an option is unknown.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"patch got {type(model).__name__}; pass a PEFT model (torch.nn.Module)")
    if backend not in BACKENDS:
        raise UsageError(f"backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    if precision not in _PRECISIONS:
        raise UsageError(f"precision is {precision!r}; choose one of {', '.join(_PRECISIONS)}")
    modules = list(model.named_modules())
    if not any(isinstance(module, LoraLayer) for _, module in modules):
        raise UsageError(_nothing_to_patch(modules))
    classes = fast_classes()
    for name, module in modules:
        fast = classes.get(type(module))
        if fast is not None:
            module.__class__ = fast
            module._fastrank = LayerState(name)
        if is_patched(module):
            module._fastrank.backend, module._fastrank.precision = backend, precision
            module.adopt()
    _introduce_siblings(modules, share_inputs)
    return PatchReport(model)


def _introduce_siblings(modules: list[tuple[str, nn.Module]], share_inputs: bool) -> None:
    """Tell the fused layers of each parent of each other: some may turn out to share an input."""
    families: dict[tuple[str, int], list[nn.Module]] = {}
    for name, module in modules:
        if is_patched(module) and module.reads_base:
            family = families.setdefault((name.rpartition(".")[0], module.in_features), [])
            family.append(module)
    for family in families.values():
        siblings = Siblings(family) if share_inputs and len(family) > 1 else None
        for module in family:
            module._fastrank.siblings = siblings


def unpatch(model: nn.Module) -> int:
    """Give every layer that `patch` changed its PEFT class back.

        >>> from peft import LoraConfig, get_peft_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(16, 8))
        >>> model = get_peft_model(net, LoraConfig(target_modules=["0"]))
        >>> report = fastrank.patch(model)
        >>> fastrank.unpatch(model)
        1

    Args:
        model: the model, patched or not.

    Returns:
        How many layers were changed back; 0 for a model that isn't patched.

    Raises:
        UsageError: a layer was given yet another class after `patch` (as `fully_shard` does).
    """
    patched = [(n, m) for n, m in model.named_modules() if is_patched(m)]
    for name, module in patched:
        if "stock" not in vars(type(module)):
            raise UsageError(
                f"{name} became a {type(module).__name__} after patch; "
                "undo that wrapper before unpatch"
            )
    for _, module in patched:
        module.release()
        module.__class__ = type(module).stock
        del module._fastrank
    return len(patched)


def _nothing_to_patch(modules: list[tuple[str, nn.Module]]) -> str:
    """One line saying what was looked for and what was there."""
    tuners = Counter(kind(type(m)) for _, m in modules if isinstance(m, BaseTunerLayer))
    if tuners:
        found = ", ".join(f"{count} {kind}" for kind, count in tuners.most_common())
        return (
            f"no LoRA layer ({LOOKED_FOR}) to patch: found {found}; "
            "patch takes LoRA and AdaLoRA adapters"
        )
    leaves = Counter(
        f"{type(m).__module__.split('.')[0]} {type(m).__name__}"
        for _, m in modules
        if any(True for _ in m.parameters(recurse=False))
    )
    found = ", ".join(f"{count} {kind}" for kind, count in leaves.most_common(4)) or "no parameters"
    return (
        f"no LoRA layer ({LOOKED_FOR}) to patch: found {found}, none of them adapted; "
        "call peft.get_peft_model(model, LoraConfig(...)) first"
    )
