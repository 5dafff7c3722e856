"""Which peers ran, and why the others didn't: from the rows, and from what is installed."""

import json

import pytest
from bench_rows import ENVIRONMENT, row, skipped

from fastrank.bench import BENCHES, grids, peer_list, svd_peers
from fastrank.bench.results_file import Results


def peft(precision="peft", **changes):
    return row(case={"name": "c", "precision": precision}, **changes)


def by_name(rows, device="cpu"):
    return {(peer["bench"], peer["name"]): peer for peer in peer_list.states(rows, device)}


def test_a_peer_that_was_measured(tmp_path):
    Results(tmp_path / "r.json", ENVIRONMENT).add([peft()])
    found = json.loads((tmp_path / "r.json").read_bytes())["peers"]
    assert {peer["bench"] for peer in found} == {"lowrank"}  # the others were not run
    (own,) = (peer for peer in found if peer["name"] == "PEFT")
    assert own["ran"]
    assert "reason" not in own
    (line, *_) = peer_list.lines(found)
    assert line == f"peer PEFT {own['version']}: measured"


def test_precisions_are_peers_of_their_own():
    name = ("lowrank", "PEFT with 16-bit adapters or autocast")
    found = by_name([peft()])[name]
    assert not found["ran"]
    assert found["reason"] == "not part of this grid"
    assert by_name([peft("16-bit")])[name]["ran"]
    assert not by_name([peft("16-bit")])["lowrank", "PEFT"]["ran"]


def test_a_skipped_row_gives_its_reason():
    rows = [skipped("sklearn: no luck") | {"bench": "svd", "baseline": "sklearn"}]
    assert by_name(rows)["svd", "scikit-learn's randomized_svd"]["reason"] == "no luck"
    rows = [skipped("fastrank: failed: X") | {"bench": "svd", "baseline": "sklearn"}]
    assert by_name(rows)["svd", "scikit-learn's randomized_svd"]["reason"] == "fastrank: failed: X"


def test_reasons_without_rows(monkeypatch):
    rows = [row(bench="grouped"), row(bench="lowrank", case={"name": "c", "precision": "peft"})]
    monkeypatch.setattr(peer_list, "_found", lambda module: False)
    assert by_name(rows)["grouped", "mLoRA"]["reason"].startswith("not installed")
    monkeypatch.setattr(peer_list, "_found", lambda module: True)
    monkeypatch.setattr(peer_list, "_version", lambda module: "1.2")
    assert by_name(rows)["grouped", "mLoRA"]["reason"] == "needs a GPU"
    assert "training program" in by_name(rows, "cuda")["grouped", "mLoRA"]["reason"]
    schedule = by_name(rows, "cuda")["lowrank", "Unsloth's layer schedule"]
    assert schedule["ours"]
    assert schedule["version"] is None


def test_every_peer_that_is_asked_for_is_listed():
    names = " ".join(peer.name for peer in peer_list.PEERS)
    for wanted in ("PEFT", "16-bit", "torch.compile", "Unsloth", "LoRAFusion", "mLoRA", "Liger",
                   "FlagGems", "scikit-learn", "SciPy", "CuPy", "JAX", "Flower"):  # fmt: skip
        assert wanted in names, wanted
    assert {peer.bench for peer in peer_list.PEERS} <= BENCHES.keys()
    rows = {name for peer in peer_list.PEERS for name in peer.rows}
    assert {*svd_peers.ON_CPU, *svd_peers.ON_GPU} <= rows


def test_versions_are_those_installed():
    torch = pytest.importorskip("torch")
    found = {peer.name: peer.version() for peer in peer_list.PEERS}
    assert torch.__version__.startswith(found["torch.linalg.svd, svd_lowrank"].partition("+")[0])
    assert found["Unsloth's layer schedule"] is None


def test_flaggems_wraps_forward_and_backward(monkeypatch):
    import contextlib
    import sys
    import types

    import torch

    from fastrank.bench import peers
    from fastrank.bench.cases import Case, Operands

    entered = []

    @contextlib.contextmanager
    def use_gems():
        entered.append(True)
        yield
        entered.append(False)

    monkeypatch.setitem(sys.modules, "flag_gems", types.SimpleNamespace(use_gems=use_gems))
    case = Case(8, 12, 10, 2, "float32")
    step = peers.flaggems(case, Operands.of(case, torch.device("cpu")))
    step()
    assert entered == [True, False]
    assert step.x.grad is not None
    assert "flaggems+peft" not in grids.builders(case, torch.device("cpu"))
