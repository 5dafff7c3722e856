"""A tiny random BERT with a word-level tokenizer, and data sets written on the spot."""

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDS = [f"w{i}" for i in range(60)]
LABELS = ("birds", "fish", "trees")

sys.path.append(str(Path(__file__).parent))  # side_by_side


def make_tokenizer(folder: Path) -> None:
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


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """Folder of a 2-layer BertModel checkpoint without a classification head; labels are known."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-bert")
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
        id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """Folder of a 2-layer causal language model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def sentences(count: int, seed: int) -> list[tuple[str, str, str]]:
    """(text, label, author): each label favours its own third of the words."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        label = i % len(LABELS)
        own = rng.integers(20 * label, 20 * label + 20, size=6)
        noise = rng.integers(0, 60, size=rng.integers(1, 6))
        words = rng.permutation(np.concatenate([own, noise]))
        rows.append((" ".join(WORDS[w] for w in words), LABELS[label], f"author{i % 7}"))
    return rows


@pytest.fixture(scope="session")
def csv_data(tmp_path_factory) -> Path:
    """Folder with train.csv (180 rows) and test.csv (60 rows): columns text, label, author."""
    folder = tmp_path_factory.mktemp("csv")
    for name, count, seed in (("train", 180, 1), ("test", 60, 2)):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", "author"])
            writer.writerows(sentences(count, seed))
    return folder


@pytest.fixture(scope="session")
def instructions(tmp_path_factory) -> Path:
    """JSON lines with prompt and response: the response repeats the prompt's first words."""
    path = tmp_path_factory.mktemp("lm") / "train.jsonl"
    lines = []
    for text, _, _ in sentences(90, 3):
        lines.append(json.dumps({"prompt": text, "response": " ".join(text.split()[:3])}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def options(tiny_bert, csv_data, tmp_path) -> dict:
    """Keywords of a simulation that takes about a second."""
    return {
        "model": str(tiny_bert),
        "dataset": str(csv_data),
        "num_clients": 6,
        "clients_per_round": 3,
        "num_rounds": 3,
        "partition": "iid",
        "max_length": 16,
        "per_device_train_batch_size": 8,
        "num_threads": 1,
        "output_dir": str(tmp_path / "run"),
    }
