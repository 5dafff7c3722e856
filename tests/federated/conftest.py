"""A tiny random BERT with a word-level tokenizer, and data sets written on the spot."""

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastrank.bench.reliability_runs import LABELS, TINY, WORDS, make_model, make_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.append(str(Path(__file__).parent))  # side_by_side


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """Folder of a 2-layer BertModel checkpoint without a classification head; labels are known."""
    return make_model(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """Folder of a 2-layer causal language model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    config = LlamaConfig(**TINY, pad_token_id=0)
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
