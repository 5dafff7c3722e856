"""Examples to tokens: truncation, where loss falls, padding."""

import logging

import numpy as np
import pytest
import torch

from fastrank.data import Dialogue, Split, collate, encode, prepare_tokenizer
from fastrank.errors import UsageError

TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def _talk(*turns: tuple[str, str]) -> Split:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Split([Dialogue(messages)], None, None)


def _learnt(encoded, tokenizer, row: int = 0) -> list[str]:
    chosen = encoded.labels[row] != -100
    assert np.array_equal(encoded.labels[row][chosen], encoded.input_ids[row][chosen])
    return tokenizer.convert_ids_to_tokens(encoded.labels[row][chosen].tolist())


def test_classification_truncates_and_keeps_labels(word_tokenizer) -> None:
    split = Split(["one two three four five", "one"], np.array([1, 0]), None)
    encoded = encode(split, word_tokenizer, "seq-cls", 4)
    assert word_tokenizer.convert_ids_to_tokens(encoded.input_ids[0].tolist()) == [
        *("<s>", "one", "two", "three")
    ]
    assert encoded.input_ids[0].dtype == np.int32
    assert encoded.lengths.tolist() == [4, 2]
    assert encoded.labels.tolist() == [1, 0]
    assert encoded.kept.tolist() == [0, 1]


def test_plain_text_is_learnt_whole_and_ended(word_tokenizer) -> None:
    split = Split(["one two", "one two three four five"], None, None)
    encoded = encode(split, word_tokenizer, "causal-lm", 5)
    assert _learnt(encoded, word_tokenizer) == ["<s>", "one", "two", "</s>"]
    assert _learnt(encoded, word_tokenizer, 1) == ["<s>", "one", "two", "three", "four"]


def test_plain_template_puts_loss_on_the_response_and_its_end(word_tokenizer) -> None:
    split = _talk(("user", "one two"), ("assistant", "three four"))
    encoded = encode(split, word_tokenizer, "causal-lm", 64)
    assert _learnt(encoded, word_tokenizer) == ["three", "four", "</s>"]
    tokens = word_tokenizer.convert_ids_to_tokens(encoded.input_ids[0].tolist())
    assert tokens[:7] == ["<s>", "#", "#", "#", "User", ":", "\n"]
    assert tokens.count("<s>") == 1


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_every_assistant_turn_is_learnt_and_nothing_else(word_tokenizer, template) -> None:
    turns = [
        ("system", "seven"),
        ("user", "one"),
        ("assistant", "two three"),
        ("user", "four"),
        ("assistant", "five"),
    ]
    word_tokenizer.chat_template = template
    try:
        encoded = encode(_talk(*turns), word_tokenizer, "causal-lm", 64)
        learnt = [t for t in _learnt(encoded, word_tokenizer) if t != "\n"]
        assert learnt == ["two", "three", "</s>", "five", "</s>"]
    finally:
        word_tokenizer.chat_template = None


def test_a_template_that_rewrites_earlier_turns_is_searched(word_tokenizer) -> None:
    # the last turn is rendered unlike the others, so no prefix is a prefix
    word_tokenizer.chat_template = (
        "<s>{% for m in messages %}{% if loop.last %}<|{{ m['role'] }}|>{% endif %}"
        "{{ m['content'] }}</s>\n{% endfor %}"
    )
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    try:
        encoded = encode(_talk(*turns), word_tokenizer, "causal-lm", 64)
        assert _learnt(encoded, word_tokenizer) == ["two", "</s>", "four", "</s>"]
    finally:
        word_tokenizer.chat_template = None


def test_a_template_that_refuses_gives_one_line(word_tokenizer) -> None:
    word_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        with pytest.raises(UsageError, match="refuses a dialogue: roles must alternate"):
            encode(_talk(("user", "a"), ("assistant", "b")), word_tokenizer, "causal-lm", 64)
    finally:
        word_tokenizer.chat_template = None


def test_a_truncated_response_is_left_out_and_counted(word_tokenizer, caplog) -> None:
    long = _talk(("user", "one " * 30), ("assistant", "two")).examples
    short = _talk(("user", "one"), ("assistant", "two")).examples
    with caplog.at_level(logging.WARNING, "fastrank"):
        encoded = encode(Split(long + short, None, None), word_tokenizer, "causal-lm", 20)
    assert encoded.kept.tolist() == [1]
    assert "1 of 2 examples left out" in caplog.text
    with pytest.raises(UsageError, match="raise max_length"):
        encode(Split(long, None, None), word_tokenizer, "causal-lm", 20)


@pytest.mark.parametrize(
    ("split", "task", "length", "message"),
    [
        (Split(["one"], None, None), "seq-cls", 8, "needs labels"),
        (Split(["one"], None, None), "seq2seq", 8, "unknown task 'seq2seq'"),
        (Split(["one"], None, None), "causal-lm", 3, "max_length is 3"),
    ],
)
def test_bad_arguments(word_tokenizer, split, task, length, message) -> None:
    with pytest.raises(UsageError, match=message):
        encode(split, word_tokenizer, task, length)


def test_collate_pads_on_the_right_to_the_longest(word_tokenizer) -> None:
    split = Split(["one two three", "one", "one two"], np.array([2, 0, 1]), None)
    encoded = encode(split, word_tokenizer, "seq-cls", 8)
    batch = collate(encoded, [1, 2], pad_token_id=2)
    assert batch["input_ids"].tolist() == [[1, 16, 2], [1, 16, 17]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [0, 1]
    assert {v.dtype for v in batch.values()} == {torch.int64}
    assert collate(encoded, [0], 2, pad_to_multiple_of=8)["input_ids"].shape == (1, 8)


def test_collate_gives_padding_no_loss(word_tokenizer) -> None:
    encoded = encode(Split(["one two three", "one"], None, None), word_tokenizer, "causal-lm", 8)
    labels = collate(encoded, [0, 1], pad_token_id=2, pad_to_multiple_of=4)["labels"]
    assert labels.shape == (2, 8)
    # the end token of the text counts although padding has the same id
    assert labels[1].tolist() == [1, 16, 2, -100, -100, -100, -100, -100]


def test_padding_token_falls_back_to_the_end_token(word_tokenizer) -> None:
    import copy

    tokenizer = copy.deepcopy(word_tokenizer)
    assert tokenizer.pad_token is None
    assert prepare_tokenizer(tokenizer) is tokenizer
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("</s>", "right")
    bare = copy.deepcopy(word_tokenizer)
    bare.eos_token = bare.unk_token = None
    with pytest.raises(UsageError, match="no padding, end-of-sequence or unknown token"):
        prepare_tokenizer(bare)
