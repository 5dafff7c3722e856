"""The results page of the federated methods, from the records of finished runs.

    python -m fastrank.bench.methods_report [--records bench/results/methods] [--check]

RECORDS/PRESET/runs/ hold what `fastrank compare bench/methods/PRESET --records-only --out
RECORDS/PRESET` left. The tables, verdicts and counts of RECORDS.md stand between markers and are
written again from them; the words around them are written by hand. --check writes nothing and
exits with 1 if the page is out of date.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastrank.bench.generated import table, update
from fastrank.bench.methods_claims import claims
from fastrank.errors import UsageError
from fastrank.federated.compare.load import FinishedRun, runs_in
from fastrank.federated.compare.table import Group, group_runs, pairs, shown

RECORDS = Path(__file__).resolve().parent / "results" / "methods"
PRESETS = (
    *("tuning", "common", "heterogeneous", "full-gap"),
    *("slora-density", "sa-schedules", "fedara-ablation"),
)
# the order of rows; methods that are not named follow as they come
ORDER = ("fedara", "slora", "sa-fedlora", "fed-plora", "fedavg", "fedit", "head-only")
# the rates that were tuned; the head alone has another
_RATES = (("learning_rate", "stage2_learning_rate"), ("head_learning_rate",))
_NONE = "No run is finished yet."


class Mean(NamedTuple):
    """Mean, standard deviation (n - 1; None for one value) and count."""

    value: float
    deviation: float | None
    count: int

    def points(self, signed: bool = False) -> str:
        sign = "+" if signed else ""
        text = f"{100 * self.value:{sign}.1f}"
        return text if self.deviation is None else f"{text} ± {100 * self.deviation:.1f}"


def mean_of(values: Iterable[float]) -> Mean:
    found = list(values)
    spread = statistics.stdev(found) if len(found) > 1 else None
    return Mean(statistics.fmean(found), spread, len(found))


def paired(runs: Sequence[FinishedRun], others: Sequence[FinishedRun]) -> Mean | None:
    """Final accuracy against other runs' of the same seeds, which see the same clients and data."""
    theirs = {run.seed: run.summary["accuracy"] for run in others}
    gaps = [r.summary["accuracy"] - theirs[r.seed] for r in runs if r.seed in theirs]
    return mean_of(gaps) if gaps else None


def blocks(records: Path) -> dict[str, str]:
    """Every generated part of the page, by its marker's name."""
    found = {name: _finished(records / name) for name in PRESETS}
    parts = {
        "counts": _counts(found),
        "tuning": _tuning(found["tuning"]),
        "claims": claims(found, paired, mean_of) or _NONE,
        "options": _options(found["common"]),
    }
    for alpha in (0.1, 1, 100):
        at = [run for run in found["common"] if run.options["alpha"] == alpha]
        parts[f"common-{alpha:g}".replace(".", "-")] = _accuracies(at)
    hardest = [run for run in found["common"] if run.options["alpha"] == 0.1]
    parts["heterogeneous"] = _accuracies(found["heterogeneous"])
    beside = [run for run in hardest if run.method in ("fedavg", "fedit", "slora")]
    parts["full-gap"] = _accuracies(found["full-gap"] + beside if found["full-gap"] else [])
    parts["gaps"] = _gaps(found["common"])
    # what one method's presets leave unchanged is among the common runs
    for preset in PRESETS[4:]:
        methods = {run.method for run in found[preset]}
        parts[preset] = _accuracies(found[preset] + [r for r in hardest if r.method in methods])
    return parts


def summary(records: Path) -> str:
    """README's table: accuracy at every alpha, bytes where it is hardest; cells of three seeds."""
    runs = _finished(records / "common")
    alphas = (0.1, 1, 100)
    cells: dict[str, dict[float, list[FinishedRun]]] = {}
    for run in runs:
        cells.setdefault(run.method, {}).setdefault(run.options["alpha"], []).append(run)
    whole = _sent(cells["fedavg"][0.1])
    rows = []
    for method in _ordered(cells):
        by_alpha = {alpha: found for alpha, found in cells[method].items() if len(found) >= 3}
        if 0.1 not in by_alpha:
            continue
        found = [
            mean_of(r.summary["accuracy"] for r in by_alpha[a]).points() if a in by_alpha else "-"
            for a in alphas
        ]
        sent = _sent(by_alpha[0.1])
        rows.append([f"`{method}`", *found, f"{sent / 1e6:,.0f}", f"{100 * sent / whole:.3g} %"])
    titles = ["method", *(f"alpha {a:g}" for a in alphas), "MB", "of fedavg's"]
    return table(titles, rows, right=1)


def _finished(folder: Path) -> list[FinishedRun]:
    try:
        return runs_in(folder / "runs")[0]
    except UsageError:  # the preset was not run
        return []


def _counts(found: dict[str, list[FinishedRun]]) -> str:
    rows = []
    for preset, runs in found.items():
        prints = sorted({str(run.config.get("data_fingerprint"))[:12] for run in runs})
        commits = sorted({str(run.config.get("commit"))[:9] for run in runs})
        rounds = sorted({len(run.rows) for run in runs})
        rows.append(
            [preset, str(len(runs)), ", ".join(map(str, rounds)), ", ".join(commits),
             ", ".join(prints)]
        )  # fmt: skip
    return table(["preset", "finished runs", "rounds", "commit", "texts"], rows)


def _tuning(runs: list[FinishedRun]) -> str:
    if not runs:
        return _NONE
    by_method: dict[str, list[tuple[tuple[float, ...], float]]] = {}
    for run in runs:
        rates = tuple(run.options[n] for n in _RATES[run.method == "head-only"] if n in run.options)
        by_method.setdefault(run.method, []).append((rates, run.summary["accuracy"]))
    rows = []
    for method in _ordered(by_method):
        tried = sorted(by_method[method])
        best = max(score for _, score in tried)
        cells = []
        for rates, score in tried:
            text = f"{', '.join(f'{rate:g}' for rate in rates)}: {100 * score:.1f}"
            cells.append(f"**{text}**" if score == best else text)
        rows.append([f"`{method}`", "; ".join(cells)])
    return table(["method", "rate, or rates of both stages: accuracy % (the best in bold)"], rows)


def _accuracies(runs: list[FinishedRun]) -> str:
    """One setting: a row for each configuration."""
    if not runs:
        return _NONE
    groups = group_runs(runs)
    groups.sort(key=lambda g: ORDER.index(g.method) if g.method in ORDER else len(ORDER))
    # the plain configuration, where variants of it stand beside it
    plain = sorted(groups, key=lambda g: not g.variant)
    whole = {g.method: g for g in plain if g.method in ("fedavg", "fedit")}
    best = max(mean_of(r.summary["accuracy"] for r in g.runs).value for g in groups)
    rows = [_row(group, whole, 0.9 * best) for group in groups]
    titles = ["method", "seeds", "accuracy %", "last third", "against fedit", "against fedavg",
              "MB", "head's MB", "of fedavg's", f"rounds to {90 * best:.1f} %",
              "trained, last round"]  # fmt: skip
    # a column in which no row says anything is left out
    kept = [i for i in range(len(titles)) if any(row[i] != "-" for row in rows)]
    return table([titles[i] for i in kept], [[row[i] for i in kept] for row in rows], right=2)


def _gaps(runs: list[FinishedRun]) -> str:
    """Distance to fedavg of equal seeds as the rounds go: means over fifths of those evaluated."""
    rows: list[list[str]] = []
    titles: list[str] = []
    for method in (m for m in ORDER if m != "fedavg"):
        for alpha in (0.1, 1, 100):
            at = [run for run in runs if run.options["alpha"] == alpha]
            whole = {run.seed: _fifths(run) for run in at if run.method == "fedavg"}
            own = {r.seed: _fifths(r) for r in at if r.method == method and r.seed in whole}
            if not own:
                continue
            titles = list(next(iter(own.values())))
            gaps = (
                mean_of(fifths[part] - whole[seed][part] for seed, fifths in own.items())
                for part in titles
            )
            rows.append([f"`{method}`", f"{alpha:g}", *(gap.points(signed=True) for gap in gaps)])
    return table(["method", "alpha", *titles], rows, right=1) if rows else _NONE


def _fifths(run: FinishedRun) -> dict[str, float]:
    """Mean accuracy of every fifth of the evaluated rounds, on the sample they are judged on."""
    rows = [row for row in run.rows if row["accuracy"] is not None]
    parts = min(5, len(rows))
    cuts = [len(rows) * i // parts for i in range(parts + 1)]
    return {
        f"rounds {rows[first]['round']} to {rows[stop - 1]['round']}": statistics.fmean(
            row["accuracy"] for row in rows[first:stop]
        )
        for first, stop in itertools.pairwise(cuts)
    }


def _row(group: Group, whole: dict[str, Group], goal: float) -> list[str]:
    runs = group.runs
    sent = _sent(runs)
    head = statistics.fmean(r.summary["head_up"] + r.summary["head_down"] for r in runs)
    gaps = []
    for other in ("fedit", "fedavg"):
        gap = None
        if other in whole and whole[other] is not group:
            gap = paired(runs, whole[other].runs)
        gaps.append("-" if gap is None else gap.points(signed=True))
    share = f"{100 * sent / _sent(whole['fedavg'].runs):.3g} %" if "fedavg" in whole else "-"
    reached = [r for r in (_reached(run, goal) for run in runs) if r is not None]
    rounds = f"{statistics.fmean(reached):.0f}" if reached else "never"
    if 0 < len(reached) < len(runs):
        rounds += f" ({len(reached)} of {len(runs)})"
    options = " ".join([*filter(None, [group.variant]), *pairs(group.options)])
    return [
        f"`{group.method}`" + (f" {options}" if options else ""),
        str(len(runs)),
        mean_of(r.summary["accuracy"] for r in runs).points(),
        mean_of(_late(r) for r in runs).points(),
        *gaps,
        f"{sent / 1e6:,.1f}",
        f"{head / 1e6:.1f}",
        share,
        rounds,
        f"{statistics.fmean(r.summary['trainable_params'] for r in runs):,.0f}",
    ]


def _sent(runs: Sequence[FinishedRun]) -> float:
    """Tensor bytes up and down of a run, mean over seeds."""
    return statistics.fmean(r.summary["payload_up"] + r.summary["payload_down"] for r in runs)


def _late(run: FinishedRun) -> float:
    """Mean accuracy of the last third's evaluated rounds (on the sample they are judged on)."""
    rounds = run.rows[-(-2 * len(run.rows) // 3) :]
    return statistics.fmean(row["accuracy"] for row in rounds if row["accuracy"] is not None)


def _reached(run: FinishedRun, goal: float) -> int | None:
    for row in run.rows:
        if row["accuracy"] is not None and row["accuracy"] >= goal:
            return row["round"]
    return None


def _options(runs: list[FinishedRun]) -> str:
    """What each method's options were, all of them."""
    from fastrank.federated.config import method_options
    from fastrank.federated.methods import METHODS

    if not runs:
        return _NONE
    first: dict[str, dict[str, Any]] = {}
    for run in runs:
        first.setdefault(run.method, run.options)
    rows = []
    for method in _ordered(first):
        own = [name for name in method_options(METHODS[method]) if name in first[method]]
        text = ", ".join(f"{name} {shown(first[method][name])}" for name in own)
        rows.append([f"`{method}`", text])
    return table(["method", "options"], rows)


def _ordered(methods: Iterable[str]) -> list[str]:
    found = list(methods)
    return sorted(found, key=lambda m: ORDER.index(m) if m in ORDER else len(ORDER))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastrank.bench.methods_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the presets' runs")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    arguments = parser.parse_args(argv)
    page = arguments.records.with_suffix(".md")
    try:
        stale = update(page, blocks(arguments.records), check=arguments.check)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if stale and arguments.check:
        print(f"{page} is out of date: python -m fastrank.bench.methods_report", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
