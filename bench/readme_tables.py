"""The tables of bench/results/README.md, each from one record; readme.py puts them there."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from fastrank.bench import packing, peer_list, simulate
from fastrank.bench.generated import table
from fastrank.bench.records import Record, Run, geometric_mean, ms, results_files, speedups
from fastrank.bench.results_file import Row

# records of the layer grid in cpu/, and the machine of each as people know it
LAYER_GRIDS = {
    "lowrank": "Intel Xeon with AMX",
    "lowrank-amd": "AMD EPYC (Zen 5)",
    "lowrank-zen4": "AMD EPYC (Zen 4)",
}
# what the layer grid is split by
_PARTS: Sequence[tuple[str, Callable[[dict], bool]]] = (
    ("all", lambda c: True),
    ("fp32, no dropout", lambda c: c["dtype"] == "float32" and not c["dropout"]),
    ("fp32, dropout 0.1", lambda c: c["dtype"] == "float32" and c["dropout"] > 0),
    ("bf16, no dropout", lambda c: c["dtype"] == "bfloat16" and not c["dropout"]),
    ("bf16, dropout 0.1", lambda c: c["dtype"] == "bfloat16" and c["dropout"] > 0),
    ("128 rows", lambda c: c["M"] == 128),
    ("1024 rows", lambda c: c["M"] == 1024),
    ("4096 rows", lambda c: c["M"] == 4096),
)
_SVD_PEERS = (
    ("torch.linalg.svd", "`torch.linalg.svd`"),
    ("svd_lowrank-8", "`svd_lowrank` niter 8"),
    ("svd_lowrank", "niter 2"),
    ("plain-torch", "plain torch"),
    ("sklearn", "scikit-learn"),
    ("scipy-svds", "SciPy `svds`"),
    ("jax", "JAX"),
)


def blocks(results: Path) -> dict[str, str]:
    """Every generated part of the page, by its marker's name."""
    cpu = results / "cpu"
    every = [Record(path) for path in results_files(cpu)]
    return {
        **{name: layers(Record(cpu / f"{name}.json")) for name in LAYER_GRIDS},
        "grouped": _if_there(cpu / "grouped.json", plain),
        "train-step": _if_there(cpu / "train-step.json", plain),
        "simulate": clients(Record(cpu / "simulate.json")),
        "simulate-zen4": clients(Record(cpu / "simulate-zen4.json")),
        "flower": flower(Record(cpu / "simulate.json")),
        "clients-memory": _if_there(cpu / "simulate-memory.json", memory, "simulate --memory"),
        "clients-profile": _if_there(cpu / "simulate-profile.json", profile, "simulate --profile"),
        "rank-sweep": ranks(Record(cpu / "rank-sweep.json")),
        "svd": svd(Record(cpu / "svd.json")),
        "svd-zen4": svd(Record(cpu / "svd-zen4.json")),
        "merge": merge(Record(cpu / "svd.json")),
        "packing": packed(Record(cpu / "packing.json")),
        "controls": controls(results / "controls"),
        "peers": peers([row for record in every for row in record.rows]),
    }


def layers(record: Record) -> str:
    """The layer grid by dtype, dropout and rows."""
    lines = []
    for name, belongs in _PARTS:
        over_peft = record.layers("peft", belongs)
        over_frozen = record.layers("frozen", belongs)
        ratios = speedups(over_peft)
        lines.append([
            name, str(len(ratios)), f"{geometric_mean(ratios):.2f}", f"{min(ratios):.2f}",
            f"{max(ratios):.2f}", f"{1 / geometric_mean(speedups(over_frozen)):.2f}",
            f"{geometric_mean(_over_products(record, over_peft)):.2f}",
        ])  # fmt: skip
    titles = ["", "cells", "PEFT / fastrank, geometric mean", "lowest", "highest",
              "fastrank / frozen", "PEFT / products alone"]  # fmt: skip
    return f"{record.origin()}\n\n{table(titles, lines, right=1)}"


def _over_products(record: Record, over_peft: list[Row]) -> list[float]:
    """PEFT's time over that of the products alone, which no layer of these operands can leave out.

    The frozen layer's own two, and the branch's six at the fp32 rate that the frozen fp32 layer of
    the same shape has on that machine: PEFT's default adapters are fp32.
    """
    frozen = {row["case"]["name"]: row["baseline_median_s"] for row in record.layers("frozen")}
    rates = {}
    for row in record.layers("frozen", lambda case: case["dtype"] == "float32"):
        M, K, N = (row["case"][size] for size in "MKN")
        rates.setdefault((M, K, N), []).append(4 * M * K * N / row["baseline_median_s"])
    found = []
    for row in over_peft:
        M, K, N, R = (row["case"][size] for size in "MKNR")
        branch = 6 * M * R * (K + N) / statistics.median(rates[M, K, N])
        found.append(row["baseline_median_s"] / (frozen[row["case"]["name"]] + branch))
    return found


def plain(record: Record) -> str:
    """Every row that was measured, as it is."""
    lines = [
        [row["case"]["name"], row["variant"], row["baseline"], ms(row["baseline_median_s"]),
         ms(row["median_s"]), f"{row['speedup']:.2f}"]
        for row in record.rows
        if "skipped" not in row
    ]  # fmt: skip
    titles = ["case", "variant", "against", "its ms", "variant's ms", "times as fast"]
    return f"{record.origin()}\n\n{table(titles, lines, right=3)}"


def _if_there(path: Path, block: Callable[[Record], str], command: str = "") -> str:
    if path.exists():
        return block(Record(path))
    command, out = command or path.stem, f"bench/results/cpu/{path.name}"
    return f"Not measured here yet: `fastrank bench {command} --device cpu --out {out}`."


def clients(record: Record) -> str:
    """A step of every client, by case."""
    lines = []
    for row in record.measured("fastrank", simulate.BASELINE):
        name = row["case"]["name"]
        together = f"{row['clients_in_parallel']} together"
        alone = [r for r in record.measured("fastrank-sequential", simulate.BASELINE)
                 if r["case"]["name"] == name]  # fmt: skip
        lines.append([
            name,
            "one by one" if row["executor"] == "sequential" else together,
            ms(row["baseline_median_s"]),
            ms(alone[0]["median_s"]) if alone else "",
            ms(row["median_s"]),
            f"{row['speedup']:.2f}",
            f"{simulate.GOALS[name]:g}" if name in simulate.GOALS else "",
        ])  # fmt: skip
    titles = ["case", "executor", "PEFT, ms", "one by one, ms", "fastrank, ms", "PEFT / fastrank",
              "goal"]  # fmt: skip
    return f"{record.origin()}\n\n{table(titles, lines, right=2)}"


def flower(record: Record) -> str:
    """Whole rounds, against Flower's simulation on Ray."""
    lines = [
        [row["case"]["name"], row["baseline"], ms(row["baseline_median_s"]),
         ms(row["median_s"]), f"{row['speedup']:.1f}"]
        for row in record.rows
        if row["mode"] == "round" and "skipped" not in row
    ]  # fmt: skip
    titles = ["case", "against", "Flower on Ray, ms a round", "fastrank, ms a round",
              "Flower / fastrank"]  # fmt: skip
    return table(titles, lines, right=2)


def memory(record: Record) -> str:
    """What more clients in a pass hold at their peak, beside the one base."""
    lines = [
        [row["case"]["name"].removeprefix("memory-").rsplit("-", 1)[0],
         str(row["case"]["clients_in_parallel"]), f"{row['base_bytes'] / 1e6:.1f}",
         f"{row['peak_bytes'] / 1e6:.1f}", f"{row['baseline_peak_bytes'] / 1e6:.1f}",
         ms(row["median_s"]), ms(row["baseline_median_s"])]
        for row in record.rows
        if "skipped" not in row
    ]  # fmt: skip
    titles = ["case", "clients in a pass", "base, MB", "above it, MB", "PEFT above it, MB",
              "ms a step", "PEFT, ms"]  # fmt: skip
    return f"{record.origin()}\n\n{table(titles, lines, right=1)}"


def profile(record: Record) -> str:
    """Shares of a step of all clients, by kind of operator."""
    rows = [row for row in record.rows if "skipped" not in row]
    kinds = list(dict.fromkeys(row["variant"] for row in rows))
    lines = []
    for name in dict.fromkeys(_profiled(row) for row in rows):
        own = {row["variant"]: row for row in rows if _profiled(row) == name}
        any_row = next(iter(own.values()))
        lines.append([
            name, ms(any_row["unprofiled_s"]), ms(any_row["baseline_median_s"]),
            *(f"{100 * own[kind]['share']:.0f} %" if kind in own else "" for kind in kinds),
        ])  # fmt: skip
    titles = ["case", "ms a step", "under the profiler", *(k.replace("-", " ") for k in kinds)]
    return f"{record.origin()}\n\n{table(titles, lines, right=1)}"


def _profiled(row: Row) -> str:
    return row["case"]["name"].removeprefix("profile-").removesuffix(f"-{row['variant']}")


def ranks(record: Record) -> str:
    """Times of one layer by ranks that are on."""
    rows = [row for row in record.rows if "skipped" not in row]
    points = sorted({row["case"]["active"] for row in rows}, reverse=True)
    lines = []
    for dtype, mask in dict.fromkeys((r["case"]["dtype"], r["case"]["mask"]) for r in rows):
        own = [r for r in rows if (r["case"]["dtype"], r["case"]["mask"]) == (dtype, mask)]
        by = {row["case"]["active"]: ms(row["median_s"]) for row in own}
        frozen = ms(own[0]["baseline_median_s"])
        lines.append([dtype, mask, *(by.get(point, "") for point in points), frozen])
    titles = ["", "ranks off by", *(f"{point} on, ms" for point in points), "frozen, ms"]
    return f"{record.origin()}\n\n{table(titles, lines, right=2)}"


def svd(record: Record) -> str:
    """fastrank and every peer: time (missing energy)."""
    seen = [(b, title) for b, title in _SVD_PEERS if any(r["baseline"] == b for r in record.rows)]
    names = dict.fromkeys(r["case"]["name"] for r in record.rows if r["case"]["kind"] != "merge")
    lines = []
    for name in names:
        own = {row["baseline"]: row for row in record.rows if row["case"]["name"] == name}
        ours = next(row for row in own.values() if "skipped" not in row)
        lines.append([
            name,
            f"{ms(ours['median_s'])} ({_missing(ours['error'])})",
            *(_svd_peer(own[baseline]) for baseline, _ in seen),
        ])  # fmt: skip
    titles = ["case", "fastrank, ms (missing)", *(title for _, title in seen)]
    return f"{record.origin()}\n\n{table(titles, lines, right=1)}"


def _svd_peer(row: Row) -> str:
    if "skipped" in row:
        told = any(word in row["skipped"] for word in ("LinAlgError", "break down"))
        return "breaks down" if told else row["skipped"]
    missing = _missing(row["baseline_error"])
    return f"{ms(row['baseline_median_s'])}: {row['speedup']:.1f} times ({missing})"


def _missing(share: float) -> str:
    return f"{share:.0e}" if share else "0"


def merge(record: Record) -> str:
    """Adapters of a model into one, against PEFT's."""
    lines = []
    for row in record.rows:
        if row["case"]["kind"] == "merge" and "skipped" not in row:
            gap = max(row["error"], row["baseline_error"])
            lines.append([row["case"]["name"], ms(row["baseline_median_s"]), ms(row["median_s"]),
                          f"{row['speedup']:.1f}", f"{gap:.0e}"])  # fmt: skip
    titles = ["case", "PEFT's `add_weighted_adapter`, ms", "`fastrank.merge_adapters`, ms",
              "PEFT / fastrank", "energy missing, of either"]  # fmt: skip
    return table(titles, lines, right=1)


def packed(record: Record) -> str:
    """Every row of the packing benchmark that was measured."""
    lines = []
    for row in record.rows:
        if "skipped" in row:
            continue
        variant = "" if row["variant"] == "fastrank" else f", {row['variant']}"
        lines.append([
            row["case"]["name"] + variant,
            row["baseline"],
            ms(row["baseline_median_s"]),
            ms(row["median_s"]),
            f"{row['speedup']:.2f}" if row["speedup"] < 10 else f"{row['speedup']:.0f}",
            _megabytes(row["baseline_peak_bytes"]),
            _megabytes(row["peak_bytes"]),
            _more(row),
            "; ".join(_goal(goal) for goal in packing.goals_of(row)),
        ])  # fmt: skip
    titles = ["case", "against", "theirs, ms", "fastrank, ms", "theirs / fastrank",
              "theirs, MB", "fastrank, MB", "", "goal"]  # fmt: skip
    return f"{record.origin()}\n\n{table(titles, lines, right=2)}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f}" if count >= 1e8 else f"{count / 1e6:.2g}"


def _more(row: Row) -> str:
    """What a row has beside time and memory."""
    if "bits_per_index" in row:
        ours, theirs = row["bits_per_index"], row["baseline_bits_per_index"]
        return f"{ours:.2f} bits an index against {theirs:.2f}"
    if "state_bytes" in row:
        share = row["state_bytes"] / row["baseline_state_bytes"]
        return f"{100 * share:.2f} % of its gradients and state"
    return ""


def _goal(goal: packing.Goal) -> str:
    if goal.key == "speedup":
        return f"{goal.bound:g}"
    if goal.key == "bits_per_index":
        return f"{goal.bound:g} bits"
    return f"{100 * goal.bound:g} % of its " + ("memory" if goal.key == "peak_bytes" else "state")


def controls(folder: Path) -> str:
    """One client with all data."""
    names = {
        "head-only": "head only (`head-only`)",
        "fedit": "LoRA on all linears (`fedit`)",
        "fedavg": "everything (`fedavg`)",
    }
    lines = []
    for name, title in names.items():
        run = Run(folder / name)
        scores = " ".join(f"{row['accuracy']:.3f}" for row in run.rounds)
        without = run.summary["accuracy_without_adapters"]
        lines.append([title, f"{run.summary['trainable_params']:,}", scores,
                      "" if without is None else f"{without:.3f}"])  # fmt: skip
    titles = ["trained", "parameters", "accuracy after each epoch", "with its adapters zeroed"]
    return table(titles, lines, right=1)


def peers(rows: Sequence[Row]) -> str:
    """Every peer: where it is compared, how it is had, and whether these results have it."""
    lines = []
    for peer in peer_list.PEERS:
        own = [row for row in rows if peer.concerns(row)]
        ran = any("skipped" not in row for row in own)
        if ran:
            state = "measured"
        elif own:
            state = own[0]["skipped"].removeprefix(f"{peer.rows[0]}: ")
        elif "cpu" not in peer.devices:
            state = "needs a GPU"
        else:
            state = f"not yet: `fastrank bench {peer.bench}` measures it where it is installed"
        how = "our implementation, " + peer.install if peer.ours else peer.install or "with torch"
        lines.append([peer.name, peer.bench, f"`{how}`" if how.startswith("pip") else how, state])
    return table(["peer", "`fastrank bench`", "how it is had", "in cpu/"], lines)
