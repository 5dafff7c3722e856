"""A plain PyTorch training loop on a PEFT causal language model, its LoRA layers run by fastrank.

    python examples/raw_loop.py           # half a minute on two CPU cores
    python examples/raw_loop.py --tiny    # seconds

The model is a small random Llama and the text is made up (counting upwards by a constant step), so
nothing is downloaded; with a real model only `make_model` and `make_batch` change.
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import fastrank

VOCABULARY = 64


def make_model(hidden: int, layers: int) -> torch.nn.Module:
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
    )
    config = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"
    )
    return get_peft_model(base, config)


def make_batch(sequences: int, length: int) -> torch.Tensor:
    """Token ids [sequences, length]: each row counts upwards by its own step, modulo the size."""
    start = torch.randint(VOCABULARY, (sequences, 1))
    step = torch.randint(1, 4, (sequences, 1))
    return (start + step * torch.arange(length)) % VOCABULARY


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a smaller model and fewer steps")
    parser.add_argument("--steps", type=int, help="optimizer steps (default 100, tiny 40)")
    args = parser.parse_args(argv)
    steps = args.steps or (40 if args.tiny else 100)

    torch.manual_seed(0)
    model = make_model(hidden=64, layers=2) if args.tiny else make_model(hidden=256, layers=4)

    # the one line that differs from a loop without fastrank
    report = fastrank.patch(model)

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-2 if args.tiny else 3e-3)
    losses = []
    model.train()
    for step in range(steps):
        tokens = make_batch(sequences=16, length=24)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {losses[-1]:.3f}")

    report.print()  # which modules ran fused, and how often
    return losses


if __name__ == "__main__":
    main()
