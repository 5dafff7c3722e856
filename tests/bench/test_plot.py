"""Figures of results files."""

import builtins

import bench_rows
import pytest

from fastrank import cli
from fastrank.bench import plot
from fastrank.bench.results_file import Results

CASE = {"name": "c", "M": 8, "K": 4, "N": 4, "R": 2, "dtype": "float32", "dropout": 0.0}


def write(path, rows):
    Results(path, bench_rows.ENVIRONMENT).add(rows)
    return path


def test_figures_of_every_kind(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    swept = {"baseline": "frozen", "case": CASE | {"mask": "prefix", "active": 4}}
    rows = [
        bench_rows.row(case=CASE),
        bench_rows.row(case=CASE, baseline="frozen"),
        bench_rows.row(**swept),
        bench_rows.skipped(),
    ]
    path = write(tmp_path / "results.json", rows)
    assert cli.main(["bench", "plot", str(path)]) == 0
    names = [f"results-{kind}.png" for kind in ("speedup", "overhead", "ranks")]
    assert [line.rsplit("/", 1)[1] for line in capsys.readouterr().out.split()] == names
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    (tmp_path / "figures").mkdir()
    write(path, rows[:1])
    assert cli.main(["bench", "plot", str(path), "--out", str(tmp_path / "figures")]) == 0
    assert [p.name for p in (tmp_path / "figures").iterdir()] == names[:1]


def test_nothing_to_show(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "results.json", [bench_rows.skipped()])
    assert cli.main(["bench", "plot", str(path)]) == 2
    assert "no row to show" in capsys.readouterr().err
    assert cli.main(["bench", "plot", str(tmp_path / "absent.json")]) == 2
    assert "can't be read" in capsys.readouterr().err


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "results.json", [bench_rows.row(case=CASE)])
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "matplotlib":
            raise ImportError("none here")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main(["bench", "plot", str(path)]) == 2
    assert "fastrank[plots]" in capsys.readouterr().err


def test_committed_results_are_shown_without_naming_them(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", "plot"]) == 2
    assert "give --out DIR" in capsys.readouterr().err
    every = plot.committed()
    assert {"lowrank", "svd", "packing", "simulate"} <= {path.stem for path in every}
    small = [path for path in every if path.stem in ("simulate", "rank-sweep")]
    monkeypatch.setattr(plot, "committed", lambda: small)
    assert cli.main(["bench", "plot", "--out", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"simulate-speedup.png", "rank-sweep-ranks.png"}
