"""load_data: the embedded task, files of every format, and every kind of bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastrank.data import Dialogue, load_data
from fastrank.errors import UsageError

ROWS = [
    {"text": f"text number {i}, with a comma", "label": name, "who": f"client {i % 3}"}
    for i, name in enumerate(["pear", "apple"] * 10)
]


def _write(path: Path, rows: list[dict], columns: list[str] | None = None) -> Path:
    """Write rows in the format that the suffix says."""
    columns = columns or list(rows[0])
    if path.suffix in (".csv", ".tsv"):
        import csv

        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(
                handle, columns, delimiter="\t" if path.suffix == ".tsv" else ","
            )
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_embedded_is_the_default(harvested) -> None:
    data = load_data()
    assert (data.name, data.task) == ("embedded", "seq-cls")
    assert len(data.train) + len(data.test) == len(harvested.texts)
    assert len(data.test) == sum(harvested.is_test())
    assert not set(data.train.examples) & set(data.test.examples)
    assert data.train.labels.dtype == np.int64
    assert data.label_names == harvested.label_names
    pairs = dict(zip(harvested.texts, harvested.labels, strict=True))
    assert all(
        pairs[t] == label for t, label in zip(data.test.examples, data.test.labels, strict=True)
    )
    assert len(set(data.train.groups)) > 100
    assert load_data().fingerprint == data.fingerprint


def test_embedded_variants(harvested) -> None:
    strict = load_data(split="file")
    assert strict.name == "embedded-file"
    assert len(strict.test) == sum(harvested.is_test("file"))
    language = load_data(task="causal-lm", max_examples=50)
    assert language.train.labels is None
    assert language.label_names == ()
    assert (len(language.train), len(language.test)) == (50, 50)
    assert language.fingerprint != load_data(max_examples=50).fingerprint


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, fastrank.data, fastrank.data.load; "
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_format_gives_the_same_data(tmp_path, suffix) -> None:
    path = _write(tmp_path / f"data.{suffix}", ROWS)
    data = load_data(str(path), group_column="who")
    assert (data.task, data.label_names) == ("seq-cls", ("apple", "pear"))
    assert (len(data.train), len(data.test)) == (16, 4)
    found = {
        (text, data.label_names[label], group)
        for split in (data.train, data.test)
        for text, label, group in zip(split.examples, split.labels, split.groups, strict=True)
    }
    assert found == {(r["text"], r["label"], r["who"]) for r in ROWS}
    _write(tmp_path / "other.csv", ROWS)
    assert (
        data.fingerprint == load_data(str(tmp_path / "other.csv"), group_column="who").fingerprint
    )


def test_split_depends_on_seed_and_content_alone(tmp_path) -> None:
    path = str(_write(tmp_path / "a.jsonl", ROWS))
    back = str(_write(tmp_path / "b.jsonl", ROWS[::-1]))
    first, again, other = load_data(path), load_data(path), load_data(path, seed=1)
    assert first.test.examples == again.test.examples
    assert set(first.test.examples) == set(load_data(back).test.examples)
    assert first.test.examples != other.test.examples
    assert len(load_data(path, test_fraction=0.5).test) == 10


def test_equal_texts_stay_on_one_side(tmp_path) -> None:
    rows = [{"text": f"text {i % 10}", "label": i % 2} for i in range(100)]
    data = load_data(str(_write(tmp_path / "a.csv", rows)))
    assert not set(data.train.examples) & set(data.test.examples)


def test_integer_labels_keep_their_order_and_become_contiguous(tmp_path) -> None:
    rows = [{"text": f"text {i}", "label": (10, 9, 2)[i % 3]} for i in range(30)]
    for suffix in ("csv", "json"):
        data = load_data(str(_write(tmp_path / f"a.{suffix}", rows)))
        assert data.label_names == ("2", "9", "10")
        assert set(data.train.labels) == {0, 1, 2}


def test_a_class_seen_once_is_trained_on_not_tested(tmp_path) -> None:
    rows = [*ROWS, {"text": "rare", "label": "quince", "who": "x"}]
    for seed in range(8):
        data = load_data(str(_write(tmp_path / "a.csv", rows)), seed=seed)
        assert "rare" in data.train.examples


def test_folder_with_train_and_test(tmp_path) -> None:
    _write(tmp_path / "train.csv", ROWS)
    _write(tmp_path / "validation.jsonl", ROWS[:3])
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.test)) == (20, 3)
    _write(tmp_path / "test.jsonl", ROWS[:2])
    assert len(load_data(str(tmp_path)).test) == 2
    elsewhere = _write(tmp_path / "elsewhere.csv", ROWS[:5])
    data = load_data(str(tmp_path / "train.csv"), test_dataset=str(elsewhere))
    assert (len(data.train), len(data.test)) == (20, 5)


def test_columns_by_name(tmp_path) -> None:
    rows = [{"Review": r["text"], "stars": r["label"]} for r in ROWS]
    path = str(_write(tmp_path / "a.csv", rows))
    data = load_data(path, label_column="stars")
    assert data.train.examples[0].startswith("text number")
    # without a known label column: text to model
    assert load_data(path).task == "causal-lm"


def test_language_modelling_columns(tmp_path) -> None:
    pairs = [{"instruction": f"ask {i}", "output": f"answer {i}"} for i in range(10)]
    data = load_data(str(_write(tmp_path / "a.jsonl", pairs)))
    assert data.task == "causal-lm"
    assert data.train.labels is None
    number = data.train.examples[0].messages[0]["content"].split()[1]
    assert data.train.examples[0] == Dialogue(
        (
            {"role": "user", "content": f"ask {number}"},
            {"role": "assistant", "content": f"answer {number}"},
        )
    )
    talk = [
        {"messages": [{"role": "user", "content": f"a{i}"}, {"role": "assistant", "content": "b"}]}
        for i in range(10)
    ]
    old = [
        {"conversations": [{"from": "human", "value": f"a{i}"}, {"from": "gpt", "value": "b"}]}
        for i in range(10)
    ]
    first = load_data(str(_write(tmp_path / "b.jsonl", talk)))
    second = load_data(str(_write(tmp_path / "c.json", old)))
    assert first.train.examples == second.train.examples
    renamed = [{"q": p["instruction"], "a": p["output"]} for p in pairs]
    path = str(_write(tmp_path / "d.csv", renamed))
    third = load_data(path, prompt_column="q", response_column="a")
    assert third.train.examples == data.train.examples


def test_csv_fields_may_hold_newlines_quotes_and_a_byte_order_mark(tmp_path) -> None:
    path = tmp_path / "a.csv"
    body = 'text,label\n"two\nlines, ""quoted""",a\nsecond,b\nthird,a\nfourth,b\n'
    path.write_bytes(b"\xef\xbb\xbf" + body.encode())
    data = load_data(str(path), test_dataset=str(path))
    assert data.train.examples[0] == 'two\nlines, "quoted"'


GOOD = "text,label\nfirst,a\nsecond,b\n"
BAD_FILES = {
    "empty.csv": ("", r"empty.csv is empty"),
    "blank.jsonl": ("\n \n", r"blank.jsonl is empty"),
    "header.csv": ("text,label\n", r"header.csv has no rows"),
    "none.json": ("[]", r"none.json has no rows"),
    "fields.csv": (GOOD + "third\n", r"fields.csv, line 4: 1 fields, but the header names 2"),
    "lines.csv": (
        'text,label\n"a\nb",x\n\n"c\nd",y,z\n',
        r"lines.csv, line 5: 3 fields",
    ),
    "quote.csv": (GOOD + '"open,a\nmore,b\n', r"quote.csv, line 4: malformed"),
    "twice.csv": ("text,text\na,b\n", r"twice.csv, line 1: the header names 'text' twice"),
    "unnamed.csv": ("text,\na,b\n", r"line 1: the header has a column without a name"),
    "gap.csv": (GOOD + " ,b\n", r"gap.csv, line 4: column 'text' is empty"),
    "nolabel.csv": (GOOD + "third,\n", r"nolabel.csv, line 4: label column 'label' holds"),
    "one.csv": ("text,label\na,x\nb,x\n", r"has a single value, 'x'"),
    "bad.jsonl": ('{"text": "a", "label": 1}\n\n{"text": \n', r"bad.jsonl, line 3: malformed JSON"),
    "list.jsonl": ('{"text": "a", "label": 1}\n[1]\n', r"list.jsonl, line 2: found list"),
    "number.jsonl": ('{"text": 5, "label": 1}\n', r"line 1: column 'text' holds int '5'"),
    "float.jsonl": ('{"text": "a", "label": 1.5}\n', r"line 1: label column .* holds float '1.5'"),
    "hole.jsonl": ('{"text": "a", "label": 1}\n{"label": 2}\n', r"line 2: .* holds nothing"),
    "object.json": ('{"text": "a"}', r"object.json, line 1: wanted a list of objects"),
    "cut.json": ('[\n{"text": "a", "label": 1},\n{"text": "b"', r"cut.json, line 3: malformed"),
    "comma.json": ('[{"text": "a"}\n{"text": "b"}]', r"comma.json, line 2: malformed"),
    "tail.json": ('[{"text": "a"}]\n\nmore', r"tail.json, line 3: text after the end"),
    "string.json": ('[{"text": "a"},\n\n "b"]', r"string.json, line 3: found str"),
    "talk.jsonl": ('{"messages": [{"role": "user"}]}\n', r"line 1: a message in 'messages' is"),
    "mute.jsonl": (
        '{"messages": [{"role": "user", "content": "hello"}]}\n',
        r"line 1: no assistant turn",
    ),
    "flat.jsonl": ('{"messages": "hello"}\n', r"line 1: .* wanted a list of messages"),
    "other.csv": ("alpha,beta\n1,2\n", r"no text column found.* the columns are: alpha, beta"),
    "tiny.csv": ("text\none\n", r"too few to hold out 0.2"),
    "data.xlsx": ("x", r"unknown format; the known ones are .csv, .tsv"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_name_file_line_and_remedy(tmp_path, name) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=message) as raised:
        load_data(str(tmp_path / name))
    assert "\n" not in str(raised.value)


def test_bytes_that_are_not_utf8(tmp_path) -> None:
    (tmp_path / "a.csv").write_bytes(GOOD.encode() + b"caf\xe9,a\n")
    with pytest.raises(UsageError, match=r"a.csv, line 4: not UTF-8 \(byte 0xe9\)"):
        load_data(str(tmp_path / "a.csv"))


def test_a_test_label_that_training_lacks(tmp_path) -> None:
    _write(tmp_path / "train.csv", ROWS)
    _write(tmp_path / "test.csv", [*ROWS[:2], {"text": "x", "label": "fig", "who": "c"}])
    with pytest.raises(
        UsageError, match=r"test.csv, line 4: label 'fig' .* not one of the 2 .*\(apple, pear\)"
    ):
        load_data(str(tmp_path))


def test_a_test_split_with_other_columns(tmp_path) -> None:
    _write(tmp_path / "train.csv", ROWS)
    _write(tmp_path / "test.csv", [{"text": "a", "kind": "apple"}])
    with pytest.raises(UsageError, match=r"test split has no column 'label'.*: text, kind"):
        load_data(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": "body"}, r"no column 'body' for text_column; the columns are: text, "),
        ({"label_column": "y"}, r"no column 'y' for label_column"),
        ({"group_column": "y"}, r"no column 'y' for group_column"),
        ({"prompt_column": "text"}, r"prompt_column and response_column go together"),
        ({"task": "ner"}, r"unknown task 'ner'; use one of: seq-cls, causal-lm"),
        ({"task": "causal-lm", "label_column": "label"}, r"label_column is for task seq-cls"),
        ({"task": "seq-cls", "messages_column": "text"}, r"but the task is seq-cls"),
        ({"test_fraction": 0.0}, r"test_fraction is 0.0; it must lie between 0 and 1"),
        ({"test_fraction": 1.0}, r"test_fraction is 1.0"),
        ({"max_examples": 0}, r"max_examples is 0"),
        ({"test_dataset": "./gone.csv"}, r"no such data file: gone.csv"),
    ],
)
def test_bad_arguments(tmp_path, options, message) -> None:
    path = _write(tmp_path / "a.csv", ROWS)
    with pytest.raises(UsageError, match=message):
        load_data(str(path), **options)


def test_bad_paths(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"no such data file: .*gone.csv"):
        load_data(str(tmp_path / "gone.csv"))
    with pytest.raises(UsageError, match=r"holds no train file"):
        load_data(str(tmp_path))
    for name in ("train.csv", "train.jsonl"):
        _write(tmp_path / name, ROWS)
    with pytest.raises(UsageError, match=r"several train files \(train.csv, train.jsonl\)"):
        load_data(str(tmp_path))
    with pytest.raises(UsageError, match=r"the embedded data set has its own columns"):
        load_data(text_column="text")


def test_a_parquet_file_that_is_none(tmp_path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(UsageError, match=r"a.parquet is not a readable Parquet file"):
        load_data(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("module", ["pyarrow", "datasets"])
def test_missing_extras_are_named(tmp_path, monkeypatch, module) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    name = str(tmp_path / "a.parquet") if module == "pyarrow" else "someone/something"
    with pytest.raises(UsageError, match=r"pip install 'fastrank\[data\]'"):
        load_data(name)


def test_silos_are_not_asked_of_the_hub() -> None:
    with pytest.raises(UsageError, match="on the nodes of a federation"):
        load_data("silos:birds,fish")
