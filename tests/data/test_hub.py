"""Hub data sets through the real `datasets` library, offline on data made here."""

import json

import pytest

from fastrank.data import load_data
from fastrank.errors import UsageError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def _saved(path, test_labels=(0, 1)) -> None:
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "mid", "pos"]),
        }
    )

    def part(labels):
        rows = {"sentence": [f"sentence {i}" for i in range(len(labels))], "label": list(labels)}
        return datasets.Dataset.from_dict(rows, features=features)

    datasets.DatasetDict(
        {"train": part([0, 1, 1, 0]), "validation": part([1, 0, 1]), "test": part(test_labels)}
    ).save_to_disk(str(path))


def test_saved_data_set_with_declared_classes(tmp_path) -> None:
    _saved(tmp_path / "saved")
    data = load_data(str(tmp_path / "saved"))
    # "mid" and "pos" are declared, so ids stay as they are although "pos" never occurs
    assert data.label_names == ("neg", "mid", "pos")
    assert data.train.labels.tolist() == [0, 1, 1, 0]
    assert len(data.test) == 2


def test_a_test_split_with_withheld_labels_gives_way_to_validation(tmp_path) -> None:
    _saved(tmp_path / "saved", test_labels=(-1, -1))
    assert len(load_data(str(tmp_path / "saved"), label_column="label").test) == 3


def test_a_repository_by_relative_name(tmp_path) -> None:
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    for split, count in (("train", 10), ("test", 4)):
        rows = [{"text": f"{split} {i}", "label": f"c{i % 2}"} for i in range(count)]
        lines = "\n".join(json.dumps(row) for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)
    # a folder with train.* is read without the library; the library reads it by its own rules
    from fastrank.data import hub

    tables = hub.load_hub("owner/name")
    assert {name: len(table.rows) for name, table in tables.items()} == {"train": 10, "test": 4}
    assert load_data("owner/name").label_names == ("c0", "c1")


def test_what_cannot_be_loaded_is_one_line(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"cannot load data set 'nobody/nothing'") as raised:
        load_data("nobody/nothing")
    assert "\n" not in str(raised.value)
