"""The page that `python -m fastrank.bench.gpu` makes from its files: DIR/README.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastrank.bench import (
    grouped,
    lowrank,
    packing,
    peer_list,
    rank_sweep,
    roofline,
    simulate,
    svd,
)
from fastrank.bench.cases import Case
from fastrank.bench.progress import milliseconds
from fastrank.bench.results_file import Row, read, write_json

_CASE_FIELDS = ("M", "K", "N", "R", "dtype", "dropout", "bias", "precision")


def write_summary(out: Path) -> None:
    """Write README.md, and roofline.json where the rates and the grid are measured."""
    parts: list[Callable[[Path], list[str]]] = [
        _machine, _rates, _steps, _tests, _grid, _roofline, _sweep, _train, _ops, _peers,
    ]  # fmt: skip
    lines = ["# GPU results", "", "Written by `python -m fastrank.bench.gpu`; times are medians."]
    for part in parts:
        lines += part(out)
    (out / "README.md").write_text("\n".join(lines) + "\n")


def _load(path: Path) -> Any:
    return json.loads(path.read_bytes()) if path.exists() else None


def _rows(path: Path) -> list[Row]:
    return read(path)["rows"] if path.exists() else []


def _table(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def _machine(out: Path) -> list[str]:
    found = _load(out / "environment.json")
    if found is None:
        return []
    rows = [[key, value] for key, value in found["environment"].items() if value is not None]
    rows += [[key, value] for key, value in found.get("properties", {}).items()]
    lines = ["", "## Machine", "", *_table(("what", "value"), rows)]
    return lines + (["```", found["driver"], "```"] if found["driver"] else [])


def _rates(out: Path) -> list[str]:
    copy, matmul = _load(out / "bandwidth.json"), _load(out / "matmul.json")
    rows: list[list[object]] = []
    if copy is not None:
        for size, rate in copy["by_size"].items():
            rows.append([f"copy of {int(size) >> 20} MiB", f"{rate / 1e9:.0f} GB/s"])
    if matmul is not None:
        for n, rate in matmul["by_size"].items():
            rows.append([f"bf16 product {n}³", f"{rate / 1e12:.1f} TFLOP/s"])
    if not rows:
        return []
    return ["", "## Measured rates", "", *_table(("what", "rate"), rows)]


def _steps(out: Path) -> list[str]:
    state = _load(out / "state.json")
    if state is None:
        return []
    rows = [
        [name, step["status"], f"{step['seconds']:.0f} s", step["last_line"].replace("|", "\\|")]
        for name, step in state["steps"].items()
    ]
    return ["", "## Steps", "", *_table(("step", "status", "time", "last line"), rows)]


def _tests(out: Path) -> list[str]:
    found = _load(out / "tests.json")
    if not found:
        return []
    rows = [[name, result["line"]] for name, result in found.items()]
    return ["", "## Tests", "", *_table(("file", "result"), rows)]


def _grid(out: Path) -> list[str]:
    shipped = _grid_of(out / "lowrank-shipped.json", "## One layer, with the choices that ship")
    return shipped + _grid_of(out / "lowrank.json", "## One layer")


def _grid_of(path: Path, title: str) -> list[str]:
    rows = _rows(path)
    if not rows:
        return []
    return _measured(title, rows, lowrank.summary(rows))


def _measured(title: str, rows: Sequence[Row], said: Sequence[str]) -> list[str]:
    """A heading, what a benchmark says of its rows, and all of them."""
    table = []
    for row in rows:
        start = [row["case"]["name"], row["mode"], row["variant"], row["baseline"]]
        if "skipped" in row:
            table.append([*start, "", "", "", "", f"skipped: {row['skipped']}"])
            continue
        table.append([
            *start,
            milliseconds(row["baseline_median_s"]),
            milliseconds(row["median_s"]),
            f"{row['speedup']:.3f}",
            _both(row, "peak_bytes", lambda count: f"{count / 1e6:.0f}"),
            _both(row, "error", lambda error: f"{error:.1e}"),
        ])  # fmt: skip
    heading = ("case", "mode", "variant", "baseline", "baseline ms", "variant ms", "speed-up",
               "peak MB, both", "error, both")  # fmt: skip
    return ["", title, "", *(f"- {line}" for line in said), "", *_table(heading, table)]


def _both(row: Row, key: str, shown: Callable[[float], str]) -> str:
    pair = (row[key], row[f"baseline_{key}"])
    return " / ".join("-" if value is None else shown(value) for value in pair)


def _ops(out: Path) -> list[str]:
    """The other benchmarks, with their goals."""
    lines = []
    for name, title, module in (
        ("grouped", "## Many adapters in one pass", grouped),
        ("svd", "## Truncated SVD", svd),
        ("packing", "## Sparse updates", packing),
        ("simulate", "## Clients side by side", simulate),
        ("simulate-memory", "## Clients side by side: memory", None),
        ("simulate-profile", "## Clients side by side: what a step is made of", None),
    ):
        if rows := _rows(out / f"{name}.json"):
            lines += _measured(title, rows, module.summary(rows) if module else [])
    return lines


def _peers(out: Path) -> list[str]:
    """Which other libraries ran, and why the others didn't."""
    found = []
    for name in ("lowrank", "train-step", "grouped", "svd", "packing", "simulate"):
        if (content := _load(out / f"{name}.json")) is not None:
            found += content.get("peers", [])
    said = [f"- {line}" for line in peer_list.lines(found)]
    return ["", "## Peers", "", *said] if said else []


def _roofline(out: Path) -> list[str]:
    copy, matmul = _load(out / "bandwidth.json"), _load(out / "matmul.json")
    grid = _rows(out / "lowrank.json")
    if copy is None or matmul is None or not grid:
        return []
    flops, bandwidth = matmul["flops_per_second"], copy["bytes_per_second"]
    found = compare_with_roofline(grid, flops, bandwidth)
    write_json(
        out / "roofline.json",
        {"flops_per_second": flops, "bytes_per_second": bandwidth, "rows": found},
    )
    table = [
        [
            row["case"], row["mode"], row["variant"], row["schedule"],
            milliseconds(row["predicted_s"]), milliseconds(row["measured_s"]),
            f"{row['predicted_s'] / row['measured_s']:.2f}",
            _percent(row["predicted_overhead"]), _percent(row["measured_overhead"]),
        ]
        for row in found
    ]  # fmt: skip
    heading = ("case", "mode", "variant", "schedule", "predicted ms", "measured ms", "ratio",
               "predicted overhead", "measured overhead")  # fmt: skip
    text = (
        "Predicted from the rates above: the frozen layer's two products, then the passes that a "
        "schedule adds, nothing overlapping. fastrank is held against the best schedule counted."
    )
    return ["", "## Against the roofline", "", text, "", *_table(heading, table)]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.1%}"


def compare_with_roofline(
    rows: Sequence[Row], flops_per_second: float, bytes_per_second: float
) -> list[dict[str, Any]]:
    """Predicted against measured, for every variant over the frozen layer, and that layer.

    Args:
        rows: of the low-rank grid.
        flops_per_second: measured, of bf16 products.
        bytes_per_second: measured, reads and writes counted.
    """
    found, seen = [], set()
    for row in rows:
        if row["baseline"] != "frozen" or "skipped" in row:
            continue
        case = Case(**{key: row["case"][key] for key in _CASE_FIELDS})
        sizes = (case.M, case.K, case.N)
        over = row["median_s"] / row["baseline_median_s"] - 1
        measured = [(row["variant"], row["median_s"], over)]
        if (case.name, row["mode"]) not in seen:
            seen.add((case.name, row["mode"]))
            measured.insert(0, ("frozen", row["baseline_median_s"], None))
        for variant, seconds, overhead in measured:
            schedule = roofline.schedule_of(variant, case)
            if schedule is None:
                continue
            rates = (flops_per_second, bytes_per_second)
            predicted = roofline.overhead(schedule, *sizes, *rates)
            found.append({
                "case": case.name,
                "mode": row["mode"],
                "variant": variant,
                "schedule": schedule,
                "predicted_s": roofline.seconds(schedule, *sizes, *rates),
                "measured_s": seconds,
                "predicted_overhead": None if overhead is None else predicted,
                "measured_overhead": overhead,
            })  # fmt: skip
    return found


def _sweep(out: Path) -> list[str]:
    rows = _rows(out / "rank-sweep.json")
    if not rows:
        return []
    table = [
        [
            row["case"]["mask"], row["case"]["active"], row["mode"],
            milliseconds(row["baseline_median_s"]), milliseconds(row["median_s"]),
            f"{1 / row['speedup'] - 1:+.1%}",
        ]
        for row in rows
        if "skipped" not in row
    ]  # fmt: skip
    said = [f"- {line}" for line in rank_sweep.summary(rows)]
    heading = ("mask", "ranks on", "mode", "frozen ms", "fastrank ms", "over frozen")
    return ["", "## Ranks pruned", "", *said, "", *_table(heading, table)]


def _train(out: Path) -> list[str]:
    rows = _rows(out / "train-step.json")
    if not rows:
        return []
    table = []
    for row in rows:
        start = [row["case"]["name"], row["variant"], row["baseline"]]
        if "skipped" in row:
            table.append([*start, f"skipped: {row['skipped']}", "", "", ""])
            continue
        tokens = row["case"]["sequence"] * row["case"]["batch"]
        table.append([
            *start,
            f"{tokens / row['baseline_median_s']:,.0f}",
            f"{tokens / row['median_s']:,.0f}",
            f"{row['speedup']:.3f}",
            f"{row['peak_bytes'] / 1e9:.2f} / {row['baseline_peak_bytes'] / 1e9:.2f}",
        ])  # fmt: skip
    heading = ("case", "variant", "baseline", "baseline tokens/s", "variant tokens/s", "ratio",
               "peak GB, both")  # fmt: skip
    return ["", "## A training step", "", *_table(heading, table)]
