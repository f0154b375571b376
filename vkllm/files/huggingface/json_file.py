"""JSON from model folders: bounded, no key twice, and typed look-ups whose refusals name file and key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vkllm.errors import ConfigError, FileFormatError

MAX_BYTES = 256 << 20  # the largest tokenizer.json in use has 35 MB
_DAMAGED = "the file is damaged: download it again"


def parse(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises: FileFormatError: no JSON, no object, a key twice, or nested too deeply."""
    try:
        found = json.loads(data, object_pairs_hook=_unique)
    except _TwiceError as e:
        raise FileFormatError(f"{what} holds {e.args[0]!r} twice", hint=_DAMAGED) from None
    except RecursionError:
        raise FileFormatError(f"{what} is nested too deeply", hint=_DAMAGED) from None
    except ValueError as e:  # JSONDecodeError, UnicodeDecodeError, an integer of thousands of digits
        raise FileFormatError(f"{what} is not JSON: {str(e)[:120]}", hint=_DAMAGED) from None
    if not isinstance(found, dict):
        raise FileFormatError(f"{what} is a JSON {type(found).__name__}; expected an object", hint=_DAMAGED)
    return found


class _TwiceError(ValueError):
    """A key is there twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        raise _TwiceError(next(k for k, _ in pairs if k in seen or seen.add(k)))  # type: ignore[func-returns-value]
    return found


def read(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises: FileFormatError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FileFormatError(f"{path.name} has {path.stat().st_size} bytes; the limit is {MAX_BYTES}", hint=_DAMAGED)
        return parse(path.read_bytes(), path.name)
    except OSError as e:
        raise FileFormatError(f"cannot read {path.name}: {e.strerror}", hint="check the folder and its permissions") from e


class Fields:
    """Typed look-ups in a JSON object. A null is the same as no entry."""

    def __init__(self, pairs: Mapping[str, Any], where: str) -> None:
        self.pairs, self.where = pairs, where

    def has(self, key: str) -> bool:
        return self.pairs.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = (1 << 31) - 1) -> int:
        value = self._value(key, default)
        if type(value) is not int:
            raise self._wrong(key, "an integer")
        if not least <= value <= most:
            raise ConfigError(
                f"{self.where}: {key} is {str(value)[:40]}; expected {least} to {most}", hint="correct the folder's file"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if type(value) not in (int, float):
            raise self._wrong(key, "a number")
        if not 0 <= value < 1e30:  # no NaN either
            raise ConfigError(
                f"{self.where}: {key} is {str(value)[:40]}; expected a number, not negative", hint="correct the folder's file"
            )
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if not value:
            raise ConfigError(f"{self.where}: {key} is 0; expected a number above 0", hint="correct the folder's file")
        return value

    def numbers(self, key: str) -> list[float]:
        value = self._value(key, None)
        if not isinstance(value, list) or not all(type(v) in (int, float) and abs(v) < 1e30 for v in value):
            raise self._wrong(key, "a list of numbers")
        return [float(v) for v in value]

    def fields(self, key: str) -> Fields:
        """A nested object; empty where there is none."""
        value = self._value(key, {})
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return Fields(value, f"{self.where}: {key}")

    def items(self, key: str) -> list[Any]:
        """A list; empty where there is none."""
        value = self._value(key, [])
        if not isinstance(value, list):
            raise self._wrong(key, "a list")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.pairs.get(key)
        return default if value is None else value

    def _wrong(self, key: str, expected: str) -> ConfigError:
        value = self.pairs.get(key)
        if value is None:
            return ConfigError(f"{self.where} lacks {key}", hint="the folder is incomplete: download it again")
        return ConfigError(f"{self.where}: {key} is {str(value)[:60]!r}; expected {expected}", hint="correct the folder's file")
