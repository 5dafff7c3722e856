"""TensorBoard and Weights & Biases are told of every round, and can't cost a run."""

import builtins
import json
import os
import sys
import types
from pathlib import Path

import pytest
from staged_runs import Stop, StopAfter

from fastrank.errors import UsageError
from fastrank.federated import Simulation, rundir
from fastrank.federated.config import resolve
from fastrank.federated.reporting import make_reporters, scalars


class FakeRun:
    """What wandb.init gives, and what was done with it."""

    def __init__(self, **given):
        self.given, self.logged, self.summary, self.finished = given, [], {}, False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A module of that name that keeps what it is told."""
    module = types.ModuleType("wandb")
    module.runs = []
    module.Settings = lambda **settings: settings

    def init(**given):
        module.runs.append(FakeRun(**given))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_names_come_as_one_word_several_or_a_list():
    for given, kept in [("none", "none"), ("a,b", ("a", "b")), (["a", "b"], ("a", "b"))]:
        assert resolve({"report_to": given})[0].report_to == kept
    assert make_reporters("none") == []
    assert make_reporters(("none",)) == []
    with pytest.raises(
        UsageError, match="names 'mlflow'; choose none or some of tensorboard, wandb"
    ):
        make_reporters(("mlflow",))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_any_training(options, monkeypatch, name):
    real = builtins.__import__

    def without(module, *args, **kwargs):
        if module.split(".")[0] == name or module == f"torch.utils.{name}":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(module, *args, **kwargs)

    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=rf"{name}, which is not installed .*fastrank\[report\]"):
        Simulation(**options, report_to=name)
    assert not Path(options["output_dir"]).exists()


def test_scalars_keep_numbers_alone():
    row = {"round": 3, "train_loss": 0.5, "accuracy": None, "bytes_up": 7, "seconds": 1.5}
    noted = {"agg_noise": 0.25, "ranks": {"a": 1}, "voted": True, "why": "x"}
    assert scalars(row, noted) == {
        "train/loss": 0.5, "traffic/bytes_up": 7.0, "round/seconds": 1.5, "method/agg_noise": 0.25,
    }  # fmt: skip


@pytest.fixture
def begun(wandb, tmp_path, monkeypatch):
    """A reporter of a run that has started, without the run."""
    monkeypatch.setattr(rundir, "describe", lambda simulation: {"options": {"method": "fedit"}})
    reporter = make_reporters("wandb")[0]
    return reporter, types.SimpleNamespace(output_dir=tmp_path)


def test_a_reporter_that_breaks_costs_nothing_but_itself(begun, wandb, caplog):
    reporter, simulation = begun
    reporter.on_start(simulation, 0)
    calls = []

    def broken(values, step):
        calls.append(step)
        raise ConnectionError("gone")

    wandb.runs[0].log = broken
    for round in (1, 2):
        reporter.on_round_end({"round": round, "train_loss": 0.5})
    reporter.close()
    assert calls == [1]
    assert caplog.text.count("wandb reports nothing any more: gone") == 1


def test_a_reporter_that_cannot_start_is_a_usage_error(begun, wandb):
    reporter, simulation = begun

    def refused(**given):
        raise RuntimeError("no login")

    wandb.init = refused
    with pytest.raises(UsageError, match="wandb can't be started: no login"):
        reporter.on_start(simulation, 0)
    reporter.close()  # nothing is open


def test_both_are_told_of_every_round_across_a_resume(options, wandb):
    """TensorBoard's curves have each round once, and Weights & Biases' run keeps its id."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options |= {"report_to": "tensorboard,wandb", "method": "hetlora"}
    with pytest.raises(Stop):
        Simulation(**options, callbacks=[StopAfter(2)]).run()
    result = Simulation.resume(options["output_dir"])
    seen = EventAccumulator(str(result.output_dir / "tensorboard"), {"scalars": 0})
    seen.Reload()
    for tag, column in (("train/loss", "train_loss"), ("traffic/bytes_up", "bytes_up")):
        shown = seen.Scalars(tag)
        assert [event.step for event in shown] == [1, 2, 3]
        assert [event.value for event in shown] == pytest.approx(
            [row[column] for row in result.rows]
        )
    lines = (result.output_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3]

    first, second = wandb.runs
    assert first.given["project"] == "fastrank"
    assert first.given["dir"] == options["output_dir"]
    assert first.given["config"]["method"] == "hetlora"
    assert first.given["id"] == second.given["id"]
    assert second.given["resume"] == "allow"
    assert [step for run in (first, second) for step, _ in run.logged] == [1, 2, 3]
    values = second.logged[0][1]
    assert values["eval/accuracy"] == result.rows[2]["accuracy"]
    noted = json.loads(lines[2])["mean_client_rank"]
    assert values["method/mean_client_rank"] == pytest.approx(noted)
    assert second.summary["run/accuracy"] == result.summary["accuracy"]
    assert first.finished
    assert second.finished


@pytest.mark.slow
def test_wandb_offline(options, monkeypatch):
    """The real package, without network: a run folder that `wandb sync` takes."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    result = Simulation(**options, report_to="wandb").run()
    folders = list((result.output_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 1
    records = list(folders[0].glob("*.wandb"))
    assert len(records) == 1
    assert b"train/loss" in records[0].read_bytes()
    assert wandb.run is None  # finished
    assert os.environ["WANDB_MODE"] == "offline"
