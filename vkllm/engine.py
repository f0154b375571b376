"""LLMEngine: text in, text out. Loads a model once, then generates with it, one sequence at a time.

It joins the parts (file, tokenizer, chain, cache, sampler) and knows none of their insides.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vkllm.chain import ModelChain, Output, Rows, Span
from vkllm.config import ModelConfig, RuntimeConfig
from vkllm.errors import ContextTooLongError, NonFiniteError, RequestError
from vkllm.files import open_model
from vkllm.files.model_file import ModelFile
from vkllm.kv_cache import BlockPool, BlockTable
from vkllm.models import build_graph
from vkllm.sampler import Sampler, SamplingParams, StopMatcher
from vkllm.speculation import Bid, DraftPlanner, Speculator
from vkllm.tokenizer import Tokenizer
from vkllm.vk import Device, open_device

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. `cached_tokens` of the prompt were still in the cache and not computed again; `drafted_tokens` were
    tried by speculation, and `accepted_tokens` of them were right: each saved a step."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


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


@dataclass(eq=False, slots=True)
class _Generation:
    """One request under way: what it may still become, and the tokens that it has."""

    prompt_ids: list[int]
    n_max: int
    ends: frozenset[int]
    sampler: Sampler
    ids: list[int] = field(default_factory=list)
    speculator: Speculator | None = None
    awaited: bool = True  # does somebody wait for each token?
    n_cached: int = 0
    n_drafted: int = 0
    n_accepted: int = 0

    @property
    def room(self) -> int:
        """Tokens that may be drafted: after them there is one more of the step itself."""
        return self.n_max - len(self.ids) - 1

    def usage(self) -> Usage:
        """Its tokens, counted."""
        return Usage(len(self.prompt_ids), len(self.ids), self.n_cached, self.n_drafted, self.n_accepted)


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
        self.planner = DraftPlanner(runtime.speculate, self.chain.capacity)
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
        for event in self._start(prompt, params, awaited=False):
            result = event.result
        assert result is not None
        return result

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamEvent]:
        """Generate, giving text away as soon as no stop string or half a character can change it.

        Streams may take turns, from one thread or several: each step then computes again what another one displaced from the
        cache. For speed with many sequences there is the batch engine, which also reports `logprobs`; this one does not.
        Raises: RequestError: an empty prompt or invalid sampling parameters; ContextTooLongError: it does not fit.
        """
        return self._start(prompt, params, awaited=True)

    def _start(self, prompt: Prompt, params: SamplingParams | None, awaited: bool) -> Iterator[StreamEvent]:
        self._check_open()
        params = params or SamplingParams()
        if not isinstance(prompt, str | Sequence | np.ndarray) or isinstance(prompt, bytes):
            raise RequestError(f"the prompt is of type {type(prompt).__name__}", hint="give text, or a sequence of token ids")
        prompt_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self.check_prompt(prompt_ids)
        limit = self.n_ctx - len(prompt_ids)
        n_max = limit if params.max_tokens is None else min(params.max_tokens, limit)
        ends = frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else self.tokenizer.eos_ids)
        return self._run(_Generation(prompt_ids, n_max, ends, Sampler(params), awaited=awaited), params)

    def _run(self, g: _Generation, params: SamplingParams) -> Iterator[StreamEvent]:
        decoder, stop = self.tokenizer.stream(g.prompt_ids), StopMatcher(params.stop)
        pieces: list[str] = []
        started = first_token = time.perf_counter()
        reason = "length"
        for token in self._tokens(g):
            if not g.ids:
                first_token = time.perf_counter()
            if token in g.ends:
                reason = "stop"
                break
            g.ids.append(token)
            text, stopped = stop.push(decoder.push(token))
            if text:
                pieces.append(text)
                yield StreamEvent(text)
            if stopped:
                reason = "stop"
                break
        ended = time.perf_counter()
        text = "" if stop.stopped else stop.push(decoder.finish())[0] + stop.finish()
        pieces.append(text)
        yield StreamEvent(text, self._result("".join(pieces), g, reason, started, first_token, ended))

    @staticmethod
    def _result(text: str, g: _Generation, reason: str, started: float, first_token: float, ended: float) -> GenerationResult:
        prompt_s, decode_s, steps = first_token - started, ended - first_token, max(len(g.ids) - 1, 0)
        timings = Timings(
            prompt_s=prompt_s,
            decode_s=decode_s,
            ttft_s=prompt_s,
            prompt_tok_s=(len(g.prompt_ids) - g.n_cached) / prompt_s if prompt_s > 0 else 0.0,
            decode_tok_s=steps / decode_s if decode_s > 0 else 0.0,
        )
        return GenerationResult(text, tuple(g.ids), reason, g.usage(), timings)

    def _tokens(self, g: _Generation) -> Iterator[int]:
        """The tokens of a generation, which appends each to `g.ids` before it asks for the next."""
        if not g.n_max:
            return
        token, g.n_cached = self._first_token(g.prompt_ids, g.sampler)
        yield token
        ready: deque[int] = deque()
        while len(g.ids) < g.n_max:
            if not ready:
                ready.extend(self._next_tokens(g))
            yield ready.popleft()

    def prefill(self, token_ids: Sequence[int]) -> int:
        """Put a prompt into the cache, which keeps what it already holds of it, and return the greedy token after it.

        Raises: RequestError, ContextTooLongError.
        """
        self.check_prompt(token_ids)
        return self._first_token(list(token_ids), Sampler(SamplingParams(temperature=0.0)))[0]

    def logits(self, token_ids: Sequence[int], *, step: bool = False) -> NDArray[np.float32]:
        """Logits of every position, f32 [n_token, n_vocab]: from a prefill in chunks, or token by token (`step`)."""
        self.check_prompt(token_ids)
        chunk = 1 if step else self.chain.logits_chunk
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
            chunk, n = self.chain.prefill_chunk, len(prompt_ids)
            for start in range(shared, n, chunk):
                part = prompt_ids[start : start + chunk]
                output = self.chain.forward(Rows.of(Span(part, start, self._table, n_output=int(start + chunk >= n))))
                self._cached += part
            self._owner = sampler
            return self._choose(output, sampler, prompt_ids), shared

    def _next_tokens(self, g: _Generation) -> list[int]:
        """One decode step, which gives a token more than drafted ones are right; a prefill where another generation has used the
        cache since."""
        with self._step():
            if self._owner is not g.sampler:
                chosen = [self._first_token(g.prompt_ids + g.ids, g.sampler)[0]]
            else:
                draft = self._draft(g)
                chosen = [] if draft else self._decode_ahead(g)
                if not chosen:
                    output, draft = self._decode(g.ids[-1], draft)
                    chosen = self._choose_after(g, output, draft)
                    g.n_drafted += len(draft)
                    g.n_accepted += len(chosen) - 1
                self._cached += [g.ids[-1], *chosen[:-1]]
        if g.speculator is not None:
            for token in chosen:
                g.speculator.push(token)
        return chosen

    def _decode_ahead(self, g: _Generation) -> list[int]:
        """The tokens of several steps in one submit, up to one that ends the text; none where they cannot be chosen so."""
        n_step = self.chain.multi_step
        if g.awaited or n_step == 1 or not g.sampler.is_greedy or g.room + 1 < n_step:
            return []
        position = len(self._cached)
        self._pool.extend(self._table, position + n_step)
        found: list[int] = self.chain.decode(Rows.of(Span([g.ids[-1]], position, self._table, n_output=1)))[:, 0].tolist()
        return found[: next((i + 1 for i, token in enumerate(found) if token in g.ends), len(found))]

    def _choose_after(self, g: _Generation, output: Output, draft: list[int]) -> list[int]:
        """A token from each row, in order, up to the first that is not the drafted one or ends the text: whatever is drafted, it
        comes from the logits after the tokens before it."""
        logits = None if g.sampler.is_greedy else output.logits()
        history = [] if g.sampler.is_greedy else g.prompt_ids + g.ids
        chosen: list[int] = []
        for row in range(len(draft) + 1):
            token = int(output.tokens[row]) if logits is None else g.sampler.sample(logits[row], history + chosen)
            chosen.append(token)
            if token in g.ends or draft[row : row + 1] != [token]:
                break
        return chosen

    def _draft(self, g: _Generation) -> list[int]:
        """What is likely to come next, as far as it pays to try."""
        if not self.planner.on:
            return []
        if g.speculator is None:
            g.speculator = Speculator(g.prompt_ids + g.ids)
        return g.speculator.draft(self.planner.lengths([Bid(g.speculator.chance, g.room)])[0])

    def _decode(self, token: int, draft: list[int]) -> tuple[Output, list[int]]:
        """Run a token and its draft. Returns what the step gave, and the draft that it took."""
        position, n_row = len(self._cached), 1 + len(draft)
        self._pool.extend(self._table, position + n_row)
        span = Span([token, *draft], position, self._table, n_output=n_row)
        if draft and self.planner.unchecked(n_row):
            found = checked_step(self.chain, span)
            self.planner.checked(n_row, found is not None)
            return (found, draft) if found else self._decode(token, [])
        started = time.perf_counter()
        try:
            output = self.chain.forward(Rows.of(span))
        except NonFiniteError:
            if not draft:
                raise
            return self._decode(token, [])  # only a token that was never chosen may be to blame
        self.planner.costs.observe(n_row, time.perf_counter() - started)
        return output, draft

    @staticmethod
    def _choose(output: Output, sampler: Sampler, history: list[int]) -> int:
        if sampler.is_greedy:
            return int(output.tokens[0])
        return sampler.sample(output.logits()[0], history)


def checked_step(chain: ModelChain, span: Span) -> Output | None:
    """Run a span in one step, then again row by row. Returns what the step gave; None: some logits are not equal to the bit."""
    try:
        output = chain.forward(Rows.of(span))
        logits = np.array(output.logits())
        for i, token in enumerate(span.token_ids):
            alone = chain.forward(Rows.of(Span([token], span.start + i, span.table, n_output=1)))
            if not np.array_equal(alone.logits()[0], logits[i]):
                return None
    except NonFiniteError:
        return None
    return Output(output.tokens, output.non_finite, lambda: logits)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids are equal."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
