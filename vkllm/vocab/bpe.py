"""Byte pair encoding, run by the `tokenizers` library: byte-level ("gpt2" vocabularies), and over lines of text ("gemma4")."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property

import tokenizers
from tokenizers import models, pre_tokenizers

from vkllm.errors import ConfigError
from vkllm.vocab.metadata import AGAIN
from vkllm.vocab.scan import encode_words
from vkllm.vocab.splits import PreTokenizer
from vkllm.vocab.spm import SPACE

CHUNK_CHARS = 1 << 15
SCANS = 8  # texts that are encoded without the library's model, which takes as long to make as some 20 of them
SCAN_CHARS = 400
LARGE = 20_000  # merges; with fewer the model is made at once
_SAFE_CUT = re.compile(r"\S\n(?=[A-Za-z\u4e00-\u9fa5])|[A-Za-z](?= [A-Za-z])")


def chunks(text: str, size: int = CHUNK_CHARS) -> Iterator[str]:
    """Cut long text where every expression of PRE_TOKENIZERS ends a word, whatever stands around: it saves memory and time.

    Such places are between a lone newline and a letter, and between an ASCII letter and a space before another one.
    """
    start = 0
    while len(text) - start > size and (cut := _SAFE_CUT.search(text, start + size)):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


class ByteLevel:
    """Byte-level BPE: every byte is a character of GPT-2's alphabet, words are merged one by one."""

    def __init__(self, tokens: Sequence[str], merges: Sequence[str], pre: PreTokenizer) -> None:
        """`tokens`: by id."""
        self._tokens, self._merges, self._ignore_merges = tokens, merges, pre.ignore_merges
        cuts = [pre_tokenizers.Split(tokenizers.Regex(s), "isolated") for s in pre.splits]
        self._words = pre_tokenizers.Sequence(
            [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)]
        )
        self._scans = SCANS if len(merges) >= LARGE else 0

    def encode(self, text: str) -> list[int]:
        """The ids of a text without special tokens. The library's model is made when several texts, or a long one, ask for it."""
        if self._scans > 0 and len(text) <= SCAN_CHARS:
            self._scans -= 1
            words = [word for word, _ in self._words.pre_tokenize_str(text)]
            scanned = encode_words(words, self._tokens, self._merges, ignore_merges=self._ignore_merges)
            if scanned is not None:
                return scanned
        ids: list[int] = []
        for chunk in chunks(text):
            ids += self._library.encode(chunk, add_special_tokens=False).ids
        return ids

    @cached_property
    def _library(self) -> tokenizers.Tokenizer:
        self._scans = 0
        vocab = {text: i for i, text in enumerate(self._tokens)}
        library = tokenizers.Tokenizer(_bpe(vocab, self._merges, ignore_merges=self._ignore_merges))
        library.pre_tokenizer = self._words
        return library


class Lines:
    """Gemma 4's BPE: spaces are U+2581, lines merge whole, newlines that form a token are that token, the rest is bytes."""

    _PIECE = re.compile(r"[^\n]+|\n+")

    def __init__(self, vocab: dict[str, int], merges: Sequence[str]) -> None:
        self._vocab = vocab
        self._backend = tokenizers.Tokenizer(_bpe(vocab, merges, byte_fallback=True))

    def encode(self, text: str) -> list[int]:
        """The ids of a text without special tokens."""
        ids: list[int] = []
        for piece in self._PIECE.findall(text.replace(" ", SPACE)):
            newlines = self._vocab.get(piece) if piece[0] == "\n" else None
            ids += self._backend.encode(piece, add_special_tokens=False).ids if newlines is None else [newlines]
        return ids


def _bpe(vocab: dict[str, int], merges: Sequence[str], **options: bool) -> models.BPE:
    """The library's model. Of equal merges the first counts; the space between the two parts is never the first character."""
    try:
        pairs = [_halves(merge) for merge in dict.fromkeys(merges)]
        return models.BPE(vocab=vocab, merges=pairs, **options)
    except Exception as e:  # the library raises bare Exception, TypeError or UnicodeEncodeError
        raise ConfigError(f"tokenizer.ggml.merges does not fit the vocabulary: {e}", hint=AGAIN) from e


def _halves(merge: str) -> tuple[str, str]:
    cut = merge.index(" ", 1)
    return merge[:cut], merge[cut + 1 :]


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 as itself, the others from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return {chr(b): bytes([b]) for b in printable} | {chr(0x100 + i): bytes([b]) for i, b in enumerate(others)}


BYTE_OF = _byte_alphabet()
