"""Silos: every node has data of its own, and the run has the bits of one on all of them."""

import csv
import shutil

import numpy as np
import pytest
from loopback import Loopback, assert_same, connected, federated, plain, rows_of
from staged_runs import Stop, StopAfter

from fastrank.data import load_data
from fastrank.data.rows import select
from fastrank.data.schema import TextData
from fastrank.errors import UsageError
from fastrank.federated.flower.roster import Roster

CLASSES = "silos:birds,fish,trees"
SIZES = (80, 60, 40)  # and the second has no birds


class Explicit:
    """A partition by row numbers."""

    def __init__(self, parts):
        self.parts, self.num_partitions = parts, len(parts)

    def load_partition(self, client):
        return self.parts[client]


@pytest.fixture(scope="module")
def silos(csv_data, tmp_path_factory):
    """Files of three silos, and rows of the whole data set that each holds."""
    with (csv_data / "train.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    order = np.random.default_rng(0).permutation(len(rows))
    ends = np.cumsum(SIZES)[:-1]
    parts = np.split(order, ends)
    parts[1] = np.array([row for row in parts[1] if rows[row][1] != "birds"])
    assert len(parts[1]) > 20
    folder = tmp_path_factory.mktemp("silos")
    for i, part in enumerate(parts):
        with (folder / f"{i}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows[row] for row in part)
    return [str(folder / f"{i}.csv") for i in range(3)], parts


@pytest.fixture
def options(small, csv_data):
    shared = {k: v for k, v in small.items() if k not in ("dataset", "partition")}
    return {**shared, "num_clients": 3, "clients_per_round": 3, "num_rounds": 2,
            "test_dataset": str(csv_data / "test.csv"), "local_steps": 2}  # fmt: skip


def together(options, csv_data, silos, folder):
    """The same clients in the simulator, with all data in one place."""
    whole = {**options, "dataset": str(csv_data)}
    return plain(whole, folder, partition=Explicit(silos[1]))


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("fedit", {}),
        ("flora", {"r": 4, "client_ranks": "2,4", "clients_per_round": 2, "num_rounds": 3}),
    ],
)
def test_silos_have_the_bits_of_their_data_in_one_place(
    method, more, options, csv_data, silos, tmp_path
):
    options |= {"method": method, **more}
    together(options, csv_data, silos, tmp_path)
    data = silos[0]
    if method == "flora":  # the second silo's come from elsewhere than a file
        everything = load_data(str(csv_data))
        own = select(everything.train, silos[1][1])
        data = [data[0], TextData("ours", "seq-cls", own, select(own, []),
                                  everything.label_names, ""), data[2]]  # fmt: skip
    _, link = federated({**options, "dataset": CLASSES}, tmp_path, data=data, forgetful=True)
    assert_same(tmp_path)
    hellos = [reply.header for kind, *_, reply in link.said if kind == "query"]
    assert sorted(each["examples"] for each in hellos) == sorted(map(len, silos[1]))
    assert not any("fingerprint" in key and ("data" in key or "partition" in key)
                   for each in hellos for key in each["description"]["agreed"])  # fmt: skip


def test_a_run_on_silos_is_resumed_with_their_data_and_no_other(options, csv_data, silos, tmp_path):
    together(options, csv_data, silos, tmp_path)
    options |= {"dataset": CLASSES}
    link = Loopback(options, tmp_path / "nodes", 3, data=silos[0])
    kind = connected(link, start_timeout=0.0)
    folder = tmp_path / "remote"
    with pytest.raises(Stop):
        kind(callbacks=[StopAfter(1)], **options, output_dir=str(folder)).run()
    first, second, _ = (link.nodes_[node] for node in sorted(link.nodes_, reverse=True))
    mine, first.data = first.data, second.data
    with pytest.raises(UsageError, match=r"client_sizes was .*, train_examples was 157, is 114"):
        kind.resume(folder)
    first.data = mine
    kind.resume(folder)
    assert_same(tmp_path)


def test_a_silo_judges_its_own_model_by_its_own_test_set(options, silos, tmp_path):
    folder = tmp_path / "first"
    folder.mkdir()
    for name in ("train", "test"):
        shutil.copy(silos[0][0], folder / f"{name}.csv")
    options |= {"method": "fedsa-lora", "r": 2, "dataset": CLASSES}
    data = [str(folder), *silos[0][1:]]
    _, link = federated(options, tmp_path, data=data)
    judged = [reply.header for kind, *_, reply in link.said if kind == "evaluate"]
    scores = [score for each in judged for score in each["scores"]]
    assert {score["client"] for score in scores} == {0}
    assert [score["score"]["count"] for score in scores] == [SIZES[0]] * 2
    assert {each["client"] for reply in judged for each in reply["failed"]} == {1, 2}
    last = float.fromhex(scores[-1]["score"]["accuracy"])
    assert float(rows_of(tmp_path / "remote")[-1]["accuracy"]) == pytest.approx(last)


@pytest.fixture(scope="module")
def roster(base, csv_data, silos, tmp_path_factory):
    """What seats a node of a run on silos, or says why not; and the run's options."""
    shared = {k: v for k, v in base.items() if k not in ("dataset", "partition")}
    test = str(csv_data / "test.csv")
    options = {**shared, "num_clients": 3, "dataset": CLASSES, "test_dataset": test}
    folder = tmp_path_factory.mktemp("server")
    link = Loopback(options, folder / "nodes", 3, data=silos[0])
    server = connected(link, start_timeout=0.0)(**options, output_dir=str(folder / "run"))
    server.prepare()
    return server.executor.roster, options


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset": "silos:birds,fish"}, r"label 'trees' in column 'label' is not one of"),
        ({"dataset": "silos"}, "dataset names 0 classes; name them"),
        ({"dataset": "silos:birds,fish,trees,fungi"}, 'labels is .* on the server.*"fungi"'),
        ({"text_column": "author"}, "options.text_column is null on the server"),
        ({"text_column": "words"}, "no column 'words'"),
        ({"data": None}, "this node has no data of its own"),
        ({"clients": [0, 1]}, "a silo is one client, but this node serves 0-1"),
    ],
)
def test_a_silo_that_does_not_fit_is_refused(change, words, roster, silos, tmp_path):
    roster, options = roster
    given = {k: v for k, v in change.items() if k in options or k == "text_column"}
    link = Loopback({**options, **given}, tmp_path, 3, data=silos[0])
    only = min(link.nodes_)
    link.absent = set(link.nodes_) - {only}
    if "data" in change:
        link.nodes_[only].data = None
    if "clients" in change:
        link.nodes_[only].clients = lambda n: change["clients"]
    alone = Roster(link, roster.description, roster.partition, timeout=0.0)
    with pytest.raises(UsageError, match=words):
        alone.gather()


def test_a_silo_may_not_change_its_size_while_it_runs(options, silos, tmp_path, caplog):
    options |= {"dataset": CLASSES}
    link = Loopback(options, tmp_path / "nodes", 3, data=silos[0])
    old = min(link.nodes_)
    ask = link.ask

    def moves(kind, letters, round, timeout):
        replies = ask(kind, letters, round, timeout)
        if kind == "train" and round == 0:
            link.nodes_[99] = link.nodes_.pop(old)
            link.nodes_[99].data = silos[0][0]
        return replies

    link.ask = moves
    federated(options, tmp_path, link=link)
    assert [row["dropped"] for row in rows_of(tmp_path / "remote")] == ["0", "1"]
    assert "silo 2 has 80 examples, but had 40; put its data back" in caplog.text


def test_the_server_of_silos_needs_a_test_set(options, silos, tmp_path):
    options = {**options, "dataset": CLASSES, "test_dataset": None}
    with pytest.raises(UsageError, match="the server needs a test set: set test-dataset"):
        federated(options, tmp_path, data=silos[0])
