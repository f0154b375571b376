"""How much a quantized model differs from its parent: KL divergence, agreement on the likeliest token, perplexity.

Both models see the same chunks of a text (see `perplexity`) side by side, part by part, so that no logits are stored. The
divergence at a position is that of the quantized model's distribution from the parent's, Σ p ln(p / q), in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vkllm.engine import LLMEngine
from vkllm.errors import RequestError
from vkllm.perplexity import F32, F64, Chunks, Perplexity, log_sum_exp, negative_log_likelihood, scored_logits, slabs, summary

VOCABULARY = ("tokenizer.ggml.model", "tokenizer.ggml.tokens")


@dataclass(frozen=True, slots=True)
class Difference:
    """The figures. KL divergences in nats; `*_error`: one standard deviation of a mean.

    `same_top`: share of positions where both find the same token likeliest; `p_shift_rms`: by how much the probability of the
    text's token changed, root mean square; `ppl_delta`, `log_ratio`: the perplexities' difference, and ln of their ratio.
    """

    kl_mean: float
    kl_error: float
    kl_median: float
    kl_p90: float
    kl_p99: float
    kl_max: float
    same_top: float
    same_top_error: float
    p_shift_rms: float
    quantized: Perplexity
    parent: Perplexity
    ppl_delta: float
    ppl_delta_error: float
    log_ratio: float
    log_ratio_error: float


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """What the figures are made of, one number a scored position, chunk after chunk: [n]."""

    kl: F64
    same_top: NDArray[np.bool_]
    nll: F64
    parent_nll: F64

    @classmethod
    def joined(cls, parts: list[Positions]) -> Positions:
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("kl", "same_top", "nll", "parent_nll")))


Report = Callable[[int, Positions], None]


def compare(
    quantized: LLMEngine, parent: LLMEngine, chunks: Chunks, report: Report = lambda *_: None
) -> tuple[Difference, Positions]:
    """Compare over all chunks. `report(chunk, positions so far)` hears after each one.

    Raises: RequestError: other vocabularies; ContextTooLongError: a cache shorter than a chunk; NonFiniteError, DeviceLostError.
    """
    check_vocabularies(quantized, parent)
    parts: list[Positions] = []
    for chunk in range(len(chunks.ids)):
        for engine in (quantized, parent):
            engine.check_prompt(chunks.inputs(chunk))
        targets, at = chunks.targets(chunk), 0
        both = zip(scored_logits(quantized, chunks, chunk), scored_logits(parent, chunks, chunk), strict=True)
        for q, p in both:
            parts.append(_positions(q, p, targets[at : at + len(q)]))
            at += len(q)
        parts = [Positions.joined(parts)]
        report(chunk, parts[0])
    return difference(parts[0], chunks), parts[0]


def check_vocabularies(quantized: LLMEngine, parent: LLMEngine) -> None:
    """Raises: RequestError: the models do not share one."""
    ours, theirs = ([engine.file.metadata.get(key) for key in VOCABULARY] for engine in (quantized, parent))
    sizes = [engine.config.n_vocab for engine in (quantized, parent)]
    if ours != theirs or sizes[0] != sizes[1]:
        raise RequestError(
            f"the models have different vocabularies, of {sizes[0]} and {sizes[1]} tokens",
            hint="give a quantized file and the file that it was made of",
        )


def _positions(q: F32, p: F32, targets: NDArray[np.uint32]) -> Positions:
    return Positions(
        kl=np.concatenate([kl_divergence(p[rows], q[rows]) for rows in slabs(*p.shape)]),
        same_top=q.argmax(axis=1) == p.argmax(axis=1),
        nll=negative_log_likelihood(q, targets),
        parent_nll=negative_log_likelihood(p, targets),
    )


def kl_divergence(p: F32, q: F32) -> F64:
    """Σ p ln(p / q) of each row of logits, [n], at least 0."""
    log_p, log_q = (logits - log_sum_exp(logits)[:, None] for logits in (p, q))  # f64: the sum cancels
    return np.asarray(np.maximum(np.sum(np.exp(log_p) * (log_p - log_q), axis=1), 0.0))


def difference(at: Positions, chunks: Chunks) -> Difference:
    """The figures of these positions."""
    n_chunk = len(at.kl) // chunks.n_scored
    quantized, parent = summary(at.nll, chunks, n_chunk), summary(at.parent_nll, chunks, n_chunk)
    same = float(at.same_top.mean())
    slope = quantized.ppl * at.nll - parent.ppl * at.parent_nll  # of the difference, in each position's share
    shift = np.exp(-at.nll) - np.exp(-at.parent_nll)
    return Difference(
        kl_mean=float(at.kl.mean()),
        kl_error=_error(at.kl),
        kl_median=float(np.median(at.kl)),
        kl_p90=float(np.percentile(at.kl, 90)),
        kl_p99=float(np.percentile(at.kl, 99)),
        kl_max=float(at.kl.max()),
        same_top=same,
        same_top_error=_error(at.same_top.astype(np.float64)),
        p_shift_rms=math.sqrt(float(np.mean(shift * shift))),
        quantized=quantized,
        parent=parent,
        ppl_delta=quantized.ppl - parent.ppl,
        ppl_delta_error=_error(slope),
        log_ratio=quantized.nll - parent.nll,
        log_ratio_error=_error(at.nll - at.parent_nll),
    )


def _error(values: F64) -> float:
    """Standard deviation of the mean."""
    return float(values.std()) / math.sqrt(len(values) - 1) if len(values) > 1 else 0.0
