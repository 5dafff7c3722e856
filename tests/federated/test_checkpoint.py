"""Checkpoints and the journal on disk: whatever is damaged, an older one serves."""

import hashlib
import json
import logging

import pytest
import torch
from checkpoint_cases import assert_is, damage, reseal, row_of, saved, state_of

from fastrank.errors import UsageError
from fastrank.federated import checkpoint as checkpoints
from fastrank.federated import journal
from fastrank.federated.checkpoint import Checkpoint, list_checkpoints, load_latest, save_checkpoint


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


# -- formats and bounds ----------------------------------------------------------------------------


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
