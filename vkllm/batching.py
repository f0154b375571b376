"""BatchEngine: many requests at once over one model. One worker thread owns the device; everybody else talks to it by queues.

`submit` may be called from any thread and gives a handle at once; text comes as events. Between steps the worker takes new
requests and cancellations, asks the scheduler for the next step, runs it, and samples.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from queue import SimpleQueue
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vkllm.chain import Output, Rows, Span
from vkllm.engine import GenerationResult, LLMEngine, Timings, Usage, checked_step
from vkllm.errors import (
    CapacityError,
    ContextTooLongError,
    DeviceError,
    NonFiniteError,
    OutOfDeviceMemoryError,
    RequestError,
    ThermalLimitError,
    VkllmError,
)
from vkllm.kv_cache import BlockPool
from vkllm.sampler import Logits, Sampler, SamplingParams, StopMatcher, log_probabilities
from vkllm.scheduler import Chunk, Scheduler
from vkllm.scheduler import Sequence as Row
from vkllm.speculation import Bid, Speculator
from vkllm.tokenizer import StreamDecoder
from vkllm.vk import open_device
from vkllm.weights import vector

log = logging.getLogger("vkllm.batching")

MASKED = np.float32(-1e30)
"""The logit of a token that a constraint forbids: so low that it is never drawn, but finite, as the sampler wants it."""


STOPPED_POLL_S = 0.05  # how often a stopped engine asks its pacer


class Pacer(Protocol):
    """What slows the engine down, if anything does. The worker asks before and after every step."""

    @property
    def batch_limit(self) -> int | None:
        """Most rows of the next step; None: as many as fit; 0: the device must stop, and no new work is taken."""

    @property
    def retry_after_s(self) -> float:
        """While `batch_limit` is 0: about when to ask again."""

    def pace(self, busy_s: float) -> float:
        """A step kept the device busy for `busy_s` seconds; returns how many seconds it must now rest."""


class Constraint(Protocol):
    """What a request's tokens must follow, a grammar for example. Called in the worker thread."""

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next: [n_vocab]."""

    def accept(self, token_id: int) -> bool:
        """A token was chosen. Returns whether more may follow."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its log probability under the raw logits, and the likeliest alternatives (id, log probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class BatchEvent:
    """What one step gave a request. `text` is final; the last event has a `result` or an `error`, and of an embedding the
    mean of the normed hidden states, f32 [n_embd]."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    result: GenerationResult | None = None
    embedding: NDArray[np.float32] | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        return self.result is not None or self.error is not None


Listener = Callable[[BatchEvent], None]


class CancelledRequestError(VkllmError):
    """The request was cancelled: by its client, or because the engine closes."""


@dataclass(slots=True)
class Progress:
    """How far a request has got, also where it does not end well. Times count from its submission; None: not yet."""

    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_s: float | None = None  # until its first step
    ttft_s: float | None = None


@dataclass(eq=False)
class Handle:
    """A submitted request. Iterate over its events, or wait for its result; `cancel` at any time."""

    id: int
    n_prompt: int
    _engine: BatchEngine
    progress: Progress = field(default_factory=Progress)  # written by the worker
    _events: SimpleQueue[BatchEvent] = field(default_factory=SimpleQueue)
    _listener: Listener | None = None

    def cancel(self) -> None:
        """Stop it before the next step and free its blocks. Does nothing where it has ended."""
        self._engine._tell("cancel", self)

    def events(self) -> Iterator[BatchEvent]:
        """All events up to the last one, as they come. Not for requests with a listener."""
        while True:
            event = self._events.get()
            yield event
            if event.last:
                return

    def result(self) -> GenerationResult:
        """Wait for the end. Raises: what ended the request, where that was an error."""
        *_, last = self.events()
        if last.error is not None:
            raise last.error
        assert last.result is not None
        return last.result

    def _send(self, event: BatchEvent) -> None:
        (self._listener or self._events.put)(event)


@dataclass(eq=False)
class _Stream:
    """A request in the worker: its sequence, and the way from token to text."""

    handle: Handle
    params: SamplingParams
    prompt_ids: list[int]
    n_max: int
    constraint: Constraint | None
    submitted_s: float
    sampler: Sampler
    stop: StopMatcher
    ends: frozenset[int]
    embeds: bool = False
    awaited: bool = True
    shown: frozenset[int] = frozenset()
    hidden_sum: NDArray[np.float64] | None = None
    row: Row | None = None
    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    decoder: StreamDecoder | None = None  # made with the first token
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    speculator: Speculator | None = None
    n_drafted: int = 0
    n_accepted: int = 0

    def bid(self) -> Bid:
        """What speculation can do for it. A constraint looks at its tokens one by one: nothing."""
        if self.constraint is not None or self.row is None:
            return Bid(0.0, 0)
        if self.speculator is None:
            self.speculator = Speculator(self.row.token_ids)
        return Bid(self.speculator.chance, self.n_max - len(self.ids) - 1)

    @property
    def needs_logits(self) -> bool:
        return not self.sampler.is_greedy or self.constraint is not None or self.params.logprobs is not None


@dataclass(slots=True)
class BatchStats:
    """Totals since the start, and what is there now; written by the worker only."""

    n_waiting: int = 0
    n_running: int = 0
    n_block_used: int = 0
    n_preempted: int = 0
    n_revived: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
    rows: int = 0
    busy_s: float = 0.0
    rest_s: float = 0.0
    requests: dict[str, int] = field(default_factory=dict)  # by finish reason


class BatchEngine:
    """Serves many requests over one LLMEngine, which nobody else may use meanwhile. Close it, or use it as a context manager.

    `n_seq` of the engine's RuntimeConfig is how many run at once; `n_block`: use fewer cache blocks than the chain has;
    `n_queue`: most requests that wait; `observe` is told (kind, seconds) of every "ttft" and "gap" between tokens;
    `revive`: when the device is lost, open it again and compute what ran anew, instead of failing.
    """

    def __init__(
        self,
        engine: LLMEngine,
        *,
        pacer: Pacer | None = None,
        n_block: int | None = None,
        n_queue: int = 1024,
        n_mixed: int | None = None,
        observe: Callable[[str, float], None] | None = None,
        revive: bool = False,
    ) -> None:
        self.engine, self.pacer, self.n_queue = engine, pacer, n_queue
        self.tokenizer, self.runtime = engine.tokenizer, engine.runtime
        engine.forget()
        self.pool = BlockPool(min(n_block or engine.chain.n_block, engine.chain.n_block), engine.runtime.block_size)
        self.scheduler = Scheduler(self.pool, n_row=engine.chain.capacity, n_seq=engine.runtime.n_seq, n_mixed=n_mixed)
        self.n_ctx = min(engine.n_ctx, self.scheduler.n_token_max)
        self.stats = BatchStats()
        self._norm = vector(engine.file, "output_norm.weight").astype(np.float64)
        self.failure: Exception | None = None
        self._given, self._revive_lost, self._steps_at_loss = engine, revive, -1
        self._observe = observe or (lambda kind, seconds: None)
        self._ids = count()
        self._lock = threading.Lock()
        self._inbox: list[tuple[str, _Stream | Handle | None]] = []
        self._news = threading.Event()
        self._streams: dict[Handle, _Stream] = {}
        self._by_row: dict[Row, _Stream] = {}
        self._n_open = 0
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="vkllm-batch", daemon=True)
        self._thread.start()

    def __enter__(self) -> BatchEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is open and end the worker. The LLMEngine stays open: it is its owner's."""
        self._closing = True
        self._tell("close", None)
        self._thread.join()
        if self.engine is not self._given:
            _discard(self.engine)

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        constraint: Constraint | None = None,
        embed: bool = False,
        awaited: bool = True,
        shown: frozenset[int] = frozenset(),
        listener: Listener | None = None,
    ) -> Handle:
        """Queue a request. `embed`: no text, but an embedding of the prompt. `awaited`: somebody waits for each token, not only
        for the last. `shown`: control tokens that are to be part of the text. `listener` gets the events in the worker thread
        and must be quick; without one they are queued.

        Raises: RequestError, ContextTooLongError: as `LLMEngine.stream`; CapacityError: the queue is full, or the engine has
        failed or closes.
        """
        params = params or SamplingParams()
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self.engine.check_prompt(ids)
        if len(ids) > self.n_ctx:
            raise ContextTooLongError(f"the prompt has {len(ids)} tokens; the cache holds {self.n_ctx}", hint="shorten it")
        limit = self.n_ctx - len(ids)
        if params.logit_bias and constraint is not None:
            raise RequestError("logit_bias and a grammar contradict each other", hint="leave one of them out")
        handle = Handle(next(self._ids), len(ids), self, _listener=listener)
        stream = _Stream(
            handle,
            params,
            ids,
            limit if params.max_tokens is None else min(params.max_tokens, limit),
            constraint,
            time.perf_counter(),
            Sampler(params),
            StopMatcher(params.stop),
            frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else self.tokenizer.eos_ids),
            embed,
            awaited,
            shown,
        )
        if self.pacer is not None and self.pacer.batch_limit == 0:
            hot = ThermalLimitError("the device is too hot to take work", hint="try again later")
            hot.retry_after_s = self.pacer.retry_after_s
            raise hot
        with self._lock:
            if self.failure is not None or self._closing:
                raise CapacityError(f"the engine is down: {self.failure or 'it closes'}", hint="try again later")
            if self._n_open >= self.n_queue + self.runtime.n_seq:
                raise CapacityError(f"{self._n_open} requests are open; no more are taken", hint="try again later")
            self._n_open += 1
            self._inbox.append(("submit", stream))
        self._news.set()
        return handle

    def _tell(self, kind: str, what: _Stream | Handle | None) -> None:
        with self._lock:
            self._inbox.append((kind, what))
        self._news.set()

    # -- the worker -----------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            self._news.clear()
            closing = not self._take_news()
            if closing:
                break
            limit = self.pacer.batch_limit if self.pacer else None
            chunks = self.scheduler.plan(limit) if self._streams and limit != 0 else []
            self._note()
            if not chunks:
                if not self._streams:
                    self.scheduler.n_row = self.engine.chain.capacity
                self._news.wait(STOPPED_POLL_S if limit == 0 else None)
                continue
            started = time.perf_counter()
            for chunk in chunks:
                stream = self._by_row[chunk.sequence]
                if stream.handle.progress.queue_s is None:
                    stream.handle.progress.queue_s = started - stream.submitted_s
            try:
                drafts = self._drafts(chunks, limit)
                if limit is not None or any(drafts) or not self._step_ahead(chunks):
                    self._step(chunks, drafts)
            except Exception as error:  # the device is lost, or a bug of ours: nobody may wait for ever
                self._fail(error)
            busy = time.perf_counter() - started
            self.stats.busy_s += busy
            self._rest(self.pacer.pace(busy) if self.pacer else 0.0)
        for stream in list(self._streams.values()):
            self._end(stream, BatchEvent(error=CancelledRequestError("the engine closes", hint="try again later")), "cancelled")
        self._note()

    def _take_news(self) -> bool:
        """New requests and cancellations. False where the engine is to close."""
        with self._lock:
            inbox, self._inbox = self._inbox, []
        for kind, what in inbox:
            if kind == "submit":
                assert isinstance(what, _Stream)
                self._begin(what)
            elif kind == "cancel":
                assert isinstance(what, Handle)
                if stream := self._streams.get(what):
                    self._end(stream, BatchEvent(error=CancelledRequestError("the request was cancelled")), "cancelled")
        return not any(kind == "close" for kind, _ in inbox)

    def _begin(self, stream: _Stream) -> None:
        self._streams[stream.handle] = stream
        if self.failure is not None:
            self._end(stream, BatchEvent(error=CapacityError(f"the engine is down: {self.failure}")), "error")
        elif stream.n_max == 0 and not stream.embeds:
            self._finish(stream, "length", "")
        else:
            stream.row = self.scheduler.add(stream.prompt_ids, reuse=not stream.embeds)
            self._by_row[stream.row] = stream
            self.stats.prompt_tokens += len(stream.prompt_ids)

    def _drafts(self, chunks: list[Chunk], limit: int | None) -> list[list[int]]:
        """What to try beside the last token of each chunk: nothing while a prompt is read."""
        streams, planner = [self._by_row[c.sequence] for c in chunks], self.engine.planner
        if not planner.on or not all(s.ids and c.n_token == 1 and c.samples for s, c in zip(streams, chunks, strict=True)):
            return [[] for _ in chunks]
        lengths = planner.lengths([s.bid() for s in streams], min(limit or self.scheduler.n_row, self.scheduler.n_row))
        return [
            s.speculator.draft(self.scheduler.reserve(c.sequence, n)) if s.speculator else []
            for s, c, n in zip(streams, chunks, lengths, strict=True)
        ]

    def _step(self, chunks: list[Chunk], drafts: list[list[int]]) -> None:
        """Run the chunks, and hand out what they give. Where numbers go wrong, only those sequences end that are to blame."""
        try:
            output = self._forward(chunks, drafts)
        except (NonFiniteError, OutOfDeviceMemoryError) as error:
            self._retry(chunks, drafts, error)
            return
        if output is None:
            self._step(chunks, [[] for _ in chunks])
            return
        self.scheduler.computed(chunks)
        self.stats.steps += 1
        self.stats.rows += sum(c.n_token for c in chunks) + sum(map(len, drafts))
        self._embed(chunks)
        sampling = [(self._by_row[c.sequence], draft) for c, draft in zip(chunks, drafts, strict=True) if c.samples]
        logits = output.logits() if any(s.needs_logits for s, _ in sampling) else None
        first = 0
        for stream, draft in sampling:
            rows = slice(first, first + 1 + len(draft))
            first = rows.stop
            try:
                if stream.embeds:
                    assert stream.hidden_sum is not None
                    self._finish(stream, "stop", "", embedding=(stream.hidden_sum / len(stream.prompt_ids)).astype(np.float32))
                    continue
                stream.n_drafted += len(draft)
                self.stats.drafted_tokens += len(draft)
                self._advance_by(stream, draft, output.tokens[rows], None if logits is None else logits[rows])
            except VkllmError as error:  # impossible sampling parameters, a broken grammar
                self._end(stream, BatchEvent(error=error), "error")

    def _step_ahead(self, chunks: list[Chunk]) -> bool:
        """Run several steps in one submit. False where somebody waits for a token or a place, or logits must be looked at."""
        chain, streams = self.engine.chain, [self._by_row[c.sequence] for c in chunks]
        n_step = chain.multi_step
        if n_step == 1 or self.scheduler.waiting or any(s.awaited or s.needs_logits for s in streams):
            return False
        if not all(s.ids and c.n_token == 1 and s.n_max - len(s.ids) >= n_step for s, c in zip(streams, chunks, strict=True)):
            return False
        if any(self.scheduler.reserve(c.sequence, n_step - 1) < n_step - 1 for c in chunks):
            return False
        spans = [Span(c.sequence.token_ids[c.start :], c.start, c.sequence.table, n_output=1) for c in chunks]
        try:
            found = chain.decode(Rows.of(*spans))
        except OutOfDeviceMemoryError:
            return False
        if not len(found):
            return False
        self.scheduler.computed(chunks)
        self.stats.steps += len(found)
        self.stats.rows += found.size
        for stream, tokens in zip(streams, found.T, strict=True):
            self._advance_by(stream, tokens[:-1].tolist(), tokens, None, drafted=False)
        return True

    def _retry(self, chunks: list[Chunk], drafts: list[list[int]], error: NonFiniteError | OutOfDeviceMemoryError) -> None:
        """A step failed. Without drafts it may run; else smaller ones, or each sequence alone."""
        if any(drafts):
            self._step(chunks, [[] for _ in chunks])
        elif isinstance(error, OutOfDeviceMemoryError):
            self._shrink(chunks, error)
        elif len(chunks) > 1:
            for chunk in chunks:
                self._step([chunk], [[]])
        else:
            self._end(self._by_row[chunks[0].sequence], BatchEvent(error=error), "error")

    def _advance_by(
        self, stream: _Stream, ahead: list[int], greedy: NDArray[np.uint32], logits: Logits | None, drafted: bool = True
    ) -> None:
        """The tokens that rows of a stream give, where those behind the first begin with `ahead`: one more than of these are
        right. Only right ones count as computed, and as accepted where they were `drafted`."""
        row = stream.row
        assert row is not None
        for i, begun in enumerate([*ahead, None]):
            self._advance(stream, int(greedy[i]), None if logits is None else logits[i])
            if stream.handle not in self._streams or row.token_ids[-1] != begun:
                return
            stream.n_accepted += drafted
            self.stats.accepted_tokens += drafted
            self.scheduler.computed([Chunk(row, row.n_computed, 1, samples=True)])

    def _shrink(self, chunks: list[Chunk], error: OutOfDeviceMemoryError) -> None:
        """There is no memory for a step of this size: smaller ones, until nothing runs. Of one row: its request ends."""
        n_row = sum(c.n_token for c in chunks)
        if n_row > 1:
            self.scheduler.n_row = n_row // 2
            log.warning("no device memory for a step of %d rows; at most %d from now on", n_row, n_row // 2)
            return
        text = f"the device has no memory left for this request: {error.message}"
        self._end(self._by_row[chunks[0].sequence], BatchEvent(error=CapacityError(text, hint="try again later")), "error")

    def _embed(self, chunks: list[Chunk]) -> None:
        """Add up the normed hidden states of the prompts that want an embedding."""
        first, ends = 0, np.cumsum([c.n_token for c in chunks])
        for chunk, end in zip(chunks, ends, strict=True):
            stream = self._by_row[chunk.sequence]
            if stream.embeds:
                hidden = self.engine.chain.hidden(int(ends[-1]))[first:end].astype(np.float64)
                scale = np.sqrt((hidden**2).mean(axis=1, keepdims=True) + self.engine.config.rms_norm_eps)
                before = 0.0 if chunk.start == 0 or stream.hidden_sum is None else stream.hidden_sum
                stream.hidden_sum = before + (hidden / scale * self._norm).sum(axis=0)
            first = int(end)

    def _forward(self, chunks: list[Chunk], drafts: list[list[int]]) -> Output | None:
        """Run the chunks with their drafts. None: with drafts it is not to the bit what it would be without."""
        spans = []
        for c, draft in zip(chunks, drafts, strict=True):
            ids = c.sequence.token_ids[c.start : c.start + c.n_token] + draft
            spans.append(Span(ids, c.start, c.sequence.table, n_output=(1 + len(draft)) * c.samples))
        chain, planner = self.engine.chain, self.engine.planner
        n_row = sum(len(span.token_ids) for span in spans)
        if any(drafts) and planner.unchecked(n_row):
            found = checked_step(chain, spans[0])
            planner.checked(n_row, found is not None)
            return found
        started = time.perf_counter()
        output = chain.forward(Rows.of(*spans))
        if n_row == len(output.tokens):  # no prompts
            planner.costs.observe(n_row, time.perf_counter() - started)
        return output

    def _advance(self, stream: _Stream, greedy: int, logits: Logits | None) -> None:
        """One more token of a stream: choose it, turn it into text, see whether that was the end."""
        row, now, progress = stream.row, time.perf_counter(), stream.handle.progress
        assert row is not None
        token, logprobs = self._choose(stream, greedy, logits)
        if stream.decoder is None:
            stream.decoder, stream.first_token_s = self.tokenizer.stream(stream.prompt_ids), now
            self.stats.cached_tokens += row.n_cached
            progress.cached_tokens, progress.ttft_s = row.n_cached, now - stream.submitted_s
            self._observe("ttft", now - stream.submitted_s)
        else:
            self._observe("gap", now - stream.last_token_s)
        stream.last_token_s = now
        if token in stream.ends:
            self._finish(stream, "stop", "")
            return
        more = stream.constraint is None or stream.constraint.accept(token)
        stream.ids.append(token)
        if stream.speculator is not None:
            stream.speculator.push(token)
        progress.completion_tokens = len(stream.ids)
        self.stats.completion_tokens += 1
        piece = self.tokenizer.token_bytes(token).decode() if token in stream.shown else stream.decoder.push(token)
        text, stopped = stream.stop.push(piece)
        if stopped or not more or len(stream.ids) >= stream.n_max:
            self._finish(stream, "stop" if stopped or not more else "length", text, (token,), logprobs)
            return
        self.scheduler.append(row, token)
        if text:
            stream.pieces.append(text)
        stream.handle._send(BatchEvent(text, (token,), logprobs))

    def _choose(self, stream: _Stream, greedy: int, logits: Logits | None) -> tuple[int, tuple[TokenLogprob, ...]]:
        """The next token, and its log probability where that is wanted."""
        if not stream.needs_logits:
            return greedy, ()
        assert logits is not None and stream.row is not None
        choices = logits if stream.constraint is None else np.where(stream.constraint.allowed(), logits, MASKED)
        token = stream.sampler.sample(choices, stream.row.token_ids)
        if stream.params.logprobs is None:
            return token, ()
        value, top = log_probabilities(logits, token, stream.params.logprobs)
        return token, (TokenLogprob(token, value, tuple(top)),)

    def _finish(
        self,
        stream: _Stream,
        reason: str,
        text: str,
        ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        embedding: NDArray[np.float32] | None = None,
    ) -> None:
        """The regular end of a stream."""
        if not stream.stop.stopped and stream.decoder is not None:
            text += stream.stop.push(stream.decoder.finish())[0] + stream.stop.finish()
        stream.pieces.append(text)
        now, first = time.perf_counter(), stream.first_token_s or time.perf_counter()
        n_prompt, n_cached = len(stream.prompt_ids), stream.row.n_cached if stream.row else 0
        prompt_s, decode_s = first - stream.submitted_s, now - first
        timings = Timings(
            prompt_s=prompt_s,
            decode_s=decode_s,
            ttft_s=prompt_s,
            prompt_tok_s=(n_prompt - n_cached) / prompt_s if prompt_s > 0 else 0.0,
            decode_tok_s=max(len(stream.ids) - 1, 0) / decode_s if decode_s > 0 else 0.0,
        )
        usage = Usage(n_prompt, len(stream.ids), n_cached, stream.n_drafted, stream.n_accepted)
        result = GenerationResult("".join(stream.pieces), tuple(stream.ids), reason, usage, timings)
        self._end(stream, BatchEvent(text, ids, logprobs, result, embedding), reason)

    def _end(self, stream: _Stream, event: BatchEvent, reason: str) -> None:
        """Any end of a stream: its blocks are free before its client knows."""
        del self._streams[stream.handle]
        if stream.row is not None:
            self.scheduler.remove(stream.row)
            del self._by_row[stream.row]
        with self._lock:
            self._n_open -= 1
        self.stats.requests[reason] = self.stats.requests.get(reason, 0) + 1
        self._note()
        stream.handle._send(event)

    def _fail(self, error: Exception) -> None:
        """A step failed for all: end every stream. After a device error that we cannot mend no more are taken."""
        if isinstance(error, DeviceError) and self._revived(error):
            return
        if isinstance(error, DeviceError) or not isinstance(error, VkllmError):
            with self._lock:
                self.failure = error
        for stream in list(self._streams.values()):
            self._end(stream, BatchEvent(error=error), "error")
        self.pool.forget()

    def _revived(self, error: DeviceError) -> bool:
        """Open the device again and load the model; what ran will be computed anew, and nothing is lost. Not twice in a row."""
        if not self._revive_lost or self.stats.steps == self._steps_at_loss:
            return False
        log.error("%s: %s; opening the device again", type(error).__name__, error)
        self._steps_at_loss = self.stats.steps
        _discard(self.engine)
        try:
            self.engine = LLMEngine(self.engine.file, open_device(self.runtime.device), self.runtime)
        except Exception as again:
            log.error("that failed: %s", again)
            return False
        self.scheduler.restart()
        self.stats.n_revived += 1
        return True

    def _rest(self, seconds: float) -> None:
        """Keep the device idle; new requests are taken afterwards, but closing cuts it short."""
        ends = time.perf_counter() + seconds
        while not self._closing and (left := ends - time.perf_counter()) > 0:
            time.sleep(min(left, 0.05))
        self.stats.rest_s += seconds

    def _note(self) -> None:
        s = self.stats
        s.n_waiting, s.n_running = len(self.scheduler.waiting), len(self.scheduler.running)
        s.n_block_used = self.pool.n_block - self.pool.n_free
        s.n_preempted = self.scheduler.n_preempted


def _discard(engine: LLMEngine) -> None:
    """Give the device memory back; the file stays open. A lost device may refuse even that."""
    for close in (engine.chain.close, engine.device.close):
        with suppress(Exception):
            close()
