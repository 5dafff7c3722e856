"""Pre-train the embedded encoder: `python -m fastrank.data.pretrain --out DIR`.

A small ModernBERT learns masked-language modelling on the docstrings of the installed packages,
the test texts of the embedded task left out. One thread and about an hour are enough. The run is
checkpointed, resumes by itself from DIR and gives the same bits as one that was never interrupted:
batches and masks are pure functions of (seed, step).
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastrank.data import corpus as corpora
from fastrank.data.harvest import CLASSES, load_harvest, package_version
from fastrank.errors import UsageError

PAD, CLS, SEP, MASK = (
    corpora.SPECIAL_TOKENS.index(t) for t in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
)
FIRST_WORD_PIECE = len(corpora.SPECIAL_TOKENS)
IGNORED = -100
WARM_UP = 0.06
DECAY = 0.3
# batches sorted together: enough for little padding, few enough to keep lengths mixed over time
POOL_BATCHES = 32


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides the weights, apart from the text and the machine's arithmetic."""

    steps: int = 8000
    batch_size: int = 32
    chunk_tokens: int = 80
    vocab_size: int = 8000
    hidden_size: int = 256
    intermediate_size: int = 640
    num_layers: int = 4
    num_heads: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    mask_fraction: float = 0.2
    seed: int = 0


def model_config(config: PretrainConfig, label_names: tuple[str, ...] = CLASSES):
    """Return the ModernBertConfig: full attention everywhere, biases on, no dropout, mean pooling.

    Fields are spelled for transformers 4.57 and 5: older releases read `global_rope_theta` and
    `global_attn_every_n_layers` where newer ones read `rope_parameters` and `layer_types`.
    """
    from transformers import ModernBertConfig

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return ModernBertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=max(128, config.chunk_tokens),
        attention_bias=True,
        mlp_bias=True,
        norm_bias=True,
        classifier_bias=True,
        classifier_pooling="mean",
        global_attn_every_n_layers=1,
        layer_types=["full_attention"] * config.num_layers,
        global_rope_theta=10000.0,
        local_rope_theta=10000.0,
        rope_parameters={"full_attention": dict(rope), "sliding_attention": dict(rope)},
        reference_compile=False,
        pad_token_id=PAD,
        cls_token_id=CLS,
        bos_token_id=CLS,
        sep_token_id=SEP,
        eos_token_id=SEP,
        id2label=dict(enumerate(label_names)),
        label2id={name: i for i, name in enumerate(label_names)},
    )


def decay_start(steps: int) -> int:
    """Return the first step of the final decay; until there a run can still be made longer."""
    return steps - round(DECAY * steps)


def schedule(step: int, steps: int) -> float:
    """Return the learning-rate factor of a step: warm-up over 6 %, flat, last 30 % down to zero.

    Flat in the middle, so that the length of a run can be changed while it is under way.
    """
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return min(1.0, (steps - step) / max(1, steps - decay_start(steps)))


class Batches:
    """Length-bucketed batches as a pure function of (seed, step)."""

    def __init__(self, pieces: list[np.ndarray], batch_size: int, seed: int) -> None:
        if not pieces:
            raise UsageError("no text to train on: the corpus has no piece of 8 tokens or more")
        self.pieces, self.batch_size, self.seed = pieces, batch_size, seed
        self.lengths = np.array([len(p) for p in pieces])
        self.per_epoch = math.ceil(len(pieces) / batch_size)
        self._epoch, self._order = -1, []

    def __call__(self, step: int) -> np.ndarray:
        """Return the token ids of a step, int64 `[batch, longest]`, padded with `[PAD]`."""
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffle(epoch)
        return pad([self.pieces[i] for i in self._order[index]])

    def _shuffle(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, 1, epoch])
        order = rng.permutation(len(self.pieces))
        pool = self.batch_size * POOL_BATCHES
        batches = []
        for start in range(0, len(order), pool):
            part = order[start : start + pool]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            batches += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]


def pad(pieces: list[np.ndarray]) -> np.ndarray:
    """Return the pieces as one int64 array `[len(pieces), longest]`, padded with `[PAD]`."""
    ids = np.full((len(pieces), max(len(p) for p in pieces)), PAD, dtype=np.int64)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)] = piece
    return ids


def corrupt(ids: np.ndarray, config: PretrainConfig, *key: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose single tokens (not whole words) to predict: 80 % masked, 10 % random, 10 % kept.

    Returns:
        corrupted ids int64 `[batch, length]` and labels int64 `[batch, length]`, -100 where nothing
        is predicted. Special tokens are never chosen. A pure function of (ids, config.seed, key).
    """
    rng = np.random.default_rng([config.seed, 2, *key])
    chosen = (rng.random(ids.shape) < config.mask_fraction) & (ids >= FIRST_WORD_PIECE)
    kind = rng.random(ids.shape)
    random_ids = rng.integers(FIRST_WORD_PIECE, config.vocab_size, ids.shape)
    corrupted = np.where(chosen & (kind < 0.8), MASK, ids)
    corrupted = np.where(chosen & (kind >= 0.8) & (kind < 0.9), random_ids, corrupted)
    return corrupted, np.where(chosen, ids, IGNORED)


def masked_loss(model, encoder, ids: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return mean cross entropy at the chosen positions and the number of right predictions.

    The vocabulary projection runs at the chosen positions alone: over all of them it would cost as
    much as the whole encoder.
    """
    input_ids = torch.from_numpy(ids)
    attention_mask = (input_ids != PAD).long()
    hidden = encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
    chosen = torch.from_numpy(np.flatnonzero(labels != IGNORED))
    target = torch.from_numpy(labels).flatten()[chosen]
    logits = model.decoder(model.head(hidden.flatten(0, 1)[chosen]))
    loss = torch.nn.functional.cross_entropy(logits.float(), target)
    return loss, (logits.argmax(-1) == target).sum()


@torch.no_grad()
def evaluate(model, pieces: list[np.ndarray], config: PretrainConfig) -> tuple[float, float]:
    """Return (loss, accuracy) per predicted token on held-out pieces, masks fixed."""
    model.eval()
    order = sorted(range(len(pieces)), key=lambda i: (len(pieces[i]), i))
    total, right, count = 0.0, 0, 0
    for start in range(0, len(order), 64):
        ids = pad([pieces[i] for i in order[start : start + 64]])
        ids, labels = corrupt(ids, config, 999_999_999, start)
        chosen = int((labels != IGNORED).sum())
        if chosen:
            loss, hits = masked_loss(model, model.model, ids, labels)
            total, right, count = total + float(loss) * chosen, right + int(hits), count + chosen
    model.train()
    return total / max(1, count), right / max(1, count)


def _write(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def _write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    _write(path, lambda p: p.write_text(text, encoding="utf-8"))


def export(model, out: Path, record: dict) -> None:
    """Write what ships: config.json, fp16 model.safetensors (no vocabulary head), pretrain.json."""
    from safetensors.torch import save_file

    # the decoder is the tied embedding plus a bias that a classifier has no use for
    tensors = {
        name: value.detach().to(torch.float16).contiguous()
        for name, value in sorted(model.state_dict().items())
        if not name.startswith("decoder.")
    }
    _write(out / "model.safetensors", lambda p: save_file(tensors, p, metadata={"format": "pt"}))
    # safetensors creates its file for the owner alone
    (out / "model.safetensors").chmod(0o644)
    config = model.config.to_dict()
    # both spellings, see model_config; transformers drops this one when it writes
    config["reference_compile"] = False
    config["global_attn_every_n_layers"] = 1
    config["global_rope_theta"] = config["local_rope_theta"] = 10000.0
    config["architectures"] = ["ModernBertForSequenceClassification"]
    # weights are stored in 16 bits and meant to be used in 32
    config["dtype"] = config["torch_dtype"] = "float32"
    config.pop("_name_or_path", None)
    _write_json(out / "config.json", dict(sorted(config.items())))
    _write_json(out / "pretrain.json", record)


def prepare(
    config: PretrainConfig,
    out: Path,
    log: Callable[[str], None],
    tokenizer_file: Path | None = None,
) -> dict:
    """Collect the text, train the tokenizer (or take one) and cut the pieces, once per folder.

    Returns:
        dict with `train` and `dev` (lists of uint16 arrays) and `text` (facts for the record).
    """
    store, facts_file = out / "pieces.npz", out / "text.json"
    if not (store.exists() and facts_file.exists() and (out / "tokenizer.json").exists()):
        harvest = load_harvest()
        log("reading docstrings of the installed packages")
        text = corpora.collect(harvest)
        dev = [d for d in text.documents if corpora.is_dev(d)]
        train = [d for d in text.documents if not corpora.is_dev(d)]
        log(f"{len(train)} documents to train on, {len(dev)} held out, {text.excluded} left out")
        if tokenizer_file is None:
            tokenizer = corpora.train_tokenizer(train, config.vocab_size)
        else:
            tokenizer = corpora.read_tokenizer(tokenizer_file, config.vocab_size)
        _write(out / "tokenizer.json", lambda p: tokenizer.save(str(p)))
        _write_json(
            out / "tokenizer_config.json", corpora.tokenizer_config(max(128, config.chunk_tokens))
        )
        arrays = {}
        for name, documents in (("train", train), ("dev", dev)):
            pieces = corpora.chunks(tokenizer, documents, config.chunk_tokens)
            arrays[name] = np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)
            arrays[f"{name}_lengths"] = np.array([len(p) for p in pieces], dtype=np.int64)
        facts = {
            "documents": len(train),
            "documents_held_out": len(dev),
            "documents_left_out_as_test": text.excluded,
            "pieces": len(arrays["train_lengths"]),
            "tokens": len(arrays["train"]),
            "fingerprint": text.fingerprint(),
            "task_fingerprint": harvest.fingerprint("text"),
            "task_fingerprint_file_split": harvest.fingerprint("file"),
            "label_names": list(harvest.label_names),
            "versions": text.versions,
        }
        np.savez(out / "pieces.tmp.npz", **arrays)
        os.replace(out / "pieces.tmp.npz", store)
        _write_json(facts_file, facts)
    with np.load(store) as data:
        cut = {
            name: np.split(data[name], np.cumsum(data[f"{name}_lengths"])[:-1])
            for name in ("train", "dev")
        }
    facts = json.loads(facts_file.read_text(encoding="utf-8"))
    digest = hashlib.sha256((out / "tokenizer.json").read_bytes()).hexdigest()
    return {**cut, "text": {**facts, "tokenizer_sha256": digest}}


def _check_resumable(saved: dict, wanted: dict, step: int, out: Path) -> None:
    different = {name for name in wanted if saved.get(name) != wanted[name]}
    if different == {"steps"}:
        # a checkpoint from before the decay of both lengths fits either schedule
        if step <= min(decay_start(saved["steps"]), decay_start(wanted["steps"])):
            return
        raise UsageError(
            f"{out} is at step {step} of {saved['steps']}, too late to make the run "
            f"{wanted['steps']} steps long; go on with --steps {saved['steps']}"
        )
    if different:
        raise UsageError(
            f"{out} holds a run with another {', '.join(sorted(different))}; choose another --out"
        )


def pretrain(
    config: PretrainConfig,
    out: Path,
    *,
    stop_after: int | None = None,
    save_every: int = 100,
    eval_every: int = 250,
    compiled: bool = False,
    tokenizer_file: Path | None = None,
    log: Callable[[str], None] = print,
) -> dict:
    """Train, or go on training, in the folder `out`; return the record that is written beside it.

    Args:
        stop_after: stop, with a checkpoint, after this step; None for the whole run.
        compiled: run the encoder through torch.compile, which needs a C++ compiler.
        tokenizer_file: a tokenizer.json to use instead of training one.

    Raises:
        UsageError: `out` holds a run with another configuration.
    """
    from transformers import ModernBertForMaskedLM

    out.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.asdict(config)
    data = prepare(config, out, log, tokenizer_file)
    torch.manual_seed(config.seed)
    model = ModernBertForMaskedLM(model_config(config, tuple(data["text"]["label_names"])))
    with torch.no_grad():
        # saves the first steps, which would only learn how frequent each token is
        counts = np.bincount(np.concatenate(data["train"]), minlength=config.vocab_size)
        model.decoder.bias.copy_(torch.from_numpy(np.log((counts + 1) / (counts.sum() + 1))))
    model.train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        eps=1e-6,
        fused=True,
    )
    checkpoint = out / "checkpoint.pt"
    step, seconds, history = 0, 0.0, []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        _check_resumable(saved["settings"], settings, saved["step"], out)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, seconds, history = saved["step"], saved["seconds"], saved["history"]
        log(f"resuming at step {step}")
    encoder = torch.compile(model.model, dynamic=True) if compiled else model.model
    batches = Batches(data["train"], config.batch_size, config.seed)
    last = config.steps if stop_after is None else min(stop_after, config.steps)
    running: list[float] = []
    started = time.monotonic() - seconds
    while step < last:
        ids, labels = corrupt(batches(step), config, step)
        loss, _ = masked_loss(model, encoder, ids, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule(step, config.steps)
        optimizer.step()
        running.append(float(loss.detach()))
        step += 1
        if step % eval_every == 0 or step == last:
            dev_loss, dev_accuracy = evaluate(model, data["dev"], config)
            seconds = time.monotonic() - started
            train_loss = sum(running) / len(running)
            running.clear()
            history.append(
                {
                    "step": step,
                    "train_loss": round(train_loss, 4),
                    "dev_loss": round(dev_loss, 4),
                    "dev_accuracy": round(dev_accuracy, 4),
                    "seconds": round(seconds, 1),
                }
            )
            log(
                f"step {step}/{config.steps}  loss {train_loss:.3f}  dev loss {dev_loss:.3f}  "
                f"dev accuracy {dev_accuracy:.3f}  {seconds:.0f} s"
            )
        if step % save_every == 0 or step == last:
            state = {
                "settings": settings,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "seconds": time.monotonic() - started,
                "history": history,
            }
            _write(checkpoint, lambda p, s=state: torch.save(s, p))
    record = {
        "objective": "masked language modelling, single tokens, 80/10/10",
        "finished": step == config.steps,
        "steps_done": step,
        "settings": settings,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.monotonic() - started, 1),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "threads": torch.get_num_threads(),
        "compiled": compiled,
        "software": {
            "python": platform.python_version(),
            **{n: package_version(n) for n in ("torch", "transformers", "tokenizers")},
        },
        "text": data["text"],
        "history": history,
    }
    export(model, out, record)
    return record


def main(argv: list[str] | None = None) -> int:
    """Command line of the module."""
    defaults = PretrainConfig()
    parser = argparse.ArgumentParser(
        prog="python -m fastrank.data.pretrain",
        description="Pre-train the embedded encoder. Run it again with the same --out to resume.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run and its result")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--stop-after", type=int, help="stop early at this step, to resume later")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--eval-every", type=int, default=250, help="steps between dev losses")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile (C++ compiler needed)"
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to use, not train anew")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: at least 1 is needed")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    try:
        pretrain(
            dataclasses.replace(defaults, steps=arguments.steps, seed=arguments.seed),
            arguments.out,
            stop_after=arguments.stop_after,
            save_every=arguments.save_every,
            eval_every=arguments.eval_every,
            compiled=arguments.compile,
            tokenizer_file=arguments.tokenizer,
            log=lambda line: print(line, flush=True),
        )
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
