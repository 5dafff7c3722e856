"""Philox4x32-10 in plain torch against the published vectors, and what dropout draws from it."""

import numpy as np
import pytest
import torch

from fastrank.kernels.common import dropout_keep, dropout_threshold, philox4x32, row_words

# known-answer vectors published with Random123: counter, key, words
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def as_seed(low: int, high: int) -> torch.Tensor:
    return torch.from_numpy(np.array([(high << 32) | low], dtype=np.uint64).view(np.int64))


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers(counter, key, words):
    drawn = philox4x32(tuple(torch.tensor([c]) for c in counter), as_seed(*key))
    assert tuple(int(w) for w in drawn) == words


def test_words_follow_the_documented_counter():
    """Word column & 3 of counter (column >> 2, 0, row low, row high)."""
    seed = as_seed(11, 2**31 + 5)
    rows = torch.tensor([0, 7, 2**32 + 3, 2**62])
    words = row_words(seed, rows, 10)
    for i, row in enumerate(rows.tolist()):
        for column in range(10):
            counter = (column >> 2, 0, row & 0xFFFFFFFF, row >> 32)
            block = philox4x32(tuple(torch.tensor([c]) for c in counter), seed)
            assert int(words[i, column]) == int(block[column & 3])


def test_a_draw_depends_on_seed_row_id_and_column_alone():
    seed = torch.tensor([-3])
    rows = torch.tensor([5, 900, 2**40, 6])
    words = row_words(seed, rows, 37)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(row_words(seed, rows[order], 37), words[order])
    assert torch.equal(row_words(seed, rows[:2], 9), words[:2, :9])
    assert not torch.equal(row_words(seed + 1, rows, 37), words)
    assert not torch.equal(row_words(seed + 2**32, rows, 37), words)
    assert words.unique().numel() == words.numel()


def test_words_are_uniform():
    words = row_words(torch.tensor([1]), torch.arange(400), 400).to(torch.float64) / 2**32
    assert words.min() >= 0.0
    assert words.max() < 1.0
    # 160000 draws: the mean of a uniform is within 5 standard errors, 5 * 0.2887 / 400
    assert abs(words.mean() - 0.5) < 0.0037
    assert (torch.histc(words, 16, 0, 1) / words.numel() - 1 / 16).abs().max() < 0.004


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_kept_share(p):
    keep = dropout_keep(torch.tensor([3]), 300, 300, p)
    tolerance = 5 * (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(keep.double().mean() - (1 - p)) <= tolerance
    assert torch.equal(
        keep, row_words(torch.tensor([3]), torch.arange(300), 300) >= dropout_threshold(p)
    )


def test_row_ids_default_to_the_index():
    seed = torch.tensor([9])
    assert torch.equal(
        dropout_keep(seed, 6, 5, 0.4), dropout_keep(seed, 6, 5, 0.4, torch.arange(6))
    )
