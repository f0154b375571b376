"""Short texts without the library's model: the same ids as with it."""

from __future__ import annotations

import random

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from vkllm.vocab import bpe
from vkllm.vocab.bpe import ByteLevel
from vkllm.vocab.scan import encode_words
from vkllm.vocab.splits import PRE_TOKENIZERS

LETTERS = "abcd"


def vocabulary(seed: int, n_merge: int = 60) -> tuple[list[str], list[str]]:
    """Tokens and merges in which every merge makes a token, over four letters."""
    rng = random.Random(seed)
    tokens, merges = list(LETTERS), []
    for _ in range(n_merge):
        a, b = rng.choice(tokens), rng.choice(tokens)
        merges.append(f"{a} {b}")
        if a + b not in tokens:
            tokens.append(a + b)
    rng.shuffle(merges)
    merges += rng.sample(merges, n_merge // 2)  # again: these count for nothing
    return tokens, merges


def library(tokens: list[str], merges: list[str], ignore_merges: bool) -> tokenizers.Tokenizer:
    pairs = [tuple(merge.split(" ")) for merge in dict.fromkeys(merges)]
    vocab = {text: i for i, text in enumerate(tokens)}
    return tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=ignore_merges))


@given(seed=st.integers(0, 10_000), word=st.text(LETTERS, min_size=1, max_size=20), ignore_merges=st.booleans())
def test_a_word_is_merged_as_by_the_library(seed: int, word: str, ignore_merges: bool) -> None:
    tokens, merges = vocabulary(seed)
    expected = library(tokens, merges, ignore_merges).encode(word).ids
    assert encode_words([word], tokens, merges, ignore_merges=ignore_merges) == expected


def test_what_has_no_token_is_left_to_the_library() -> None:
    tokens, merges = vocabulary(1)
    assert encode_words(["abx"], tokens, merges, ignore_merges=False) is None
    assert encode_words(["ab"], list(LETTERS), ["a b"], ignore_merges=False) is None
    assert encode_words(["ab" * 200], tokens, merges, ignore_merges=False) is None


TEXTS = ("Hello, world!", "It's 1234 o'clock\n\n  indented\tüber 日本 🙂", " ", "", "a" * 300, "x = [i for i in range(10)]")


@pytest.mark.parametrize("pre", ["default", "qwen2", "llama-bpe"])
def test_a_text_has_the_same_ids_either_way(pre: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alphabet = list(bpe.BYTE_OF)
    rng = random.Random(pre)
    tokens, merges = list(alphabet), []
    for _ in range(3000):
        a, b = rng.choice([*tokens[-500:], *"helowrd"]), rng.choice([*alphabet, *"helowrd" * 9])
        merges.append(f"{a} {b}")
        tokens += [a + b] if a + b not in tokens else []
    plain = ByteLevel(tokens, merges, PRE_TOKENIZERS[pre])
    monkeypatch.setattr(bpe, "LARGE", 1)
    scanning = ByteLevel(tokens, merges, PRE_TOKENIZERS[pre])
    for text in TEXTS:
        assert scanning.encode(text) == plain.encode(text), text
    assert "_library" in vars(plain)


def test_the_library_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "LARGE", 1)
    tokens, merges = vocabulary(2)
    found = ByteLevel(tokens, merges, PRE_TOKENIZERS["default"])
    for _ in range(bpe.SCANS):
        found.encode("abcd")
    assert "_library" not in vars(found)
    assert found.encode("abcd") == library(tokens, merges, False).encode("abcd").ids
    assert "_library" in vars(found)
