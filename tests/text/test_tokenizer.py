"""Tokenizers: small vocabularies made here, and the real ones of ../shared where they are."""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from vkllm.errors import ConfigError, RequestError, UnsupportedModelError
from vkllm.files import GGUFFile
from vkllm.tokenizer import Tokenizer
from vkllm.vocab.bpe import BYTE_OF
from vkllm.vocab.special import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from vkllm.vocab.splits import PRE_TOKENIZERS

VOCABULARIES = ("llama-spm", "phi-3", "llama-bpe", "qwen2", "gpt-2")
SEPARATOR = "\n__ggml_vocab_test__\n"

# Scores with ties and tokens that can be split in several ways, so that the order of merges matters.
WORDS = {
    "ab": -3,
    "ba": -3,
    "aa": -5,
    "aaa": -4,
    "aab": -4,
    "▁a": -2,
    "▁▁": -6,
    "▁ab": -1,
    "bab": -2,
    "é!": -2,
    "▁a▁": -7,
    "cd": -1,
}


def spm_metadata(**changes: Any) -> dict[str, object]:
    """An SPM vocabulary: controls, bytes, a user-defined token, words and characters. "c" and "d" are only in "cd"."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "[user]", *WORDS, *"▁abé!"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, USER_DEFINED, *[NORMAL] * (len(WORDS) + 5)]
    scores = [0.0] * 260 + [float(s) for s in WORDS.values()] + [-10.0] * 5
    base: dict[str, object] = {
        "model": "llama",
        "tokens": tokens,
        "token_type": np.array(types, np.int32),
        "scores": np.array(scores, np.float32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in (base | changes).items() if v is not None}


@cache
def trained_bpe() -> tuple[list[str], list[str]]:
    """Tokens and merges of a small byte-level BPE."""
    import json

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(BYTE_OF), show_progress=False)
    tokenizer.train_from_iterator(
        ["the cat sat on the mat, then it slept 123 times", "don't you think é is nice? 日本語 日本"] * 5, trainer
    )
    model = json.loads(tokenizer.to_str())["model"]
    return list(model["vocab"]), [" ".join(m) for m in model["merges"]]


def bpe_metadata(pre: str | None = "qwen2", **changes: Any) -> dict[str, object]:
    """Byte-level BPE with two control tokens at the end."""
    tokens, merges = trained_bpe()
    n = len(tokens)
    base: dict[str, object] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, "<|im_start|>", "<|im_end|>"],
        "token_type": np.array([NORMAL] * n + [CONTROL] * 2, np.int32),
        "merges": merges,
        "bos_token_id": n,
        "eos_token_id": n + 1,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in (base | changes).items() if v is not None}


@cache
def spm() -> Tokenizer:
    return Tokenizer.from_gguf(spm_metadata())


@cache
def bpe(pre: str = "qwen2") -> Tokenizer:
    return Tokenizer.from_gguf(bpe_metadata(pre))


def anything() -> st.SearchStrategy[str]:
    """Text that the small vocabularies have merges for, mixed with any Unicode."""
    return st.one_of(st.text("ab é!cd\n", max_size=30), st.text(max_size=20), st.text("the cat's 12日本\r\n", max_size=30))


def naive_merges(text: str) -> list[str]:
    """SentencePiece's rule, word for word: while neighbours form a token, merge the best scored pair, the leftmost of equals."""
    tokens = spm_metadata()["tokenizer.ggml.tokens"]
    scores = spm_metadata()["tokenizer.ggml.scores"]
    score = dict(zip(tokens, scores.tolist(), strict=True))  # type: ignore[call-overload,attr-defined]
    parts = list(text.replace(" ", "▁"))
    while True:
        pairs = [(-score[parts[i] + parts[i + 1]], i) for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in score]
        if not pairs:
            return parts
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@given(text=st.text("ab é!cdx", max_size=24))
@settings(max_examples=500, deadline=None)
def test_spm_merges_as_sentencepiece(text: str) -> None:
    t = spm()
    expected = []
    for part in naive_merges(" " + text) if text else []:
        expected += [t._tokens.index(part)] if part in t._tokens else [3 + b for b in part.encode()]
    assert t.encode(text, add_special=False) == expected


@given(text=anything().filter(lambda s: "▁" not in s), special=st.booleans())
@settings(max_examples=300, deadline=None)
def test_round_trip(text: str, special: bool) -> None:
    for t in (spm(), bpe(), bpe("llama-bpe"), bpe("gpt-2"), bpe("default"), bpe("smollm")):
        assert t.decode(t.encode(text, add_special=special)) == text


@given(data=st.data(), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_streaming_equals_decoding_and_never_gives_half_a_character(data: st.DataObject, skip: bool) -> None:
    for t in (spm(), bpe()):
        ids = data.draw(st.lists(st.integers(0, t.n_vocab - 1), max_size=20))
        stream, text = t.stream(skip_special=skip), ""
        for n, i in enumerate(ids, 1):
            text += stream.push(i)
            assert t.decode(ids[:n], skip_special=skip).startswith(text)
        assert text + stream.finish() == t.decode(ids, skip_special=skip)


@given(text=st.text("aé日🦙😶‍🌫️", max_size=12))
@settings(deadline=None)
def test_streaming_valid_text_has_no_replacement(text: str) -> None:
    for t in (spm(), bpe()):
        stream = t.stream()
        pieces = [stream.push(i) for i in t.encode(text)]
        assert "\ufffd" not in "".join(pieces) and "".join(pieces) == text and stream.finish() == ""


def test_half_a_character_at_the_end_is_shown_by_finish() -> None:
    stream = spm().stream()
    first, second = (3 + b for b in "é".encode())
    assert stream.push(first) == ""
    assert stream.finish() == "\ufffd"
    assert [stream.push(first), stream.push(second)] == ["", "é"]


def test_spm_leading_space() -> None:
    t = spm()
    ids = t.encode("ab ab")
    assert ids[0] == 1 and t.decode(ids) == "ab ab" and t.decode(ids[1:]) == "ab ab"
    assert t.token_bytes(ids[1]) == b" ab"
    # What continues a prompt keeps its space; after a special token there is none to keep.
    assert t.stream(ids[:2]).push(ids[2]) == " ab"
    assert t.stream(ids[:1]).push(ids[1]) == "ab"
    assert Tokenizer.from_gguf(spm_metadata(add_space_prefix=False)).decode([ids[1]]) == " ab"


def test_special_tokens() -> None:
    t, ab = spm(), spm().encode("ab", add_special=False)
    user = t._tokens.index("[user]")
    assert t.encode("ab[user]ab", add_special=False) == [*ab, user, *ab]
    assert t.encode("[user][user]", add_special=False) == [user, user]
    assert 2 not in t.encode("ab</s>")
    assert t.encode("ab</s>", parse_special=True) == [1, *ab, 2]
    assert t.decode([1, *ab, 2]) == "ab" and t.decode([1, *ab, 2], skip_special=False) == "<s>ab</s>"
    assert t.decode([*ab, user, *ab]) == "ab[user]ab"


def test_the_longest_special_token_wins() -> None:
    tokens, _ = trained_bpe()
    n = len(tokens)
    more = [*tokens, "<|im|>", "<|im|><|x|>", "<|x|>"]
    t = Tokenizer.from_gguf(bpe_metadata(tokens=more, token_type=np.array([NORMAL] * n + [CONTROL] * 3), eos_token_id=n))
    assert t.encode("<|im|><|x|><|im|>", parse_special=True) == [n + 1, n]


def test_begin_and_end_tokens() -> None:
    assert spm().encode("")[:1] == [1] and spm().add_bos and not spm().add_eos
    both = Tokenizer.from_gguf(spm_metadata(add_bos_token=False, add_eos_token=True))
    assert both.encode("") == [2]
    assert not bpe().add_bos and not bpe("gpt-2").add_bos and bpe("llama-bpe").add_bos
    assert (bpe().bos_token, bpe().eos_token) == ("<|im_start|>", "<|im_end|>")


def test_end_ids_are_found_by_name_too() -> None:
    n = bpe().n_vocab
    assert Tokenizer.from_gguf(bpe_metadata(eos_token_id=5, eot_token_id=7)).eos_ids == {5, 7, n - 1}
    assert Tokenizer.from_gguf(bpe_metadata(eos_token_id=None, bos_token_id=None)).eos_ids == {n - 1}


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("qwen2", "a 1234 don't", ["a", " ", "1", "2", "3", "4", " don", "'t"]),
        ("llama-bpe", "a 1234 don't", ["a", " ", "123", "4", " don", "'t"]),
        ("gpt-2", "a 1234 don't", ["a", " 1234", " don", "'t"]),
        ("smollm", "a 1234", ["a", " ", "1", "2", "3", "4"]),
        ("default", "a 12345", ["a", " ", "123", "45"]),
        ("qwen2", "x\n\n  y", ["x", "\n\n", " ", " y"]),
        ("gpt-2", "x\n\n  y", ["x", "\n\n ", " y"]),
    ],
)
def test_pre_tokenizers(pre: str, text: str, words: list[str]) -> None:
    """No token spans two words: with a vocabulary that holds every piece, the pieces are the words."""
    cuts = [pre_tokenizers.Split(tokenizers.Regex(s), "isolated") for s in PRE_TOKENIZERS[pre].splits]
    assert [w for w, _ in pre_tokenizers.Sequence(cuts).pre_tokenize_str(text)] == words


def test_lone_surrogates_become_replacement_characters() -> None:
    for t in (spm(), bpe()):
        assert t.decode(t.encode("a\ud83d")) == "a\ufffd"
        assert t.decode(t.encode("\ud83e\udd99")) == "🦙"


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({}, ConfigError, "tokenizer.ggml.model"),
        (spm_metadata(model="t5"), UnsupportedModelError, "t5"),
        (bpe_metadata("kimi-k2"), UnsupportedModelError, "kimi-k2"),
        (spm_metadata(tokens=None), ConfigError, "tokenizer.ggml.tokens"),
        (spm_metadata(tokens="abc"), ConfigError, "tokenizer.ggml.tokens"),
        (spm_metadata(token_type=np.zeros(3, np.int32)), ConfigError, "token_type"),
        (spm_metadata(bos_token_id=100_000), ConfigError, "bos_token_id"),
        (spm_metadata(add_bos_token=1), ConfigError, "add_bos_token"),
        (spm_metadata(scores=None), ConfigError, "scores"),
        (bpe_metadata(merges=None), ConfigError, "merges"),
        (bpe_metadata(merges=["nospace"]), ConfigError, "merges"),
        (bpe_metadata(merges=["not there"]), ConfigError, "merges"),
        (bpe_metadata(merges=["\udcff x"]), ConfigError, "merges"),
    ],
)
def test_bad_metadata_is_a_typed_error(metadata: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Tokenizer.from_gguf(metadata).encode("a")


def test_ids_outside_the_vocabulary_are_refused() -> None:
    for bad in (-1, spm().n_vocab):
        with pytest.raises(RequestError, match=str(bad)):
            spm().decode([bad])


@pytest.mark.parametrize("text", ["a" * 100_000, " " * 100_000, "the cat sat. " * 8_000, "日" * 100_000])
def test_long_prompts_do_not_hang(text: str) -> None:
    started = time.perf_counter()
    for t in (spm(), bpe()):
        assert t.decode(t.encode(text)) == text
    assert time.perf_counter() - started < 20


def check_vocabulary(path: Path) -> None:
    """Every line of llama.cpp's own test of a vocabulary."""
    with GGUFFile.open(path) as file:
        t = Tokenizer.from_gguf(file.metadata)
    texts = Path(f"{path}.inp").read_bytes().decode().split(SEPARATOR)
    lines = Path(f"{path}.out").read_text().split("\n")
    if lines[len(texts) :] == [""]:  # Gemma 4's file ends with a newline
        lines.pop()
    for text, line in zip(texts, lines, strict=True):
        ids = [int(i) for i in line.split()]
        assert t.encode(text, add_special=False) == ids
        stream = t.stream()
        assert t.decode(ids) == text == "".join([stream.push(i) for i in ids]) + stream.finish()


@pytest.mark.parametrize("name", VOCABULARIES)
def test_real_vocabularies(shared_data: Path, name: str, figure: Any) -> None:
    check_vocabulary(shared_data / "vocab" / f"ggml-vocab-{name}.gguf")
    figure(name, "ids from llama.cpp (../shared/data/vocab)", "texts with another id, or not decoded back", 0, 0)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_random_unicode_through_real_vocabularies(shared_data: Path, name: str) -> None:
    with GGUFFile.open(shared_data / "vocab" / f"ggml-vocab-{name}.gguf") as file:
        t = Tokenizer.from_gguf(file.metadata)

    @given(text=st.one_of(st.text(max_size=40), anything()), special=st.booleans())
    @settings(max_examples=100, deadline=None)
    def check(text: str, special: bool) -> None:
        ids = t.encode(text, add_special=special)
        stream = t.stream()
        pieces = [stream.push(i) for i in ids]
        expected = text.replace("▁", " ") if t.model == "llama" else text  # SPM cannot tell them apart
        assert t.decode(ids) == "".join(pieces) + stream.finish() == expected

    check()


def test_more_real_vocabularies() -> None:
    """All byte-level and SPM vocabularies of a llama.cpp checkout: `models`, where the variable tells."""
    folder = os.environ.get("LLAMA_CPP_MODELS")
    if not folder:
        pytest.skip("LLAMA_CPP_MODELS is not set to the folder `models` of a llama.cpp checkout")
    paths = [p for p in sorted(Path(folder).glob("ggml-vocab-*.gguf")) if Path(f"{p}.inp").exists() and "bert" not in p.name]
    assert len(paths) >= len(VOCABULARIES)
    for path in paths:
        check_vocabulary(path)


def test_stories(shared_data: Path) -> None:
    with GGUFFile.open(shared_data / "stories260K" / "stories260K-q8_0.gguf") as file:
        t = Tokenizer.from_gguf(file.metadata)
    for text in ("Once upon a time", '"Mom, can I', "Zebra ünïcode 🦙\n"):
        ids = t.encode(text)
        assert ids[0] == t.bos_id == 1 and t.decode(ids) == text
    assert t.eos_ids == {2}
