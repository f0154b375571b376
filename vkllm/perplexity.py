"""Perplexity of a model on a text: e to the mean negative log-likelihood of tokens that the model had context for.

llama.cpp's definition, so that figures compare: the text is cut into chunks of `n_ctx` tokens, each computed alone and begun with
BOS in place of its first token where the model wants one; tokens of the second half count, what is left over does not.

Source: https://huggingface.co/docs/transformers/perplexity and llama.cpp, tools/perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vkllm.chain import Rows, Span
from vkllm.engine import LLMEngine
from vkllm.errors import RequestError
from vkllm.tokenizer import Tokenizer

MIN_CTX = 4
SLAB = 1 << 20  # logits looked at together: bounds temporary arrays, whatever the vocabulary

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Chunks:
    """A text as chunks of equal length, u32 [n_chunk, n_ctx]. `bos` takes the place of each first token, if it is there."""

    ids: NDArray[np.uint32]
    bos: int | None

    @property
    def n_ctx(self) -> int:
        return int(self.ids.shape[1])

    @property
    def first(self) -> int:
        """The first position whose logits count."""
        return self.n_ctx // 2

    @property
    def n_scored(self) -> int:
        """Tokens of a chunk that count."""
        return self.n_ctx - self.first - 1

    def inputs(self, chunk: int) -> list[int]:
        """What the model is given: all but the last token, after which nothing counts."""
        ids: list[int] = self.ids[chunk, :-1].tolist()
        return ids if self.bos is None else [self.bos, *ids[1:]]

    def targets(self, chunk: int) -> NDArray[np.uint32]:
        """The tokens that it is to predict, u32 [n_scored]."""
        return self.ids[chunk, self.first + 1 :]


@dataclass(frozen=True, slots=True)
class Perplexity:
    """`ppl` ± `error` (of the mean, one standard deviation) over `n_token` tokens; `nll` is ln(ppl)."""

    ppl: float
    error: float
    nll: float
    n_token: int
    n_chunk: int
    n_ctx: int


Report = Callable[[int, Perplexity], None]


def cut(tokenizer: Tokenizer, text: str, n_ctx: int = 512, n_chunk: int | None = None) -> Chunks:
    """A text's chunks, all or the first `n_chunk`.

    Raises: RequestError: the text has too few tokens for one, or n_ctx is too small.
    """
    if n_ctx < MIN_CTX:
        raise RequestError(f"chunks of {n_ctx} tokens", hint=f"choose at least {MIN_CTX}")
    ids = tokenizer.encode(text)
    if tokenizer.add_eos and ids and ids[-1] == tokenizer.eos_id:
        ids.pop()
    whole = len(ids) // n_ctx
    if not whole:
        raise RequestError(f"the text has {len(ids)} tokens; a chunk takes {n_ctx}", hint="give a longer text, or lower --n-ctx")
    n = min(whole, n_chunk) if n_chunk else whole
    return Chunks(np.asarray(ids[: n * n_ctx], np.uint32).reshape(n, n_ctx), tokenizer.bos_id if tokenizer.add_bos else None)


def scored_logits(engine: LLMEngine, chunks: Chunks, chunk: int) -> Iterator[F32]:
    """The logits that count, f32 [n, n_vocab], prefill part by prefill part, in order: n_scored rows together.

    Raises: NonFiniteError, DeviceLostError.
    """
    ids, size = chunks.inputs(chunk), engine.chain.logits_chunk
    with engine.scratch_sequence(len(ids)) as table:
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            n = min(len(part), max(0, start + len(part) - chunks.first))
            output = engine.chain.forward(Rows.of(Span(part, start, table, n_output=n)))
            if n:
                yield output.logits()


def log_sum_exp(logits: F32) -> F64:
    """ln Σ exp of each row, [n]; in f64, because differences of two such sums matter."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    wide -= top[:, None]
    return np.asarray(top + np.log(np.exp(wide, out=wide).sum(axis=1)))


def slabs(n_row: int, n_col: int) -> Iterator[slice]:
    """Rows that are looked at together."""
    step = max(1, SLAB // n_col)
    return (slice(i, i + step) for i in range(0, n_row, step))


def negative_log_likelihood(logits: F32, targets: NDArray[np.uint32]) -> F64:
    """-ln of the probability of each row's target, [n]."""
    chosen = np.take_along_axis(logits, targets[:, None].astype(np.int64), axis=1)[:, 0]
    sums = [log_sum_exp(logits[rows]) for rows in slabs(*logits.shape)]
    return np.asarray(np.concatenate(sums) - chosen, np.float64)


def summary(nll: F64, chunks: Chunks, n_chunk: int) -> Perplexity:
    """The figures of so many chunks."""
    mean = float(nll.mean())
    spread = float(nll.std()) / math.sqrt(len(nll) - 1) if len(nll) > 1 else 0.0
    return Perplexity(math.exp(mean), math.exp(mean) * spread, mean, len(nll), n_chunk, chunks.n_ctx)


def perplexity(engine: LLMEngine, chunks: Chunks, report: Report = lambda *_: None) -> Perplexity:
    """The perplexity of all chunks. `report(chunk, figures so far)` hears after each one.

    Raises: RequestError, ContextTooLongError: the engine's cache is shorter than a chunk; NonFiniteError, DeviceLostError.
    """
    losses: list[F64] = []
    for chunk in range(len(chunks.ids)):
        engine.check_prompt(chunks.inputs(chunk))
        targets, at = chunks.targets(chunk), 0
        for logits in scored_logits(engine, chunks, chunk):
            losses.append(negative_log_likelihood(logits, targets[at : at + len(logits)]))
            at += len(logits)
        figures = summary(np.concatenate(losses), chunks, chunk + 1)
        report(chunk, figures)
    return figures
