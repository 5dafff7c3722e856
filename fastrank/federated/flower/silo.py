"""Data that stays where it is: each node holds its own, and the server a test set.

    run configuration    dataset="silos:birds,fish,trees" test-dataset="/srv/test.csv" num-clients=3
    node configuration   partition-id=0 num-partitions=3 dataset="/data/ours.csv"

A silo is one client. The classes are named, so that all number them alike although a silo may lack
some; ``dataset="silos"`` serves tasks without labels. A silo tells the server how many examples it
trains on, for that is its weight in averages, and nothing else of them.

A file is read as any data set of fastrank's (options like ``text_column`` hold for all). Of a
folder with train.* and test.*, the second is what a silo judges its own model by, with methods
whose clients keep such (FedSA-LoRA).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastrank.data import Split, TextData, files, rows, select
from fastrank.data.rows import Columns, Table
from fastrank.data.schema import digest, fingerprint, plain
from fastrank.errors import UsageError
from fastrank.federated.population import Population

if TYPE_CHECKING:
    from fastrank.federated.config import Config


def classes_of(dataset: str) -> tuple[str, ...] | None:
    """The classes that ``dataset`` names if it says that data lies in silos; None if it doesn't."""
    word, _, names = dataset.partition(":")
    return tuple(n.strip() for n in names.split(",") if n.strip()) if word == "silos" else None


class Silos(Population):
    """Clients whose examples are not here, but their numbers: rows that nobody can read.

    Attributes:
        rows: client -> its row numbers; on its own node those of its examples.
        tested: whether this node has a test set of its own.
    """

    def __init__(self, num_clients: int | None) -> None:
        if num_clients is None:
            raise UsageError("data in silos needs num_clients, the number of silos")
        self._count, self.tested = num_clients, False
        self.rows: dict[int, np.ndarray] = {}

    @property
    def num_partitions(self) -> int:
        return self._count

    def load_partition(self, client: int) -> np.ndarray:
        return self.rows.get(client, np.empty(0, dtype=np.int64))

    def told(self, client: int, examples: int) -> None:
        """Take down how many examples a silo has.

        Raises:
            UsageError: none, more than there can be, or not as many as it said before.
        """
        before = len(self[client])
        if not 1 <= examples < 1 << 40 or before not in (0, examples):
            raise UsageError(
                f"silo {client} has {examples} examples"
                + (f", but had {before}; put its data back, or start a new run" if before else "")
            )
        self.rows[client] = np.broadcast_to(np.int64(-1), examples)  # takes no memory

    def identity(self) -> dict[str, Any]:
        return {"population": "silos", "examples": [len(own) for own in self]}


def silo_data(source: str | TextData | None, config: Config) -> tuple[TextData, bool]:
    """A silo's data, and whether a test set is among them."""
    if source is None:
        raise UsageError(
            "this node has no data of its own, and the run's lies in silos: start it with "
            "--node-config 'dataset=\"/path/to/its/file.csv\"', or give client_app its data"
        )
    task, names, train, test = _read(source, config)
    # a split has an example at least; this one is judged by nobody
    return TextData("silo", task, train, test or select(train, [0]), names, ""), test is not None


def server_data(source: str | TextData | None, config: Config) -> TextData:
    """The server's data, a test set: the file, or a folder's or an object's test split."""
    if source is None:
        raise UsageError("data lies in silos, and the server needs a test set: set test-dataset")
    task, names, train, test = _read(source, config)
    test = test or train
    found = fingerprint(task, names, select(test, []), test)
    # a split has an example at least; this one is trained on by nobody
    return TextData(config.dataset, task, select(test, [0]), test, names, found)


def _read(
    source: str | TextData, config: Config
) -> tuple[str, tuple[str, ...], Split, Split | None]:
    """Task, classes in the order of their numbers, training and test split."""
    classes = classes_of(config.dataset)
    names = _labels_of(None, "label", classes)[1] if classes else ()
    if isinstance(source, TextData):
        if tuple(source.label_names) != names:
            raise UsageError(f"the data has the classes {source.label_names}, the run {names}")
        return source.task, names, source.train, source.test if len(source.test) else None
    asked = Columns(
        text=config.text_column,
        label=config.label_column,
        prompt=config.prompt_column,
        response=config.response_column,
        messages=config.messages_column,
        image=config.image_column,
    )
    paths = files.find_files(Path(source).expanduser())
    tables = [None if path is None else files.read_table(path) for path in paths]
    task, columns = rows.resolve(tables[0], config.task, asked)
    if (columns.label is None) == bool(classes):
        raise UsageError(
            f"{source}: the task is {task}, but dataset names {len(classes)} classes; name them "
            'all where there are labels (dataset="silos:birds,fish"), and none elsewhere'
        )

    def split(table: Table | None) -> Split | None:
        if table is None:
            return None
        labels = _labels_of(table, columns.label, classes)[0] if classes else None
        return _limited(Split(rows.examples(table, columns), labels, None), config)

    return task, names, split(tables[0]), split(tables[1])


def _labels_of(
    table: Table | None, column: str, classes: tuple[str, ...]
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """A table's labels as numbers, and the classes in their order: of a training set with all."""
    everyone = Table(
        (column,), [{column: name} for name in classes], "dataset, class {}".format, {}
    )
    return rows.labels(everyone, table, column)[1:]


def _limited(split: Split, config: Config) -> Split:
    """At most ``max_examples``, chosen as `load_data` does."""
    if config.max_examples is None or len(split) <= config.max_examples:
        return split
    ranks = [digest([config.seed, plain(example)]) for example in split.examples]
    order = sorted(range(len(ranks)), key=lambda i: (ranks[i], i))
    return select(split, sorted(order[: config.max_examples]))
