"""The examples run as they are shipped, and Trainer trains, resumes and saves a patched model."""

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fastrank

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    # Trainer would pick accelerators by itself, and the counts below are those of one device
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_trainer_example(tmp_path, capsys):
    example = load_example("hf_trainer")
    result = example.main(["--tiny", "--output-dir", str(tmp_path)])
    assert result["after"] >= result["before"] + 0.2
    # 13 linear layers, 2 epochs of 30 batches and two evaluations of 2
    assert result["fused_calls"] == 13 * (60 + 4)
    text = capsys.readouterr().out
    assert "13 of 13 adapted modules fused" in text
    assert f"adapter in {tmp_path}" in text
    # what was saved is an ordinary adapter, and scores the same without fastrank
    torch.manual_seed(0)
    base, _, rows = example.make_tiny()
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    batch = example.collate(rows)
    with torch.no_grad():
        predicted = loaded(**batch).logits.argmax(-1)
    assert float((predicted == batch["labels"]).float().mean()) == pytest.approx(result["after"])


def test_raw_loop_example(capsys):
    losses = load_example("raw_loop").main(["--tiny"])
    assert sum(losses[-5:]) / 5 < losses[0] - 0.3
    assert "14 of 14 adapted modules fused" in capsys.readouterr().out


def test_trainer_checkpoints_resume_and_accumulation(tmp_path):
    """Trainer's own machinery around a patched model, against stock PEFT step by step."""
    ids = torch.randint(40, (24, 8), generator=torch.Generator().manual_seed(3))
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def trainer(folder, patched):
        torch.manual_seed(0)
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=40,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=16,
            )
        )
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
        report = fastrank.patch(model) if patched else None
        args = TrainingArguments(
            output_dir=tmp_path / folder,
            max_steps=6,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="steps",
            save_steps=3,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            label_names=["labels"],
        )
        return Trainer(model=model, args=args, train_dataset=rows), report

    def losses(trainer):
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    stock, _ = trainer("stock", patched=False)
    stock.train()
    fast, report = trainer("fast", patched=True)
    fast.train()
    assert losses(fast) == pytest.approx(losses(stock), abs=2e-4)
    assert losses(fast)[-1] < losses(fast)[0]
    # seven linear layers, forward and recomputed, two batches a step
    assert report.fused_calls == 7 * 2 * 2 * 6
    assert report.delegated_calls == {}
    resumed, _ = trainer("resumed", patched=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "fast" / "checkpoint-3"))
    for name, parameter in resumed.model.named_parameters():
        want = fast.model.get_parameter(name)
        assert torch.allclose(parameter, want, atol=1e-6), name
