"""Tiny random models of eight families, and which of their modules have to run fused how often."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

import fastrank

LAYERS, ALBERT_LAYERS = 2, 3
HIDDEN, WIDE, VOCABULARY, LENGTH = 24, 40, 60, 9


@dataclass(frozen=True)
class Family:
    """One architecture.

    Args:
        make: a new base model.
        task: PEFT's task type, or None.
        fused: modules that run fused -> calls in one forward of the model.
        options: LoRA options besides those that all families share.
    """

    make: Callable
    task: str | None
    fused: dict[str, int]
    options: dict = field(default_factory=dict)


def blocks(prefix, parts, layers=LAYERS):
    """Each part of each block, called once."""
    return {f"{prefix}.{i}.{part}": 1 for i in range(layers) for part in parts}


def bert():
    return hf.BertForSequenceClassification(
        hf.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            intermediate_size=WIDE,
            max_position_embeddings=16,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def distilbert():
    return hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=HIDDEN,
            n_layers=LAYERS,
            n_heads=2,
            hidden_dim=WIDE,
            max_position_embeddings=16,
            num_labels=3,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
        )
    )


def albert():
    # every layer is the same module: one adapter, called once a layer
    return hf.AlbertForSequenceClassification(
        hf.AlbertConfig(
            vocab_size=VOCABULARY,
            embedding_size=12,
            hidden_size=HIDDEN,
            num_hidden_layers=ALBERT_LAYERS,
            num_attention_heads=2,
            intermediate_size=WIDE,
            max_position_embeddings=16,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            classifier_dropout_prob=0.0,
        )
    )


def gpt2():
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=2,
            n_positions=16,
            resid_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def _decoder(model, config):
    return model(
        config(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=WIDE,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            head_dim=6,
        )
    )


def llama():
    return _decoder(hf.LlamaForCausalLM, hf.LlamaConfig)


def qwen3():
    return _decoder(hf.Qwen3ForCausalLM, hf.Qwen3Config)


def t5():
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            d_kv=12,
            d_ff=WIDE,
            num_layers=LAYERS,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            feed_forward_proj="gated-gelu",
        )
    )


def vit():
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            intermediate_size=WIDE,
            image_size=8,
            patch_size=4,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


_LLAMA = blocks("model.layers", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))  # fmt: skip
_ALBERT = "albert.encoder.albert_layer_groups.0.albert_layers.0"
_T5_SELF = tuple(f"layer.0.SelfAttention.{part}" for part in "qkvo")
_T5_CROSS = tuple(f"layer.1.EncDecAttention.{part}" for part in "qkvo")
_T5_WIDE = tuple(f"DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo"))
# transformers renamed the parts of its ViT
_VIT = ("vit.layers", ("attention.q_proj", "attention.k_proj", "attention.v_proj",
        "attention.o_proj", "mlp.fc1", "mlp.fc2"))  # fmt: skip
if not hasattr(vit().vit, "layers"):
    _VIT = ("vit.encoder.layer", ("attention.attention.query", "attention.attention.key",
            "attention.attention.value", "attention.output.dense", "intermediate.dense",
            "output.dense"))  # fmt: skip

FAMILIES = {
    "bert": Family(
        bert,
        "SEQ_CLS",
        blocks("bert.encoder.layer", ("attention.self.query", "attention.self.key",
               "attention.self.value", "attention.output.dense", "intermediate.dense",
               "output.dense")) | {"bert.pooler.dense": 1},
    ),
    # pre_classifier is trained whole: PEFT takes every name that ends in "classifier"
    "distilbert": Family(
        distilbert,
        "SEQ_CLS",
        blocks("distilbert.transformer.layer", ("attention.q_lin", "attention.k_lin",
               "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2")),
        options={"target_modules": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]},
    ),
    "albert": Family(
        albert,
        "SEQ_CLS",
        {f"{_ALBERT}.{part}": ALBERT_LAYERS for part in ("attention.query", "attention.key",
         "attention.value", "attention.dense", "ffn", "ffn_output")}
        | {"albert.encoder.embedding_hidden_mapping_in": 1, "albert.pooler": 1},
        options={"target_modules": ["query", "key", "value", "dense", "ffn", "ffn_output",
                                    "embedding_hidden_mapping_in", "pooler"]},
    ),
    "gpt2": Family(
        gpt2,
        "CAUSAL_LM",
        blocks("transformer.h", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
        options={"fan_in_fan_out": True, "use_rslora": True},
    ),
    "llama": Family(llama, "CAUSAL_LM", _LLAMA),
    "qwen3": Family(qwen3, "CAUSAL_LM", _LLAMA),
    "t5": Family(
        t5,
        "SEQ_2_SEQ_LM",
        blocks("encoder.block", (*_T5_SELF, *(f"layer.1.{part}" for part in _T5_WIDE)))
        | blocks("decoder.block", (*_T5_SELF, *_T5_CROSS,
                 *(f"layer.2.{part}" for part in _T5_WIDE))),
    ),
    "vit": Family(
        vit,
        None,
        blocks(*_VIT),
        options={"target_modules": rf"{_VIT[0]}\.\d\.({'|'.join(_VIT[1])})"},
    ),
}  # fmt: skip


def fused_calls(family, model="base_model.model"):
    """Full module name -> calls that one forward of the model makes fused."""
    return {f"{model}.{name}": count for name, count in FAMILIES[family].fused.items()}


def adapted(family, seed=0, dtype=torch.float64, **options):
    """A PEFT model of the family, all of whose adapters count."""
    chosen = FAMILIES[family]
    torch.manual_seed(seed)
    base = chosen.make().to(dtype)
    options = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear",
               "task_type": chosen.task} | chosen.options | options  # fmt: skip
    return fill_b(get_peft_model(base, LoraConfig(**options)))


def fill_b(model):
    """PEFT starts B at zero, where half of the gradients vanish and nothing is tested."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    return model


def pair(family, seed=0, dtype=torch.float64, **options):
    """(stock, patched, report): the same model twice."""
    stock = adapted(family, seed, dtype, **options)
    fast = copy.deepcopy(stock)
    return stock, fast, fastrank.patch(fast)


def batch(family, seed=0):
    """One batch of three; a part of the second text is padding."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.tensor([0, 2, 1])
    if family == "vit":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=generator), "labels": classes}
    ids = torch.randint(3, VOCABULARY, (3, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = classes if FAMILIES[family].task == "SEQ_CLS" else ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model, family, seed=0):
    """Loss, logits and every gradient by name of one training step without the update."""
    model.zero_grad()
    like = next(model.parameters())
    inputs = {name: tensor.to(like.device) for name, tensor in batch(family, seed).items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(like.dtype)
    out = model(**inputs)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **grads}
