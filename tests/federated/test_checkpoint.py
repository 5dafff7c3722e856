"""What a run keeps on disk: checkpoints, the journal, what clients keep; damaged, they say so."""

import errno
import hashlib
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from staged_runs import Stop, StopAfter

from fastrank.errors import UsageError
from fastrank.federated import Simulation, journal, rundir, storage
from fastrank.federated import checkpoint as checkpoints
from fastrank.federated.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_latest,
    save_checkpoint,
    seal,
)
from fastrank.federated.client_states import ClientStates
from fastrank.federated.export import digest
from fastrank.federated.ledger import COLUMNS, Ledger
from fastrank.federated.methods.base import ServerState
from fastrank.federated.storage import StorageError, storing


def state_of(rounds):
    return ServerState(
        tensors={"b": torch.full((2, 3), float(rounds)), "a": torch.arange(4.0)},
        head=("a",),
        server={"momentum": torch.zeros(2)},
        extra={"stage": 2, "alive": {"query": [0, 2], "key": [1]}},
    )


def row_of(round):
    return {"round": round, "train_loss": 1 / round, "accuracy": None, "seconds": 0.25}


def saved(run, rounds, states=None, keep=2):
    """Checkpoints after 1, ..., rounds rounds; returns the clients' states."""
    states = ClientStates(run) if states is None else states
    for n in range(1, rounds + 1):
        states[n % 3] = {"own": torch.full((2,), float(n)), "first": torch.ones(1)}
        rows = [row_of(i) for i in range(1, n + 1)]
        metrics = [{"round": i, "noise": i / 7} for i in range(1, n + 1) if i % 2]
        facts = {"initial_accuracy": 0.5, "metrics": metrics}
        save_checkpoint(run, Checkpoint(n, state_of(n), states, rows, facts), keep)
    return states


def assert_is(found, rounds):
    assert found.rounds_done == rounds
    assert list(found.state.tensors) == ["b", "a"]
    assert torch.equal(found.state.tensors["b"], torch.full((2, 3), float(rounds)))
    assert found.state.head == ("a",)
    assert found.state.extra == {"stage": 2, "alive": {"query": [0, 2], "key": [1]}}
    assert list(found.state.extra["alive"]) == ["query", "key"]  # votes are counted in this order
    assert found.rows == [row_of(i) for i in range(1, rounds + 1)]
    odd = [i for i in range(1, rounds + 1) if i % 2]
    assert found.facts["metrics"] == [{"round": i, "noise": i / 7} for i in odd]
    for client in found.client_states:
        newest = max(n for n in range(1, rounds + 1) if n % 3 == client)
        kept = found.client_states[client]
        assert list(kept) == ["own", "first"]
        assert torch.equal(kept["own"], torch.full((2,), float(newest)))


def test_round_trip(tmp_path):
    saved(tmp_path, 5)
    found = load_latest(tmp_path)
    assert_is(found, 5)
    assert sorted(found.client_states) == [0, 1, 2]
    assert [p.name for p in list_checkpoints(tmp_path)] == ["round_0004", "round_0005"]
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[2] == {**row_of(3), "noise": 3 / 7}
    assert lines[3] == row_of(4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (
        tmp_path / "checkpoints" / "journal.jsonl"
    ).read_bytes()


def damage(path, kind):
    data = bytearray(path.read_bytes())
    if kind == "flipped":
        data[len(data) // 2] ^= 1
    elif kind == "cut":
        del data[len(data) // 2 :]
    elif kind == "empty":
        data.clear()
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(data)


@pytest.mark.parametrize("kind", ["flipped", "cut", "empty", "gone"])
@pytest.mark.parametrize("name", ["meta.json", "state.safetensors", "server.safetensors", "client"])
def test_falls_back_and_says_so(tmp_path, name, kind, caplog):
    saved(tmp_path, 4)
    path = tmp_path / "checkpoints" / "round_0004" / name
    if name == "client":  # what client 1 kept in round 4
        path = tmp_path / "checkpoints" / "clients" / "000000" / "1.4.safetensors"
    damage(path, kind)
    with caplog.at_level(logging.WARNING, "fastrank"):
        found = load_latest(tmp_path)
    assert_is(found, 3)
    assert "round_0004 is damaged" in caplog.text
    assert path.name in caplog.text
    # the run goes on: the damaged one is replaced
    rows = [row_of(i) for i in range(1, 5)]
    states = found.client_states
    states.drop_after(3)
    states[1] = {"own": torch.full((2,), 4.0), "first": torch.ones(1)}
    save_checkpoint(tmp_path, Checkpoint(4, state_of(4), states, rows, found.facts))
    assert_is(load_latest(tmp_path), 4)


@pytest.mark.parametrize("kind", ["flipped", "cut", "empty", "gone"])
@pytest.mark.parametrize("name", journal.COPIES)
def test_a_damaged_journal_is_mended_from_its_copy(tmp_path, name, kind, caplog):
    saved(tmp_path, 4)
    before = (tmp_path / name).read_bytes()
    damage(tmp_path / name, kind)
    assert_is(load_latest(tmp_path), 4)
    assert "taken from its copy" in caplog.text
    assert (tmp_path / name).read_bytes() == before


def test_a_journal_that_lost_its_end_twice_costs_a_checkpoint(tmp_path, caplog):
    saved(tmp_path, 4)
    for name in journal.COPIES:
        lines = (tmp_path / name).read_bytes().splitlines(keepends=True)
        (tmp_path / name).write_bytes(b"".join(lines[:3]) + lines[3][:5])
    assert_is(load_latest(tmp_path), 3)
    assert "neither checkpoints/journal.jsonl nor metrics.jsonl" in caplog.text


def test_the_journal_grows_by_its_new_lines_alone(tmp_path, monkeypatch):
    written = []
    real = journal.storage.append
    monkeypatch.setattr(
        journal.storage,
        "append",
        lambda p, d, *at, **how: (written.append(len(d)), real(p, d, *at)),
    )
    saved(tmp_path, 40)
    assert len(written) == 2 * 39
    assert max(written) < 1.5 * min(written) + 60


def test_journal_follows_rows_after_a_fall_back(tmp_path):
    """Round 4 is run again with another outcome: its old line is gone from both copies."""
    saved(tmp_path, 4)
    (tmp_path / "checkpoints" / "round_0004" / "meta.json").write_text("{")
    found = load_latest(tmp_path)
    rows = [*found.rows, {**row_of(4), "seconds": 9.0}]
    save_checkpoint(tmp_path, Checkpoint(4, state_of(4), found.client_states, rows, found.facts))
    for name in journal.COPIES:
        lines = [json.loads(x) for x in (tmp_path / name).read_text().splitlines()]
        assert [x["round"] for x in lines] == [1, 2, 3, 4]
        assert lines[3]["seconds"] == 9.0


# -- what clients keep ----------------------------------------------------------------------------


def client_files(run):
    return sorted(p.name for p in (run / "checkpoints" / "clients").glob("*/*"))


def test_only_changed_clients_are_written_and_old_files_go(tmp_path):
    states = ClientStates(tmp_path)
    for client in range(50):
        states[client] = {"w": torch.tensor([float(client)])}
    for n in range(1, 4):
        if n > 1:
            states[n] = {"w": torch.tensor([100.0 + n])}
        rows = [row_of(i) for i in range(1, n + 1)]
        save_checkpoint(tmp_path, Checkpoint(n, state_of(n), states, rows, {}))
    # 2 was replaced in round 2, and the oldest kept checkpoint is that of round 2
    assert [x for x in client_files(tmp_path) if x.startswith(("2.", "3."))] == [
        "2.2.safetensors", "3.1.safetensors", "3.3.safetensors"
    ]  # fmt: skip
    assert len(client_files(tmp_path)) == 51
    found = load_latest(tmp_path).client_states
    assert [float(found[c]["w"]) for c in (1, 2, 3, 49)] == [1.0, 102.0, 103.0, 49.0]
    assert len(found) == 50
    assert 7 in found
    assert 50 not in found
    assert found.get(50) is None


def test_states_are_read_when_asked_for(tmp_path):
    saved(tmp_path, 3)
    found = load_latest(tmp_path).client_states
    found.read_ahead([1, 2, 77])
    for path in (tmp_path / "checkpoints" / "clients").glob("*/*"):
        path.unlink()
    assert float(found[1]["own"][0]) == 1.0
    with pytest.raises(StorageError, match=r"client 0 keeps .*/0\.3\.safetensors"):
        found[0]


def test_a_missing_old_state_is_noticed(tmp_path, caplog):
    """Client 1's file of round 1 is meant by both checkpoints: neither can be resumed rightly."""
    saved(tmp_path, 3)
    (tmp_path / "checkpoints" / "clients" / "000000" / "1.1.safetensors").unlink()
    with pytest.raises(UsageError, match="none can be read"):
        load_latest(tmp_path)
    assert "states of 3 clients" in caplog.text


def test_files_of_a_round_that_never_ended_do_not_count(tmp_path):
    saved(tmp_path, 3)
    folder = tmp_path / "checkpoints" / "clients" / "000000"
    (folder / "1.4.safetensors").write_bytes(b"half")
    (folder / "notes.txt").write_text("not ours")
    found = load_latest(tmp_path)
    assert_is(found, 3)
    found.client_states.drop_after(3)
    assert not (folder / "1.4.safetensors").exists()
    assert (folder / "notes.txt").exists()


def test_plain_dicts_work_too(tmp_path):
    states = {5: {"w": torch.ones(2)}}
    for n in (1, 2, 3, 4):
        rows = [row_of(i) for i in range(1, n + 1)]
        save_checkpoint(tmp_path, Checkpoint(n, state_of(n), states, rows, {}))
    assert torch.equal(load_latest(tmp_path).client_states[5]["w"], torch.ones(2))
    assert client_files(tmp_path) == ["5.3.safetensors", "5.4.safetensors"]


# -- formats and bounds ---------------------------------------------------------------------------


def reseal(path, change):
    meta = json.loads(path.read_text())["meta"]
    change(meta)
    path.write_bytes(seal(meta))


def test_another_format_is_refused_with_both_versions(tmp_path):
    saved(tmp_path, 2)
    newest = list_checkpoints(tmp_path)[-1] / "meta.json"
    reseal(newest, lambda meta: meta.update(format=3, fastrank="9.1"))
    with pytest.raises(UsageError, match=r"format 3, .* reads format 2; .* fastrank 9\.1"):
        load_latest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"].update({"../../config.json": m["files"]["state.safetensors"]}),
        lambda m: m["files"]["state.safetensors"].update(bytes=1 << 60),
        lambda m: m["clients"]["written"].update({"../../../x": "0" * 64}),
        lambda m: m["clients"].update(count=10**30),
        lambda m: m["journal"].update(bytes=1 << 60),
        lambda m: m["journal"].update(bytes=-5),
        lambda m: m["journal"].update(rounds=1),
        lambda m: m.update(rounds_done=7),
        lambda m: m.update(columns=["round", "nothing"]),
        lambda m: m.update(order={"state.safetensors": ["a"], "server.safetensors": []}),
        lambda m: m.update(head="a"),
        lambda m: m.pop("facts"),
    ],
)
def test_forged_facts_are_refused(tmp_path, change, caplog):
    """A checksum made right again protects nothing: names and sizes are bounded anyway."""
    saved(tmp_path, 2)
    reseal(list_checkpoints(tmp_path)[-1] / "meta.json", change)
    assert_is(load_latest(tmp_path), 1)
    assert "round_0002 is damaged" in caplog.text


def test_a_journal_nested_too_deep_is_damage(tmp_path, caplog):
    """Forged with a chain that fits: json's own limit must not end the process."""
    saved(tmp_path, 2)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:1]
    lines.append(b"[" * 100_000 + b"\n")
    for name in journal.COPIES:
        (tmp_path / name).write_bytes(b"".join(lines))
    mark = journal._linked(journal.Mark(), lines)._asdict()
    reseal(list_checkpoints(tmp_path)[-1] / "meta.json", lambda m: m.update(journal=mark))
    assert_is(load_latest(tmp_path), 1)
    assert "nested too deep" in caplog.text


def test_huge_claims_allocate_nothing(tmp_path, caplog):
    """A header that announces 2**60 bytes, its checksum made right again."""
    saved(tmp_path, 2)
    folder = list_checkpoints(tmp_path)[-1]
    for header in (
        (1 << 60).to_bytes(8, "little") + b"{}",
        (80).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[1152921504606846976],'.ljust(79)
        + b"}",
    ):
        (folder / "state.safetensors").write_bytes(header)
        entry = {"bytes": len(header), "sha256": hashlib.sha256(header).hexdigest()}
        reseal(
            folder / "meta.json",
            lambda m, entry=entry: m["files"].update({"state.safetensors": entry}),
        )
        assert_is(load_latest(tmp_path), 1)
    with open(folder / "meta.json", "wb") as file:
        file.truncate(checkpoints.MAX_META_BYTES + 1)  # sparse
    assert_is(load_latest(tmp_path), 1)
    assert "the limit is" in caplog.text


def test_ledger_appends_and_survives_others(tmp_path):
    def ledger_row(n):
        return dict.fromkeys(COLUMNS) | {"round": n, "seconds": 0.5}

    path, ledger = tmp_path / "rounds.csv", Ledger()
    texts = []
    for n in range(1, 4):
        ledger.add(**ledger_row(n))
        ledger.write(path)
        texts.append(path.read_text())
    assert texts[2].startswith(texts[1])
    assert texts[1].startswith(texts[0])
    path.write_text("edited")
    ledger.write(path)
    assert path.read_text() == texts[2]
    whole = tmp_path / "again.csv"
    Ledger(ledger.rows).write(whole)
    assert whole.read_text() == texts[2]
    assert not list(Path(tmp_path).glob(".*"))


# -- whole runs -----------------------------------------------------------------------------------


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


# -- what a file system that refuses comes to -----------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "run/x"),
        Exception("No space left on device (os error 28)"),  # tokenizers, in Rust
        RuntimeError("Error while serializing: IoError(Os { code: 28, kind: StorageFull })"),
    ],
)
def test_errors_of_the_disk_become_one_line_whoever_raises_them(tmp_path, error):
    with pytest.raises(StorageError) as raised, storing(tmp_path):
        raise error
    said = str(raised.value)
    assert "No space left on device; free some space, then go on with: fastrank resume" in said
    assert "\n" not in said


@pytest.mark.parametrize("error", [ValueError("status code: 404"), KeyError("x"), UsageError("u")])
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as raised, storing(tmp_path):
        raise error
    assert raised.value is error


def test_a_file_that_cannot_be_replaced_stays_and_leaves_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "file"
    storage.write_atomic(path, b"before")

    def full(handle, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left") as raised:
        storage.write_atomic(path, b"after")
    assert raised.value.filename.endswith(".tmp")
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_where_a_run_never_began_can_be_used(tmp_path):
    rundir.refuse_occupied(tmp_path)
    (tmp_path / ".config.json.12.tmp").write_text("{")  # killed in the first write
    rundir.refuse_occupied(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UsageError, match="is not empty"):
        rundir.refuse_occupied(tmp_path)
    (tmp_path / "checkpoints" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="already holds a run"):
        rundir.refuse_occupied(tmp_path)
