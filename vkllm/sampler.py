"""Choosing the next token from logits, and knowing when to stop. Pure numpy: no device, no tokenizer, no clock.

The order is llama.cpp's: logit bias · penalties · top-k · top-p · min-p · temperature · draw. So top-p and min-p judge the
model's own distribution, and temperature only flattens or sharpens what they leave. Equal logits rank by id, lowest first.
The draw inverts the cumulative distribution with one number from PCG64: same seed and logits, same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from vkllm.errors import NonFiniteError, RequestError

MAX_BIAS = 100.0
"""A bias of ±100 is absolute, as in OpenAI's API: a token with -100 is never drawn, and with +100 nothing else is."""

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to end. Unknown or impossible values raise RequestError.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 keep every token. `repetition_penalty` divides (positive) or
    multiplies (negative) the logits of the last `penalty_last_n` tokens of prompt and completion (-1: all of them), then
    `presence_penalty` and `frequency_penalty` times the count are subtracted. `max_tokens` None: up to the context's end.
    `stop`: texts to end before; `stop_ids`: more end tokens. `logprobs`: how many alternatives to report with
    each token (by the batch engine only).
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = 256
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0.0, 1e6)
        _check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 1e6, open_low=True)
        _check_range("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _check_range("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _check_int("top_k", self.top_k, 0)
        _check_int("penalty_last_n", self.penalty_last_n, -1)
        for name, least in (("seed", 0), ("max_tokens", 0), ("logprobs", 0)):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), least)
        if not isinstance(self.stop, tuple | list) or not all(isinstance(s, str) and s for s in self.stop):
            raise RequestError(f"stop is {self.stop!r}; expected a tuple of texts, none empty", hint="write stop=('text',)")
        if not isinstance(self.stop_ids, tuple | list | set | frozenset):
            raise RequestError(f"stop_ids is {self.stop_ids!r}; expected a tuple of token ids", hint="write stop_ids=(2,)")
        for token in self.stop_ids:
            _check_int("a token id of stop_ids", token, 0)
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias is {self.logit_bias!r}; expected {{token id: bias}}", hint="write logit_bias={2: -9}")
        for token, bias in self.logit_bias.items():
            _check_int("a token id of logit_bias", token, 0)
            _check_range(f"logit_bias of token {token}", bias, -MAX_BIAS, MAX_BIAS)
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias)))

    @property
    def has_penalty(self) -> bool:
        """Do earlier tokens change the logits?"""
        changed = self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        return changed and self.penalty_last_n != 0


def _check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not ok or (open_low and value == low):
        bound = "more than" if open_low else "at least"
        raise RequestError(f"{name} is {value!r}; expected {bound} {low:g} and at most {high:g}", hint=f"change {name}")


def _check_int(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RequestError(f"{name} is {value!r}; expected an integer, {least} or more", hint=f"change {name}")


class Sampler:
    """Draws the tokens of one sequence."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params

    @cached_property
    def _rng(self) -> np.random.Generator:
        """Made when it is first asked for: greedy sampling does without, and without importing numpy.random."""
        return np.random.Generator(np.random.PCG64(self.params.seed))

    @property
    def is_greedy(self) -> bool:
        """Is the token the argmax of the raw logits, so that the device may choose it?"""
        p = self.params
        return (p.temperature == 0 or p.top_k == 1) and not p.logit_bias and not p.has_penalty and not p.logprobs

    def sample(self, logits: Logits, history: Sequence[int] = ()) -> int:
        """The next token.

        Args: logits: f32 [n_vocab], unchanged. history: ids of the sequence so far, prompt included.
        Raises: NonFiniteError: a logit is NaN or infinite; RequestError: the logit bias names no token or bans all.
        """
        adjusted = self._adjusted(logits, history)
        if self.params.temperature == 0 or self.params.top_k == 1:
            return int(np.argmax(adjusted))
        ids, probabilities = self._distribution(adjusted)
        cumulative = np.cumsum(probabilities)
        drawn = int(np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right"))
        return int(ids[min(drawn, len(ids) - 1)])

    def distribution(self, logits: Logits, history: Sequence[int] = ()) -> tuple[Ids, NDArray[np.float64]]:
        """What `sample` draws from: ids [n_kept] and their probabilities [n_kept], which sum to 1."""
        adjusted = self._adjusted(logits, history)
        if self.params.temperature == 0 or self.params.top_k == 1:
            return np.array([np.argmax(adjusted)], np.int64), np.ones(1)
        return self._distribution(adjusted)

    def _distribution(self, logits: Logits) -> tuple[Ids, NDArray[np.float64]]:
        p = self.params
        ids = _top_k(logits, p.top_k)
        if p.top_p < 1:
            ids = _top_p(logits, ids, p.top_p)
        kept = logits[ids]
        best = kept.max()
        if p.min_p > 0:
            near = kept >= best + np.float32(math.log(p.min_p))
            ids, kept = ids[near], kept[near]
        with np.errstate(over="ignore"):  # a tiny temperature sends the others to -inf
            weights = np.exp((kept - best) / np.float32(max(p.temperature, 1e-30))).astype(np.float64)
        return ids, weights / weights.sum()

    def _adjusted(self, logits: Logits, history: Sequence[int]) -> Logits:
        """The logits after bias and penalties: a copy where they change anything."""
        if not np.isfinite(logits).all():
            bad = int(np.argmin(np.isfinite(logits)))
            raise NonFiniteError(f"logit {bad} is {logits[bad]}", hint="run `vkllm diff` to find the layer", layer="logits")
        p = self.params
        if p.logit_bias or p.has_penalty:
            logits = np.array(logits, np.float32)
            _apply_bias(logits, p.logit_bias)
            if p.has_penalty:
                _apply_penalties(logits, history if p.penalty_last_n < 0 else history[-p.penalty_last_n :], p)
        return logits


def _apply_bias(logits: Logits, bias: Mapping[int, float]) -> None:
    wrong = next((i for i in bias if i >= len(logits)), None)
    if wrong is not None:
        raise RequestError(f"logit_bias names token {wrong}; the vocabulary has {len(logits)}", hint="use this model's ids")
    forced = [i for i, b in bias.items() if b >= MAX_BIAS]
    if forced:
        values = logits[forced]
        logits[:] = -np.inf
        logits[forced] = values
    for i, b in bias.items():
        logits[i] = -np.inf if b <= -MAX_BIAS else logits[i] + np.float32(b)
    if not np.isfinite(logits).any():
        raise RequestError("logit_bias bans every token", hint="leave at least one token")


def _apply_penalties(logits: Logits, history: Sequence[int], p: SamplingParams) -> None:
    ids, counts = np.unique(np.asarray(history, np.int64), return_counts=True)
    inside = (ids >= 0) & (ids < len(logits))
    ids, counts = ids[inside], counts[inside]
    seen = logits[ids]
    seen = np.where(seen > 0, seen / np.float32(p.repetition_penalty), seen * np.float32(p.repetition_penalty))
    logits[ids] = seen - (counts * p.frequency_penalty + p.presence_penalty).astype(np.float32)


def _ranked(logits: Logits, ids: Ids) -> Ids:
    """`ids` (ascending) by falling logit; equal ones stay ascending."""
    ranked: Ids = ids[np.argsort(-logits[ids], kind="stable")]
    return ranked


def _top_k(logits: Logits, k: int) -> Ids:
    """The k best ids, in ascending order, -inf left out; all of them where k is 0. Linear time: one partition."""
    n = len(logits)
    if 0 < k < n:
        least = np.partition(logits, n - k)[n - k]
        if np.isfinite(least):
            above, equal = np.flatnonzero(logits > least), np.flatnonzero(logits == least)
            ids: Ids = np.sort(np.concatenate([above, equal[: k - len(above)]]))
            return ids
    return np.flatnonzero(logits > -np.inf)


def _top_p(logits: Logits, ids: Ids, p: float) -> Ids:
    """The fewest best of `ids` whose probabilities reach p. Ranks only as many as it must."""
    values = logits[ids]
    weights = np.exp(values - values.max())
    goal, k = p * float(weights.sum(dtype=np.float64)), 128
    while True:
        part = np.arange(len(ids)) if k >= len(ids) else _top_k(values, k)
        order = _ranked(values, part)
        reach = np.cumsum(weights[order], dtype=np.float64)
        if reach[-1] >= goal or len(order) == len(ids):
            return ids[order[: int(np.searchsorted(reach, goal)) + 1]]
        k *= 16


def log_probabilities(logits: Logits, token_id: int, n_top: int) -> tuple[float, list[tuple[int, float]]]:
    """Of the raw logits: the log probability of `token_id`, and the `n_top` likeliest (id, log probability), best first."""
    wide = logits.astype(np.float64)
    best = float(wide.max())
    total = best + math.log(float(np.exp(wide - best).sum()))
    top = _ranked(logits, _top_k(logits, n_top)) if n_top else np.empty(0, np.int64)
    return float(wide[token_id] - total), [(int(i), float(wide[i] - total)) for i in top]


class StopMatcher:
    """Ends a stream of text before the stop string that is complete first, and withholds what may be the start of one.

    Where two are complete at the same character, the longer one counts. The result does not depend on how the text was cut.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stop = tuple(stop)
        self.stopped = False
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Returns: the text that is now certain, and whether a stop string was found (later text is ignored)."""
        if self.stopped:
            return "", True
        self._held += text
        found = min(self._matches(), default=None)
        if found:
            emit, self._held, self.stopped = self._held[: found[1]], "", True
            return emit, True
        cut = len(self._held) - self._n_withheld()
        emit, self._held = self._held[:cut], self._held[cut:]
        return emit, False

    def finish(self) -> str:
        """The text that was withheld: no stop string came of it."""
        held, self._held = self._held, ""
        return held

    def _matches(self) -> Iterator[tuple[int, int]]:
        """(end, start) of the first occurrence of each stop string."""
        for stop in self.stop:
            start = self._held.find(stop)
            if start >= 0:
                yield start + len(stop), start

    def _n_withheld(self) -> int:
        """How many characters at the end begin a stop string."""
        longest = 0
        for stop in self.stop:
            for n in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:n]):
                    longest = n
                    break
        return longest
