"""README's and bench/results/README.md's figures, written from what was measured.

    python -m fastrank.bench.readme [--check]

The parts between markers (generated.py), and the figures in bench/results/plots/, are made again
from bench/results/. --check writes nothing and exits with 1 if a page or a figure is out of date,
or if README says how fast, how large or how good something is outside of the markers.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from fastrank.bench import methods_report, readme_claims, readme_plots, readme_tables, simulate
from fastrank.bench.generated import table, update
from fastrank.bench.records import Record, Run, geometric_mean, ms, speedups, times
from fastrank.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "python -m fastrank.bench.readme"
_LINK = "[every cell](bench/results/README.md)"


def blocks(root: Path) -> dict[str, str]:
    """Every generated part of README, by its marker's name."""
    cpu = root / "bench" / "results" / "cpu"
    return {
        "kernels": kernels(cpu),
        "layers": layers(cpu),
        "demo": demo(Run(root / "bench" / "results" / "demo")),
        "clients": clients(Record(cpu / "simulate.json")),
        "methods": methods_report.summary(root / "bench" / "results" / "methods"),
        "embedded": embedded(root),
    }


def kernels(cpu: Path) -> str:
    """The ops: maths, code, and their best-known speed on CPUs with its conditions."""
    svd, packing = Record(cpu / "svd.json"), Record(cpu / "packing.json")
    grids = [Record(cpu / f"{name}.json") for name in readme_tables.LAYER_GRIDS]
    means = sorted(geometric_mean(speedups(r.layers("peft"))) for r in grids)
    whole = svd.one("sparse-24x768-r16", "torch.linalg.svd")
    near = svd.one("sparse-24x768-r16", "svd_lowrank-8")
    mean = packing.one("aggregate-64", "dense")
    mask = packing.one("mask-16.8M", "bernoulli-philox")
    gradient = packing.one("weight-grad-4096", "dense")
    folder = "[`kernels/{0}/`](kernels/{0}/)".format
    lines = [
        ["`lowrank_linear`", "y = xWᵀ + b + s·((D∘x)Aᵀ ∘ e ∘ m)Bᵀ, all gradients",
         folder("lowrank"),
         f"{means[0]:.2f} to {means[-1]:.2f} times PEFT's layer, on three machines (below)"],
        ["`lowrank_add`", "y += s·((D∘x)Aᵀ ∘ e ∘ m)Bᵀ over a base of your own", folder("lowrank"),
         "-"],
        ["`lowrank_linears`", "several such layers of one x (q, k, v; gate, up), x read once for"
         " all", folder("lowrank"), "-"],
        ["`grouped_lowrank_linear`", "one base, any number of adapters of any rank, rows sorted by"
         " adapter", folder("lowrank"), _grouped(cpu / "grouped.json")],
        ["`truncated_svd`, `refactor`", "best rank-r factors of dense matrices, of Σ w b aᵀ, of"
         " packed sparse values, a model at once", folder("svd"),
         f"{times(whole['speedup'])} `torch.linalg.svd`, {times(near['speedup'])} `svd_lowrank`"
         " (8 iterations, less accurate): 24 sparse matrices 768 x 768, r 16, fp32"],
        ["`SparseMask`, `pack`, `aggregate`, `topk_pack`", "seeded positions, values and their"
         " sums, no indices", folder("packing"),
         f"{times(mask['speedup'])} a Bernoulli mask of 16.8 M; {times(mean['speedup'])} the"
         " mean of 64 dense deltas of 2048 x 2048"],
        ["`masked_weight_grad`, `sparse_linear`", "(dYᵀX) at a mask; x(W + S)ᵀ + b trained through"
         " S's values", folder("packing"),
         f"{times(gradient['speedup'])} the dense gradient and a gather: 1 % of 4096 x 4096, fp32"],
    ]  # fmt: skip
    titles = ["op", "maths", "code", "on two CPU cores as fast as"]
    return table(titles, lines)


def _grouped(path: Path) -> str:
    below = "[clients side by side](#clients-side-by-side)"
    if not path.exists():
        return below
    row = Record(path).one("M1024-d384-G8-R8", "loop", variant="grouped")
    return f"{times(row['speedup'])} a loop over 8 adapters, 128 rows each of 384; {below}"


def layers(cpu: Path) -> str:
    """One layer's step over the grids."""
    records = {m: Record(cpu / f"{name}.json") for name, m in readme_tables.LAYER_GRIDS.items()}
    lines = []
    for machine, record in records.items():
        ratios = speedups(record.layers("peft"))
        lines.append([machine, *(f"{r:.2f}" for r in (geometric_mean(ratios), min(ratios))),
                      f"{max(ratios):.1f}"])  # fmt: skip
    first = next(iter(records.values()))
    where, cells = first.content["environment"], len(first.layers("peft"))
    figure = (
        "![A training step of one layer: PEFT's time over fastrank's, by shape]"
        "(bench/results/plots/layers.svg)"
    )
    titles = ["two cores of", "PEFT / fastrank, geometric mean", "lowest cell", "highest"]
    words = _wrapped(
        f"A training step (forward and backward) of one linear layer with PEFT's default float32 "
        f"adapters, no optimizer, over {cells} shapes, dtypes and dropouts ({_LINK}); dots are "
        f"means over r 4, 16 and 64; torch {where['torch'].partition('+')[0]}, PEFT "
        f"{where['peft']}."
    )
    return f"{figure}\n\n{table(titles, lines, right=1)}\n\n{words}"


def _wrapped(words: str) -> str:
    return textwrap.fill(words, 104, break_long_words=False, break_on_hyphens=False)


def layer_panels(cpu: Path) -> dict[str, readme_plots.Panel]:
    """Geometric means over ranks, by machine, shape, dtype and dropout."""
    panels = {}
    for name, machine in readme_tables.LAYER_GRIDS.items():
        record, panel = Record(cpu / f"{name}.json"), {}
        for row in record.layers("peft"):
            case = row["case"]
            shape = f"{case['M']} × {case['K']} → {case['N']}"
            dtype = {"float32": "fp32", "bfloat16": "bf16"}[case["dtype"]]
            series = f"{dtype}, dropout {case['dropout']:g}"
            panel.setdefault(shape, {}).setdefault(series, []).append(row["speedup"])
        panels[f"{machine}, {record.threads} threads"] = {
            shape: {name: geometric_mean(found) for name, found in by.items()}
            for shape, by in panel.items()
        }
    return panels


def demo(run: Run) -> str:
    """What `make demo` printed, by the code that prints it."""
    from rich.console import Console

    from fastrank.federated.callbacks import ConsoleReport

    console = Console(file=io.StringIO(), width=200, highlight=False, color_system=None)
    report = ConsoleReport(console)
    report.total_rounds = len(run.rounds)
    console.print("".join(name.rjust(width) for name, width in report.widths.items()))
    for row in (run.rounds[0], run.rounds[-1]):
        report.on_round_end(row)
        if row is run.rounds[0]:
            console.print(f"{'...':>9}")
    report.on_end({"rouge_l": None, **run.summary})
    printed, _, _ = console.file.getvalue().partition("\nresults ")
    seconds, threads = run.summary["seconds"], run.config["options"]["num_threads"]
    return (
        f"Its {len(run.rounds)} rounds took {seconds:.0f} s on {threads} CPU threads and ended "
        f"like this ([its record](bench/results/demo/)):\n\n```\n{printed.rstrip()}\n```"
    )


def clients(record: Record) -> str:
    """Three cases of the side-by-side benchmark."""
    lines = []
    for name in ("encoder-2x128-16x4x16", "encoder-6x384-8x4x32", "encoder-6x384-4x16x128"):
        row = record.one(name, simulate.BASELINE)
        case = row["case"]
        size, hidden = case["model"].removeprefix("encoder-").split("x")
        shape = f"{size} layers x {hidden}, {case['clients']} x {case['batch']} x {case['tokens']}"
        if row["executor"] == "sequential":
            shape += " (one by one: full as it is)"
        lines.append([shape, f"{ms(row['baseline_median_s'])} ms", f"{ms(row['median_s'])} ms",
                      f"{row['speedup']:.1f} times"])  # fmt: skip
    titles = ["encoder, clients x batch x tokens", "stock PEFT, one by one", "side by side", ""]
    return (
        f"{table(titles, lines)}\n\n"
        "![A step of all clients: one by one over side by side]"
        "(bench/results/plots/clients.svg)\n\n"
        f"One optimizer step of every client, two cores of an {record.device}, fp32\n"
        "([every case](bench/results/README.md))."
    )


def client_panels(record: Record) -> dict[str, readme_plots.Panel]:
    """PEFT's and fastrank's own one-by-one times over fastrank's choice, by case."""
    panel: dict[str, dict[str, float]] = {}
    titles = {simulate.BASELINE: "PEFT, one by one", "fastrank-sequential": "fastrank, one by one"}
    for baseline, title in titles.items():
        for row in record.measured("fastrank", baseline):
            panel.setdefault(row["case"]["name"], {})[title] = row["speedup"]
    return {f"{record.device}, {record.threads} threads, LoRA r 8, AdamW, fp32": panel}


def embedded(root: Path) -> str:
    """What the embedded encoder is and what can be reached with it."""
    folder = root / "bench" / "results" / "controls"
    head, lora, whole = (
        Run(folder / name).summary["accuracy"] for name in ("head-only", "fedit", "fedavg")
    )
    record = json.loads((root / "fastrank" / "data" / "encoder" / "pretrain.json").read_bytes())
    shape, masked = record["settings"], record["history"][-1]["dev_accuracy"]
    weights = (root / "fastrank" / "data" / "encoder" / "model.safetensors").stat().st_size
    return _wrapped(
        f"`--model embedded` is a {shape['num_layers']}-layer ModernBERT with "
        f"{shape['hidden_size']} hidden units ({record['parameters'] / 1e6:.2f} M parameters, "
        f"{weights / 1e6:.1f} MB) pre-trained on docstrings of the same environment, test texts "
        "excluded, by `python -m fastrank.data.pretrain`; its record is "
        "[`pretrain.json`](fastrank/data/encoder/pretrain.json) "
        f"({record['steps_done']:,} steps, masked-token accuracy {masked:.3f}). Trained in "
        f"one place for {len(Run(folder / 'fedit').rounds)} epochs, the head alone reaches "
        f"{100 * head:.1f} %, LoRA {100 * lora:.1f} %, full fine-tuning {100 * whole:.1f} % "
        "([controls](bench/results/README.md))."
    )


def plots(results: Path) -> dict[str, str]:
    """Name of a figure in bench/results/plots/ -> its SVG."""
    cpu = results / "cpu"
    layer = readme_plots.dots(layer_panels(cpu), "PEFT's time / fastrank's time")
    together = client_panels(Record(cpu / "simulate.json"))
    label = "time one by one / fastrank's time"
    return {
        "layers.svg": layer,
        "clients.svg": readme_plots.dots(together, label, left=190, width=460),
    }


def outdated(root: Path, *, check: bool) -> list[str]:
    """Write every page and figure anew, or only look; the names of those that were out of date."""
    results = root / "bench" / "results"
    pages = {root / "README.md": blocks(root), results / "README.md": readme_tables.blocks(results)}
    stale = [page for page, parts in pages.items() if update(page, parts, check=check)]
    for name, svg in plots(results).items():
        path = results / "plots" / name
        if not path.exists() or path.read_text(encoding="utf-8") != svg:
            stale.append(path)
            if not check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(svg, encoding="utf-8")
    return [path.relative_to(root).as_posix() for path in stale]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    arguments = parser.parse_args(argv)
    try:
        stale = outdated(ROOT, check=arguments.check)
        claims = readme_claims.claims((ROOT / "README.md").read_text(encoding="utf-8"))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in stale:
        print(f"{name} was out of date" + (f": {COMMAND}" if arguments.check else ""))
    for claim in claims:
        print(f"README.md says outside of markers: {claim}", file=sys.stderr)
    return 1 if claims or (stale and arguments.check) else 0


if __name__ == "__main__":
    sys.exit(main())
