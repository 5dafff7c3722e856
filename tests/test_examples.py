"""The examples do what they say, at sizes of seconds.

hf_trainer.py and raw_loop.py are in test_trainer.py, the resumption of federated.py in
federated/test_example.py, and the Flower app in federated/test_flower_engine.py.
"""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastrank.bench.reliability_runs import TINY, make_data, make_model, make_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_example(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def words(tmp_path):
    """Options of a run on a tiny random BERT and texts of three classes."""
    return {
        "model": str(make_model(tmp_path / "model")),
        "dataset": str(make_data(tmp_path / "data", train=240, test=60)),
        "num_clients": "2",
        "clients_per_round": "2",
        "num_rounds": "4",
        "partition": "iid",
        "max_length": "16",
        "per_device_train_batch_size": "8",
        "local_steps": "20",
        "learning_rate": "0.01",
        "head_learning_rate": "0.01",
        "num_threads": "1",
        "output_dir": str(tmp_path / "run"),
    }


def test_every_example_is_in_the_table():
    table = (EXAMPLES / "README.md").read_text()
    listed = set(re.findall(r"^\| \[`([\w./]+)`\]\(\1\)", table, re.MULTILINE))
    found = {path.name for path in EXAMPLES.glob("*.py")}
    found |= {f"{path.name}/" for path in EXAMPLES.iterdir() if (path / "README.md").exists()}
    assert listed == found
    for name in listed:
        if name.endswith(".py"):
            source = (EXAMPLES / name).read_text()
            assert f"    python examples/{name}" in source.split('"""')[1], name


def test_adalora_allocates_the_ranks_that_stock_peft_does(monkeypatch, capsys):
    example = load_example("adalora", monkeypatch)
    fast = example.main(["--tiny", "--epochs", "2"])
    stock = example.main(["--tiny", "--epochs", "2", "--stock"])
    layers = len(fast["ranks"])
    assert layers == 13
    assert len(fast["fused"]) == layers
    assert fast["delegated_calls"] == {}
    assert "fused" not in stock
    # the budget is kept, unevenly, and in the same layers
    assert sum(fast["ranks"].values()) == 4 * layers
    assert len(set(fast["ranks"].values())) > 2
    assert fast["ranks"] == stock["ranks"]
    # every score, those of ranks that are off among them
    assert fast["scores"].keys() == stock["scores"].keys()
    for name, score in fast["scores"].items():
        assert torch.allclose(score, stock["scores"][name], rtol=1e-2, atol=1e-7), name
    off = [score for name, score in fast["scores"].items() if "lora_E" in name]
    assert all((score > 0).all() for score in off)
    assert fast["losses"] == pytest.approx(stock["losses"], abs=1e-3)
    assert fast["accuracy"] > 0.8  # of three classes
    assert "13 of 13 adapted modules fused" in capsys.readouterr().out


def test_many_adapters_are_trained_and_served_in_one_pass(monkeypatch, tmp_path, capsys):
    example = load_example("many_adapters", monkeypatch)
    result = example.main(["--tiny", "--output-dir", str(tmp_path)])
    first, last = result["losses"][0], result["losses"][-1]
    assert all(after < before - 0.5 for before, after in zip(first, last, strict=True))
    scores = result["scores"]
    assert (scores.diagonal() > 0.9).all()  # each knows its own task
    assert (scores - torch.diag(scores.diagonal()) < 0.3).all()  # and no other
    # what PEFT alone loads from the folders answers as all of them do in one pass
    tokens = example.make_batch(3)
    model, names = example.load(example.make_base(), result["folders"])
    assert [model.peft_config[name].r for name in names] == [8, 4, 2]
    groups, layers = example.put_together(model, names)
    groups.examples = (8, 8, 8)
    with torch.no_grad():
        together = model(input_ids=tokens).logits
        for i, folder in enumerate(result["folders"]):
            alone = PeftModel.from_pretrained(example.make_base(), folder).eval()
            own = slice(8 * i, 8 * i + 8)
            assert torch.allclose(
                together[own], alone(input_ids=tokens[own]).logits, rtol=1e-4, atol=1e-5
            )
    assert len(layers) == 14
    assert "adapter 2, right next tokens" in capsys.readouterr().out


def test_prompts_are_answered_each_by_its_adapter(monkeypatch, tmp_path):
    example = load_example("many_adapters", monkeypatch)
    config = LlamaConfig(
        **TINY | {"max_position_embeddings": 64}, pad_token_id=0, bos_token_id=2, eos_token_id=3
    )
    folder, prompts = tmp_path / "model", ["w1 w2", "w3 w4 w5 w6", "w1 w2"]
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder)
    adapters = [tmp_path / name for name in ("a", "b", "c")]
    for r, saved in zip((2, 5, 3), adapters, strict=True):
        lora = LoraConfig(r=r, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora).save_pretrained(saved)
    arguments = ["--model", str(folder), "--adapters", *map(str, adapters), "--prompts", *prompts]
    answers = example.main(arguments)["answers"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for saved, prompt, answer in zip(adapters, prompts, answers, strict=True):
        base = AutoModelForCausalLM.from_pretrained(folder)
        alone = PeftModel.from_pretrained(base, saved).eval()
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = alone.generate(input_ids=ids, max_new_tokens=40, do_sample=False)
        wanted = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer == wanted
    assert all(answers)
    assert answers[0] != answers[2]  # one prompt, two adapters


def test_federation_in_ten_lines(words, monkeypatch, capsys):
    source = (EXAMPLES / "federated_ten_lines.py").read_text()
    code = source.split('"""')[2].strip().splitlines()
    assert len([line for line in code if line]) <= 10
    arguments = [f"{key}={value}" for key, value in words.items()]
    monkeypatch.setattr(sys, "argv", ["federated_ten_lines.py", *arguments])
    result = runpy.run_path(str(EXAMPLES / "federated_ten_lines.py"), run_name="__main__")["result"]
    assert len(result.rows) == 4
    assert result.summary["accuracy"] > 0.6  # of three classes
    assert result.summary["initial_accuracy"] < 0.6
    assert (Path(words["output_dir"]) / "adapter" / "adapter_model.safetensors").is_file()
    assert "round 4: accuracy" in capsys.readouterr().out


def test_a_method_of_ones_own(words, monkeypatch, capsys):
    example = load_example("federated", monkeypatch)
    words["num_rounds"] = "2"
    arguments = [part for key, value in words.items() for part in ("--set", f"{key}={value}")]
    monkeypatch.setattr(sys, "argv", ["federated.py", *arguments])
    example.main()
    out = capsys.readouterr().out
    adapter = Path(words["output_dir"]) / "adapter"
    assert f"rank-8 adapter: {adapter}" in out
    assert (adapter / "adapter_model.safetensors").is_file()
