"""Rows, warnings and refusals of `fastrank compare`, on folders that look like runs."""

import csv
import dataclasses
import json
import statistics

import pytest
from fabricated_runs import fabricate, ledger_row

from fastrank import cli
from fastrank.errors import UsageError
from fastrank.federated.compare import compare, make_comparison, plots
from fastrank.federated.compare.load import load_run
from fastrank.federated.compare.table import COLUMNS, group_runs
from fastrank.federated.compare.text import columns_shown


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Figures take a second each and are test_compare_page's."""
    monkeypatch.setattr(plots, "draw", lambda groups, folder: [])


def test_a_row_is_mean_and_spread_over_seeds(tmp_path):
    """Every column by hand: bytes go up by 1,000 a round, down by 500 after the first."""
    for seed, accuracies in enumerate(([0.2, 0.5, 0.6], [0.1, 0.3, 0.4], [0.2, None, 0.8])):
        fabricate(tmp_path / f"s{seed}", accuracies, seed=seed, alpha=0.1)
    (row,) = compare([tmp_path], target_accuracy=0.5, out=tmp_path / "out")
    assert tuple(row) == tuple(COLUMNS)
    assert row["method"] == "fedit"
    assert row["options"] == ""
    assert row["seeds"] == "0 1 2"
    assert row["rounds"] == 3
    assert row["accuracy"] == pytest.approx(0.6)
    assert row["accuracy_std"] == pytest.approx(statistics.stdev([0.6, 0.4, 0.8]))
    assert (row["accuracy_min"], row["accuracy_max"]) == (0.4, 0.8)
    assert (row["bytes_up"], row["bytes_down"]) == (3000, 1000)
    assert row["payload"] == 2700 + 900
    assert row["payload_without_head"] == 2700 + 900 - 300 - 100
    # seed 0 reaches it after round 2, seed 1 never, seed 2 after round 3 (round 2 isn't evaluated)
    assert row["target_accuracy"] == 0.5
    assert row["reached"] == "2/3"
    assert row["bytes_to_target"] == (2500 + 4000) / 2
    assert row["seconds_to_target"] == 5.0
    assert row["rounds_to_target"] == 2.5
    assert row["seconds"] == 6.0
    assert row["seconds_per_round"] == 2.0
    assert row["peak_memory"] == 10**8 + 3
    assert row["trainable_params"] == row["trainable_params_max"] == 225
    assert row["energy_j"] is None


def test_memory_is_the_highest_of_the_seeds(tmp_path):
    for seed, peak in enumerate((5, 7, 6)):
        rows = [ledger_row(1, 0.5, peak_memory=peak)]
        fabricate(tmp_path / f"s{seed}", [0.5], seed=seed, rows=rows)
    (row,) = compare([tmp_path], out=tmp_path / "out")
    assert row["peak_memory"] == 7


def test_one_seed_has_no_spread_and_energy_is_summed(tmp_path):
    rows = [ledger_row(i, 0.5, energy_j=10.0 * i, trainable_params=100 // i) for i in (1, 2)]
    fabricate(tmp_path / "a", [0.5, 0.5], rows=rows)
    (row,) = compare([tmp_path / "a"], out=tmp_path / "out")
    assert row["accuracy_std"] is None
    assert row["energy_j"] == 30.0
    assert (row["trainable_params"], row["trainable_params_max"]) == (50, 100)
    # 90 % of the best accuracy there is
    assert row["target_accuracy"] == pytest.approx(0.45)
    assert row["reached"] == "1/1"


def test_generated_responses_are_judged_where_there_are_some(tmp_path):
    for seed, rouge in enumerate((0.5, 0.25)):
        folder = fabricate(tmp_path / f"a{seed}", [0.5], seed=seed)
        summary = json.loads((folder / "summary.json").read_text()) | {"rouge_l": rouge}
        (folder / "summary.json").write_text(json.dumps(summary))
        fabricate(tmp_path / f"b{seed}", [0.5], seed=seed, method="fedavg")
    rows = compare([tmp_path], out=tmp_path / "out")
    assert [row["rouge_l"] for row in rows] == [0.375, None]
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert lines[0].startswith("| method | seeds | accuracy % | Rouge-L |")
    assert "| 0.375 |" in lines[2]
    assert "Rouge" not in str(columns_shown(rows[1:]))


def test_groups_are_configurations_without_the_seed(tmp_path):
    for alpha in (100, 0.1):
        for seed in (1, 0):
            for method, options in (("fedit", {"r": 8}), ("fedit", {"r": 4}), ("fedavg", {})):
                name = f"{method}{options.get('r')}-{alpha}-{seed}"
                fabricate(tmp_path / name, [0.5], method=method, alpha=alpha, seed=seed, **options)
    rows = compare([tmp_path], out=tmp_path / "out")
    assert [(row["alpha"], row["method"], row["options"], row["seeds"]) for row in rows] == [
        (alpha, method, options, "0 1")
        for alpha in (0.1, 100.0)
        for method, options in (("fedavg", ""), ("fedit", "r=4"), ("fedit", "r=8"))
    ]


def test_a_label_is_the_same_in_every_setting(tmp_path):
    fabricate(tmp_path / "a", [0.5], alpha=1, r=8)
    fabricate(tmp_path / "b", [0.5], alpha=1, r=4)
    fabricate(tmp_path / "c", [0.5], alpha=10, r=8)
    groups = group_runs([load_run(tmp_path / name) for name in "abc"])
    assert [(group.setting, group.label) for group in groups] == [
        ({"alpha": 1.0}, "fedit r=8"),
        ({"alpha": 1.0}, "fedit r=4"),
        ({"alpha": 10.0}, "fedit r=8"),
    ]


def test_variants_go_by_their_names(tmp_path):
    """And by options that they don't set."""
    text = "num_rounds = 1\nseed = 0\n[grid]\nr = [4, 8]\n[variants.whole]\n[variants.half]\n"
    (tmp_path / "file.toml").write_text(text + "lora_alpha = 8\nlora_dropout = 0.1\n")
    out = tmp_path / "out"
    for r in (4, 8):
        fabricate(out / "runs" / f"file-whole-r{r}-seed0", [0.5], r=r)
        half = {"lora_alpha": 8.0, "lora_dropout": 0.1}
        fabricate(out / "runs" / f"file-half-r{r}-seed0", [0.5], r=r, **half)
    found = make_comparison([tmp_path / "file.toml"], out=out)
    assert not found.failures
    told = [row["options"] for row in found.rows]
    assert told == ["whole r=4", "whole r=8", "half r=4", "half r=8"]
    assert found.groups[2].label == "fedit half r=4"
    # without the file there are no names
    rows = compare([out / "runs"], out=tmp_path / "other")
    assert rows[0]["options"] == "lora_alpha=8 lora_dropout=0.1 r=4"


def test_variants_of_one_name_go_by_their_options(tmp_path):
    runs = []
    for r in (4, 8):
        folder = fabricate(tmp_path / str(r), [0.5], r=r)
        runs.append(dataclasses.replace(load_run(folder), variant="a", varied=frozenset({"r"})))
    assert [group.label for group in group_runs(runs)] == ["fedit r=4", "fedit r=8"]


def test_a_rate_tuned_for_each_setting_is_no_label(tmp_path):
    fabricate(tmp_path / "a", [0.5], alpha=1, learning_rate=1e-3)
    fabricate(tmp_path / "b", [0.5], alpha=10, learning_rate=2e-3)
    rows = compare([tmp_path], out=tmp_path / "out")
    assert [row["options"] for row in rows] == ["", ""]


def test_threads_and_folders_decide_nothing(tmp_path):
    fabricate(tmp_path / "a", [0.5], seed=0, checkpoint_every=1)
    fabricate(tmp_path / "b", [0.5], seed=1, checkpoint_every=5)
    assert len(compare([tmp_path], out=tmp_path / "out")) == 1


def test_options_that_came_after_a_run_are_their_defaults(tmp_path):
    """A record of before `client_sampling` is the same configuration as one of after it."""
    old, new = (fabricate(tmp_path / n, [0.5], seed=i) for i, n in enumerate(("old", "new")))
    config = json.loads((old / "config.json").read_text())
    for name in ("client_sampling", "examples_per_client", "lora_dropout"):
        del config["options"][name]
    (old / "config.json").write_text(json.dumps(config))
    (group,) = group_runs([load_run(old), load_run(new)])
    assert [run.seed for run in group.runs] == [0, 1]
    assert group.runs[0].options["client_sampling"] == "fixed"
    config["options"]["client_sampling"] = "poisson"
    (old / "config.json").write_text(json.dumps(config))
    assert len(group_runs([load_run(old), load_run(new)])) == 2


def test_each_setting_has_a_target_of_its_own(tmp_path):
    fabricate(tmp_path / "a", [0.5], alpha=1)
    fabricate(tmp_path / "b", [0.8], alpha=10)
    fabricate(tmp_path / "c", [0.6], alpha=10, method="fedavg")
    rows = compare([tmp_path], out=tmp_path / "out")
    assert [row["target_accuracy"] for row in rows] == pytest.approx([0.45, 0.72, 0.72])


def test_files(tmp_path):
    fabricate(tmp_path / "a", [0.25, 0.5], seed=0, target_modules="query,value")
    fabricate(tmp_path / "b", [0.25, 0.5], seed=0, target_modules="key")
    out = tmp_path / "deep" / "out"
    comparison = make_comparison([tmp_path / "a", tmp_path / "b", tmp_path / "a"], out=out)
    with open(out / "table.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["options"] for row in table] == [
        "target_modules=query,value",
        "target_modules=key",
    ]
    assert float(table[0]["accuracy"]) == comparison.rows[0]["accuracy"] == 0.5
    assert table[0]["accuracy_std"] == ""
    lines = (out / "table.md").read_text().splitlines()
    assert lines[0].startswith("| method | options | seeds | accuracy % |")
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[2].startswith("| fedit | target_modules=query,value | 0 | 50.0 |")
    assert {path.name for path in comparison.files} == {"table.csv", "table.md", "compare.html"}
    assert all(path.is_file() for path in comparison.files)


@pytest.mark.parametrize(
    ("changed", "options", "words"),
    [
        ({"resolved": {"task": "causal-lm", "device": "cpu"}}, {}, "differ in task"),
        ({"data_fingerprint": "12" * 32}, {}, "different data"),
        ({"versions": {"torch": "2.11.0"}}, {}, "torch's version: 2.11.0; 2.13.0"),
        ({}, {"seed": 7}, "same seeds"),
    ],
)
def test_warnings(tmp_path, changed, options, words):
    fabricate(tmp_path / "a", [0.5])
    fabricate(tmp_path / "b", [0.5], method="fedavg", config=changed, **options)
    comparison = make_comparison([tmp_path], out=tmp_path / "out")
    (warning,) = comparison.warnings
    assert words in warning
    assert len(comparison.rows) == 2


def test_runs_that_agree_give_no_warning(tmp_path):
    """A seed may well choose its own examples."""
    for seed in (0, 1):
        for method in ("fedit", "fedavg"):
            fabricate(
                tmp_path / f"{method}{seed}", [0.5], method=method, seed=seed,
                config={"data_fingerprint": f"{seed}" * 64},
            )  # fmt: skip
    assert make_comparison([tmp_path], out=tmp_path / "out").warnings == []


def test_the_same_seed_twice_is_a_warning(tmp_path):
    fabricate(tmp_path / "a", [0.5])
    fabricate(tmp_path / "b", [0.5])
    (warning,) = make_comparison([tmp_path], out=tmp_path / "out").warnings
    assert "same seed" in warning


A, B = "a" * 40, "b" * 40


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ([(A, False)] * 3, "all runs: commit aaaaaaaaaaaa of fastrank"),
        (
            [(A, False), (B, True), (A, False)],
            "commits of fastrank (runs): commit aaaaaaaaaaaa (2), "
            "commit bbbbbbbbbbbb with uncommitted changes (1)",
        ),
        (
            [(A, True), (None, None), "before there was such an entry"],
            "commits of fastrank (runs): no known commit (2), "
            "commit aaaaaaaaaaaa with uncommitted changes (1)",
        ),
        ([(None, None)] * 3, ""),
    ],
    ids=["one", "two", "unknown", "none"],
)
def test_commits_of_the_runs(tmp_path, made, words):
    for i, entry in enumerate(made):
        known = not isinstance(entry, str)
        config = dict(zip(("commit", "dirty"), entry, strict=True)) if known else {}
        fabricate(tmp_path / str(i), [0.5], seed=i, config=config)
    comparison = make_comparison([tmp_path], out=tmp_path / "out")
    table, page = ((tmp_path / "out" / name).read_text() for name in ("table.md", "compare.html"))
    assert comparison.warnings == []
    if words:
        assert words in table
        assert words[1:] in page
    else:
        assert "ommit" not in table


def test_unfinished_runs_in_a_folder_of_runs_are_left_out(tmp_path):
    fabricate(tmp_path / "runs" / "a", [0.5])
    fabricate(tmp_path / "runs" / "b", [0.5], num_rounds=9, finished=False)
    comparison = make_comparison([tmp_path / "runs"], out=tmp_path / "out")
    assert len(comparison.rows) == 1
    ((name, reason),) = comparison.failures
    assert name.endswith("b")
    assert "1 of 9 rounds" in reason
    assert f"fastrank resume {tmp_path / 'runs' / 'b'}" in reason


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("compare", "PATH"),
        ("compare nowhere", "no folder or file 'nowhere'"),
        ("compare notes.txt", "neither a run's folder nor a .toml"),
        ("compare empty", "holds no run"),
        ("compare unfinished", "not finished (2 of 3 rounds); go on with it: fastrank resume"),
        ("compare edited", "rounds.csv of 1"),
        ("compare torn", "torn/summary.json is damaged"),
        ("compare bare", "not a run's configuration"),
        ("compare poor", "summary.json lacks accuracy"),
        ("compare cut", "not a run's ledger"),
        ("compare bad.toml", "not valid TOML"),
        ("compare twice", "both give a run named 'same-seed0'"),
        ("compare whole --target-accuracy 1.5", "target_accuracy must be above 0"),
        ("compare whole --seeds 1,a", "no list such as 0,1,2"),
        ("compare whole --seeds 1,1", "different whole numbers"),
        ("compare whole --seeds -1", "seeds"),
        ("compare whole --jobs 0", "jobs must be at least 1"),
        ("compare whole --out notes.txt", "'notes.txt' is a file"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.toml").write_text("= 3")
    for name in ("whole", "edited", "torn", "bare", "poor", "cut"):
        fabricate(tmp_path / name, [0.5, 0.5])
    fabricate(tmp_path / "unfinished", [0.5, 0.5], num_rounds=3, finished=False)
    ledger = (tmp_path / "edited" / "rounds.csv").read_text().splitlines(keepends=True)
    (tmp_path / "edited" / "rounds.csv").write_text("".join(ledger[:-1]))
    (tmp_path / "cut" / "rounds.csv").write_text("".join(ledger)[:-30])
    (tmp_path / "torn" / "summary.json").write_text('{"accuracy": ')
    (tmp_path / "bare" / "config.json").write_text("{}")
    (tmp_path / "poor" / "summary.json").write_text("{}")
    for folder in ("twice", "twice/x"):
        (tmp_path / folder).mkdir()
    (tmp_path / "twice" / "same.toml").write_text("seed = 0")
    if "twice" in arguments:
        (tmp_path / "same.toml").write_text("seed = 0")
        arguments += " same.toml"
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastrank: error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert sorted(tmp_path.rglob("*")) == before


def test_python_refuses_likewise(tmp_path):
    with pytest.raises(UsageError, match="nothing to compare"):
        compare([])


def test_the_command_prints_the_table_and_the_files(tmp_path, capsys):
    fabricate(tmp_path / "a", [0.5, 0.625])
    fabricate(tmp_path / "b", [0.5, 0.75], method="fedavg")
    assert cli.main(["compare", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "62.5" in out
    assert "75.0" in out
    assert "target accuracy: 67.5 %" in out
    assert str(tmp_path / "out" / "compare.html") in out
    # nothing is cut or left out where there is no terminal
    assert "…" not in out
    assert "payload" in out


def test_a_narrow_terminal_gets_fewer_columns(tmp_path):
    import io

    from rich.console import Console

    from fastrank.federated.compare.text import print_comparison

    fabricate(tmp_path / "a", [0.5])
    comparison = make_comparison([tmp_path / "a"], out=tmp_path / "out")
    seen = {}
    for width in (80, 200):
        file = io.StringIO()
        print_comparison(Console(file=file, force_terminal=True, width=width), comparison)
        seen[width] = file.getvalue()
    assert "…" not in seen[80]
    assert "payload" in seen[200]
    assert "payload" not in seen[80]
    assert all("accuracy" in text for text in seen.values())
