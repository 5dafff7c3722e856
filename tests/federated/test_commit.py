"""Which commit of fastrank made a run: recorded, and no reason to refuse going on."""

import json
import logging
import shutil
import subprocess

import pytest
from staged_runs import Stop, StopAfter

from fastrank import checkout
from fastrank.federated import Simulation
from fastrank.federated.export import digest


@pytest.mark.parametrize("found", [("c" * 40, True), (None, None)], ids=["checkout", "wheel"])
def test_config_json_records_the_commit(options, monkeypatch, found):
    monkeypatch.setattr(checkout, "commit", lambda: found)
    simulation = Simulation(**options)
    simulation.prepare()
    config = simulation.resolved()
    assert (config["commit"], config["dirty"]) == found


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_gits(tmp_path, monkeypatch):
    def git(*arguments):
        told = {"user.name": "a", "user.email": "a@b", "commit.gpgsign": "false"}
        settings = [word for k, v in told.items() for word in ("-c", f"{k}={v}")]
        command = ["git", *settings, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    source = tmp_path / "fastrank" / "checkout.py"
    source.parent.mkdir()
    source.write_text("one")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    monkeypatch.setattr(checkout, "__file__", str(source))
    commit = git("rev-parse", "HEAD")
    assert checkout.commit() == (commit, False)
    source.write_text("two")
    assert checkout.commit() == (commit, True)
    assert checkout.words(commit, False) == f"commit {commit[:12]}"
    assert checkout.words(commit, True).endswith("with uncommitted changes")


def test_a_wheel_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(checkout, "__file__", str(tmp_path / "fastrank" / "checkout.py"))
    assert checkout.commit() == (None, None)


def test_another_commit_is_a_warning_and_the_run_goes_on(options, tmp_path, caplog, monkeypatch):
    options |= {"num_rounds": 2, "local_steps": 1}
    monkeypatch.setattr(checkout, "commit", lambda: ("a" * 40, False))
    whole = Simulation(**options).run()
    folder = tmp_path / "stopped"
    with pytest.raises(Stop):
        Simulation(**options | {"output_dir": str(folder)}, callbacks=[StopAfter(1)]).run()
    monkeypatch.setattr(checkout, "commit", lambda: ("b" * 40, True))
    with caplog.at_level(logging.WARNING, "fastrank"):
        resumed = Simulation.resume(folder)
    (text,) = [record.getMessage() for record in caplog.records]
    assert "began with commit aaaaaaaaaaaa of fastrank" in text
    assert "goes on with commit bbbbbbbbbbbb with uncommitted changes" in text
    assert digest(folder / "adapter") == digest(whole.output_dir / "adapter")
    assert resumed.rows[-1]["accuracy"] == whole.rows[-1]["accuracy"]
    # where the run began is what stays recorded
    assert json.loads((folder / "config.json").read_text())["commit"] == "a" * 40


@pytest.mark.parametrize("entry", ["same", "missing"])
def test_the_same_commit_or_none_recorded_is_no_warning(options, caplog, monkeypatch, entry):
    options |= {"num_rounds": 2, "local_steps": 1}
    monkeypatch.setattr(checkout, "commit", lambda: ("a" * 40, False))
    simulation = Simulation(**options, callbacks=[StopAfter(1)])
    with pytest.raises(Stop):
        simulation.run()
    if entry == "missing":
        for path in simulation.output_dir.rglob("config.json"):
            config = json.loads(path.read_text())
            if config.pop("commit", None):
                del config["dirty"]
                path.write_text(json.dumps(config))
        monkeypatch.setattr(checkout, "commit", lambda: ("b" * 40, False))
    with caplog.at_level(logging.WARNING, "fastrank"):
        Simulation.resume(simulation.output_dir)
    assert caplog.records == []
