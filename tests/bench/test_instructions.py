"""What small CPU calls cost besides arithmetic: ops that they dispatch, and instructions counted by
callgrind against the committed ones.
"""

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch

from fastrank.bench import instructions
from fastrank.bench.environment import environment
from fastrank.bench.instructions import CASES, _read, built, dispatched, run, table, why_not
from fastrank.errors import UsageError

COMMITTED = Path(__file__).parents[2] / "bench" / "results" / "cpu" / "instructions.json"
HOW = "python -m fastrank.bench.instructions --out bench/results/cpu/instructions.json"
# counts of a case may differ by so much: memory lies elsewhere, dicts have grown otherwise
MARGIN = 0.05
# case -> ops of a call with these versions, fastrank's and PEFT's
VERSIONS = {"torch": "2.13.0", "peft": "0.21.2"}
OPS = {
    "patched layer": (7, 27),
    "patched layer, dropout": (8, 32),
    "lowrank_linear": (7, 27),
    "lowrank_linear, dropout": (8, 32),
    "lowrank_add": (7, None),
    "grouped_lowrank_linear": (246, 108),
    "mask positions": (1, None),
    "pack": (10, None),
    "unpack_add_": (11, None),
    "aggregate": (13, None),
    "truncated_svd": (197, None),
}


def same_versions() -> bool:
    installed = {"torch": torch.__version__.partition("+")[0], "peft": metadata.version("peft")}
    return installed == VERSIONS


@pytest.mark.parametrize("name", CASES)
def test_ops_that_a_call_dispatches(name):
    """Exactly today's with the versions above; with others at most a tenth more."""
    ours, theirs = OPS[name]
    assert ("peft" in CASES[name]) == (theirs is not None)
    found = dispatched(built(name, "fastrank"))
    if same_versions():
        assert found == ours
    assert found <= 1.1 * ours
    if "layer" in name or name.startswith("lowrank_linear"):
        assert found < dispatched(built(name, "peft"))


def test_ops_are_counted():
    x = torch.ones(3, requires_grad=True)
    assert dispatched(lambda: None) == 0
    assert dispatched(lambda: x + x) == 1
    assert dispatched(lambda: (x.detach() * 2).view(3, 1)) == 3


def test_counts_are_read_in_order(tmp_path):
    for i in range(6):
        (tmp_path / f"out.{i + 1}").write_text(f"desc: Trigger: x\ntotals: {100 * (i + 1)}\n")
    pairs = [("a", "fastrank"), ("a", "peft")]
    assert _read(tmp_path, pairs) == {pairs[0]: [20, 40, 60], pairs[1]: [80, 100, 120]}
    (tmp_path / "out.4").write_text("nothing\n")
    with pytest.raises(RuntimeError, match=r"dump 4 of 6 has no totals"):
        _read(tmp_path, pairs)


def test_what_cannot_be_counted_is_said(monkeypatch):
    with pytest.raises(UsageError, match=r"no case is called 'x'; choose among patched layer"):
        run(only=["x"])
    monkeypatch.setattr(instructions.shutil, "which", lambda tool: None)
    with pytest.raises(UsageError, match=r"valgrind is not installed.*apt-get install valgrind"):
        run(only=["pack"])


def test_a_file_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(instructions, "why_not", lambda: None)
    monkeypatch.setattr(instructions, "_version", lambda: "3")
    counts = {("lowrank_linear", "fastrank"): [3, 1, 2], ("lowrank_linear", "peft"): [8, 9, 7]}
    monkeypatch.setattr(instructions, "_counted", lambda names: counts)
    found = run(tmp_path / "new.json", ["lowrank_linear"])
    assert json.loads((tmp_path / "new.json").read_text()) == found
    ours, theirs = found["counts"]
    assert (ours["instructions"], ours["lowest"], ours["highest"]) == (2, 1, 3)
    assert theirs["variant"] == "peft"
    assert found["environment"]["valgrind"] == "3"
    assert table(found).splitlines()[1].split() == ["lowrank_linear", "2", "8", "0.25"]


def test_the_committed_file_has_every_case():
    rows = json.loads(COMMITTED.read_text())["counts"]
    pairs = [(name, variant) for name in CASES for variant in CASES[name]]
    assert [(row["case"], row["variant"]) for row in rows] == pairs
    for row in rows:
        assert row["highest"] <= (1 + MARGIN) * row["lowest"], row


def differences(committed, found, margin=MARGIN):
    """Cases whose counts aren't the committed ones."""
    known = {(row["case"], row["variant"]): row["instructions"] for row in committed["counts"]}
    wrong = []
    for row in found["counts"]:
        before, now = known[row["case"], row["variant"]], row["instructions"]
        if abs(now - before) > margin * before:
            wrong.append(f"{row['case']}, {row['variant']}: {now}, committed {before}; {HOW}")
    return wrong


def test_a_difference_is_found():
    committed = json.loads(COMMITTED.read_text())
    assert differences(committed, committed) == []
    changed = json.loads(COMMITTED.read_text())
    changed["counts"][0]["instructions"] = int(changed["counts"][0]["instructions"] * 1.06)
    [said] = differences(committed, changed)
    assert said.startswith("patched layer, fastrank: ")
    assert HOW in said


@pytest.mark.slow
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_instructions_are_the_committed_ones():
    committed = json.loads(COMMITTED.read_text())
    here = environment(torch.device("cpu"))
    for name in ("torch", "python", "peft"):
        recorded = committed["environment"][name]
        if recorded != here[name]:  # other code of theirs runs, whose instructions are not ours
            pytest.skip(f"counted with {name} {recorded}, here is {here[name]}")
    assert differences(committed, run()) == []
