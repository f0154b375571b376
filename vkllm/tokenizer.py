"""Text to token ids and back, from the vocabulary in a GGUF file.

Two kinds: byte-level BPE (tokenizer.ggml.model "gpt2"), run by the `tokenizers` library, and SentencePiece's score-ordered
merging ("llama"). The second is our own forty lines: merge lists derived from the scores, as `tokenizers` would need them,
order equal scores and the several splits of one token differently, and so do not always give the ids a model was trained on.

Special tokens follow llama.cpp: user-defined ones are always found in text, control tokens only with `parse_special`, the
longest token first. Building is lazy: a Tokenizer costs nothing until the first `encode`.
"""

from __future__ import annotations

import codecs
import heapq
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from vkllm.errors import ConfigError, RequestError, UnsupportedModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # SentencePiece's stand-in for a space

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MODERN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = (GPT2_SPLIT,)
_LLAMA3 = (MODERN_SPLIT % 3,)
_QWEN2 = (MODERN_SPLIT % 1,)
_DIGITS = (r"\p{N}", GPT2_SPLIT)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]")

PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": _DIGITS,
}
"""tokenizer.ggml.pre → regular expressions that cut text into words, each applied to the pieces of the one before."""

END_TEXTS = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<EOT>"}
)
"""Special tokens that end a turn in every model that has them, whether or not the file's metadata say so."""


CHUNK_CHARS = 1 << 15
_SAFE_CUT = re.compile(r"\S\n(?=\S)|[A-Za-z](?= [A-Za-z])")


def chunks(text: str, size: int = CHUNK_CHARS) -> Iterator[str]:
    """Cut long text where every expression of PRE_TOKENIZERS ends a word, whatever stands around: it saves memory and time.

    Such places are after a lone newline, and between an ASCII letter and a space before another one.
    """
    start = 0
    while len(text) - start > size and (cut := _SAFE_CUT.search(text, start + size)):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


class _Model(Protocol):
    """Merges plain text into ids."""

    def encode(self, text: str) -> list[int]: ...


class _ByteLevel:
    """Byte-level BPE: the `tokenizers` library with the file's merges."""

    def __init__(self, vocab: dict[str, int], merges: Sequence[str], splits: Sequence[str], *, ignore_merges: bool) -> None:
        try:
            pairs = [(left, right) for left, right in (m.split(" ", 1) for m in merges)]
            model = models.BPE(vocab=vocab, merges=pairs, ignore_merges=ignore_merges)
        except Exception as e:  # the library raises bare Exception, TypeError or UnicodeEncodeError
            raise ConfigError(f"tokenizer.ggml.merges does not fit the vocabulary: {e}", hint="convert the model again") from e
        backend = tokenizers.Tokenizer(model)
        cuts = [pre_tokenizers.Split(tokenizers.Regex(s), "isolated") for s in splits]
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)]
        )
        self._backend = backend

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for chunk in chunks(text):
            ids += self._backend.encode(chunk, add_special_tokens=False).ids
        return ids


class _SentencePiece:
    """SentencePiece BPE: of all neighbours that form a token, merge the one with the best score, leftmost first.

    Text is first cut wherever no token holds the two characters side by side: no merge can cross such a place, so the result
    is the same, words repeat and are remembered, and time grows linearly with the text.
    Source: https://github.com/google/sentencepiece (bpe_model.cc).
    """

    MAX_CACHED, MAX_CACHED_CHARS = 1 << 17, 48

    def __init__(self, vocab: dict[str, int], scores: Sequence[float], byte_ids: Sequence[int]) -> None:
        self._vocab, self._scores, self._byte_ids = vocab, scores, byte_ids
        self._inside = {pair for text in vocab for pair in pairwise(text)}
        self._cache: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        text = text.replace(" ", SPACE)
        ids: list[int] = []
        inside, start = self._inside, 0
        for i, pair in enumerate(pairwise(text), 1):
            if pair not in inside:
                ids += self._word(text[start:i])
                start = i
        ids += self._word(text[start:])
        return ids

    def _word(self, word: str) -> tuple[int, ...]:
        found = self._cache.get(word)
        if found is None:
            found = tuple(self._ids(self._merge(list(word))))
            if len(word) <= self.MAX_CACHED_CHARS:
                if len(self._cache) >= self.MAX_CACHED:
                    self._cache.clear()
                self._cache[word] = found
        return found

    def _ids(self, parts: Iterable[str]) -> Iterable[int]:
        for part in parts:
            token = self._vocab.get(part)
            if token is None:
                yield from (self._byte_ids[b] for b in part.encode())
            else:
                yield token

    def _merge(self, parts: list[str]) -> list[str]:
        """Merge single characters as far as scores lead. A linked list, and a heap of (-score, left, right, length)."""
        before, after = list(range(-1, len(parts) - 1)), [*range(1, len(parts)), -1]
        queue: list[tuple[float, int, int, int]] = []

        def consider(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                joined = parts[left] + parts[right]
                token = self._vocab.get(joined)
                if token is not None:
                    heapq.heappush(queue, (-self._scores[token], left, right, len(joined)))

        for right in range(1, len(parts)):
            consider(right - 1, right)
        while queue:
            _, left, right, length = heapq.heappop(queue)
            if not parts[left] or not parts[right] or len(parts[left]) + len(parts[right]) != length:
                continue  # one of the two has grown or gone since
            parts[left] += parts[right]
            parts[right] = ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            consider(before[left], left)
            consider(left, after[left])
        return [part for part in parts if part]


class StreamDecoder:
    """Decodes ids one by one. Never gives away half a character; the pieces join to what `Tokenizer.decode` gives."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, at_start: bool) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = at_start and tokenizer.add_space_prefix

    def push(self, token_id: int) -> str:
        """The text that is certain after `token_id`; empty while a character is incomplete."""
        return self._utf8.decode(self._piece(token_id))

    def finish(self) -> str:
        """What is left: U+FFFD where the last character never became complete."""
        return self._utf8.decode(b"", final=True)

    def _piece(self, token_id: int) -> bytes:
        piece = self._tokenizer.token_bytes(token_id)
        if self._tokenizer.is_special(token_id):
            self._drop_space = self._tokenizer.add_space_prefix
            return b"" if self._skip_special and self._tokenizer.is_control(token_id) else piece
        if piece and self._drop_space:  # encode put a space before this text
            self._drop_space = False
            return piece.removeprefix(b" ")
        return piece


class Tokenizer:
    """A model's tokenizer. Make one with `from_gguf`."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        self._meta = metadata
        self.model = self._text("model")
        if self.model not in ("llama", "gpt2"):
            raise UnsupportedModelError(f"tokenizer {self.model!r} is not supported", hint="supported: llama (SPM), gpt2 (BPE)")
        self.pre = self._text("pre", "default") if self.model == "gpt2" else ""
        if self.pre and self.pre not in PRE_TOKENIZERS:
            raise UnsupportedModelError(
                f"pre-tokenizer {self.pre!r} is not supported", hint=f"supported: {', '.join(PRE_TOKENIZERS)}"
            )
        self._tokens = self._strings("tokens")
        self.n_vocab = len(self._tokens)
        self._types = self._types_of_tokens()
        self.add_bos = self._flag("add_bos_token", self.model == "llama" or PRE_TOKENIZERS[self.pre] is _LLAMA3)
        self.add_eos = self._flag("add_eos_token", False)
        self.add_space_prefix = self.model == "llama" and self._flag("add_space_prefix", True)
        defaults = (1, 2) if self.model == "llama" else (None, None)
        self.bos_id = self._id("bos_token_id", defaults[0])
        self.eos_id = self._id("eos_token_id", defaults[1])
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """From the metadata of a GGUF file.

        Raises: UnsupportedModelError: a tokenizer or pre-tokenizer that we do not have; ConfigError: a missing or bad key.
        """
        return cls(metadata)

    @property
    def chat_template(self) -> str | None:
        """The Jinja2 template of a conversation, where the file has one."""
        template = self._meta.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    @property
    def bos_token(self) -> str:
        """Text of the token that begins a sequence, or ''."""
        return "" if self.bos_id is None else self._tokens[self.bos_id]

    @property
    def eos_token(self) -> str:
        """Text of the token that ends a sequence, or ''."""
        return "" if self.eos_id is None else self._tokens[self.eos_id]

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Ids after which generation ends: the file's end tokens, and the special tokens of END_TEXTS."""
        named = (self._id(f"{name}_token_id") for name in ("eot", "eom"))
        known = (i for i in self._special_ids if self._tokens[i] in END_TEXTS)
        return frozenset(i for i in (self.eos_id, *named, *known) if i is not None)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of `text`.

        Args: add_special: begin and end with BOS and EOS as the file asks. parse_special: find control tokens in the text,
        as in a rendered chat template; otherwise they are plain characters. Lone surrogates become U+FFFD.
        """
        ids = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        after_special = True
        for part in self._partition(_valid(text), parse_special):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._backend.encode(" " + part if after_special and self.add_space_prefix else part)
            after_special = isinstance(part, int)
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. `skip_special` leaves control tokens out."""
        stream = self.stream(skip_special=skip_special)
        return "".join([stream.push(i) for i in ids]) + stream.finish()

    def stream(self, prompt: Sequence[int] = (), *, skip_special: bool = True) -> StreamDecoder:
        """A decoder for ids that come one by one and continue `prompt` (SPM: keeps the space before the next word)."""
        return StreamDecoder(self, skip_special=skip_special, at_start=not prompt or self.is_special(prompt[-1]))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for. Raises: RequestError: no such id."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._make_bytes(self._checked(token_id))
        return found

    def is_control(self, token_id: int) -> bool:
        """Is it a control (or the unknown) token, which is no part of the text?"""
        return self._types[self._checked(token_id)] in (CONTROL, UNKNOWN)

    def is_special(self, token_id: int) -> bool:
        """Is it a control or a user-defined token?"""
        return self._types[self._checked(token_id)] in (CONTROL, UNKNOWN, USER_DEFINED)

    def _checked(self, token_id: int) -> int:
        if not 0 <= token_id < self.n_vocab:
            raise RequestError(f"token id {token_id} is outside the vocabulary of {self.n_vocab}", hint="use this model's ids")
        return token_id

    def _make_bytes(self, token_id: int) -> bytes:
        text, kind = self._tokens[token_id], self._types[token_id]
        if kind == BYTE and (value := _byte_value(text)) is not None:
            return bytes([value])
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            return text.encode("utf-8", "surrogateescape")
        if self.model == "llama":
            return text.replace(SPACE, " ").encode("utf-8", "surrogateescape")
        return b"".join(BYTE_OF.get(c) or c.encode("utf-8", "surrogateescape") for c in text)

    def _partition(self, text: str, parse_special: bool) -> list[str | int]:
        """Cut special tokens out of the text, the longest first."""
        parts: list[str | int] = [text] if text else []
        for special, token_id in self._specials:
            if special not in text or not (parse_special or self._types[token_id] == USER_DEFINED):
                continue
            cut: list[str | int] = []
            for part in parts:
                if isinstance(part, int):
                    cut.append(part)
                    continue
                first, *rest = part.split(special)
                cut += [first] if first else []
                for piece in rest:
                    cut += [token_id, piece] if piece else [token_id]
            parts = cut
        return parts

    @cached_property
    def _special_ids(self) -> list[int]:
        return [i for i, kind in enumerate(self._types) if kind in (CONTROL, UNKNOWN, USER_DEFINED)]

    @cached_property
    def _specials(self) -> list[tuple[str, int]]:
        """Special tokens, the longest (in bytes) first."""
        pairs = [(self._tokens[i], i) for i in self._special_ids if self._tokens[i]]
        return sorted(pairs, key=lambda p: -len(p[0].encode("utf-8", "surrogateescape")))

    @cached_property
    def _backend(self) -> _Model:
        vocab = {text: i for i, text in enumerate(self._tokens)}
        if self.model == "gpt2":
            splits = PRE_TOKENIZERS[self.pre]
            return _ByteLevel(vocab, self._strings("merges"), splits, ignore_merges=splits is _LLAMA3)
        scores = self._numbers("scores")
        unknown = self._id("unknown_token_id", 0)
        byte_ids = [vocab.get(f"<0x{b:02X}>", vocab.get(chr(b), unknown)) for b in range(256)]
        return _SentencePiece(vocab, scores, [0 if i is None else i for i in byte_ids])

    def _types_of_tokens(self) -> list[int]:
        if "tokenizer.ggml.token_type" not in self._meta:
            return [NORMAL] * self.n_vocab
        return [int(t) for t in self._numbers("token_type")]

    def _numbers(self, name: str) -> list[Any]:
        """A numeric array with one value a token."""
        value = self._meta.get(f"tokenizer.ggml.{name}")
        if value is None:
            raise _missing(name)
        array = np.asarray(value)
        if array.shape != (self.n_vocab,) or array.dtype.kind not in "iuf":
            raise ConfigError(
                f"tokenizer.ggml.{name} must hold {self.n_vocab} numbers, one a token", hint="convert the model again"
            )
        numbers: list[Any] = array.tolist()
        return numbers

    def _strings(self, name: str) -> list[str]:
        value = self._meta.get(f"tokenizer.ggml.{name}")
        if value is None:
            raise _missing(name)
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ConfigError(f"tokenizer.ggml.{name} must be an array of strings", hint="convert the model again")
        return value

    def _text(self, name: str, default: str | None = None) -> str:
        value = self._meta.get(f"tokenizer.ggml.{name}", default)
        if value is None:
            raise _missing(name)
        if not isinstance(value, str):
            raise ConfigError(f"tokenizer.ggml.{name} is {value!r}; expected a string", hint="convert the model again")
        return value

    def _flag(self, name: str, default: bool) -> bool:
        value = self._meta.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, bool):
            raise ConfigError(f"tokenizer.ggml.{name} is {value!r}; expected a boolean", hint="convert the model again")
        return value

    def _id(self, name: str, default: int | None = None) -> int | None:
        """A token id, or None where the file has none. A default outside the vocabulary counts as none."""
        value = self._meta.get(f"tokenizer.ggml.{name}")
        if value is None:
            return default if default is not None and default < self.n_vocab else None
        if not isinstance(value, int) or not 0 <= value < self.n_vocab:
            raise ConfigError(
                f"tokenizer.ggml.{name} is {value!r}; the vocabulary has {self.n_vocab}", hint="convert the model again"
            )
        return value


def _missing(name: str) -> ConfigError:
    return ConfigError(f"the metadata lacks tokenizer.ggml.{name}", hint="the file holds no vocabulary: convert the model again")


def _valid(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _byte_value(text: str) -> int | None:
    """The byte that a token like <0x0A> stands for."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            return None
    return None


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 as itself, the others from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return {chr(b): bytes([b]) for b in printable} | {chr(0x100 + i): bytes([b]) for i, b in enumerate(others)}


BYTE_OF = _byte_alphabet()
