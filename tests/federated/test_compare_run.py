"""Configurations that `fastrank compare` runs: new, interrupted, finished, failing."""

import signal
import subprocess
import sys
import time

import pytest
from fabricated_runs import fabricate

from fastrank import cli
from fastrank.errors import UsageError
from fastrank.federated.callbacks import Callback
from fastrank.federated.compare import execute, make_comparison, plots
from fastrank.federated.compare.execute import command_of, keep_records, run_all, state_of
from fastrank.federated.compare.plan import Planned, read_plan
from fastrank.federated.config import resolve
from fastrank.federated.export import digest
from fastrank.federated.simulation import Simulation


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(plots, "draw", lambda groups, folder: [])


class Stop(Callback):
    def on_round_end(self, row):
        raise KeyboardInterrupt


def test_new_interrupted_finished_and_failing_runs(options, tmp_path, monkeypatch, capsys):
    """One command: the first run is new, the second goes on, the third can't be; then again."""
    del options["output_dir"]
    lines = [f"{key} = {str(value) if isinstance(value, int) else repr(value)}"
             for key, value in options.items()]  # fmt: skip
    file = tmp_path / "tiny.toml"
    file.write_text("\n".join([*lines, "[grid]", "r = [4, 2, 0]", "seed = [0]"]))
    new, interrupted, failing = read_plan(file)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        Simulation(
            *resolve(interrupted.options, {"output_dir": str(out / "runs" / interrupted.name)}),
            callbacks=[Stop()],
        ).run()
    whole = Simulation(*resolve(interrupted.options, {"output_dir": str(tmp_path / "whole")})).run()

    command = ["compare", str(file), "--out", str(out), "--jobs", "2"]
    assert cli.main(command) == 1
    printed = capsys.readouterr().out
    assert f"left out: {failing.name}: r must be at least 1, got 0" in printed
    assert "tiny-r4-seed0" in printed
    for planned in (new, interrupted):
        assert (out / "runs" / planned.name / "summary.json").exists()
        assert "round" in (out / "logs" / f"{planned.name}.log").read_text()
    # the second went on after its first round, to the same bits
    log = (out / "logs" / f"{interrupted.name}.log").read_text()
    assert " 2/3 " in log
    assert " 1/3 " not in log
    assert digest(out / "runs" / interrupted.name / "adapter") == digest(
        whole.output_dir / "adapter"
    )
    table = (out / "table.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in table] == ["options", "r=4", "r=2"]

    def never(*arguments, **_):
        raise AssertionError(f"ran {arguments}")

    monkeypatch.setattr(execute._Running, "run", never)
    before = (out / "table.csv").read_bytes()
    assert cli.main(command) == 1
    assert capsys.readouterr().out.count("finished before") == 2
    assert (out / "table.csv").read_bytes() == before


@pytest.mark.slow
def test_ctrl_c_stops_the_runs_and_the_same_command_goes_on(options, tmp_path):
    """The signal reaches the parent alone, as from a job scheduler; the parent passes it on."""
    del options["output_dir"]
    file, out = tmp_path / "tiny.toml", tmp_path / "out"
    lines = [f"{key} = {value!r}" for key, value in options.items() if key != "num_rounds"]
    file.write_text("\n".join([*lines, "num_rounds = 60", "seed = 0"]))
    command = [sys.executable, "-m", "fastrank", "compare", str(file), "--out", str(out)]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 200
    while not (out / "runs" / "tiny-seed0" / "checkpoints" / "round_0002").exists():
        assert first.poll() is None, first.communicate()
        assert time.time() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=100)
    assert first.returncode == 130
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    assert not (out / "table.csv").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert again.returncode == 0, again.stderr
    rounds = (out / "runs" / "tiny-seed0" / "rounds.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in rounds] == ["round", *map(str, range(1, 61))]
    assert " 1/60 " in (out / "logs" / "tiny-seed0.log").read_text()
    assert (out / "table.csv").exists()


def planned(**options):
    return Planned("name", options, None)


def test_a_folder_of_other_options_is_not_taken_for_the_run(tmp_path):
    """Only what decides no result may differ; options newer than the run had their default."""
    folder = fabricate(tmp_path / "name", [0.5], r=4, seed=1, config={})
    same = {"num_rounds": 1, "r": 4, "seed": 1}
    assert state_of(planned(**same), folder) == "finished"
    assert state_of(planned(**same, num_threads=7, checkpoint_every=3), folder) == "finished"
    with pytest.raises(UsageError, match=r"alpha was 1\.0, is 0\.5"):
        state_of(planned(**same, alpha=0.5), folder)
    with pytest.raises(UsageError, match="r was 4, is 8"):
        state_of(planned(**{**same, "r": 8}), folder)
    (folder / "summary.json").unlink()
    assert state_of(planned(**same), folder) == "interrupted"
    assert state_of(planned(**same), tmp_path / "other") == "new"
    _, failures = run_all([planned(**same, alpha=0.5)], tmp_path)
    assert "other options" in failures[0][1]


def test_options_that_are_newer_than_a_run(tmp_path):
    import json

    folder = fabricate(tmp_path / "name", [0.5], r=4)
    config = json.loads((folder / "config.json").read_text())
    del config["options"]["lora_dropout"], config["options"]["max_grad_norm"]
    (folder / "config.json").write_text(json.dumps(config))
    same = {"num_rounds": 1, "r": 4}
    assert state_of(planned(**same), folder) == "finished"
    with pytest.raises(UsageError, match=r"lora_dropout was 0\.0, is 0\.1"):
        state_of(planned(**same, lora_dropout=0.1), folder)


def test_the_command_gives_a_run_the_options_that_were_planned(tmp_path):
    """Through text and back: what the child resolves is what the plan holds."""
    from fastrank.federated.config import read_assignment

    options = {
        "method": "fedit",
        "alpha": 0.1,
        "balance": True,
        "target_modules": ["query", "value"],
        "model": "a=b,c d",
        "learning_rate": 1e-05,
        "num_rounds": 7,
    }
    words = command_of(planned(**options), tmp_path, "new")
    assert words[:3] == ["simulate", "--output-dir", str(tmp_path)]
    assigned = dict(read_assignment(word) for word in words[4::2])
    assert resolve(assigned) == resolve(options)
    assert command_of(planned(**options), tmp_path, "interrupted") == ["resume", str(tmp_path)]


@pytest.mark.parametrize(
    ("status", "lines", "reason"),
    [
        (2, ["warming up", "fastrank: error: no such model"], "no such model"),
        (1, ["Traceback", "ValueError: what"], "ValueError: what"),
        (1, [], "exit status 1 without a word"),
        (-9, ["round 1"], "killed by SIGKILL (out of memory?)"),
        (130, ["interrupted; go on"], "interrupted"),
    ],
)
def test_reasons(status, lines, reason):
    assert execute._reason(status, lines) == reason


def test_records_only_leaves_what_the_comparison_reads(tmp_path):
    folder = fabricate(tmp_path / "out" / "runs" / "a", [0.5], ranks=[{"x": 1}])
    for name in ("checkpoints/round_0001", "adapter"):
        (folder / name).mkdir(parents=True)
    (folder / "adapter" / "weights").write_text("x")
    (folder / "curve.png").write_text("x")
    keep_records(folder)
    assert {path.name for path in folder.iterdir()} == set(execute.RECORDS)
    assert len(make_comparison([folder], out=tmp_path / "out").rows) == 1


def test_two_comparisons_do_not_share_a_folder(tmp_path):
    """Nor does a run whose comparison was killed: it has inherited the lock."""
    out = tmp_path / "out"
    logs = out / "logs"
    with execute._Running(logs, needed=True), pytest.raises(UsageError, match="another comparison"):
        run_all([planned(r=4)], out / "runs")
    with execute._Running(logs, needed=True):
        pass


def test_if_every_run_fails_there_is_no_table(tmp_path, capsys):
    file = tmp_path / "bad.toml"
    file.write_text("r = 0\n")
    out = tmp_path / "out"
    assert cli.main(["compare", str(file), "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "left out: bad-seed0, bad-seed1, bad-seed2: r must be at least 1" in printed
    assert not out.exists()
