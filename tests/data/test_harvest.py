"""The embedded task: counts, masking, splits, determinism, cache."""

import json
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fastrank.data import harvest as hv
from fastrank.data.docstrings import ROOTS
from fastrank.errors import UsageError


def test_twenty_classes_of_enough_texts(harvested) -> None:
    counts = Counter(harvested.labels)
    assert len(harvested.label_names) == 20
    assert sorted(counts) == list(range(20))
    assert min(counts.values()) >= hv.MIN_TEXTS
    assert max(counts.values()) <= hv.TEXTS_PER_CLASS
    assert len(harvested.texts) == len(set(harvested.texts)) == len(harvested.files)
    lengths = [len(text.split()) for text in harvested.texts]
    assert min(lengths) >= 8
    assert max(lengths) <= 64


def test_no_package_name_is_left_in_any_text(harvested) -> None:
    # independent of the masking code: every run of letters, lower-cased
    parts = {part.lower() for name in harvested.label_names for part in re.split(r"[._]", name)}
    parts = {part.rstrip("2") for part in parts} - {"", "hub"}
    found = Counter()
    for text in harvested.texts:
        for word in re.findall(r"[a-z]+", text.lower()):
            if word in parts or any(root in word for root in ROOTS):
                found[word] += 1
    assert not found


def test_text_split_is_a_quarter_and_decided_by_the_text(harvested) -> None:
    held_out = harvested.is_test("text")
    assert 0.22 < sum(held_out) / len(held_out) < 0.28
    assert set(harvested.labels) == {
        label for label, test in zip(harvested.labels, held_out, strict=True) if test
    }
    # the same text alone lands on the same side
    one = hv.Harvest(harvested.texts[:1], (0,), ("f",), ("x",), {})
    assert one.is_test("text") == held_out[:1]


def test_file_split_keeps_files_whole_and_every_class_on_both_sides(harvested) -> None:
    held_out = harvested.is_test("file")
    sides: dict[str, set[bool]] = {}
    for file, label, test in zip(harvested.files, harvested.labels, held_out, strict=True):
        sides.setdefault(f"{label}:{file}", set()).add(test)
    assert all(len(side) == 1 for side in sides.values())
    for label in range(20):
        own = [t for t, lab in zip(held_out, harvested.labels, strict=True) if lab == label]
        assert 0.15 < sum(own) / len(own) < 0.45


def test_fingerprint_tells_splits_and_contents_apart(harvested) -> None:
    first = harvested.fingerprint("text")
    assert first == harvested.fingerprint("text")
    assert first != harvested.fingerprint("file")
    other = hv.Harvest(**{**harvested.__dict__, "labels": harvested.labels[::-1]})
    assert other.fingerprint("text") != first


def test_unknown_split_is_refused(harvested) -> None:
    with pytest.raises(UsageError, match="unknown split 'files'; use one of: text, file"):
        harvested.is_test("files")


def test_same_texts_under_any_hash_seed_and_nothing_imported() -> None:
    code = (
        "import hashlib, sys; from fastrank.data.harvest import class_texts; "
        "texts = class_texts('sympy.geometry') | class_texts('jinja2'); "
        "print(hashlib.sha256(repr(list(texts.items())).encode()).hexdigest(), len(texts)); "
        "assert not {'sympy', 'jinja2'} & set(sys.modules)"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert int(outputs[0].split()[1]) > 500


def _package(root: Path, name: str, count: int, word: str) -> None:
    folder = root / name
    folder.mkdir()
    body = "".join(
        f'def f{i}():\n    """Number {i} of the {word} functions that this file has."""\n'
        for i in range(count)
    )
    (folder / "__init__.py").write_text("raise ImportError('must not be imported')\n" + body)


@pytest.fixture
def small_task(tmp_path, monkeypatch):
    """Two made-up packages instead of twenty real ones, and a cache folder of our own."""
    (tmp_path / "lib").mkdir()
    for name, word in (("firstpkg", "alpha"), ("secondpkg", "beta"), ("sparepkg", "gamma")):
        _package(tmp_path / "lib", name, 12, word)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.setattr(hv, "CLASSES", ("firstpkg", "secondpkg"))
    monkeypatch.setattr(hv, "CANDIDATES", ("sparepkg",))
    monkeypatch.setattr(hv, "MIN_TEXTS", 10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_progress_is_reported_and_duplicates_across_labels_dropped(small_task) -> None:
    same = '\ndef same():\n    """A sentence that both of the packages have in common."""\n'
    for name in ("firstpkg", "secondpkg"):
        with (small_task / "lib" / name / "__init__.py").open("a") as handle:
            handle.write(same)
    calls = []
    data = hv.harvest(lambda *call: calls.append(call))
    assert calls == [(1, 2, "firstpkg"), (2, 2, "secondpkg")]
    assert Counter(data.labels) == {0: 12, 1: 12}
    assert not any("in common" in text for text in data.texts)


def test_a_missing_package_is_replaced_and_named(small_task, monkeypatch, caplog) -> None:
    monkeypatch.setattr(hv, "CLASSES", ("firstpkg", "nowhere.at_all"))
    with caplog.at_level(logging.WARNING, "fastrank"):
        assert hv.harvest().label_names == ("firstpkg", "sparepkg")
    assert "nowhere.at_all has too few docstrings, taking sparepkg" in caplog.text


def test_without_a_replacement_the_error_names_the_package(small_task, monkeypatch) -> None:
    monkeypatch.setattr(hv, "CLASSES", ("firstpkg", "nowhere"))
    monkeypatch.setattr(hv, "CANDIDATES", ())
    with pytest.raises(UsageError, match=r"missing: nowhere;.*--dataset"):
        hv.harvest()


def test_the_cache_is_used_and_rebuilt_when_corrupted(small_task, monkeypatch, caplog) -> None:
    first = hv.load_harvest()
    assert hv.cache_file().is_file()
    assert [p.suffix for p in hv.cache_file().parent.iterdir()] == [".json"]

    def refuse(progress=None):
        raise AssertionError("harvested although cached")

    with monkeypatch.context() as patch:
        patch.setattr(hv, "harvest", refuse)
        assert hv.load_harvest() == first
    raw = hv.cache_file().read_text()
    for damage in (raw[: len(raw) // 2], raw.replace("alpha", "omega"), "", "[]\n[]"):
        hv.cache_file().write_text(damage)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fastrank"):
            assert hv.load_harvest() == first
        assert "is corrupted" in caplog.text
        assert hv.cache_file().read_text() == raw


def test_a_cache_that_cannot_be_written_is_done_without(small_task, monkeypatch) -> None:
    (small_task / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_task / "file"))
    assert len(hv.load_harvest().texts) == 24
    assert (small_task / "file").read_text() == "in the way"


def test_the_cache_belongs_to_versions(small_task, monkeypatch) -> None:
    before = hv.cache_file()
    monkeypatch.setattr(hv, "package_version", lambda top: "9.9")
    assert hv.cache_file() != before


def test_the_shipped_record_names_the_task_it_left_out() -> None:
    from fastrank.data import encoder_path

    text = json.loads((encoder_path() / "pretrain.json").read_text())["text"]
    assert text["documents_left_out_as_test"] >= 1900
    assert len(text["task_fingerprint"]) == len(text["fingerprint"]) == 64
    assert text["label_names"] == list(hv.CLASSES)
