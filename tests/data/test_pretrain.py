"""Pre-training: test texts left out, batches cover the corpus, resumed runs have equal bits."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import torch

from fastrank.data import corpus as corpora
from fastrank.data import pretrain as pt
from fastrank.errors import UsageError

WORDS = [
    "the",
    "matrix",
    "graph",
    "node",
    "value",
    "returns",
    "list",
    "of",
    "numbers",
    "file",
    "path",
    "model",
    "layer",
    "token",
]
TINY = pt.PretrainConfig(
    steps=8,
    batch_size=4,
    chunk_tokens=16,
    vocab_size=120,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
)


def _documents(count: int) -> tuple[str, ...]:
    rng = np.random.default_rng(7)
    return tuple(
        " ".join(rng.choice(WORDS, rng.integers(10, 30))) + f" ending {i}" for i in range(count)
    )


@pytest.fixture
def tiny_corpus(monkeypatch, harvested):
    found = corpora.Corpus(_documents(300), 3, {"python": "3"})
    monkeypatch.setattr(corpora, "collect", lambda harvest: found)
    # one thread: sums in a fixed order, so that equal bits may be asked for
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield found
    torch.set_num_threads(threads)


def test_exclusion_finds_a_text_anywhere_in_a_document() -> None:
    text = "one two three four five six seven eight nine"
    exclusion = corpora.Exclusion([text, "a b c d e f g h"])
    assert exclusion.hits(text)
    assert exclusion.hits(f"before {text.upper()} after")
    assert not exclusion.hits(text.removesuffix(" nine"))
    assert not exclusion.hits(text.replace("seven", "7"))
    assert exclusion.hits("x a b c d e f g h")


def test_no_test_text_is_in_the_corpus(harvested, monkeypatch) -> None:
    from fastrank.data.harvest import package_folder

    folders = [(name, package_folder(name)) for name in ("jinja2", "fsspec", "accelerate")]
    monkeypatch.setattr(corpora, "_folders", lambda: iter(folders))
    found = corpora.collect(harvested)
    held_out = [
        text.lower()
        for split in ("text", "file")
        for text, test in zip(harvested.texts, harvested.is_test(split), strict=True)
        if test
    ]
    assert found.excluded > 250
    assert len(found.documents) > 500
    # plain substring search over everything at once, unlike the code under test
    everything = "\n".join(f" {d.lower()} " for d in found.documents)
    assert not [text for text in held_out if f" {text} " in everything]
    # training texts, on the other hand, are there
    held_out_set = set(held_out)
    mine = {harvested.label_names.index(name) for name, _ in folders}
    kept = [
        t.lower()
        for t, label in zip(harvested.texts, harvested.labels, strict=True)
        if label in mine and t.lower() not in held_out_set
    ]
    assert sum(f" {text}" in everything for text in kept) > 0.95 * len(kept)


def test_tokenizer_is_deterministic_lower_cased_and_marks_word_pieces() -> None:
    documents = list(_documents(200))
    first = corpora.train_tokenizer(documents, 120)
    assert first.to_str() == corpora.train_tokenizer(documents, 120).to_str()
    assert first.encode("The Matrix").tokens == ["[CLS]", "the", "matrix", "[SEP]"]
    assert all(t.startswith("##") for t in first.encode("matrixgraph").tokens[2:-1])
    assert [first.token_to_id(t) for t in corpora.SPECIAL_TOKENS] == [0, 1, 2, 3, 4]


def test_chunks_cut_documents_without_losing_tokens() -> None:
    documents = list(_documents(50))
    tokenizer = corpora.train_tokenizer(documents, 120)
    pieces = corpora.chunks(tokenizer, documents, 16)
    assert max(map(len, pieces)) == 16
    assert min(map(len, pieces)) >= 10
    assert all(p[0] == pt.CLS and p[-1] == pt.SEP for p in pieces)
    ids = [tokenizer.encode(d, add_special_tokens=False).ids for d in documents]
    short_tails = sum(len(i) % 14 for i in ids if len(i) % 14 < 8)
    assert sum(len(p) - 2 for p in pieces) == sum(map(len, ids)) - short_tails


def test_batches_use_every_piece_once_an_epoch_whatever_the_order_of_calls() -> None:
    pieces = [np.full(10 + i % 7, i + 5, dtype=np.uint16) for i in range(41)]
    batches = pt.Batches(pieces, 4, seed=3)
    for epoch in range(2):
        steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
        rows = [row for step in steps for row in batches(step)]
        assert sorted(int(row[0]) for row in rows) == list(range(5, 46))
    fresh = pt.Batches(pieces, 4, seed=3)
    assert np.array_equal(fresh(12), batches(12))
    assert not np.array_equal(pt.Batches(pieces, 4, seed=4)(12), batches(12))


def test_corruption_has_the_stated_shares() -> None:
    config = dataclasses.replace(TINY, mask_fraction=0.2, vocab_size=8000)
    ids = np.random.default_rng(0).integers(5, 8000, (400, 100))
    ids[:, 0], ids[:, -1] = pt.CLS, pt.PAD
    changed, labels = pt.corrupt(ids, config, 1)
    chosen = labels != -100
    assert not chosen[:, [0, -1]].any()
    assert abs(chosen[:, 1:-1].mean() - 0.2) < 0.01
    assert np.array_equal(labels[chosen], ids[chosen])
    assert np.array_equal(changed[~chosen], ids[~chosen])
    kinds = Counter()
    for new, old in zip(changed[chosen], ids[chosen], strict=True):
        kinds["mask" if new == pt.MASK else "kept" if new == old else "random"] += 1
    total = sum(kinds.values())
    assert abs(kinds["mask"] / total - 0.8) < 0.02
    assert abs(kinds["random"] / total - 0.1) < 0.02
    assert np.array_equal(changed, pt.corrupt(ids, config, 1)[0])
    assert not np.array_equal(changed, pt.corrupt(ids, config, 2)[0])


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_schedule_warms_up_stays_and_decays(steps: int) -> None:
    factors = [pt.schedule(step, steps) for step in range(steps)]
    assert all(0 < f <= 1 for f in factors)
    assert max(factors) == 1.0
    if steps == 1000:
        assert factors[29] == 0.5
        assert factors[60] == factors[699] == 1.0
        assert factors[850] == 0.5
        assert factors[-1] == pytest.approx(1 / 300)


def test_the_loss_over_chosen_positions_is_the_stock_model_s_loss() -> None:
    from transformers import ModernBertForMaskedLM

    torch.manual_seed(0)
    model = ModernBertForMaskedLM(pt.model_config(TINY)).eval()
    ids = np.random.default_rng(1).integers(5, 120, (3, 12))
    ids[0, 9:] = pt.PAD
    corrupted, labels = pt.corrupt(ids, TINY, 0)
    ours, _ = pt.masked_loss(model, model.model, corrupted, labels)
    stock = model(
        input_ids=torch.from_numpy(corrupted),
        attention_mask=torch.from_numpy(ids != pt.PAD).long(),
        labels=torch.from_numpy(labels),
    ).loss
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tiny_corpus, tmp_path) -> None:
    quiet = {"log": lambda line: None, "eval_every": 4, "save_every": 3}
    whole = pt.pretrain(TINY, tmp_path / "whole", **quiet)
    half = pt.pretrain(TINY, tmp_path / "parts", stop_after=5, **quiet)
    assert not half["finished"]
    assert half["steps_done"] == 5
    parts = pt.pretrain(TINY, tmp_path / "parts", **quiet)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert whole["finished"]
    assert parts["finished"]
    last, other = whole["history"][-1], parts["history"][-1]
    assert (last["step"], last["dev_loss"]) == (8, other["dev_loss"])
    # other steps: allowed before the decay, refused after it; anything else always refused
    with pytest.raises(UsageError, match="step 8 of 8, too late to make the run 100 steps long"):
        pt.pretrain(dataclasses.replace(TINY, steps=100), tmp_path / "whole", **quiet)
    with pytest.raises(UsageError, match="another learning_rate"):
        pt.pretrain(dataclasses.replace(TINY, learning_rate=1.0), tmp_path / "whole", **quiet)


def test_a_run_can_be_made_longer_before_its_decay(tiny_corpus, tmp_path) -> None:
    quiet = {"log": lambda line: None, "eval_every": 100, "save_every": 100}
    pt.pretrain(TINY, tmp_path, stop_after=2, **quiet)
    longer = pt.pretrain(dataclasses.replace(TINY, steps=12), tmp_path, **quiet)
    assert longer["steps_done"] == 12


def test_training_learns_the_text(tiny_corpus, tmp_path) -> None:
    config = dataclasses.replace(TINY, steps=60, batch_size=16, learning_rate=3e-3)
    record = pt.pretrain(config, tmp_path, log=lambda line: None, eval_every=30, save_every=1000)
    losses = [entry["dev_loss"] for entry in record["history"]]
    # 16 words and their endings: far below the ln(120) = 4.8 of a guess
    assert losses[-1] < 3.6
    saved = json.loads((tmp_path / "pretrain.json").read_text())
    assert saved == record
    assert str(tmp_path) not in json.dumps(saved)


def test_bad_steps_are_refused_by_the_command_line(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as raised:
        pt.main(["--out", str(tmp_path), "--steps", "0"])
    assert raised.value.code == 2
    assert "--steps 0: at least 1 is needed" in capsys.readouterr().err
