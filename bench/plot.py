"""`fastrank bench plot`: figures of results files: speed-up and overhead of each case, rank sweep.

Writes PNG files into --out (default: beside each results file), named after the file they show.
Without files it shows those of bench/results/cpu and bench/results/gpu, into --out. README's own
figures are SVG: `python -m fastrank.bench.readme`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastrank.bench.records import results_files
from fastrank.bench.results_file import Row, read
from fastrank.errors import UsageError

_COLOURS = ("#3b6fb6", "#c4572c", "#4d9a5b", "#8a5fa8", "#7f7f7f")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line's options."""
    parser.add_argument("files", nargs="*", metavar="RESULTS.json", help="what to show")
    parser.add_argument("--out", metavar="DIR", help="where the figures go")


def plot(files: Sequence[str | Path], out: str | Path | None = None) -> list[Path]:
    """Draw what results files hold.

    Args:
        files: written by `fastrank bench`; none for the committed ones, which need `out`.
        out: folder of the figures; None for each file's own.

    Returns:
        The figures written, PNG.

    Raises:
        UsageError: matplotlib is missing, a file has nothing to show, or there is none.
    """
    if not files:
        if out is None:
            raise UsageError("give --out DIR for the figures of bench/results, or files to show")
        files = committed()
    pyplot = _pyplot()
    figures = []
    for file in map(Path, files):
        content = read(file)
        folder = file.parent if out is None else Path(out)
        if not folder.is_dir():
            raise UsageError(f"--out {folder} is no folder; make it, or give another")
        made = [
            figures_of(pyplot, content, folder / f"{file.stem}-{kind}.png")
            for kind, figures_of in (
                ("speedup", _speedups), ("overhead", _overheads), ("ranks", _ranks),
            )
        ]  # fmt: skip
        made = [path for path in made if path is not None]
        if not made:
            raise UsageError(f"{file} has no row to show: every one was skipped, or there is none")
        figures += made
    return figures


def committed() -> list[Path]:
    """The results files of a checkout that have rows.

    Raises:
        UsageError: there is none beside this package.
    """
    folder = Path(__file__).resolve().parent / "results"
    found = [path for name in ("cpu", "gpu") for path in results_files(folder / name)]
    if not found:
        raise UsageError(f"{folder} has no results files: run from a checkout, or give files")
    return found


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError(
            "plots need matplotlib, which is not installed: pip install 'fastrank[plots]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _measured(rows: Sequence[Row], **wanted: str) -> list[Row]:
    return [
        row
        for row in rows
        if "skipped" not in row and all(row[key] == value for key, value in wanted.items())
    ]


def _speedups(pyplot: Any, content: dict, path: Path) -> Path | None:
    """Baseline time over fastrank's, a point for each case and baseline."""
    rows = [
        row
        for row in _measured(content["rows"], variant="fastrank")
        if row["baseline"] != "frozen" and "active" not in row["case"]
    ]
    return _by_case(
        pyplot, rows, lambda row: row["speedup"], "baseline", 1.0,
        "baseline time / fastrank time", content, path,
    )  # fmt: skip


def _overheads(pyplot: Any, content: dict, path: Path) -> Path | None:
    """Percent over the frozen layer, a point for each case and variant."""
    rows = [
        row for row in _measured(content["rows"], baseline="frozen") if "active" not in row["case"]
    ]
    return _by_case(
        pyplot, rows, lambda row: 100 * (1 / row["speedup"] - 1), "variant", 0.0,
        "% over the frozen layer", content, path,
    )  # fmt: skip


def _by_case(
    pyplot: Any,
    rows: Sequence[Row],
    value: Callable[[Row], float],
    series: str,
    neutral: float,
    label: str,
    content: dict,
    path: Path,
) -> Path | None:
    """A panel for each dtype, dropout, precision and mode; a line for each shape in it.

    Colours tell `series` apart ("baseline" or "variant"), sizes of the points the rank.
    """
    if not rows:
        return None
    panels = list(dict.fromkeys(map(_panel, rows)))
    shapes = list(dict.fromkeys(map(_shape, rows)))
    labels = list(dict.fromkeys(row[series] for row in rows))
    ranks = sorted({_rank(row) for row in rows})
    height = max(2.6, 1.4 + 0.24 * len(shapes))
    across = min(len(panels), 4)
    down = -(-len(panels) // across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(1.8 + 2.6 * across, height * down), sharex=True, sharey=True,
        squeeze=False,
    )  # fmt: skip
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for panel, axis in zip(panels, axes.flat, strict=False):
        for name in labels:
            taken = [row for row in rows if _panel(row) == panel and row[series] == name]
            axis.scatter(
                [value(row) for row in taken],
                [shapes.index(_shape(row)) for row in taken],
                s=[10 + 18 * ranks.index(_rank(row)) for row in taken],
                color=_COLOURS[labels.index(name) % len(_COLOURS)],
                alpha=0.75,
                label=name,
            )
        axis.axvline(neutral, color="black", linewidth=0.8)
        axis.set_title(panel, fontsize=8)
        axis.set_yticks(range(len(shapes)), shapes, fontsize=7)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylim(len(shapes) - 0.5, -0.5)
    axes[0][0].legend(fontsize=7)
    figure.supxlabel(f"{label}; larger points: r = {', '.join(map(str, ranks))}", fontsize=8)
    return _save(pyplot, figure, content, path)


def _panel(row: Row) -> str:
    case = row["case"]
    words = [case.get("dtype", ""), f"dropout {case.get('dropout', 0):g}"]
    if case.get("precision", "peft") != "peft":
        words.append(case["precision"])
    return ", ".join([*words, *([row["mode"]] if row["mode"] != "full" else [])])


def _shape(row: Row) -> str:
    case = row["case"]
    return f"{case['M']} × {case['K']} → {case['N']}" if "M" in case else case["name"]


def _rank(row: Row) -> int:
    return row["case"].get("R", row["case"].get("r", 0))


def _ranks(pyplot: Any, content: dict, path: Path) -> Path | None:
    """Time over ranks that are on, with the frozen layer as a line."""
    rows = [row for row in _measured(content["rows"]) if "active" in row["case"]]
    if not rows:
        return None
    series: dict[str, dict[int, float]] = {}
    frozen = {}
    for row in rows:
        case = row["case"]
        label = f"{case['dtype']}, {case['mask']}, {row['mode']}"
        series.setdefault(label, {})[case["active"]] = 1e3 * row["median_s"]
        frozen[f"{case['dtype']}, frozen, {row['mode']}"] = 1e3 * row["baseline_median_s"]
    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    for label, points in series.items():
        ranks = sorted(points)
        axis.plot(ranks, [points[r] for r in ranks], marker="o", markersize=3, label=label)
    for label, milliseconds in frozen.items():
        axis.axhline(milliseconds, linestyle="--", linewidth=0.8, color="black")
        axis.annotate(label, (0, milliseconds), fontsize=6, va="bottom")
    axis.set(xlabel="ranks that are on", ylabel="ms", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return _save(pyplot, figure, content, path)


def _save(pyplot: Any, figure: Any, content: dict, path: Path) -> Path:
    where = content["environment"]
    title = f"{where['device']}, {where.get('threads')} threads, torch {where.get('torch')}"
    figure.suptitle(f"{title}, {str(where.get('date'))[:10]}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return path
