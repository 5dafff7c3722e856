"""Cases of `fastrank bench simulate`: models with random weights, clients with random examples."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from fastrank.bench.cases import DTYPES
from fastrank.data import Encoded
from fastrank.federated.local import LocalOptions
from fastrank.federated.methods.base import ServerState
from fastrank.federated.methods.fedit import FedIT
from fastrank.federated.model import ResidentModel

_LABELS = 20
_ENCODER_LINEARS = ("query", "key", "value", "intermediate.dense", "output.dense")
_LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# steps of a client in a round
LOCAL_STEPS = 10

# what SimCase.model names: the transformers configuration
SHAPES: dict[str, dict[str, int]] = {
    "encoder-1x32": {  # rehearsals and tests
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2,
    },
    "encoder-2x128": {
        "vocab_size": 8192, "hidden_size": 128, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 2,
    },
    "encoder-6x384": {
        "vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1536,
        "num_hidden_layers": 6, "num_attention_heads": 6,
    },
    "encoder-12x768": {  # BERT-base
        "vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12,
    },
    "llama-1x32": {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    },
    "llama-4x256": {
        "vocab_size": 4000, "hidden_size": 256, "intermediate_size": 688,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    },
    "llama-16x2048": {  # Llama 3.2 1B
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip


@dataclass(frozen=True)
class SimCase:
    """One round of federated LoRA: r 8 on every linear layer of the blocks, and an encoder's head.

    Args:
        model: a key of SHAPES; an encoder classifies into 20 labels, a llama predicts tokens.
        clients: of the round.
        batch, tokens: examples of a client's step, tokens of each.
        dtype: of the base, a key of DTYPES; adapters are float32, and there is no autocast.
        local_steps: optimizer steps of each client in a round.
        r: rank of every adapter.
    """

    model: str
    clients: int
    batch: int
    tokens: int
    dtype: str = "float32"
    local_steps: int = LOCAL_STEPS
    r: int = 8

    @property
    def name(self) -> str:
        name = f"{self.model}-{self.clients}x{self.batch}x{self.tokens}"
        return name if self.dtype == "float32" else f"{name}-bf16"

    @property
    def rate(self) -> float:
        """Learning rate of every parameter."""
        return 1e-3

    @property
    def work(self) -> float:
        """FLOP of a step of all clients, about: the blocks' and a llama's output products."""
        shape = SHAPES[self.model]
        hidden, wide = shape["hidden_size"], shape["intermediate_size"]
        llama = self.model.startswith("llama")
        weights = shape["num_hidden_layers"] * hidden * (4 * hidden + (3 if llama else 2) * wide)
        weights += shape["vocab_size"] * hidden if llama else 0
        return 4.0 * self.clients * self.batch * self.tokens * weights

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self), "dropout": 0.0}


# where a client's step has 500 tokens and more, a round's other costs are hardly seen
_FEW = 2


def cases(device: torch.device, quick: bool) -> list[SimCase]:
    """The grid of a device; what the goals are about comes first."""
    if device.type == "cuda":
        if quick:
            return [
                SimCase("encoder-6x384", 4, 4, 32, "bfloat16", 3),
                SimCase("llama-4x256", 2, 4, 32, "bfloat16", 3),
            ]
        return [
            SimCase("encoder-12x768", 32, 4, 128, "bfloat16"),
            SimCase("llama-16x2048", 8, 4, 256, "bfloat16", _FEW),
        ]
    if quick:
        return [
            SimCase("encoder-1x32", 4, 2, 8, local_steps=3),
            SimCase("llama-1x32", 3, 2, 8, local_steps=3),
        ]
    return [
        SimCase("encoder-6x384", 8, 4, 32),
        SimCase("encoder-2x128", 16, 4, 16),
        SimCase("encoder-2x128", 8, 4, 32),
        SimCase("encoder-2x128", 8, 4, 16),
        SimCase("encoder-6x384", 8, 32, 32, local_steps=_FEW),
        SimCase("encoder-6x384", 4, 16, 128, local_steps=_FEW),
        SimCase("encoder-6x384", 4, 8, 64, local_steps=_FEW),
        SimCase("llama-4x256", 8, 4, 32),
    ]


class Job:
    """A case's data, options and models; the same for every call.

    Attributes:
        case, device: what is run, and where.
        examples: random tokens, all of one length; labels an encoder's classes or the tokens.
        partition: each client's positions among them, enough for its steps.
        clients: the cohort, which is all of them.
    """

    def __init__(self, case: SimCase, device: torch.device) -> None:
        self.case, self.device = case, device
        rng = np.random.default_rng(0)
        each = case.batch * case.local_steps
        shape = (case.clients * each, case.tokens)
        tokens = rng.integers(1, SHAPES[case.model]["vocab_size"], shape)
        if self.task == "seq-cls":
            labels: Any = rng.integers(0, _LABELS, shape[0])
        else:
            labels = list(tokens)
        ids, lengths = list(tokens.astype(np.int32)), np.full(shape[0], case.tokens)
        self.examples = Encoded(ids, labels, lengths, np.arange(shape[0]))
        self.partition = np.split(np.arange(shape[0]), case.clients)
        self.clients = list(range(case.clients))
        self.method = FedIT(
            r=case.r, lora_alpha=2.0 * case.r, learning_rate=case.rate, head_learning_rate=case.rate
        )

    @property
    def task(self) -> str:
        return "causal-lm" if self.case.model.startswith("llama") else "seq-cls"

    def options(self, steps: int | None = None) -> LocalOptions:
        """AdamW without decay, gradients clipped to 1.0; so many steps, or the case's."""
        return LocalOptions(
            batch_size=self.case.batch, max_steps=steps or self.case.local_steps, max_grad_norm=1.0
        )

    def base(self) -> nn.Module:
        """The transformers model in the case's dtype, without adapters, the same for every call."""
        import transformers as t

        shape, positions = SHAPES[self.case.model], max(self.case.tokens, 64)
        before = torch.get_default_dtype()
        try:
            # made where and as it stays: buffers that are float32 in any model stay so
            torch.set_default_dtype(DTYPES[self.case.dtype])
            with torch.random.fork_rng(), torch.device(self.device):
                torch.manual_seed(0)
                if self.task == "causal-lm":
                    config = t.LlamaConfig(
                        **shape, max_position_embeddings=positions, use_cache=False,
                        tie_word_embeddings=True, pad_token_id=0,
                    )  # fmt: skip
                    return t.LlamaForCausalLM(config)
                config = t.BertConfig(
                    **shape, max_position_embeddings=positions, num_labels=_LABELS,
                    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                )  # fmt: skip
                return t.BertForSequenceClassification(config)
        finally:
            torch.set_default_dtype(before)

    def lora_config(self) -> Any:
        """PEFT's own description of the same adapters, written out as its users do."""
        from peft import LoraConfig

        llama = self.task == "causal-lm"
        return LoraConfig(
            task_type="CAUSAL_LM" if llama else "SEQ_CLS",
            r=self.case.r,
            lora_alpha=2 * self.case.r,
            lora_dropout=0.0,
            target_modules=list(_LLAMA_LINEARS if llama else _ENCODER_LINEARS),
            modules_to_save=None if llama else ["classifier"],
        )

    def resident(self) -> tuple[ResidentModel, ServerState]:
        """fastrank's own model, its layers fused, and the values that every client starts from.

        B is not zero, as after a few rounds: with zeros A would have no gradient.
        """
        head = ("classifier",) if self.task == "seq-cls" else ()
        tokenizer = SimpleNamespace(pad_token_id=0)
        model = ResidentModel(self.base(), tokenizer, self.task, head, self.device)
        state = self.method.init(model, seed=0)
        generator = torch.Generator().manual_seed(1)
        for name, value in state.tensors.items():
            if ".lora_B." in name:
                value.normal_(std=0.02, generator=generator)
        return model, state


def bytes_of(tensors: Any) -> int:
    """Bytes that tensors hold, shared storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
