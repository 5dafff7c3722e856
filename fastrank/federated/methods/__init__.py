"""Federated methods by name; one short file each."""

import difflib

from fastrank.errors import UsageError
from fastrank.federated.methods.adalora import AdaLora
from fastrank.federated.methods.base import (
    LocalPlan,
    LocalResult,
    Method,
    ServerState,
    Update,
    weighted_mean,
)
from fastrank.federated.methods.bitfit import BitFit
from fastrank.federated.methods.fed_plora import FedPLoRA
from fastrank.federated.methods.fedara import FedARA
from fastrank.federated.methods.fedavg import FedAvg
from fastrank.federated.methods.federa import FeDeRA
from fastrank.federated.methods.fedex_lora import FedExLoRA
from fastrank.federated.methods.fedit import FedIT
from fastrank.federated.methods.fedprox import FedProx
from fastrank.federated.methods.fedsa_lora import FedSALoRA
from fastrank.federated.methods.fedsvd import FedSVD
from fastrank.federated.methods.ffa_lora import FFALoRA
from fastrank.federated.methods.flexlora import FlexLoRA
from fastrank.federated.methods.flora import FLoRA
from fastrank.federated.methods.head_only import HeadOnly
from fastrank.federated.methods.hetlora import HetLoRA
from fastrank.federated.methods.houlsby import Houlsby
from fastrank.federated.methods.pfeiffer import Pfeiffer
from fastrank.federated.methods.sa_fedlora import SAFedLoRA
from fastrank.federated.methods.sft import SFT
from fastrank.federated.methods.slora import SLoRA

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        FedIT,
        FedAvg,
        HeadOnly,
        FedProx,
        FFALoRA,
        FedSALoRA,
        HetLoRA,
        FlexLoRA,
        FLoRA,
        FedExLoRA,
        FedSVD,
        FeDeRA,
        FedARA,
        FedPLoRA,
        AdaLora,
        BitFit,
        Houlsby,
        Pfeiffer,
        SAFedLoRA,
        SFT,
        SLoRA,
    )
}

__all__ = [
    "METHODS",
    "SFT",
    "AdaLora",
    "BitFit",
    "FFALoRA",
    "FLoRA",
    "FeDeRA",
    "FedARA",
    "FedAvg",
    "FedExLoRA",
    "FedIT",
    "FedPLoRA",
    "FedProx",
    "FedSALoRA",
    "FedSVD",
    "FlexLoRA",
    "HeadOnly",
    "HetLoRA",
    "Houlsby",
    "LocalPlan",
    "LocalResult",
    "Method",
    "Pfeiffer",
    "SAFedLoRA",
    "SLoRA",
    "ServerState",
    "Update",
    "find_method",
    "weighted_mean",
]


def find_method(name: str) -> type[Method]:
    """The method class of that name, or a UsageError that lists the names there are."""
    if name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UsageError(f"no method named {name!r}{hint}; the methods are {', '.join(METHODS)}")
    return METHODS[name]
