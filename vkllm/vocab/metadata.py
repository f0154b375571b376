"""Typed look-ups in a file's metadata under `tokenizer.ggml`; every refusal names the key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vkllm.errors import ConfigError
from vkllm.vocab.strings import Strings

AGAIN = "convert the model again"


class VocabMetadata:
    """The tokenizer's keys, checked when they are asked for."""

    def __init__(self, pairs: Mapping[str, object]) -> None:
        self.pairs = pairs

    def get(self, name: str) -> object:
        """The value of tokenizer.ggml.`name`, or None."""
        return self.pairs.get(f"tokenizer.ggml.{name}")

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = default if self.get(name) is None else self.get(name)
        if value is None:
            raise missing(name)
        if not isinstance(value, str):
            raise ConfigError(f"tokenizer.ggml.{name} is {value!r}; expected a string", hint=AGAIN)
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, bool):
            raise ConfigError(f"tokenizer.ggml.{name} is {value!r}; expected a boolean", hint=AGAIN)
        return value

    def strings(self, name: str) -> Sequence[str]:
        """An array of strings."""
        value = self.get(name)
        if value is None:
            raise missing(name)
        if isinstance(value, Strings):
            return value
        if not isinstance(value, list) or set(map(type, value)) - {str}:
            raise ConfigError(f"tokenizer.ggml.{name} must be an array of strings", hint=AGAIN)
        return value

    def numbers(self, name: str, n_vocab: int) -> list[Any]:
        """A numeric array with one value a token."""
        value = self.get(name)
        if value is None:
            raise missing(name)
        array = np.asarray(value)
        if array.shape != (n_vocab,) or array.dtype.kind not in "iuf":
            raise ConfigError(f"tokenizer.ggml.{name} must hold {n_vocab} numbers, one a token", hint=AGAIN)
        numbers: list[Any] = array.tolist()
        return numbers

    def token_id(self, name: str, n_vocab: int, default: int | None = None) -> int | None:
        """A token id, or None where the file has none. A default outside the vocabulary counts as none."""
        value = self.get(f"{name}_token_id")
        if value is None:
            return default if default is not None and default < n_vocab else None
        if not isinstance(value, int) or not 0 <= value < n_vocab:
            raise ConfigError(f"tokenizer.ggml.{name}_token_id is {value!r}; the vocabulary has {n_vocab}", hint=AGAIN)
        return value


def missing(name: str) -> ConfigError:
    """The error for a key that is not there."""
    return ConfigError(f"the metadata lacks tokenizer.ggml.{name}", hint=f"the file holds no vocabulary: {AGAIN}")
