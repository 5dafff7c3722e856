"""Hugging Face Trainer on a PEFT text classifier whose LoRA layers are run by fastrank.

    python examples/hf_trainer.py           # embedded encoder and data, minutes on two CPU cores
    python examples/hf_trainer.py --tiny    # random model and made-up data, seconds

Nothing is downloaded: fastrank brings a small pretrained encoder and a data set (which package does
a docstring come from?). For another model or data set, `load_embedded` is the part to replace.
"""

import argparse

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import fastrank


def load_embedded():
    """Model, training rows and test rows; a row is {"input_ids": [...], "labels": int}."""
    from fastrank.data import encoder_path, load_data

    data = load_data("embedded")
    tokenizer = AutoTokenizer.from_pretrained(encoder_path())
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder_path(), num_labels=len(data.label_names), dtype=torch.float32
    )

    def rows(split):
        ids = tokenizer(split.examples, truncation=True, max_length=64)["input_ids"]
        labels = [int(label) for label in split.labels]
        return [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]

    return model, rows(data.train), rows(data.test)


def make_tiny():
    """The same three from nothing: the label is the word that occurs three times."""
    generator = np.random.default_rng(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )

    def row():
        label = int(generator.integers(3))
        words = [*generator.integers(4, 40, generator.integers(4, 8)), *[label + 1] * 3]
        return {"input_ids": [int(word) for word in words], "labels": label}

    return model, [row() for _ in range(480)], [row() for _ in range(120)]


def collate(rows):
    """A batch: input_ids and attention_mask [batch, longest], labels [batch]."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[i, : len(row["input_ids"])] = 1
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="random model and made-up data")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--output-dir", default="hf_trainer_output", help="the adapter goes here")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    base, train_rows, test_rows = make_tiny() if args.tiny else load_embedded()
    config = LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"
    )
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    # the one line that differs from a script without fastrank
    report = fastrank.patch(model)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            learning_rate=5e-3 if args.tiny else 2e-3,
            lr_scheduler_type="linear",
            logging_steps=20,
            eval_strategy="no",
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            # a PeftModel hides the names of its labels from Trainer
            label_names=["labels"],
        ),
        train_dataset=train_rows,
        eval_dataset=test_rows,
        data_collator=collate,
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()  # an ordinary PEFT adapter: loads with or without fastrank

    report.print()  # which modules ran fused, and how often
    print(f"accuracy {before:.3f} before, {after:.3f} after; adapter in {args.output_dir}")
    return {"before": before, "after": after, "fused_calls": report.fused_calls}


if __name__ == "__main__":
    main()
