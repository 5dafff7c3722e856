"""The command line as a person uses it, in processes of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastrank import cli
from fastrank.federated.export import digest


def start(*arguments: str, hashseed: str = "0") -> subprocess.Popen:
    environment = {**os.environ, "PYTHONHASHSEED": hashseed, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "fastrank", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # tests that run in the background inherit a SIGINT that nothing hears
        preexec_fn=hear_interrupts,
    )


def hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(*arguments: str, hashseed: str = "0") -> subprocess.CompletedProcess:
    process = start(*arguments, hashseed=hashseed)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.time() + 200
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline, f"{path} did not appear"
        time.sleep(0.005)


def flags(tiny_bert, csv_data, folder, rounds=4) -> list[str]:
    return (
        f"simulate --model {tiny_bert} --dataset {csv_data} --num-clients 6 --clients-per-round 3 "
        f"--num-rounds {rounds} --alpha 1 --max-length 16 --per-device-train-batch-size 8 "
        f"--num-threads 1 --output-dir {folder}"
    ).split()


def test_same_command_twice_and_killed_and_resumed_give_the_same_bits(
    tiny_bert, csv_data, tmp_path
):
    """Three processes with different hash seeds, one of them killed with SIGKILL."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished = run(*flags(tiny_bert, csv_data, whole, 12), hashseed="1")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    victim = start(*flags(tiny_bert, csv_data, killed, 12), hashseed="2")
    wait_for(killed / "checkpoints" / "round_0001", victim)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    assert not (killed / "summary.json").exists()
    resumed = run("resume", str(killed), hashseed="3")
    assert resumed.returncode == 0, resumed.stderr
    assert digest(killed / "adapter") == digest(whole / "adapter")
    assert (killed / "summary.json").exists()
    for line in ("accuracy", "adapters", "bytes", "results"):
        assert f"\n{line} " in resumed.stdout
    assert "with the trained adapters zeroed" in finished.stdout


def test_ctrl_c_leaves_a_resumable_run(tiny_bert, csv_data, tmp_path):
    folder = tmp_path / "run"
    process = start(*flags(tiny_bert, csv_data, folder, 500))
    wait_for(folder / "checkpoints" / "round_0002", process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"fastrank resume {folder}" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("simulate --method fedti", "did you mean 'fedit'"),
        ("simulate --r 0", "r must be at least 1, got 0"),
        ("simulate --r -4", "r must be at least 1, got -4"),
        ("simulate --alpha 0", "alpha must be above 0"),
        ("simulate --num-rounds ten", "num_rounds must be a whole number, got 'ten'"),
        ("simulate --set rounds=3", "num_rounds"),
        ("simulate --set rounds", "key=value"),
        ("simulate --num-clients 4 --clients-per-round 9", "only 4 clients"),
        ("simulate --config no.toml", "cannot read 'no.toml'"),
        ("simulate --frobnicate 3", "--frobnicate"),
        ("simulate --dataset no.csv", "no.csv"),
        ("simulate --device cuda:99", "CUDA devices; use --device cpu"),
        ("simulate --model ./nowhere --dataset {data}", "no folder './nowhere'"),
        ("simulate --dataset {data} --num-clients 200 --clients-per-round 2", "200"),
        ("simulate --dataset {data} --label-column stars", "stars"),
        ("resume ./nowhere", "holds no run"),
        ("simulat", "invalid choice"),
        ("", "COMMAND"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments, words, csv_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments.format(data=csv_data).split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastrank: error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert list(tmp_path.iterdir()) == []


def test_help_explains_every_option(capsys):
    from dataclasses import fields

    from fastrank.federated.config import Config

    with pytest.raises(SystemExit) as stopped:
        cli.main(["simulate", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for f in fields(Config):
        assert "--" + f.name.replace("_", "-") in text
    assert "--lora-alpha" in text
    assert "None" not in text


def test_info_says_what_works(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "triton", "peft", "kernels", "embedded encoder"):
        assert word in text
