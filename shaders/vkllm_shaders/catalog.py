"""Every kernel family of the package at representative specs: what `vkllm shaders OUT` exports and the tests sweep over.

The engine makes kernels for the model and the device at hand; this list is for people and for tests, and holds each code path once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from vkllm_codegen import Kernel
from vkllm_shaders import attention, embed, matmul, rmsnorm, rope, sample, softmax
from vkllm_shaders.attention import AttentionSpec
from vkllm_shaders.formats import FORMATS, Layout
from vkllm_shaders.matmul import MatmulSpec
from vkllm_shaders.sample import SampleSpec

LANE_ROW, LANE_CHUNK = Layout("lane_row", 8, 4), Layout("lane_chunk", 1, 2)
LAYOUTS = (LANE_ROW, LANE_CHUNK)
LANES = {"lane_row": 8, "lane_chunk": 32}
INT8_FORMATS = ("Q4_0", "Q8_0", "Q4_K", "Q6_K")


@cache
def all_kernels() -> tuple[Kernel, ...]:
    """The kernels, named uniquely."""
    return (*_matmul(), *_embed(), *_attention(), *_plain(), *_sample())


def _matmul() -> Iterator[Kernel]:
    for layout in LAYOUTS:
        for fmt in FORMATS:
            yield matmul.matmul(MatmulSpec(fmt, layout))
        yield matmul.matmul(MatmulSpec("Q5_0", layout, tile=4, norm=True, bias=True, epilogue="qkv", head_dim=64, rope_pairing="half"))
        yield matmul.matmul(MatmulSpec("Q8_0", layout, tile=4, norm=True, epilogue="qkv", head_dim=64))
        yield matmul.matmul(MatmulSpec("Q4_K", layout, norm=True, epilogue="swiglu"))
        yield matmul.matmul(MatmulSpec("Q6_K", layout, tile=8, epilogue="residual"))
        yield matmul.matmul(MatmulSpec("Q8_0", layout, norm=True, gather=True))
    for fmt in INT8_FORMATS:
        yield matmul.matmul(MatmulSpec(fmt, LANE_ROW, activations="int8"))
        yield matmul.matmul(MatmulSpec(fmt, LANE_ROW, tile=8, activations="int8"))


def _embed() -> Iterator[Kernel]:
    for layout in LAYOUTS:
        for fmt in FORMATS:
            yield embed.embed(fmt, layout)


def _attention() -> Iterator[Kernel]:
    for schedule in ("lane_row", "lane_chunk"):
        for head_dim, group in ((64, 7), (128, 4), (8, 2)):
            spec = AttentionSpec(head_dim, group, lanes=LANES[schedule], schedule=schedule)
            yield attention.direct(spec)
            if head_dim == 64:
                yield from (attention.partial(spec), attention.combine(spec))


def _plain() -> Iterator[Kernel]:
    yield from (softmax.softmax(), rmsnorm.rmsnorm(), rope.rope(64, "interleaved"), rope.rope(64, "half"))


def _sample() -> Iterator[Kernel]:
    for spec in (SampleSpec(), SampleSpec(k=40), SampleSpec(lanes=32)):
        yield from (sample.top_k(spec), sample.argmax(spec))
