"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): PEFT allocates the ranks, fastrank runs them.

    python examples/adalora.py                # embedded encoder and text, minutes on two CPU cores
    python examples/adalora.py --model bert-base-uncased --dataset SetFit/20_newsgroups --epochs 3
    python examples/adalora.py --tiny         # random model and made-up data, seconds

The second downloads from the hub (`pip install 'fastrank[data]'`); --model takes a folder, too, and
--dataset a file. AdaLoRA starts every layer at --init-r ranks, scores each by |value x gradient|,
and takes the least important away until --target-r a layer are left on average. A rank that is off
adds nothing but keeps its score, so that it can come back: its gradient has to be right although
its value is zero, and is, in a patched model as in PEFT. --stock runs PEFT alone: the same ranks.
"""

import argparse

import numpy as np
import torch
from peft import AdaLoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

import fastrank
from fastrank.data import Encoded, collate, encode, encoder_path, load_data, prepare_tokenizer


def load(model_name, dataset):
    """(model, training examples, test examples, id of the padding token)"""
    name = encoder_path() if model_name == "embedded" else model_name
    data = load_data(dataset)
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(name))
    train, test = (encode(part, tokenizer, "seq-cls", 64) for part in (data.train, data.test))
    model = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=len(data.label_names), dtype=torch.float32
    )
    return model, train, test, tokenizer.pad_token_id


def make_tiny():
    """The same four from nothing: the label is the word that occurs three times."""
    draw = np.random.default_rng(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=40, num_attention_heads=2, num_labels=3, **sizes)
    )

    def examples(count):
        labels = draw.integers(3, size=count)
        ids = [np.append(draw.integers(4, 40, size=5), [label + 1] * 3) for label in labels]
        lengths = np.array([len(row) for row in ids])
        return Encoded(ids, labels, lengths, np.arange(count))

    return model, examples(480), examples(120), 0


@torch.no_grad()
def accuracy(model, examples, pad):
    right = 0
    for start in range(0, len(examples), 64):
        batch = collate(examples, range(start, min(start + 64, len(examples))), pad)
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(examples)


def ranks(model):
    """How many ranks of each layer are on."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_E.default"): int((e != 0).sum())
        for name, e in model.named_parameters()
        if name.endswith("lora_E.default")
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="random model and made-up data")
    parser.add_argument("--model", default="embedded", help="hub name or folder")
    parser.add_argument("--dataset", default="embedded", help="hub name, file or folder")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--init-r", type=int, default=12, help="ranks of every layer at the start")
    parser.add_argument("--target-r", type=int, default=4, help="ranks a layer at the end, mean")
    parser.add_argument("--learning-rate", type=float, help="default 5e-3, tiny 2e-2")
    parser.add_argument("--stock", action="store_true", help="PEFT alone, to compare")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    base, train, test, pad = make_tiny() if args.tiny else load(args.model, args.dataset)
    steps = max(10, int(args.epochs * len(train) / 16))
    config = AdaLoraConfig(
        task_type="SEQ_CLS",
        init_r=args.init_r,
        target_r=args.target_r,
        total_step=steps,
        tinit=steps // 10,  # steps with all ranks
        tfinal=steps // 3,  # steps with the final ranks
        deltaT=5,  # steps between two allocations
        lora_alpha=32,
        target_modules="all-linear",
    )
    model = get_peft_model(base, config).eval()  # the base's dropout off; there is no other

    # the one line that differs from a script without fastrank
    report = None if args.stock else fastrank.patch(model)

    trainable = [p for p in model.parameters() if p.requires_grad]
    rate = args.learning_rate or (2e-2 if args.tiny else 5e-3)
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0)
    allocator = model.base_model.rankallocator
    draw, losses, scores = np.random.default_rng(1), [], {}
    for step in range(steps):
        batch = collate(train, draw.choice(len(train), 16, replace=False), pad)
        loss = model(**batch).loss  # PEFT adds the penalty that keeps A and B orthogonal
        loss.backward()
        optimizer.step()
        if allocator.exp_avg_ipt:  # PEFT forgets its scores once the last allocation is made
            scores = {name: value.clone() for name, value in allocator.exp_avg_ipt.items()}
        # after backward and before zero_grad: it reads gradients
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % max(1, steps // 8) == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {losses[-1]:.3f}  ranks {sum(ranks(model).values())}")

    kept = ranks(model)
    for name, count in kept.items():
        print(f"{count:3d} of {args.init_r}  {name}")
    result = accuracy(model, test, pad)
    print(f"accuracy {result:.3f} with {sum(kept.values())} of {args.init_r * len(kept)} ranks")
    found = {"losses": losses, "ranks": kept, "scores": scores, "accuracy": result}
    if report is not None:
        report.print()  # which modules ran fused, and how often
        found |= {"fused": report.fused, "delegated_calls": report.delegated_calls}
    return found


if __name__ == "__main__":
    main()
