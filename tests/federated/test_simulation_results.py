"""What a run leaves behind: adapters and models that load elsewhere and score the same."""

import json
import shutil

import pytest
import torch

from fastrank.federated import Simulation


@pytest.mark.parametrize("labels", ["known", "unknown"])
def test_adapter_loads_with_peft_alone_and_reproduces_the_accuracy(
    options, tiny_bert, tmp_path, labels
):
    """Where the model doesn't know the data set's labels, a base that does is saved beside it."""
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    options |= {
        "num_rounds": 4, "local_epochs": 3, "learning_rate": 5e-3, "head_learning_rate": 2e-2,
    }  # fmt: skip
    if labels == "unknown":
        shutil.copytree(tiny_bert, tmp_path / "plain")
        config = json.loads((tiny_bert / "config.json").read_text())
        del config["id2label"], config["label2id"]
        (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
        options["model"] = str(tmp_path / "plain")
    simulation = Simulation(**options)
    result = simulation.run()
    assert (result.output_dir / "base").exists() == (labels == "unknown")
    folder = result.output_dir / "adapter"
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder).eval()
    assert type(model.base_model.model).__name__ == "BertForSequenceClassification"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    test = simulation.data.test
    encoded = tokenizer(
        list(test.examples), padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        predicted = model(**{k: encoded[k] for k in ("input_ids", "attention_mask")}).logits
    accuracy = float((predicted.argmax(-1).numpy() == test.labels).mean())
    assert accuracy == pytest.approx(result.summary["accuracy"], abs=1e-9)
    assert accuracy > 0.5
    names = json.loads((folder / "adapter_config.json").read_text())
    assert names["target_modules"] == sorted(names["target_modules"])


def test_full_model_loads_with_transformers(options):
    from transformers import AutoModelForSequenceClassification

    result = Simulation(**{**options, "method": "fedavg", "num_rounds": 1}).run()
    model = AutoModelForSequenceClassification.from_pretrained(result.output_dir / "model")
    ours = result.model.read([n for n, _ in result.model.model.named_parameters()])
    theirs = dict(model.named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert not (result.output_dir / "adapter").exists()


@pytest.mark.parametrize("form", ["instructions", "plain"])
def test_causal_lm(options, tiny_llama, instructions, tmp_path, form):
    from peft import AutoPeftModelForCausalLM

    dataset = str(instructions)
    if form == "plain":
        texts = [json.loads(line)["prompt"] for line in instructions.read_text().splitlines()]
        path = tmp_path / "plain.jsonl"
        path.write_text("\n".join(json.dumps({"text": t}) for t in texts) + "\n")
        dataset = str(path)
    options |= {
        "model": str(tiny_llama), "dataset": dataset, "num_rounds": 4, "learning_rate": 1e-2,
        "max_length": 32, "local_epochs": 2,
    }  # fmt: skip
    result = Simulation(**options, task="causal-lm").run()
    first, last = result.rows[0], result.rows[-1]
    assert last["eval_loss"] < first["eval_loss"]
    assert len(result.model.report.fused) == 14
    model = AutoPeftModelForCausalLM.from_pretrained(result.output_dir / "adapter")
    name = result.model.lora_names()[1]
    assert torch.equal(dict(model.named_parameters())[name], result.model.read([name])[name])


def test_natural_partition_and_live_objects(options):
    from fastrank.data import load_data

    data = load_data(options.pop("dataset"), group_column="author")
    options |= {"partition": "natural", "num_clients": None, "num_rounds": 1}
    simulation = Simulation(**options, data=data)
    simulation.run()
    assert len(simulation.partition) == 7
    for indices in simulation.partition:
        assert len({data.train.groups[i] for i in indices}) == 1
