"""LLMEngine: text in, text out. Loads a model once, then generates with it, one sequence at a time.

It joins the parts (file, tokenizer, chain, cache, sampler) and knows none of their insides.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vkllm.chain import ModelChain, Output, Rows, Span
from vkllm.config import ModelConfig, RuntimeConfig
from vkllm.errors import ContextTooLongError, RequestError
from vkllm.files import open_model
from vkllm.files.model_file import ModelFile
from vkllm.kv_cache import BlockPool, BlockTable
from vkllm.models import build_graph
from vkllm.sampler import Sampler, SamplingParams, StopMatcher
from vkllm.tokenizer import Tokenizer
from vkllm.vk import Device, open_device

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. `cached_tokens` of the prompt were still in the cache and not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one request; rates in tokens per second (0 where nothing ran)."""

    prompt_s: float
    decode_s: float
    ttft_s: float
    prompt_tok_s: float
    decode_tok_s: float


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What one request produced. `finish_reason`: "stop" (end token or stop string) or "length"."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """A piece of text as soon as it is final. The last event carries the result."""

    text: str
    result: GenerationResult | None = None


class LLMEngine:
    """A loaded model on a device. Make one with `init_model`; close it, or use it as a context manager."""

    def __init__(self, file: ModelFile, device: Device, runtime: RuntimeConfig) -> None:
        started = time.perf_counter()
        self.file, self.device, self.runtime = file, device, runtime
        self.config = ModelConfig.from_gguf(file)
        self.graph = build_graph(self.config, file.tensors)
        self.tokenizer = Tokenizer.from_gguf(file.metadata)
        self.chain = ModelChain(device, self.graph, file, runtime)
        self.n_ctx = self.chain.n_ctx
        self._pool = BlockPool(self.chain.n_block, runtime.block_size)
        self._table = BlockTable(runtime.block_size)
        self._cached: list[int] = []
        self._owner: Sampler | None = None  # of the generation whose sequence the cache holds
        self._lock = threading.RLock()  # one step at a time
        self._closed = False
        self.load_s = time.perf_counter() - started

    @classmethod
    def init_model(cls, model: str | Path, runtime: RuntimeConfig | None = None) -> LLMEngine:
        """Load a model: the path of a GGUF file or Hugging Face folder, or the name of a packaged one (`tiny`).

        Raises: FileFormatError, UnsupportedModelError, ConfigError: the file; DeviceError: no device, or too little memory.
        """
        runtime = runtime or RuntimeConfig()
        with ThreadPoolExecutor(1) as pool:  # drivers are loaded while the file is read
            opening = pool.submit(open_device, runtime.device)
            try:
                file = open_model(model)
            except BaseException:
                if opening.exception() is None:
                    opening.result().close()
                raise
        try:
            device = opening.result()
        except BaseException:
            file.close()
            raise
        try:
            return cls(file, device, runtime)
        except BaseException:
            device.close()
            file.close()
            raise

    def close(self) -> None:
        """Give the device and the file back. What is asked of the engine later raises RequestError."""
        with self._lock:
            self._closed = True
            self.chain.close()
            self.device.close()
            self.file.close()

    def __enter__(self) -> LLMEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> str:
        """The continuation of `prompt` (text, or token ids)."""
        return self.generate_result(prompt, params).text

    def generate_result(self, prompt: Prompt, params: SamplingParams | None = None) -> GenerationResult:
        """As `generate`, with token ids, finish reason, usage and timings."""
        result = None
        for event in self.stream(prompt, params):
            result = event.result
        assert result is not None
        return result

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamEvent]:
        """Generate, giving text away as soon as no stop string or half a character can change it.

        Streams may take turns, from one thread or several: each step then computes again what another one displaced from the
        cache. For speed with many sequences there is the batch engine, which also reports `logprobs`; this one does not.
        Raises: RequestError: an empty prompt or invalid sampling parameters; ContextTooLongError: it does not fit.
        """
        self._check_open()
        params = params or SamplingParams()
        if not isinstance(prompt, str | Sequence | np.ndarray) or isinstance(prompt, bytes):
            raise RequestError(f"the prompt is of type {type(prompt).__name__}", hint="give text, or a sequence of token ids")
        prompt_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self.check_prompt(prompt_ids)
        limit = self.n_ctx - len(prompt_ids)
        n_max = limit if params.max_tokens is None else min(params.max_tokens, limit)
        return self._run(prompt_ids, params, n_max)

    def _run(self, prompt_ids: list[int], params: SamplingParams, n_max: int) -> Iterator[StreamEvent]:
        sampler, decoder, stop = Sampler(params), self.tokenizer.stream(prompt_ids), StopMatcher(params.stop)
        ends = frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else self.tokenizer.eos_ids)
        started = time.perf_counter()
        ids: list[int] = []
        pieces: list[str] = []
        reason, first_token = "length", started
        token, cached = self._first_token(prompt_ids, sampler) if n_max else (-1, 0)
        while len(ids) < n_max:
            if not ids:
                first_token = time.perf_counter()
            if token in ends:
                reason = "stop"
                break
            ids.append(token)
            text, stopped = stop.push(decoder.push(token))
            if text:
                pieces.append(text)
                yield StreamEvent(text)
            if stopped:
                reason = "stop"
                break
            if len(ids) < n_max:
                token = self._next_token(token, sampler, prompt_ids, ids)
        ended = time.perf_counter()
        if not stop.stopped:
            text, _ = stop.push(decoder.finish())
            text += stop.finish()
            pieces.append(text)
        else:
            text = ""
        yield StreamEvent(text, self._result("".join(pieces), ids, reason, len(prompt_ids), cached, started, first_token, ended))

    @staticmethod
    def _result(
        text: str, ids: list[int], reason: str, n_prompt: int, cached: int, started: float, first_token: float, ended: float
    ) -> GenerationResult:
        prompt_s, decode_s, steps = first_token - started, ended - first_token, max(len(ids) - 1, 0)
        timings = Timings(
            prompt_s=prompt_s,
            decode_s=decode_s,
            ttft_s=prompt_s,
            prompt_tok_s=(n_prompt - cached) / prompt_s if prompt_s > 0 else 0.0,
            decode_tok_s=steps / decode_s if decode_s > 0 else 0.0,
        )
        return GenerationResult(text, tuple(ids), reason, Usage(n_prompt, len(ids), cached), timings)

    def prefill(self, token_ids: Sequence[int]) -> int:
        """Put a prompt into the cache, which keeps what it already holds of it, and return the greedy token after it.

        Raises: RequestError, ContextTooLongError.
        """
        self.check_prompt(token_ids)
        return self._first_token(list(token_ids), Sampler(SamplingParams(temperature=0.0)))[0]

    def logits(self, token_ids: Sequence[int], *, step: bool = False) -> NDArray[np.float32]:
        """Logits of every position, f32 [n_token, n_vocab]: from a prefill in chunks, or token by token (`step`)."""
        self.check_prompt(token_ids)
        chunk = 1 if step else self.runtime.prefill_chunk
        out = np.empty((len(token_ids), self.config.n_vocab), np.float32)
        with self.scratch_sequence(len(token_ids)) as table:
            for start in range(0, len(token_ids), chunk):
                part = token_ids[start : start + chunk]
                out[start : start + len(part)] = self.chain.forward(
                    Rows.of(Span(part, start, table, n_output=len(part)))
                ).logits()
        return out

    @contextmanager
    def scratch_sequence(self, n_token: int) -> Iterator[BlockTable]:
        """An empty cache with room for `n_token` positions; what was cached before is forgotten."""
        with self._step():
            self._forget(0)
            self._pool.extend(self._table, n_token)
            try:
                yield self._table
            finally:
                self._forget(0)

    def check_prompt(self, ids: Sequence[int]) -> None:
        """Refuse what cannot be run.

        Raises: RequestError: no ids, or one that is not in the vocabulary; ContextTooLongError.
        """
        if len(ids) == 0:
            raise RequestError("the prompt is empty", hint="give at least one token")
        bad = [i for i in ids if not (isinstance(i, int | np.integer) and 0 <= i < self.config.n_vocab)]
        if bad:
            raise RequestError(
                f"token id {bad[0]!r} is outside the vocabulary of {self.config.n_vocab}",
                hint="encode the text with this model's tokenizer",
            )
        if len(ids) > self.n_ctx:
            raise ContextTooLongError(
                f"the prompt has {len(ids)} tokens; the context holds {self.n_ctx}", hint="shorten it, or raise n_ctx"
            )

    def forget(self) -> None:
        """Empty the cache: the next prompt is computed from its first token."""
        with self._step():
            self._forget(0)

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("the engine is closed", hint="make another one with LLMEngine.init_model")

    @contextmanager
    def _step(self) -> Iterator[None]:
        """Whoever uses the cache and the chain does so in here, alone."""
        with self._lock:
            self._check_open()
            yield

    def _forget(self, keep: int) -> None:
        """Drop all but the first `keep` positions of the sequence in the cache, which is nobody's from now on."""
        self._owner = None
        del self._cached[keep:]
        if not keep:
            self._pool.free(self._table)

    def _first_token(self, prompt_ids: list[int], sampler: Sampler) -> tuple[int, int]:
        """Prefill what the cache does not already hold, and sample. Returns the token and how many ids were cached."""
        with self._step():
            shared = _common_prefix(self._cached, prompt_ids[:-1])
            self._forget(shared)
            self._pool.extend(self._table, len(prompt_ids))
            chunk, n = self.runtime.prefill_chunk, len(prompt_ids)
            for start in range(shared, n, chunk):
                part = prompt_ids[start : start + chunk]
                output = self.chain.forward(Rows.of(Span(part, start, self._table, n_output=int(start + chunk >= n))))
                self._cached += part
            self._owner = sampler
            return self._choose(output, sampler, prompt_ids), shared

    def _next_token(self, token: int, sampler: Sampler, prompt_ids: list[int], ids: list[int]) -> int:
        """One decode step; a prefill where another generation has used the cache since."""
        with self._step():
            if self._owner is not sampler:
                return self._first_token(prompt_ids + ids, sampler)[0]
            position = len(self._cached)
            self._pool.extend(self._table, position + 1)
            output = self.chain.forward(Rows.of(Span([token], position, self._table, n_output=1)))
            self._cached.append(token)
            return self._choose(output, sampler, prompt_ids, ids)

    @staticmethod
    def _choose(output: Output, sampler: Sampler, *history: list[int]) -> int:
        if sampler.is_greedy:
            return int(output.tokens[0])
        return sampler.sample(output.logits()[0], [i for part in history for i in part])


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids are equal."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
