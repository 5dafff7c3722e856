"""The round loop: equal to closed forms, honest about bytes, and particular before it begins."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from staged_runs import rows_of

from fastrank.errors import UsageError
from fastrank.federated import Simulation
from fastrank.federated.local import LocalOptions, task_loss
from fastrank.federated.simulation import find_device

# -- what a round computes ------------------------------------------------------------------------


def head_grad_step(simulation: Simulation, indices: np.ndarray, rate: float) -> dict:
    """The head's values after one SGD step on these examples, from the resident model."""
    model = simulation.model
    state = simulation.method.init(model, simulation.config.seed)
    parameters = model.parameters(state.tensors)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    batch = model.collate(simulation.train, indices)
    task_loss(model.logits(batch), batch["labels"]).backward()
    after = {n: (p - rate * p.grad).detach().clone() for n, p in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    return after


def test_equal_clients_with_one_step_are_one_large_batch(options):
    """McMahan et al.: with one full-batch SGD step, averaging weights averages gradients."""
    options |= {
        "method": "head-only", "num_clients": 4, "clients_per_round": 4, "num_rounds": 1,
        "per_device_train_batch_size": 1000, "optimizer": "sgd", "head_learning_rate": 0.1,
        "max_grad_norm": 1e9, "group_by_length": False,
    }  # fmt: skip
    simulation = Simulation(**options)
    result = simulation.run()
    everyone = np.concatenate(simulation.partition)
    assert len(everyone) == 180
    simulation.prepare()
    expected = head_grad_step(simulation, everyone, 0.1)
    got = result.model.read(expected)
    moved = 0.0
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
        moved += float(value.abs().sum())
    assert moved > 0


def test_average_is_weighted_by_samples():
    from fastrank.federated.methods import Update, weighted_mean
    from fastrank.federated.wire import Payload

    updates = [
        Update(i, Payload({"w": torch.full((2, 3), float(i))}), i + 1, 1, 0.0) for i in range(8)
    ]
    mean = weighted_mean(iter(updates), "samples")["w"]
    # sum (1 + i) i / sum (1 + i) for i < 8 is 168 / 36
    torch.testing.assert_close(mean, torch.full((2, 3), 168 / 36))
    assert weighted_mean(iter(updates), "uniform")["w"][0, 0] == 3.5


def test_fedit_starts_at_the_base_model_and_all_adapters_are_fused(options):
    simulation = Simulation(**options)
    state = simulation.prepare()
    b = [value for name, value in state.tensors.items() if ".lora_B." in name]
    assert b
    assert all(not value.any() for value in b)
    # 2 blocks of query, key, value, attention output and two feed-forward linears
    assert len(b) == 12
    assert len(simulation.model.report.fused) == 12
    a = [value for name, value in state.tensors.items() if ".lora_A." in name]
    assert all(float(v.abs().max()) <= v.shape[1] ** -0.5 for v in a)
    assert len({float(v[0, 0]) for v in a}) == 12


@pytest.mark.parametrize("method", ["fedit", "fedavg", "head-only"])
def test_every_method_learns(options, method):
    options |= {
        "method": method, "num_rounds": 5, "local_epochs": 3, "learning_rate": 5e-3,
        "head_learning_rate": 2e-2,
    }  # fmt: skip
    result = Simulation(**options).run()
    assert result.summary["accuracy"] > result.summary["initial_accuracy"] + 0.15
    assert result.rows[-1]["train_loss"] < result.rows[0]["train_loss"]
    assert [row["round"] for row in result.rows] == list(range(1, 6))


def test_only_what_a_method_trains_ever_changes(options):
    simulation = Simulation(**options)
    state = simulation.prepare()
    names = [n for n, _ in simulation.model.model.named_parameters() if n not in state.tensors]
    before = simulation.model.read(names)
    simulation.run()
    after = simulation.model.read(names)
    assert all(torch.equal(before[n], after[n]) for n in names)


# -- the ledger -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_payload_bytes_equal_the_formula(options, dtype, width):
    """up = down = e (R P + H) per client, and 0 down in the first round (methods.md 0.3)."""
    options |= {"r": 4, "wire_dtype": dtype}
    result = Simulation(**options).run()
    hidden, inner, labels = 32, 48, 3
    p = 2 * (4 * (hidden + hidden) + 2 * (hidden + inner))
    h = hidden * labels + labels
    expected = 3 * width * (4 * p + h)
    for row in result.rows:
        assert row["payload_up"] == expected
        assert row["head_up"] == 3 * width * h
        assert row["payload_down"] == (0 if row["round"] == 1 else expected)
        assert row["bytes_up"] > row["payload_up"]
    assert result.rows[-1]["trainable_params"] == 4 * p + h


def test_first_downlink_can_be_charged(options):
    options |= {"charge_initial": True, "num_rounds": 1}
    row = Simulation(**options).run().rows[0]
    assert row["payload_down"] == row["payload_up"] > 0


def test_rounds_csv_and_summary(options):
    options |= {"eval_every": 2}
    result = Simulation(**options).run()
    rows = rows_of(result.output_dir)
    assert [row["round"] for row in rows] == ["1", "2", "3"]
    assert [bool(row["accuracy"]) for row in rows] == [False, True, True]
    summary = json.loads((result.output_dir / "summary.json").read_text())
    assert summary["bytes_up"] == sum(int(row["bytes_up"]) for row in rows)
    assert summary["accuracy"] == float(rows[-1]["accuracy"])
    assert summary["accuracy_without_adapters"] is not None
    config = json.loads((result.output_dir / "config.json").read_text())
    assert config["options"]["r"] == 8
    assert config["resolved"]["client_sizes"] == {"min": 30, "median": 30.0, "max": 30}


# -- before any training --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_clients": 500}, "500"),
        ({"partition": "dirichlet", "alpha": 0.01, "min_partition_size": 25}, "25"),
        ({"model": "./no/such/folder"}, "no folder './no/such/folder'"),
        ({"dataset": "missing.csv"}, "missing.csv"),
        ({"text_column": "body"}, "body"),
        ({"max_length": 4000}, "40 positions"),
        ({"target_modules": "quary"}, "no linear layer of .* is named 'quary'"),
        ({"partition": "natural", "num_clients": None}, "group"),
        ({"task": "causal-lm", "partition": "dirichlet"}, "causal|label"),
        ({"method": "head-only", "head": "freeze"}, "head-only needs a task head"),
        ({"method": "fedavg", "dtype": "bfloat16"}, "needs float32"),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_anything_is_written(options, change, words):
    options |= change
    with pytest.raises(UsageError, match=words):
        Simulation(**options).run()
    assert not Path(options["output_dir"]).exists()


def test_devices():
    assert find_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="must be auto, cpu, cuda"):
        find_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="sees 0 CUDA devices"):
            find_device("cuda")
        assert find_device("auto").type == "cpu"


def test_methods_document_every_option():
    from fastrank.cli import _attribute_help
    from fastrank.federated.methods import METHODS

    for cls in METHODS.values():
        for field in dataclasses.fields(cls):
            assert len(_attribute_help(cls, field.name)) > 10


def test_local_options_follow_the_configuration(options):
    simulation = Simulation(**options)
    simulation.prepare()
    assert simulation.executor.options == LocalOptions(batch_size=8)
