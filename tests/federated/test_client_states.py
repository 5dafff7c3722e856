"""What clients keep between rounds: files of their own, read when asked for."""

import pytest
import torch
from checkpoint_cases import assert_is, client_files, row_of, saved, state_of

from fastrank.errors import UsageError
from fastrank.federated.checkpoint import Checkpoint, load_latest, save_checkpoint
from fastrank.federated.client_states import ClientStates
from fastrank.federated.storage import StorageError


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
