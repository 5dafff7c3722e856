"""Shared pieces of the data tests."""

import pytest

from fastrank.data.harvest import Harvest, load_harvest


@pytest.fixture(scope="session")
def harvested() -> Harvest:
    """The embedded task: read from the user's cache, harvested once where there is none."""
    return load_harvest()


@pytest.fixture(scope="session")
def word_tokenizer():
    """A fast tokenizer with one token per word, <s> and </s>, no padding token, no template."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "#", ":", "\n", "<|", "|>", ".", "?"]
    words += ["user", "assistant", "system", "User", "Assistant", "System"]
    words += ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n|<\||\|>|[#:.?]"), "isolated"),
            pre_tokenizers.Split(" ", "removed"),
        ]
    )
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
