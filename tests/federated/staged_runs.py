"""Whole small runs of one method: repeated, interrupted, compared, judged by what they cost."""

import csv
import json

import numpy as np
import pytest
import torch

from fastrank.federated import Callback, Simulation
from fastrank.federated.cohort import sample_cohort
from fastrank.federated.config import resolve
from fastrank.federated.export import digest
from fastrank.federated.model import ResidentModel

MEASURED = ("seconds", "peak_memory", "energy_j")


class Stop(Exception):
    pass


class StopAfter(Callback):
    """Ends the process's work after a round, as a kill would."""

    def __init__(self, round: int) -> None:
        self.round = round

    def on_round_end(self, row):
        if row["round"] == self.round:
            raise Stop("enough")


def run(options, folder=None, method=None, **changed):
    """A finished run; ``method`` is a class that is not registered."""
    options = {**options, **changed}
    if folder is not None:
        options["output_dir"] = str(folder)
    if method is None:
        return Simulation(**options).run()
    config, made = resolve(options, method=method)
    return Simulation(config, made).run()


def prepared(options, **changed):
    """A simulation and its state before the first round."""
    simulation = Simulation(**{**options, **changed})
    return simulation, simulation.prepare()


def values(result):
    """Every parameter of a run's model."""
    return result.model.read([name for name, _ in result.model.model.named_parameters()])


def assert_equal(a, b, names=None):
    names = set(a) if names is None else names
    assert names
    for name in names:
        assert torch.equal(a[name], b[name]), name


def recorded(folder):
    """metrics.jsonl, without what no two runs share."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in MEASURED} for x in lines]


def rows_of(folder):
    """rounds.csv, without what no two runs share."""
    with open(folder / "rounds.csv", newline="") as file:
        return [{k: v for k, v in x.items() if k not in MEASURED} for x in csv.DictReader(file)]


def assert_resumes_everywhere(options, tmp_path):
    """Interrupted after any round and resumed, a run ends with the same bits in every file."""
    whole = run(options, tmp_path / "whole")
    kinds = [k for k in ("adapter", "base", "model") if (whole.output_dir / k).exists()]
    assert kinds
    for stop in range(1, options["num_rounds"]):
        folder = tmp_path / f"stopped{stop}"
        with pytest.raises(Stop):
            Simulation(**{**options, "output_dir": str(folder)}, callbacks=[StopAfter(stop)]).run()
        resumed = Simulation.resume(folder)
        for kind in kinds:
            ours, theirs = digest(folder / kind), digest(whole.output_dir / kind)
            ours.pop("adapter_config.json", None), theirs.pop("adapter_config.json", None)
            assert ours == theirs, (stop, kind)
        for a, b in zip(whole.rows, resumed.rows, strict=True):
            assert {k: v for k, v in a.items() if k not in MEASURED} == {
                k: v for k, v in b.items() if k not in MEASURED
            }
        assert recorded(folder) == recorded(whole.output_dir)
    return whole


def assert_side_by_side(options, tmp_path, tolerance=2e-4):
    """Sequential and ClientParallel end with the same adapters, to rounding."""
    alone = run(options, tmp_path / "alone", executor="sequential")
    together = run(
        options, tmp_path / "together", executor="client-parallel", clients_in_parallel=3
    )
    a, b = values(alone), values(together)
    moved = 0.0
    for name, value in a.items():
        off = float((value - b[name]).norm() / value.norm().clamp_min(1e-3))
        assert off <= tolerance, (name, off)
        moved += float((value - b[name]).abs().sum())
    assert moved > 0  # else both were the same executor
    return alone


def cohorts(options, seed=0):
    """Clients of each round."""
    shape = options["num_clients"], options["clients_per_round"]
    return [sample_cohort(*shape, seed, t) for t in range(options["num_rounds"])]


@torch.no_grad()
def logits(simulation, count=8):
    batch = simulation.model.collate(simulation.test, np.arange(count))
    return simulation.model.logits(batch)


def loaded_accuracy(model, simulation_data, folder, max_length=16):
    """Accuracy of a model that was loaded from disk, with the tokenizer beside it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(
        list(simulation_data.test.examples),
        padding=True,
        truncation=True,
        max_length=max_length,
        return_tensors="pt",
    )
    with torch.no_grad():
        found = model.eval()(**{k: encoded[k] for k in ("input_ids", "attention_mask")}).logits
    return float((found.argmax(-1).numpy() == simulation_data.test.labels).mean())


def gpt2():
    """A resident GPT-2, whose Conv1D layers hold [K, N] (its output projection is square)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=40)
    model = GPT2LMHeadModel(config)
    return ResidentModel(model, None, "causal-lm", (), torch.device("cpu"))


@torch.no_grad()
def gpt2_logits(resident):
    ids = torch.randint(2, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    return resident.logits({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
