"""Text to token ids and back, from the vocabulary in a model file's metadata. The parts are in vkllm/vocab.

Ids follow llama.cpp, and where its regular expressions only approximate a model's own, the model's own (docs/tokenizers.md).
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Protocol

from vkllm.errors import RequestError, UnsupportedModelError
from vkllm.vocab.bpe import BYTE_OF, ByteLevel, Lines
from vkllm.vocab.metadata import VocabMetadata
from vkllm.vocab.special import BYTE, CONTROL, SPECIAL, UNKNOWN, SpecialTokens
from vkllm.vocab.splits import PRE_TOKENIZERS
from vkllm.vocab.spm import SPACE, SentencePiece

KINDS = {"llama": "SPM", "gpt2": "BPE", "gemma4": "BPE"}
FORCE = "VKLLM_PRE_TOKENIZER"
"""The variable that names the pre-tokenizer to use, whatever the file says."""


class _Model(Protocol):
    """Merges plain text into ids."""

    def encode(self, text: str) -> list[int]: ...


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
    """A model's tokenizer. Make one with `from_gguf`. It costs little until the first `encode`."""

    def __init__(self, metadata: Mapping[str, object], pre_tokenizer: str | None = None) -> None:
        self._meta = VocabMetadata(metadata)
        self.model = self._meta.text("model")
        if self.model not in KINDS:
            known = ", ".join(f"{name} ({kind})" for name, kind in KINDS.items())
            raise UnsupportedModelError(f"tokenizer {self.model!r} is not supported", hint=f"supported: {known}")
        self.pre = self._pre_tokenizer(pre_tokenizer) if KINDS[self.model] == "BPE" else ""
        self._escapes_spaces = self.model == "llama" or self.pre == "gemma4"
        self._tokens = self._meta.strings("tokens")
        self.n_vocab = len(self._tokens)
        self._special = SpecialTokens(self._meta, self._tokens)
        self._types = self._special.types
        add_bos = self.model == "llama" or PRE_TOKENIZERS[self.pre].add_bos
        self.add_bos = self._meta.flag("add_bos_token", add_bos) or self.pre == "gemma4"  # its files are wrong, says llama.cpp
        self.add_eos = self._meta.flag("add_eos_token", False)
        self.add_space_prefix = self.model == "llama" and self._meta.flag("add_space_prefix", True)
        defaults = (1, 2) if self.model == "llama" else (None, None)
        self.bos_id = self._meta.token_id("bos", self.n_vocab, defaults[0])
        self.eos_id = self._meta.token_id("eos", self.n_vocab, defaults[1])
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], pre_tokenizer: str | None = None) -> Tokenizer:
        """From the metadata of a GGUF file. `pre_tokenizer`, or the variable VKLLM_PRE_TOKENIZER, overrules the file's.

        Raises: UnsupportedModelError: a tokenizer or pre-tokenizer that we do not have; ConfigError: a missing or bad key.
        """
        return cls(metadata, pre_tokenizer or os.environ.get(FORCE) or None)

    @property
    def chat_template(self) -> str | None:
        """The Jinja2 template of a conversation, where the file has one."""
        template = self._meta.pairs.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    @property
    def bos_token(self) -> str:
        """Text of the token that begins a sequence, or ''."""
        return "" if self.bos_id is None else self._tokens[self.bos_id]

    @property
    def eos_token(self) -> str:
        """Text of the token that ends a sequence, or ''."""
        return "" if self.eos_id is None else self._tokens[self.eos_id]

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids after which generation ends: the file's end tokens, and those that end a turn wherever they are."""
        return self._special.end_ids

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of `text`.

        Args: add_special: begin and end with BOS and EOS as the file asks. parse_special: find control tokens in the text,
        as in a rendered chat template; otherwise they are plain characters. Lone surrogates become U+FFFD.
        """
        ids = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        after_special = True
        for part in self._special.partition(_valid(text), parse_special):
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
        return self._types[self._checked(token_id)] in SPECIAL

    def _checked(self, token_id: int) -> int:
        if not 0 <= token_id < self.n_vocab:
            raise RequestError(f"token id {token_id} is outside the vocabulary of {self.n_vocab}", hint="use this model's ids")
        return token_id

    def _make_bytes(self, token_id: int) -> bytes:
        text, kind = self._tokens[token_id], self._types[token_id]
        if kind == BYTE and (value := _byte_value(text)) is not None:
            return bytes([value])
        if kind in SPECIAL:
            return text.encode("utf-8", "surrogateescape")
        if self._escapes_spaces:
            return text.replace(SPACE, " ").encode("utf-8", "surrogateescape")
        return b"".join(BYTE_OF.get(c) or c.encode("utf-8", "surrogateescape") for c in text)

    @cached_property
    def _backend(self) -> _Model:
        if self.pre and self.pre != "gemma4":
            return ByteLevel(self._tokens, self._meta.strings("merges"), PRE_TOKENIZERS[self.pre])
        vocab = {text: i for i, text in enumerate(self._tokens)}
        if self.pre == "gemma4":
            return Lines(vocab, self._meta.strings("merges"))
        unknown = self._meta.token_id("unknown", self.n_vocab, 0)
        byte_ids = [vocab.get(f"<0x{b:02X}>", vocab.get(chr(b), unknown)) for b in range(256)]
        return SentencePiece(vocab, self._meta.numbers("scores", self.n_vocab), [0 if i is None else i for i in byte_ids])

    def _pre_tokenizer(self, forced: str | None) -> str:
        """The name of a known pre-tokenizer: the forced one, or the file's. Files without one are old and say "default"."""
        default = "gemma4" if self.model == "gemma4" else "default"
        name = forced or (self._meta.text("pre", default) if self.model == "gpt2" else default)
        if name in PRE_TOKENIZERS:
            return name
        known = ", ".join(PRE_TOKENIZERS)
        if forced:
            raise UnsupportedModelError(f"{FORCE}: pre-tokenizer {name!r} is not known", hint=f"choose one of {known}")
        raise UnsupportedModelError(
            f"pre-tokenizer {name!r} is not supported",
            hint=f"supported: {known}. {FORCE}=NAME forces one, but a wrong one makes answers worse",
        )


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
