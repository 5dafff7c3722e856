"""`load_data`: one entry point for the embedded task, files and hub data sets."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from fastrank.data import files, hub, image_folder, rows
from fastrank.data.harvest import Progress, load_harvest
from fastrank.data.rows import Columns, Table
from fastrank.data.schema import TASKS, Split, TextData, digest, fingerprint, plain
from fastrank.errors import UsageError


def load_data(
    dataset: str = "embedded",
    *,
    task: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    prompt_column: str | None = None,
    response_column: str | None = None,
    messages_column: str | None = None,
    image_column: str | None = None,
    group_column: str | None = None,
    test_dataset: str | None = None,
    test_fraction: float = 0.2,
    split: str = "text",
    max_examples: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> TextData:
    """Load a data set with its test split; a pure function of content and arguments.

    Args:
        dataset: "embedded"; the path of a .csv, .tsv, .json, .jsonl or .parquet file, or of a
            folder with train.* and test.*; a folder of images by class (ROOT/CLASS/*.png, or
            ROOT/train/CLASS and ROOT/test/CLASS); else a hub name, "owner/name" or
            "owner/name:configuration" (needs the `[data]` extra).
        task: "seq-cls", "causal-lm" or "image-cls"; by default decided by the columns (images or a
            label make it classification).
        text_column, label_column, prompt_column, response_column, messages_column, image_column:
            where things are; by default columns with usual names.
        group_column: column with natural client ids.
        test_dataset: the test split, where it lies elsewhere; a path or a hub name.
        test_fraction: share held out, by content digest and seed, where there is no test split.
        split: embedded task only: "text" holds out single docstrings, "file" whole files.
        max_examples: keep at most this many examples of each split, chosen by digest and seed.
        progress: called as `progress(done, total, what)` during a first harvest, with the
            package's name, and while images are read.

    Returns:
        TextData: labels are int64 ids 0..n-1 into `label_names`.

    Raises:
        UsageError: anything wrong with the arguments or the data, in one line.
    """
    if task is not None and task not in TASKS:
        raise UsageError(f"unknown task {task!r}; use one of: {', '.join(TASKS)}")
    if not 0.0 < test_fraction < 1.0:
        raise UsageError(f"test_fraction is {test_fraction}; it must lie between 0 and 1")
    if max_examples is not None and max_examples < 1:
        raise UsageError(f"max_examples is {max_examples}; at least 1 is needed")
    asked = Columns(
        text_column,
        label_column,
        prompt_column,
        response_column,
        messages_column,
        group_column,
        image_column,
    )
    if dataset.startswith("silos:"):
        raise UsageError(
            f"{dataset!r} is data that lies on the nodes of a federation, for fastrank.federated."
            "flower; name a data set that is here"
        )
    folder = Path(dataset).expanduser()
    if dataset == "embedded":
        if asked != Columns() or test_dataset is not None:
            raise UsageError(
                "the embedded data set has its own columns and test split; "
                "drop the column and test_dataset options or name a --dataset"
            )
        if task == "image-cls":
            raise UsageError(
                "the embedded data set is text; for task image-cls name a --dataset of images"
            )
        data = _embedded(task, split, progress)
    elif _holds_images(folder, task):
        if task not in (None, "image-cls"):
            raise UsageError(f"{dataset} is a folder of images, but the task is {task}; drop it")
        if asked != Columns():
            raise UsageError(
                f"{dataset} is a folder of images: their classes are the folders, there are no "
                "columns; drop the column options"
            )
        data = _images(dataset, test_dataset, test_fraction, seed, progress)
    else:
        data = _loaded(dataset, test_dataset, task, asked, test_fraction, seed)
    if max_examples is not None:
        data = replace(
            data,
            train=_limited(data.train, max_examples, seed),
            test=_limited(data.test, max_examples, seed),
        )
    return replace(
        data, fingerprint=fingerprint(data.task, data.label_names, data.train, data.test)
    )


def _embedded(task: str | None, split: str, progress: Progress | None) -> TextData:
    harvest = load_harvest(progress)
    held_out = np.array(harvest.is_test(split))
    classify = task != "causal-lm"
    everything = Split(
        examples=list(harvest.texts),
        labels=np.array(harvest.labels, dtype=np.int64) if classify else None,
        # the folder a docstring comes from: its natural author
        groups=np.array([f.rpartition("/")[0] for f in harvest.files], dtype=str),
    )
    return TextData(
        name="embedded" if split == "text" else f"embedded-{split}",
        task="seq-cls" if classify else "causal-lm",
        train=rows.select(everything, np.flatnonzero(~held_out)),
        test=rows.select(everything, np.flatnonzero(held_out)),
        label_names=harvest.label_names if classify else (),
        fingerprint="",
    )


def _holds_images(path: Path, task: str | None) -> bool:
    if image_folder.is_image_folder(path):
        return True
    # a folder that is asked for images and holds no table is refused by what images need
    return task == "image-cls" and path.is_dir() and not (hub.is_saved(path) or _has_train(path))


def _has_train(folder: Path) -> bool:
    return any(file.suffix.lower() in files.SUFFIXES for file in folder.glob("train.*"))


def _images(
    dataset: str,
    test_dataset: str | None,
    test_fraction: float,
    seed: int,
    progress: Progress | None,
) -> TextData:
    train, test, names = image_folder.load_folder(Path(dataset).expanduser(), progress)
    if test_dataset is not None:
        test = image_folder.load_test(Path(test_dataset).expanduser(), names, progress)
    if test is None:
        train, test = _held_out(train, test_fraction, seed, dataset)
    return TextData(dataset, "image-cls", train, test, names, "")


def _tables(name: str, asked: Columns) -> tuple[Table, Table | None]:
    path = Path(name).expanduser()
    if path.is_dir() and hub.is_saved(path):
        return hub.choose_splits(name, hub.load_hub(str(path)), asked.label)
    if path.exists() or path.suffix.lower() in files.SUFFIXES or name.startswith(("/", ".", "~")):
        train, test = files.find_files(path)
        return files.read_table(train), None if test is None else files.read_table(test)
    tables = hub.load_hub(name)
    label = asked.label
    if label is None and "train" in tables:
        label = next((c for c in rows.LABEL_COLUMNS if c in tables["train"].columns), None)
    return hub.choose_splits(name, tables, label)


def _loaded(
    dataset: str,
    test_dataset: str | None,
    task: str | None,
    asked: Columns,
    test_fraction: float,
    seed: int,
) -> TextData:
    train_table, test_table = _tables(dataset, asked)
    if test_dataset is not None:
        own_train, own_test = _tables(test_dataset, asked)
        test_table = own_train if own_test is None else own_test
    task, columns = rows.resolve(train_table, task, asked)
    if test_table is not None:
        for column in (
            columns.text,
            columns.prompt,
            columns.response,
            columns.messages,
            columns.image,
            columns.label,
        ):
            if column is not None and column not in test_table.columns:
                raise UsageError(
                    f"the test split has no column {column!r}, which the training split uses; "
                    f"its columns are: {', '.join(test_table.columns)}"
                )
    train_examples = rows.examples(train_table, columns)
    test_examples = None if test_table is None else rows.examples(test_table, columns)
    train_labels = test_labels = None
    names: tuple[str, ...] = ()
    if columns.label is not None:
        train_labels, test_labels, names = rows.labels(train_table, test_table, columns.label)
    train = Split(train_examples, train_labels, rows.groups(train_table, columns.group))
    if test_examples is None:
        train, test = _held_out(train, test_fraction, seed, dataset)
    else:
        test = Split(test_examples, test_labels, None)
    return TextData(dataset, task, train, test, names, "")


def _ranks(split: Split, seed: int) -> list[str]:
    # by content alone: equal examples stay on one side, and adding rows moves no other row
    return [digest([seed, plain(example)]) for example in split.examples]


def _held_out(split: Split, fraction: float, seed: int, name: str) -> tuple[Split, Split]:
    ranks = _ranks(split, seed)
    count = max(1, round(fraction * len(ranks)))
    bound = sorted(ranks)[count - 1]
    test = np.array([rank <= bound for rank in ranks])
    if split.labels is not None:
        # a class that would only be tested goes to training instead
        test &= np.isin(split.labels, split.labels[~test])
    if test.all() or not test.any():
        raise UsageError(
            f"{name} has {len(ranks)} examples, too few to hold out {fraction:g} of them for "
            "testing; give more, another test_fraction, or a test_dataset"
        )
    return rows.select(split, np.flatnonzero(~test)), rows.select(split, np.flatnonzero(test))


def _limited(split: Split, count: int, seed: int) -> Split:
    if len(split) <= count:
        return split
    ranks = _ranks(split, seed)
    kept = sorted(range(len(ranks)), key=lambda i: (ranks[i], i))[:count]
    return rows.select(split, sorted(kept))
