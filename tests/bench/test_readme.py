"""README and the results page say what bench/results/ holds, and nothing else about speed."""

import json
import shutil
from pathlib import Path

import pytest

from fastrank.bench import readme, readme_claims, readme_plots
from fastrank.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def copy(tmp_path):
    """What the pages are written from and to, to be spoiled."""
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "fastrank" / "data").mkdir(parents=True)
    (tmp_path / "fastrank" / "data" / "encoder").symlink_to(ROOT / "fastrank" / "data" / "encoder")
    results = tmp_path / "bench" / "results"
    for name in ("cpu", "plots"):
        shutil.copytree(ROOT / "bench" / "results" / name, results / name)
    for name in ("demo", "controls", "methods"):
        (results / name).symlink_to(ROOT / "bench" / "results" / name)
    shutil.copy(ROOT / "bench" / "results" / "README.md", results)
    return tmp_path


def edit(path, before, after):
    text = path.read_text(encoding="utf-8")
    assert before in text, f"{path.name} has no {before!r}: name another part to spoil"
    path.write_text(text.replace(before, after, 1), encoding="utf-8")


def test_pages_and_figures_are_what_the_records_say():
    assert readme.outdated(ROOT, check=True) == [], f"out of date: {readme.COMMAND}"


def test_readme_claims_nothing_outside_of_the_markers():
    assert readme_claims.claims(README) == []


def test_a_doctored_page_is_out_of_date_and_made_right_again(copy):
    before = {path: path.read_bytes() for path in copy.rglob("*.md")}
    edit(copy / "README.md", "| two cores of |", "| four cores of |")
    edit(copy / "bench" / "results" / "README.md", "| all | 144 | 1.38 |", "| all | 144 | 1.83 |")
    edit(copy / "bench" / "results" / "plots" / "layers.svg", "<circle", "<circle ")
    stale = ["README.md", "bench/results/README.md", "bench/results/plots/layers.svg"]
    assert readme.outdated(copy, check=True) == stale
    assert readme.outdated(copy, check=False) == stale
    assert readme.outdated(copy, check=True) == []
    assert {path: path.read_bytes() for path in copy.rglob("*.md")} == before


def test_new_measurements_make_the_pages_out_of_date(copy):
    path = copy / "bench" / "results" / "cpu" / "lowrank.json"
    content = json.loads(path.read_bytes())
    for row in content["rows"]:
        row["speedup"] *= 1.5
    path.write_text(json.dumps(content))
    stale = readme.outdated(copy, check=True)
    assert stale == ["README.md", "bench/results/README.md", "bench/results/plots/layers.svg"]


def test_a_case_that_was_not_measured_is_named(copy):
    path = copy / "bench" / "results" / "cpu" / "packing.json"
    content = json.loads(path.read_bytes())
    content["rows"] = [row for row in content["rows"] if row["case"]["kind"] != "mask"]
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"packing\.json has no row of mask-16\.8M"):
        readme.outdated(copy, check=True)


@pytest.mark.parametrize(
    "claim",
    [
        "It is 3.1 times as fast.",
        "A step is 1.5x quicker",
        "A round takes 12 ms.",
        "The demo took 2 minutes.",
        "It saves 40 % of memory.",
        "It saves a tenth of it.",
        "An adapter is 2.1 MB.",
        "Accuracy 0.66 is reached.",
        "Much faster than PEFT.",
        "many times slower",
        "| `fedara` | 61.2 points |",
    ],
)
def test_a_claim_by_hand_is_found(claim):
    for page in (f"{README}\n{claim}\n", README.replace("## Settings", f"{claim}\n\n## Settings")):
        (found,) = readme_claims.claims(page)
        assert found.endswith(f": {claim}")
    generated = f"{README}\n<!-- begin x -->\n{claim}\n<!-- end x -->\n"
    assert readme_claims.claims(generated) == []


def test_what_is_no_claim():
    for words in ("32 x 32 pixels", "r 16, 8 x 4 x 32 tokens", "Python 3.11+", "4 clients",
                  "--alpha 0.1", "several adapters at once"):  # fmt: skip
        assert readme_claims.claims(f"{README}\n{words}\n") == [], words


def test_an_allowed_sentence_that_is_gone_is_named():
    words = next(iter(readme_claims.ALLOWED))
    (found,) = readme_claims.claims(README.replace(words, "something else"))
    assert found.startswith("not in README any more")


def test_the_command_checks(monkeypatch, capsys):
    assert readme.main(["--check"]) == 0
    monkeypatch.setattr(readme_claims, "ALLOWED", {})
    assert readme.main(["--check"]) == 1
    assert "outside of markers" in capsys.readouterr().err


def test_panels_must_show_the_same_rows():
    with pytest.raises(ValueError, match="different rows"):
        readme_plots.dots({"a": {"x": {"s": 1.0}}, "b": {"y": {"s": 1.0}}}, "label")
