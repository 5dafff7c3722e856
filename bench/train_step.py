"""`fastrank bench train-step`: tokens a second and memory of training a LoRA model, against PEFT.

A Llama-shaped model with random weights (no download), LoRA on all its linear layers, AdamW on the
adapters, random tokens. PEFT and fastrank train the same model in turn: it is patched and unpatched
between samples, outside of what is timed. Liger is measured where it is installed. Before
anything is timed, every variant's gradients are compared with PEFT's: `error` is their distance.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrank.bench import options, timing
from fastrank.bench.environment import pick_device
from fastrank.bench.harness import Measured, WrongResult, first_line, rows
from fastrank.bench.memory import measure as measure_memory
from fastrank.bench.progress import Report
from fastrank.bench.results_file import Results
from fastrank.bench.variants import has_peft
from fastrank.errors import UsageError

if TYPE_CHECKING:
    from fastrank.patching import PatchReport

DEFAULTS: dict[str, Any] = {
    **options.DEFAULTS,
    "shape": None,
    "r": 16,
    "sequence": None,
    "batch": 1,
    "dropout": 0.0,
    "precision": "autocast",
}
SHAPES: dict[str, dict[str, int]] = {
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
_PRECISIONS = ("autocast", "16-bit", "peft")
# relative distance of gradients from PEFT's: bf16 sums in another order are a few percent apart,
# another scale or a missing adapter is tens
WRONG = 0.2
_UNSLOTH = (
    "Unsloth changes transformers for the whole process when it is imported, and loads models in "
    "its own way: it can't take turns with the others on this model"
)


@dataclass(frozen=True)
class Case:
    """One training step.

    Args:
        shape: a key of SHAPES.
        r: rank of every adapter.
        sequence, batch: tokens of a text, texts of a step.
        dropout: lora_dropout.
        precision: "autocast" (float32 adapters, the step under bf16 autocast), "16-bit" (adapters
            in bf16 too) or "peft" (float32 adapters without autocast). The model is in bf16.
    """

    shape: str
    r: int
    sequence: int
    batch: int
    dropout: float
    precision: str

    @property
    def tokens(self) -> int:
        return self.sequence * self.batch

    def as_dict(self) -> dict[str, Any]:
        name = f"{self.shape}-r{self.r}-b{self.batch}x{self.sequence}-p{self.dropout:g}"
        return {"name": f"{name}-{self.precision}", **asdict(self), "dtype": "bfloat16"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line's options; their defaults are DEFAULTS."""
    add = parser.add_argument
    options.add_options(parser, quick="the tiny shape, whatever the device", seconds="default 60")
    add("--shape", choices=tuple(SHAPES), help="default llama-3-8b on a GPU, tiny on a CPU")
    add("--r", type=int, metavar="R", help="rank of the adapters (default 16)")
    add("--sequence", type=int, metavar="N", help="tokens a text (default 2048; tiny: 64)")
    add("--batch", type=int, metavar="N", help="texts a step (default 1)")
    add("--dropout", type=float, metavar="P", help="lora_dropout (default 0)")
    add("--precision", choices=_PRECISIONS, help="of the adapters (default autocast)")


def run(
    *,
    device: str,
    quick: bool,
    shape: str | None,
    r: int,
    sequence: int | None,
    batch: int,
    dropout: float,
    precision: str,
    threads: int | None,
    seconds: float | None,
    out: str | Path | None,
    resume: bool,
) -> dict[str, Any]:
    """Measure one shape; see `fastrank.bench.run`."""
    where = pick_device(device)  # what is measured by default depends on it
    if shape is None or quick:
        shape = "tiny" if quick or where.type == "cpu" else "llama-3-8b"
    if sequence is None:
        sequence = 64 if shape == "tiny" else 2048
    if not has_peft():
        raise UsageError("train-step needs PEFT, which is not installed: pip install peft")
    _check(shape, r, sequence, batch, dropout, precision)
    case = Case(shape, r, sequence, batch, dropout, precision)
    with options.session(device, threads, seconds, out, resume) as (where, results):
        if not results.has(case.as_dict()["name"], "full"):
            measure(case, where, results, seconds or (2.0 if quick else 60.0))
        return options.finish(results)


def _check(shape: str, r: int, sequence: int, batch: int, dropout: float, precision: str) -> None:
    if shape not in SHAPES:
        raise UsageError(f"shape is {shape!r}; choose one of {', '.join(SHAPES)}")
    if precision not in _PRECISIONS:
        raise UsageError(f"precision is {precision!r}; choose one of {', '.join(_PRECISIONS)}")
    for name, value in {"r": r, "sequence": sequence, "batch": batch}.items():
        if value < 1:
            raise UsageError(f"{name} is {value}; give at least 1")
    if not 0.0 <= dropout < 1.0:
        raise UsageError(f"dropout is {dropout}; give a probability in [0, 1)")


class TrainStep:
    """Forward, loss, backward and optimizer step of one model on one batch.

    Args:
        model: a PEFT model whose adapters alone are trained.
        case: what it is.
        device: where it runs.
        prepare: called before every sample, outside of the timing.
    """

    def __init__(
        self,
        model: nn.Module,
        case: Case,
        device: torch.device,
        prepare: Callable[[nn.Module], object],
    ) -> None:
        self.model, self.prepare = model, prepare
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)
        generator = torch.Generator().manual_seed(0)
        size = (case.batch, case.sequence)
        tokens = torch.randint(SHAPES[case.shape]["vocab_size"], size, generator=generator)
        self.tokens, self.device = tokens.to(device), device
        self.autocast = case.precision == "autocast"

    def __call__(self) -> Tensor:
        loss = self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def backward(self) -> Tensor:
        """Forward and backward; the loss."""
        region = torch.autocast(self.device.type, torch.bfloat16) if self.autocast else None
        with region or nullcontext():
            loss = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def gradients(self) -> list[Tensor]:
        """Of what is trained, without dropout; nothing is changed by it."""
        self.prepare(self.model)
        self.model.eval()
        self.backward()
        self.model.train()
        found = [p.grad.float() for p in self.trained]
        self.optimizer.zero_grad(set_to_none=True)
        return found


def judge(steps: dict[str, TrainStep], found: dict[str, Measured]) -> None:
    """Compare every variant's gradients with PEFT's, before any of them trains the model; what is
    further off than rounding goes is skipped as wrong."""
    wanted: list[Tensor] = []

    def check(step: TrainStep, entry: Measured) -> None:
        gradients = step.gradients()
        if step is steps["peft"]:
            wanted.extend(gradients)
            return
        if not wanted:
            raise WrongResult("there are no gradients of PEFT's to compare with")
        apart = _distance(gradients, wanted)
        if not apart <= WRONG:
            raise WrongResult(f"gradients are {apart:.3g} off PEFT's, allowed is {WRONG:g}")
        entry.error = apart

    for name, step in list(steps.items()):
        _guarded(found[name], lambda step=step, name=name: check(step, found[name]))
        if found[name].skipped is not None:
            del steps[name]


def _distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    gap = sum(float((f - w).square().sum()) for f, w in zip(found, wanted, strict=True))
    return (gap / sum(float(w.square().sum()) for w in wanted)) ** 0.5


def _guarded(entry: Measured, work: Callable[[], Any]) -> Any:
    """The result of work; where it fails the variant is skipped with the reason."""
    try:
        return work()
    except torch.OutOfMemoryError:
        entry.skipped = "out of memory"
    except Exception as error:
        traceback.print_exc()
        entry.skipped = f"failed: {type(error).__name__}: {first_line(error)}"
    return None


class _Clock:
    """Gives the model its variant's layers before a sample, and a step to get used to them.

    Layers that have just changed class find none of their caches filled, unlike in training.
    """

    def __init__(self, clock: timing.Clock) -> None:
        self.clock = clock

    def seconds(self, step: TrainStep, calls: int) -> float:
        step.prepare(step.model)
        step()
        return self.clock.seconds(step, calls)


def measure(case: Case, device: torch.device, results: Results, seconds: float) -> None:
    """Measure every variant in turn and add the rows."""
    from fastrank.patching import patch

    with Report((("variant", 12), ("ms", 9), ("tokens/s", 10), ("peak GB", 8), ("loss", 8))) as out:
        out.line(f"{results.environment['device']}, {case.as_dict()['name']}")
        steps, found = variants(case, device)
        out.start(len(found))
        judge(steps, found)
        losses = {}
        for name, step in list(steps.items()):
            look = functools.partial(_look_at, step, found[name], device)
            losses[name] = _guarded(found[name], look)
            if name == "fastrank" and found[name].skipped is None:
                _check_fused(patch(step.model))
            if found[name].skipped is not None:
                del steps[name]
        begin = time.perf_counter()
        clock = _Clock(timing.clock_for(device))
        for name, taken in timing.interleave(steps, clock, seconds=seconds, max_rounds=30).items():
            found[name].timing = taken
        for name, entry in found.items():
            out.row(_cells(name, entry, losses.get(name), case))
        out.close()
        results.add(rows("train-step", case.as_dict(), "full", found, _PAIRS))
        _say_result(out, found, time.perf_counter() - begin)


def variants(case: Case, device: torch.device) -> tuple[dict[str, TrainStep], dict[str, Measured]]:
    """A step of each variant that runs here, PEFT's first, and what is known of all of them."""
    from fastrank.federated.quiet import quiet
    from fastrank.patching import patch, unpatch

    with quiet():
        model = adapted_model(case, device)
    steps = {"peft": TrainStep(model, case, device, unpatch)}
    steps["fastrank"] = TrainStep(model, case, device, patch)
    found = {name: Measured() for name in steps}
    found["liger+peft"] = _liger(case, device, steps)
    found["unsloth"] = Measured(skipped=_UNSLOTH)
    return steps, found


_PAIRS = [("fastrank", "peft"), ("fastrank", "liger+peft"), ("fastrank", "unsloth")]


def adapted_model(case: Case, device: torch.device) -> nn.Module:
    """A random Llama with LoRA on all linear layers but the head; the same for every call."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SHAPES[case.shape], max_position_embeddings=max(case.sequence, 64), use_cache=False
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    try:
        # weights are made where and as they stay: an 8B model in float32 needs 32 GB
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    lora = LoraConfig(
        r=case.r,
        lora_dropout=case.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora, autocast_adapter_dtype=case.precision != "16-bit")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros would leave the gradient of A zero
                parameter.normal_(std=0.01)
    return model.train()


def _liger(case: Case, device: torch.device, steps: dict[str, TrainStep]) -> Measured:
    """Liger's kernels around PEFT's layers, on a model of their own."""
    if importlib.util.find_spec("liger_kernel") is None:
        return Measured(skipped="liger-kernel is not installed")
    if device.type == "cpu":
        return Measured(skipped="Liger's kernels need a GPU")
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        model = adapted_model(case, device)
        apply_liger_kernel_to_llama(model=model.get_base_model())
    except torch.OutOfMemoryError:
        return Measured(skipped="no memory for a second model")
    except Exception as error:
        return Measured(skipped=f"failed: {type(error).__name__}: {first_line(error)}")
    steps["liger+peft"] = TrainStep(model, case, device, lambda model: None)
    return Measured()


def _look_at(step: TrainStep, entry: Measured, device: torch.device) -> float:
    """The first step's loss; memory of the second, when the optimizer has its state."""
    step.prepare(step.model)
    loss = float(step())
    held = [*step.model.parameters(), *step.model.buffers(), step.tokens]
    entry.memory = measure_memory(step, held, device)
    return loss


def _check_fused(report: PatchReport) -> None:
    """Everything ran fused, or the comparison is PEFT against itself."""
    if report.delegated or report.delegated_calls or not report.fused_calls:
        raise RuntimeError(f"not everything ran fused: {report!r}, {report.delegated}")


def _cells(name: str, entry: Measured, loss: float | None, case: Case) -> list[str]:
    if entry.timing is None:
        return [name, f"skipped: {entry.skipped}"]
    seconds = entry.timing.median_s
    return [
        name,
        f"{seconds * 1e3:.1f}",
        f"{case.tokens / seconds:,.0f}",
        f"{entry.memory.peak_bytes / 1e9:.3f}" if entry.memory else "-",
        f"{loss:.4f}",
    ]


def _say_result(out: Report, found: dict[str, Measured], seconds: float) -> None:
    this, other = found["fastrank"].timing, found["peft"].timing
    if this is None or other is None:
        return
    out.line(
        f"fastrank trains {other.median_s / this.median_s:.3f} times PEFT's tokens a second "
        f"({this.samples} samples each in {seconds:.0f} s)"
    )
