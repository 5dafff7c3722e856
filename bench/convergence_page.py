"""The convergence report's page, from its record (convergence.py)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastrank.bench.convergence_plot import figure
from fastrank.bench.generated import table, update


def gaps(entry: Mapping[str, Any], variant: str) -> list[float]:
    """How far a variant's loss is from stock PEFT's, at each step."""
    stock = entry["variants"]["peft"]["losses"]
    found = entry["variants"][variant]["losses"]
    return [abs(a - b) for a, b in zip(found, stock, strict=True)]


def late(entry: Mapping[str, Any], variant: str) -> float:
    """Mean loss of the last tenth of the steps."""
    losses = entry["variants"][variant]["losses"]
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def blocks(content: Mapping[str, Any]) -> dict[str, str]:
    """The page's generated parts by name."""
    entries = sorted(content["seeds"], key=lambda e: (e["dropout"], e["seed"]))
    return {
        "conditions": _conditions(content),
        "seeds": _seeds(entries, content["settings"]["test_examples"]),
        "summary": _summary(entries),
    }


def _conditions(content: Mapping[str, Any]) -> str:
    settings, task, where = content["settings"], content["task"], content["environment"]
    fused = sorted({entry["fused_layers"] for entry in content["seeds"]})
    commits = dict.fromkeys(entry.get("commit", where["commit"]) for entry in content["seeds"])
    commits = " and ".join(str(commit)[:9] for commit in commits)
    rows = [
        ["encoder", f"{task['model']}, weights {task['weights_sha256'][:12]}"],
        ["data", f"{task['data']}, {task['classes']} classes, {task['training_examples']:,} "
                 f"training examples, fingerprint {task['data_fingerprint'][:12]}"],
        ["adapters", f"LoRA r {settings['r']}, alpha {settings['lora_alpha']}, on "
                     f"{' or '.join(map(str, fused))} linear layers, and a new head; fp32"],
        ["training", f"{settings['steps']} steps of {settings['batch_size']} examples of at most "
                     f"{settings['max_length']} tokens, AdamW, peak rate "
                     f"{settings['learning_rate']:g}, a tenth of warm-up, then linear to 0, "
                     "gradients clipped to norm 1"],
        ["machine", f"{where['cpu']}, {where['threads']} thread"],
        ["versions", f"torch {where['torch']}, peft {where['peft']}, transformers "
                     f"{where['transformers']}, fastrank {where['fastrank']} at {commits}"
                     f"{' and uncommitted changes' if where['dirty'] else ''}, "
                     f"{where['date'][:10]}"],
    ]  # fmt: skip
    return table(["", ""], rows)


def _seeds(entries: list[Mapping[str, Any]], count: int) -> str:
    rows = []
    for entry in entries:
        found = entry["variants"]
        for variant in found:
            if variant == "peft":
                continue
            far = gaps(entry, variant)
            worst = max(range(len(far)), key=far.__getitem__)
            rows.append([
                f"{entry['dropout']:g}",
                str(entry["seed"]),
                variant,
                f"{max(far):.1e} (step {worst + 1})",
                f"{late(entry, 'peft'):.4f}",
                f"{late(entry, variant):.4f}",
                f"{100 * found['peft']['accuracy']:.1f}",
                f"{100 * found[variant]['accuracy']:.1f}",
                str(found[variant]["answered_differently"]),
            ])  # fmt: skip
    titles = ["dropout", "seed", "against peft", "largest gap of the loss", "late loss, peft",
              "late loss", "accuracy %, peft", "accuracy %",
              f"other answers (of {count})"]  # fmt: skip
    return table(titles, rows, right=3)


def _summary(entries: list[Mapping[str, Any]]) -> str:
    rows = []
    for dropout in sorted({entry["dropout"] for entry in entries}):
        alike = [entry for entry in entries if entry["dropout"] == dropout]
        for variant in ("peft", "fastrank", "peft-again"):
            those = [entry for entry in alike if variant in entry["variants"]]
            scores = [100 * entry["variants"][variant]["accuracy"] for entry in those]
            text = f"{statistics.fmean(scores):.2f}"
            if len(scores) > 1:
                text += f" ± {statistics.stdev(scores):.2f}"
            apart = "-"
            if variant != "peft":
                apart = f"{max(max(gaps(entry, variant)) for entry in those):.1e}"
            rows.append([f"{dropout:g}", variant, str(len(those)), text, apart])
    titles = ["dropout", "variant", "seeds", "accuracy %, mean and spread",
              "largest gap of any loss"]  # fmt: skip
    return table(titles, rows, right=2)


def report(content: Mapping[str, Any], out: Path, *, check: bool = False) -> list[Path]:
    """Write the page beside the record, where there is one, and the figure.

    Args:
        out: the record; the page is OUT.md and keeps what is written by hand in it, the figure
            plots/OUT.svg.
        check: write nothing.

    Returns:
        What was out of date.
    """
    page, drawn = out.with_suffix(".md"), out.parent / "plots" / f"{out.stem}.svg"
    stale = [page] if page.exists() and update(page, blocks(content), check=check) else []
    svg = figure(content)
    if not drawn.exists() or drawn.read_text(encoding="utf-8") != svg:
        stale.append(drawn)
    if not check:
        drawn.parent.mkdir(exist_ok=True)
        drawn.write_text(svg, encoding="utf-8")
        print(_summary(list(content["seeds"])))
    return stale
