"""A model and a data set so small that a whole federated run takes a second."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

LABELS = ("birds", "fish", "trees")
WORDS = [f"w{i}" for i in range(60)]


# every tiny model here is of this size
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}


def make_model(folder: Path) -> Path:
    """A random BERT of 2 layers without a classification head, and its tokenizer: some 30 kB."""
    import torch
    from transformers import BertConfig, BertModel

    names = dict(enumerate(LABELS))
    config = BertConfig(**TINY, id2label=names, label2id={name: i for i, name in names.items()})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path) -> None:
    """A tokenizer that knows `WORDS`, one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
    ).save_pretrained(folder)


def make_data(folder: Path, train: int = 60, test: int = 20) -> Path:
    """train.csv and test.csv: texts whose words tell their label."""
    folder.mkdir(parents=True)
    for name, count, seed in (("train", train, 1), ("test", test, 2)):
        rng = np.random.default_rng(seed)
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for i in range(count):
                label = i % len(LABELS)
                words = rng.integers(20 * label, 20 * label + 20, size=rng.integers(4, 9))
                writer.writerow([" ".join(WORDS[w] for w in words), LABELS[label]])
    return folder
