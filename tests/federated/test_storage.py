"""What a file system that refuses comes to, and how files are written."""

import errno
import os
from pathlib import Path

import pytest

from fastrank.errors import UsageError
from fastrank.federated import rundir, storage
from fastrank.federated.ledger import COLUMNS, Ledger
from fastrank.federated.storage import StorageError, storing


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
