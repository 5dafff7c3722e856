"""The shipped encoder: small, loadable by stock classes, without a machine's traces."""

import hashlib
import json

import pytest
import torch

from fastrank.data import encoder as encoder_module
from fastrank.data import encoder_path
from fastrank.data.harvest import CLASSES
from fastrank.errors import UsageError

FILES = (
    "config.json",
    "model.safetensors",
    "pretrain.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def test_files_are_there_small_and_name_no_machine_path() -> None:
    assert sorted(p.name for p in encoder_path().iterdir()) == sorted(FILES)
    assert sum(p.stat().st_size for p in encoder_path().iterdir()) <= 15 * 2**20
    for name in set(FILES) - {"model.safetensors", "tokenizer.json"}:
        text = (encoder_path() / name).read_text()
        assert not [p for p in ("/work", "/root", "/home", "/tmp", "site-packages") if p in text]


def test_stock_class_loads_it_with_only_the_classifier_new() -> None:
    from transformers import AutoModelForSequenceClassification

    model, info = AutoModelForSequenceClassification.from_pretrained(
        encoder_path(), output_loading_info=True
    )
    assert sorted(info["missing_keys"]) == ["classifier.bias", "classifier.weight"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.classifier_pooling == "mean"
    assert [model.config.id2label[i] for i in range(20)] == list(CLASSES)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    # nothing random in training mode: all dropout is zero
    ids = torch.arange(5, 25).reshape(2, 10)
    model.train()
    torch.testing.assert_close(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_every_linear_and_norm_has_a_bias_and_attention_is_full() -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(encoder_path())
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            assert module.bias is not None, name
    # a change at the far end of a long text reaches the first token: no sliding window
    ids = torch.full((2, 120), 50)
    ids[1, -1] = 60
    model.eval()
    with torch.no_grad():
        first, second = model(input_ids=ids).last_hidden_state[:, 0]
    assert (first - second).abs().max() > 1e-6


def test_padding_does_not_change_the_answer() -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder_path())
    model = AutoModelForSequenceClassification.from_pretrained(encoder_path()).eval()
    texts = ["Return the eigenvalues of a matrix.", "Return " + "a long list of nodes " * 6]
    together = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        padded = model(**together).logits
        for row, text in enumerate(texts):
            alone = model(**tokenizer(text, return_tensors="pt")).logits[0]
            torch.testing.assert_close(padded[row], alone, rtol=1e-4, atol=1e-5)


def test_tokenizer_lower_cases_and_knows_its_specials() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder_path())
    assert tokenizer("Return The Matrix").input_ids == tokenizer("return the matrix").input_ids
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id) == (0, 1, 4)
    ids = tokenizer("anything").input_ids
    assert (ids[0], ids[-1]) == (2, 3)
    assert len(tokenizer) == 8000


def test_the_record_tells_a_finished_run() -> None:
    record = json.loads((encoder_path() / "pretrain.json").read_text())
    final = record["history"][-1]
    assert record["finished"]
    assert final["step"] == record["steps_done"] == record["settings"]["steps"]
    assert final["dev_accuracy"] > 0.35
    assert final["dev_loss"] < 4.0
    digest = hashlib.sha256((encoder_path() / "tokenizer.json").read_bytes()).hexdigest()
    assert record["text"]["tokenizer_sha256"] == digest


def test_features_tell_the_classes_apart_without_training(harvested) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder_path())
    model = AutoModel.from_pretrained(encoder_path()).eval()
    names = ("sympy.geometry", "jinja2", "networkx", "torch.distributed")
    features, labels = [], []
    for label, name in enumerate(names):
        wanted = harvested.label_names.index(name)
        pairs = zip(harvested.texts, harvested.labels, strict=True)
        texts = [t for t, own in pairs if own == wanted][:48]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        weight = batch["attention_mask"].unsqueeze(-1)
        features.append((hidden * weight).sum(1) / weight.sum(1))
        labels += [label] * 24
    # nearest class mean, means from the first half, asked about the second; chance is 0.25
    means = torch.stack([f[:24].mean(0) for f in features])
    asked = torch.cat([f[24:] for f in features])
    right = torch.cdist(asked, means).argmin(1) == torch.tensor(labels)
    assert right.float().mean() > 0.7


def test_missing_weights_are_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(encoder_module, "__file__", str(tmp_path / "encoder.py"))
    with pytest.raises(UsageError, match=r"lacks config.json, model.safetensors, tokenizer.json"):
        encoder_path()
