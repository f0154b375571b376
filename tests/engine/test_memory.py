"""What fits on a device: context and cache chosen for the free memory, refusals with figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from vkllm.config import ModelConfig, RuntimeConfig
from vkllm.errors import OutOfDeviceMemoryError
from vkllm.files import resolve_model
from vkllm.files.gguf import GGUFFile
from vkllm.memory import Fit, fit
from vkllm.models import build_graph
from vkllm.vk import MINIMUM_LIMITS, DeviceLimits, NullDevice

AMPLE = 1 << 40


@pytest.fixture(scope="module")
def tiny() -> Iterator[GGUFFile]:
    with GGUFFile.open(resolve_model("tiny")) as file:
        yield file


def fitted(file: GGUFFile, available: int = AMPLE, limits: DeviceLimits = MINIMUM_LIMITS, **options: Any) -> Fit:
    graph = build_graph(ModelConfig.from_gguf(file), file.tensors)
    info = replace(NullDevice(limits=limits).info, kind="cpu")
    return fit(graph, file, info, RuntimeConfig(**options), available)


def bytes_for(file: GGUFFile, n_block: int, **options: Any) -> int:
    return Fit(fitted(file, **options).lower, n_block).needed


def test_where_memory_is_ample_every_sequence_has_its_context(tiny: GGUFFile) -> None:
    found = fitted(tiny, n_ctx=256, n_seq=3)
    assert (found.lower.n_ctx, found.n_block) == (256, 3 * 8)


def test_several_sequences_share_what_fits(tiny: GGUFFile) -> None:
    available = bytes_for(tiny, 20, n_ctx=256, n_seq=8)
    found = fitted(tiny, available, n_ctx=256, n_seq=8, memory_share=1.0)
    assert found.n_block == 20
    assert found.needed <= available


def test_a_part_of_the_memory_stays_free(tiny: GGUFFile) -> None:
    available = bytes_for(tiny, 60, n_ctx=256, n_seq=8)
    found = fitted(tiny, available, n_ctx=256, n_seq=8, memory_share=0.9)
    assert 8 <= found.n_block < 60
    assert found.needed <= 0.9 * available


def test_a_default_context_shrinks(tiny: GGUFFile) -> None:
    trained = ModelConfig.from_gguf(tiny).n_ctx
    available = bytes_for(tiny, 20, n_seq=1)
    found = fitted(tiny, available, memory_share=1.0)
    assert 512 <= found.lower.n_ctx < trained
    assert found.n_block * 32 == found.lower.n_ctx


def test_what_was_asked_for_does_not_shrink(tiny: GGUFFile) -> None:
    available = bytes_for(tiny, 4, n_ctx=256)
    with pytest.raises(OutOfDeviceMemoryError, match="GiB are free") as caught:
        fitted(tiny, available, n_ctx=256)
    assert caught.value.needed > available
    with pytest.raises(OutOfDeviceMemoryError):
        fitted(tiny, available, n_ctx=64, cache_tokens=256)


def test_a_cache_ends_where_a_binding_ends(tiny: GGUFFile) -> None:
    lower = fitted(tiny, n_ctx=256).lower
    limits = replace(MINIMUM_LIMITS, max_storage_buffer_range=max(40 * lower.block_nbytes, 4 << 20))
    found = fitted(tiny, limits=limits, n_ctx=256, n_seq=100)
    assert found.n_block == limits.max_storage_buffer_range // lower.block_nbytes


def test_a_quantized_cache_takes_nine_sixteenths(tiny: GGUFFile) -> None:
    head_dim = ModelConfig.from_gguf(tiny).head_dim
    f16, q8_0 = (fitted(tiny, n_ctx=256, cache_type=kind).lower.block_nbytes for kind in ("f16", "q8_0"))
    assert q8_0 / f16 == (head_dim + 16 * -(-head_dim // 128)) / (2 * head_dim)
