"""Whole simulations side by side: same accuracy as one by one, and the same bits when resumed."""

import json

import pytest
import torch

from fastrank.federated import Simulation
from fastrank.federated.callbacks import Callback


def run(options, name, **changed):
    folder = options["output_dir"].replace("run", name)
    simulation = Simulation(**{**options, **changed, "output_dir": folder})
    return simulation, simulation.run()


@pytest.mark.parametrize("method", ["fedit", "head-only"])
def test_a_run_ends_as_it_does_one_by_one(options, method):
    options = {**options, "method": method, "num_rounds": 4, "local_epochs": 2}
    one, alone = run(options, "alone", executor="sequential")
    many, together = run(options, "together", executor="client-parallel")
    assert type(one.executor).__name__ == "Sequential"
    assert type(many.executor).__name__ == "ClientParallel"
    for ours, theirs in zip(together.rows, alone.rows, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
        for exact in ("clients", "payload_up", "payload_down", "bytes_up", "trainable_params"):
            assert ours[exact] == theirs[exact]
    assert together.summary["accuracy"] == pytest.approx(alone.summary["accuracy"], abs=0.02)
    assert together.summary["accuracy"] > together.summary["initial_accuracy"]


def test_auto_shares_small_steps_and_not_large_ones(options):
    simulation, _ = run(options, "small", num_rounds=1)
    assert type(simulation.executor).__name__ == "ClientParallel"
    saved = json.loads((simulation.output_dir / "config.json").read_text())["resolved"]
    assert saved["executor"] == "ClientParallel"
    assert saved["clients_in_parallel"] == simulation.executor.clients_in_parallel > 1
    large, _ = run(options, "large", num_rounds=1, per_device_train_batch_size=512)
    assert type(large.executor).__name__ == "Sequential"


def test_full_fine_tuning_goes_one_by_one_and_says_so_once(options, caplog):
    _, result = run(options, "full", num_rounds=2, method="fedavg")
    said = [r.message for r in caplog.records if "one after another" in r.message]
    assert said == ["clients train one after another: fedavg changes the base itself"]
    assert len(result.rows) == 2


def test_clients_in_parallel_is_obeyed_and_checked(options):
    from fastrank.errors import UsageError

    simulation, _ = run(options, "two", num_rounds=1, clients_in_parallel=2)
    assert simulation.executor.clients_in_parallel == 2
    for wrong in (0, "many"):
        with pytest.raises(UsageError, match="clients_in_parallel must be"):
            run(options, "wrong", clients_in_parallel=wrong)


class Killed(Callback):
    def on_round_end(self, row):
        if row["round"] == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_has_the_same_bits(options):
    options = {**options, "num_rounds": 4, "clients_in_parallel": 2, "lora_dropout": 0.1}
    _, whole = run(options, "whole")
    folder = options["output_dir"]
    with pytest.raises(KeyboardInterrupt):
        Simulation(**options, callbacks=[Killed()]).run()
    resumed = Simulation.resume(folder)
    names = whole.model.lora_names() + whole.model.head_names()
    ours, theirs = resumed.model.read(names), whole.model.read(names)
    assert all(torch.equal(ours[name], theirs[name]) for name in names)


def test_fewer_clients_after_running_out_of_memory_are_replayed(options, monkeypatch):
    from fastrank.federated import parallel

    real = parallel.train_together

    def short_of_memory(model, jobs, *rest):
        if len(jobs) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(model, jobs, *rest)

    options = {**options, "num_rounds": 4, "clients_in_parallel": 3}
    monkeypatch.setattr(parallel, "train_together", short_of_memory)
    with pytest.raises(KeyboardInterrupt):
        Simulation(**options, callbacks=[Killed()]).run()
    sizes = []

    def counted(model, jobs, *rest):
        sizes.append(len(jobs))
        return real(model, jobs, *rest)

    monkeypatch.setattr(parallel, "train_together", counted)
    Simulation.resume(options["output_dir"])
    assert sizes
    assert max(sizes) == 2
