"""Reading values in the vocabulary is exact, by whatever way it is done."""

import pytest
import torch

from ffnprobe import vocabulary
from ffnprobe.vocabulary import read_values

WORDS, WIDTH = 9001, 24  # not a multiple of anything


@pytest.fixture(params=["narrow", "wide"])
def way(request, monkeypatch):
    monkeypatch.setattr(vocabulary, "_narrow_is_faster", lambda *_: request.param == "narrow")
    return request.param


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute(values, words, k):
    scores = values.double() @ words.double().T
    return scores.argsort(dim=1, descending=True)[:, :k], scores.argsort(dim=1)[:, :k]


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("k", [1, 20])
def test_the_reading_is_that_of_the_whole_product(way, k):
    values, words = drawn(70, WIDTH), drawn(WORDS, WIDTH, seed=1) * drawn(WORDS, 1, seed=2).exp()
    assert same(read_values(values, words, k), brute(values, words, k))


def test_words_that_bfloat16_cannot_tell_apart_are_told_apart(way):
    values, words = drawn(5, WIDTH), drawn(WORDS, WIDTH, seed=1)
    near = torch.arange(0, WORDS, 7)  # more of them than candidates, and all but equal
    words[near] = 3 * values[0] + 3e-2 * drawn(len(near), WIDTH, seed=2)
    assert same(read_values(values, words, 20), brute(values, words, 20))
    assert torch.isin(read_values(values, words, 20)[0][0], near).all()


def test_chunks_change_nothing(way):
    values, words = drawn(9, WIDTH), drawn(WORDS, WIDTH, seed=1)
    assert same(read_values(values, words, 3, held=1), read_values(values, words, 3))


def test_a_small_vocabulary_is_read_whole():
    values, words = drawn(9, WIDTH), drawn(30, WIDTH, seed=1)
    assert same(read_values(values, words, 30), brute(values, words, 30))


def test_more_words_than_there_are_cannot_be_read():
    with pytest.raises(ValueError, match="cannot read 31 tokens of a vocabulary of 30"):
        read_values(drawn(2, WIDTH), drawn(30, WIDTH), 31)
