"""Many LoRA adapters over one base in one pass: trained together, served together.

    python examples/many_adapters.py --tiny         # seconds, nothing is downloaded
    python examples/many_adapters.py --model Qwen/Qwen3-0.6B --adapters runs/en runs/de runs/fr \\
        --prompts "Good morning" "Guten Morgen" "Bonjour"

The second answers the i-th prompt by the i-th saved PEFT adapter, all prompts in one batch. The
first trains three adapters of ranks 8, 4 and 2 in one batch, each on its own task (counting in
steps of 1, 2 or 3), saves them as ordinary PEFT checkpoints, and serves them from those.

PEFT's layers hold the adapters and know their scales; `GroupedLowRankLinear` applies each to its
own rows of the batch. Adapters may have any ranks and miss layers; rows are sorted by adapter.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastrank.layers import GroupedLowRankLinear, Groups

VOCABULARY = 16


def put_together(model: PeftModel, names: list[str]) -> tuple[Groups, dict[str, PeftLinear]]:
    """Replace the model's LoRA layers; (what says whose rows are whose, the old layers by name)."""
    groups, replaced = Groups(), {}
    for name, module in list(model.named_modules()):
        if isinstance(module, PeftLinear):
            if module.lora_variant or not isinstance(module.base_layer, nn.Linear):
                raise SystemExit(f"{name}: only plain LoRA over nn.Linear goes together")
            layer = GroupedLowRankLinear.from_linear(
                module.base_layer,
                ranks=[module.r.get(adapter, 0) for adapter in names],
                scale=[module.scaling.get(adapter, 0.0) for adapter in names],
                groups=groups,
            )
            for index, adapter in enumerate(names):
                if adapter in module.lora_A:
                    factors = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                    layer.load_adapter(index, *factors)
            replaced[name] = module
            model.set_submodule(name, layer)
    return groups, replaced


def take_apart(model: PeftModel, replaced: dict[str, PeftLinear], names: list[str]) -> None:
    """PEFT's layers again, with what was learnt."""
    for name, module in replaced.items():
        layer = model.get_submodule(name)
        for index, adapter in enumerate(names):
            if adapter in module.lora_A:
                A, B, _ = layer.adapter(index)
                module.lora_A[adapter].weight.data.copy_(A)
                module.lora_B[adapter].weight.data.copy_(B)
        model.set_submodule(name, module)


def load(base: nn.Module, folders: list[Path]) -> tuple[PeftModel, list[str]]:
    """All adapters in one PeftModel, and their names."""
    names = [f"adapter{i}" for i in range(len(folders))]
    model = PeftModel.from_pretrained(base, folders[0], adapter_name=names[0])
    for folder, name in zip(folders[1:], names[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    return model.eval(), names


# -- the tiny model and its tasks ------------------------------------------------------------------


def make_base() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads))


def make_batch(adapters: int, each: int = 8, length: int = 12) -> torch.Tensor:
    """Token ids [adapters * each, length]: adapter i's rows count in steps of i + 1."""
    start = torch.randint(VOCABULARY, (adapters * each, 1))
    step = torch.arange(1, adapters + 1).repeat_interleave(each)[:, None]
    return (start + step * torch.arange(length)) % VOCABULARY


def losses_of(logits: torch.Tensor, tokens: torch.Tensor, adapters: int) -> torch.Tensor:
    """Each adapter's own mean loss [adapters]."""
    targets = tokens[:, 1:].flatten()
    each = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none")
    return each.view(adapters, -1).mean(1)


def train(folder: Path, ranks: tuple[int, ...], steps: int) -> tuple[list[Path], list[list[float]]]:
    """Adapters of these ranks, trained together and saved; (their folders, losses by step)."""
    names, model = [f"adapter{i}" for i in range(len(ranks))], None
    for name, r in zip(names, ranks, strict=True):
        config = LoraConfig(
            task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, target_modules="all-linear"
        )
        if model is None:
            model = get_peft_model(make_base(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    groups, replaced = put_together(model, names)
    groups.examples = (8,) * len(names)
    layers = [model.get_submodule(name) for name in replaced]
    parameters = [p for layer in layers for p in (layer.A, layer.B)]
    # AdamW works entry by entry, so that one optimizer does for each adapter what its own would
    optimizer = torch.optim.AdamW(parameters, lr=2e-2, weight_decay=0.0)
    history = []
    for step in range(steps):
        tokens = make_batch(len(names))
        losses = losses_of(model(input_ids=tokens).logits, tokens, len(names))
        losses.sum().backward()  # no adapter's loss depends on another's factors
        optimizer.step()
        optimizer.zero_grad()
        history.append(losses.tolist())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3d}  losses " + " ".join(f"{loss:.3f}" for loss in history[-1]))
    take_apart(model, replaced, names)
    model.save_pretrained(folder)  # folder/adapter0, folder/adapter1, ...
    return [folder / name for name in names], history


@torch.no_grad()
def serve(folders: list[Path]) -> torch.Tensor:
    """Share of right next tokens [adapters, tasks]: each adapter on every task, one pass a task."""
    model, names = load(make_base(), folders)
    groups, _ = put_together(model, names)
    groups.examples = (8,) * len(names)
    scores = torch.zeros(len(names), len(names))
    for task in range(len(names)):
        rows = make_batch(len(names)).view(len(names), 8, -1)[task]
        tokens = rows.repeat(len(names), 1)  # the same examples for every adapter
        right = model(input_ids=tokens).logits[:, :-1].argmax(-1) == tokens[:, 1:]
        scores[:, task] = right.view(len(names), -1).float().mean(1)
    return scores


# -- real models -----------------------------------------------------------------------------------


def answer(name: str, folders: list[Path], prompts: list[str]) -> list[str]:
    """The i-th prompt continued by the i-th adapter, all in one batch."""
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device)
    model, names = load(base, folders)
    groups, _ = put_together(model, names)
    groups.examples = (1,) * len(names)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(device)
    out = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="train and serve three on a tiny model")
    parser.add_argument("--model", help="hub name or folder of a causal language model")
    parser.add_argument("--adapters", type=Path, nargs="+", default=[], help="saved PEFT adapters")
    parser.add_argument("--prompts", nargs="+", default=[], help="one an adapter")
    parser.add_argument("--steps", type=int, default=60, help="of --tiny")
    parser.add_argument("--output-dir", type=Path, help="where --tiny saves its adapters")
    args = parser.parse_args(argv)
    if not args.tiny:
        if not args.model or not args.adapters or len(args.adapters) != len(args.prompts):
            parser.error("give --tiny, or --model with as many --adapters as --prompts")
        answers = answer(args.model, args.adapters, args.prompts)
        for folder, text in zip(args.adapters, answers, strict=True):
            print(f"{folder}: {text}")
        return {"answers": answers}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output_dir or Path(temporary)
        folders, losses = train(folder, ranks=(8, 4, 2), steps=args.steps)
        scores = serve(folders)
    for i, row in enumerate(scores.tolist()):
        shares = "  ".join(f"{share:4.0%}" for share in row)
        print(f"adapter {i}, right next tokens of steps 1, 2, 3: {shares}")
    return {"losses": losses, "scores": scores, "folders": folders}


if __name__ == "__main__":
    main()
