"""What a results file holds, when it is written, and which are refused."""

import csv
import json

import pytest
from bench_rows import ENVIRONMENT, row, skipped

from fastrank.bench.results_file import Results, check_row, failures, read
from fastrank.errors import UsageError


def test_rows_are_in_the_file_as_soon_as_they_are_added(tmp_path):
    path = tmp_path / "results.json"
    results = Results(path, ENVIRONMENT)
    assert not path.exists()  # nothing is lost before there is something
    results.add([row()])
    content = json.loads(path.read_text())
    assert content.pop("peers")
    assert content == {"environment": ENVIRONMENT, "rows": [row()]}
    results.add([skipped()])
    assert json.loads(path.read_text())["rows"] == [row(), skipped()]
    assert sorted(tmp_path.iterdir()) == [path.with_suffix(".csv"), path]


def test_the_table_beside_the_file_says_where_every_row_comes_from(tmp_path):
    rows = [row(case={"name": "a, b", "M": 3}), skipped(), row(extra=5)]
    Results(tmp_path / "results.json", ENVIRONMENT).add(rows)
    with (tmp_path / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["case.name"] for line in table] == ["a, b", "other", "case"]
    assert [line["skipped"] for line in table] == ["", "peft: not installed", ""]
    assert float(table[0]["median_s"]) == 1.0
    assert table[0]["baseline_error"] == table[1]["median_s"] == ""
    assert table[2]["extra"] == "5"
    for line in table:
        assert {key: line[f"environment.{key}"] for key in ENVIRONMENT} == {
            key: str(value) for key, value in ENVIRONMENT.items()
        }


def test_a_table_cannot_be_the_results_file(tmp_path):
    with pytest.raises(UsageError, match=r"give results\.json"):
        Results(tmp_path / "results.csv", ENVIRONMENT)


def test_resume_takes_up_what_is_there(tmp_path):
    path = tmp_path / "results.json"
    Results(path, ENVIRONMENT).add([row("a"), skipped(name="b")])
    results = Results(path, ENVIRONMENT | {"date": "tomorrow"}, resume=True)
    assert results.has("a", "full")
    assert results.has("b", "full")
    assert not results.has("a", "full-graph")
    results.add([row("c")])
    assert [r["case"]["name"] for r in read(path)["rows"]] == ["a", "b", "c"]
    assert read(path)["environment"]["date"] == "today"
    assert Results(path, ENVIRONMENT).rows == []


def test_results_of_another_machine_are_not_mixed(tmp_path):
    path = tmp_path / "results.json"
    Results(path, ENVIRONMENT).add([row()])
    with pytest.raises(UsageError, match="measured with torch 2, here it is 3"):
        Results(path, ENVIRONMENT | {"torch": "3"}, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speedup": float("nan")}, "speedup is nan"),
        ({"median_s": None}, "median_s is None"),
        ({"median_s": -1.0}, "median_s is -1.0"),
        ({"error": "small"}, "error is 'small'"),
        ({"case": {"M": 1}}, "wanted an object with a name"),
        ({"skipped": ""}, "wanted the reason"),
    ],
)
def test_a_row_that_says_nothing_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_row(row(**changes))


@pytest.mark.parametrize("key", ["variant", "q80_s", "baseline_error"])
def test_every_key_is_wanted(key):
    incomplete = row()
    del incomplete[key]
    with pytest.raises(ValueError, match=f"lacks {key}"):
        check_row(incomplete)


def test_a_refused_row_does_not_reach_the_file(tmp_path):
    results = Results(tmp_path / "results.json", ENVIRONMENT)
    results.add([row()])
    with pytest.raises(ValueError):
        results.add([row(speedup=float("inf"))])
    assert read(tmp_path / "results.json")["rows"] == [row()]


def test_failures_are_not_absences():
    rows = [row(), skipped(), skipped("peft: failed: RuntimeError: broken")]
    assert failures(rows) == 1


def test_bad_paths(tmp_path):
    with pytest.raises(UsageError, match="is no folder"):
        Results(tmp_path / "nowhere" / "r.json", ENVIRONMENT)
    with pytest.raises(UsageError, match="is a folder"):
        Results(tmp_path, ENVIRONMENT)
    with pytest.raises(UsageError, match="can't be read"):
        read(tmp_path / "absent.json")
    for text in ("{", "[]", '{"environment": {}, "rows": []}', '{"rows": [{}], "environment": {}}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UsageError, match="no results file"):
            read(tmp_path / "bad.json")
