"""The embedded default as a newcomer runs it, in minutes: `make test-slow`."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from fastrank.data import load_data
from fastrank.federated.export import digest

pytestmark = pytest.mark.slow

COMMAND = "simulate --num-rounds 3 --num-clients 8 --clients-per-round 4 --output-dir {folder}"


def start(hashseed: str, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONHASHSEED": hashseed, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "fastrank", *arguments], env=environment)


def test_same_bits_after_a_kill_and_the_adapter_reproduces_the_accuracy(tmp_path):
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    other = start("1", *COMMAND.format(folder=whole).split())
    victim = start("2", *COMMAND.format(folder=killed).split())
    while not (killed / "checkpoints" / "round_0001").exists():
        assert victim.poll() is None
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert start("3", "resume", str(killed)).wait() == 0
    assert other.wait() == 0
    assert digest(killed / "adapter") == digest(whole / "adapter")

    with open(whole / "rounds.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["1", "2", "3"]
    model = AutoPeftModelForSequenceClassification.from_pretrained(whole / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(whole / "adapter")
    test = load_data().test
    right = 0
    for i in range(0, len(test.examples), 64):
        batch = tokenizer(
            test.examples[i : i + 64],
            padding=True,
            truncation=True,
            max_length=64,
            return_tensors="pt",
        )
        with torch.inference_mode():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        right += int((logits.argmax(-1).numpy() == test.labels[i : i + 64]).sum())
    # padding differs from the evaluation's batches, so one text in doubt may tip
    assert right / len(test.examples) == pytest.approx(float(rows[-1]["accuracy"]), abs=1e-3)
    assert float(rows[-1]["accuracy"]) > 0.3
