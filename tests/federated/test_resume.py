"""Whole runs: the same bits again, interrupted or not; what a resume takes and what it refuses."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_cases import client_files, damage
from staged_runs import Stop, StopAfter

from fastrank.errors import UsageError
from fastrank.federated import Callback, Simulation
from fastrank.federated.checkpoint import list_checkpoints
from fastrank.federated.export import digest

# -- the same bits ---------------------------------------------------------------------------------


class Scramble(Callback):
    """Disturbs every global generator whenever it is called."""

    def on_client(self, client):
        random.seed(client)
        np.random.seed(client)
        torch.manual_seed(client)

    on_round_end = on_round_start = lambda self, *args: self.on_client(7)


def test_interrupted_anywhere_and_resumed_is_bit_identical(options, tmp_path):
    whole = Simulation(**options).run()
    for stop in (1, 2):
        folder = tmp_path / f"stopped{stop}"
        with pytest.raises(Stop):
            Simulation(
                **{**options, "output_dir": str(folder)}, callbacks=[Scramble(), StopAfter(stop)]
            ).run()
        resumed = Simulation.resume(folder)
        assert digest(folder / "adapter") == digest(whole.output_dir / "adapter")
        measured = ("seconds", "peak_memory", "energy_j")
        for a, b in zip(whole.rows, resumed.rows, strict=True):
            assert {k: v for k, v in a.items() if k not in measured} == {
                k: v for k, v in b.items() if k not in measured
            }


def test_dropout_and_base_dropout_repeat_and_differ(options, tmp_path):
    options |= {"num_rounds": 1}
    digests = {}
    for name, extra in {
        "plain": {}, "lora": {"lora_dropout": 0.3}, "again": {"lora_dropout": 0.3},
        "base": {"base_dropout": True},
    }.items():  # fmt: skip
        folder = tmp_path / name
        Simulation(**{**options, **extra, "output_dir": str(folder)}, callbacks=[Scramble()]).run()
        digests[name] = digest(folder / "adapter")["adapter_model.safetensors"]
    assert digests["lora"] == digests["again"]
    assert len({digests["plain"], digests["lora"], digests["base"]}) == 3


def test_seed_changes_the_result(options, tmp_path):
    a = Simulation(**options).run()
    b = Simulation(**{**options, "seed": 1, "output_dir": str(tmp_path / "b")}).run()
    assert digest(a.output_dir / "adapter") != digest(b.output_dir / "adapter")


def test_a_run_leaves_torchs_generator_alone(options):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    Simulation(**{**options, "lora_dropout": 0.1}).run()
    assert torch.equal(before, torch.get_rng_state())


# -- checkpoints and resume -----------------------------------------------------------------------


def test_damaged_checkpoint_falls_back_to_the_one_before(options, caplog):
    folder = Path(options["output_dir"])
    with pytest.raises(Stop):
        Simulation(**options, callbacks=[StopAfter(2)]).run()
    newest = list_checkpoints(folder)[-1]
    assert newest.name == "round_0002"
    data = bytearray((newest / "state.safetensors").read_bytes())
    data[-3] ^= 1
    (newest / "state.safetensors").write_bytes(data)
    resumed = Simulation.resume(folder)
    assert "round_0002 is damaged" in caplog.text
    assert len(resumed.rows) == 3


def test_no_readable_checkpoint_is_an_error(options):
    folder = Path(options["output_dir"])
    with pytest.raises(Stop):
        Simulation(**options, callbacks=[StopAfter(2)]).run()
    for path in list_checkpoints(folder):
        (path / "meta.json").write_text("{}")
    with pytest.raises(UsageError, match="none can be read"):
        Simulation.resume(folder)


def test_resume_refuses_what_would_change_the_result(options, tmp_path):
    folder = Path(options["output_dir"])
    with pytest.raises(UsageError, match="holds no run"):
        Simulation.resume(tmp_path / "nothing")
    with pytest.raises(Stop):
        Simulation(**options, callbacks=[StopAfter(1)]).run()
    config = json.loads((folder / "config.json").read_text())
    changed = {**config, "versions": {**config["versions"], "peft": "0.0.1"}}
    copies = [folder / "config.json", folder / "checkpoints" / "config.json"]
    copies[0].write_text(json.dumps(changed))
    with pytest.raises(UsageError, match=r"was edited .*: versions: peft was '.*', is '0\.0\.1'"):
        Simulation.resume(folder)
    copies[1].write_text(json.dumps(changed))
    with pytest.raises(UsageError, match=r"versions: peft was '0\.0\.1'"):
        Simulation.resume(folder)
    for copy in copies:
        copy.write_text(json.dumps(config))
    Simulation.resume(folder)
    with pytest.raises(UsageError, match="is finished"):
        Simulation.resume(folder)


def test_nothing_is_overwritten(options):
    result = Simulation(**options).run()
    before = digest(result.output_dir)
    with pytest.raises(UsageError, match="already holds a run"):
        Simulation(**options).run()
    assert digest(result.output_dir) == before


def test_foreign_folder_is_refused(options, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="is not empty"):
        Simulation(**options).run()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def stopped(options, after=1):
    with pytest.raises(Stop):
        Simulation(**options, callbacks=[StopAfter(after)]).run()
    return Path(options["output_dir"])


def test_a_resume_with_other_options_is_refused_with_the_difference(options, capsys):
    from fastrank.cli import main

    folder = str(stopped(options))
    assert main(["resume", folder, "--set", "learning_rate=0.5", "--set", "num_rounds=9"]) == 2
    said = capsys.readouterr().err
    assert "learning_rate was 0.002, is 0.5" in said
    assert "num_rounds was 3, is 9" in said
    for name, value in (("partition", "shard"), ("method", "fedprox"), ("dataset", "x.csv")):
        assert main(["resume", folder, "--set", f"{name}={value}"]) == 2
        assert f"{name} was" in capsys.readouterr().err
    assert main(["resume", folder, "--set", "keep_checkpoint=1"]) == 2
    assert "did you mean 'keep_checkpoints'?" in capsys.readouterr().err
    # what decides no bits may change, and what stays the same is no change
    assert main(["resume", folder, "--set", "keep_checkpoints=1", "--set", "num_rounds=3"]) == 0
    assert [p.name for p in list_checkpoints(Path(folder))] == ["round_0003"]


def test_a_damaged_config_is_taken_from_its_copy(options, caplog):
    folder = stopped(options)
    before = json.loads((folder / "config.json").read_text())
    damage(folder / "config.json", "cut")
    result = Simulation.resume(folder)
    assert "its copy" in caplog.text
    assert len(result.rows) == 3
    assert json.loads((folder / "config.json").read_text()) == before


def test_personal_models_resume_from_their_files(options, tmp_path):
    """FedSA-LoRA's clients keep B and the head: on disk, and the same after a fall-back."""
    options |= {"method": "fedsa-lora", "num_rounds": 4}
    whole = Simulation(**options).run()
    folder = stopped({**options, "output_dir": str(tmp_path / "stopped")}, after=3)
    damage(folder / "checkpoints" / "round_0003" / "state.safetensors", "cut")
    Simulation.resume(folder)
    assert digest(folder / "adapter") == digest(whole.output_dir / "adapter")
    names = client_files(folder)
    assert names == client_files(whole.output_dir)
    assert len(names) >= 3
