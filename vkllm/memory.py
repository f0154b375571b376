"""What fits on a device: how many blocks of KV cache beside the weights, and what to refuse before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from vkllm.config import ModelConfig, RuntimeConfig
from vkllm.errors import ConfigError, OutOfDeviceMemoryError, UnsupportedModelError
from vkllm.files.model_file import ModelFile
from vkllm.kernels import Lowering
from vkllm.plan import Graph
from vkllm.vk import DeviceInfo

DEFAULT_N_CTX = 4096
LEAST_N_CTX = 512  # a default context is not shrunk below this


@dataclass(frozen=True, slots=True)
class Fit:
    """A lowering that fits its device, and the blocks of its KV cache."""

    lower: Lowering
    n_block: int

    @property
    def needed(self) -> int:
        """Bytes of device memory, but for vectors and parameters."""
        return sum(m.nbytes for m in self.lower.matrices) + sum(self.lower.buffer_bytes(self.n_block).values())


def fit(graph: Graph, file: ModelFile, device: DeviceInfo, runtime: RuntimeConfig, available: int) -> Fit:
    """Choose context and cache for `available` bytes of free memory: what the user asks for; where nothing is asked, the context
    that the model was trained on, at most DEFAULT_N_CTX, and a cache that takes at most `memory_share` of what is free.

    Raises: OutOfDeviceMemoryError, ConfigError (naming the option to lower), UnsupportedModelError (a matrix out of reach).
    """
    n_ctx = context_length(graph.config, runtime.n_ctx)
    lower = Lowering(graph, file, device, runtime, n_ctx)
    most = _most_blocks(lower, device, int(available * runtime.memory_share))
    least = -(-LEAST_N_CTX // runtime.block_size)
    if runtime.n_ctx is None and runtime.cache_tokens is None and least <= most < _blocks(n_ctx, runtime):
        lower = Lowering(graph, file, device, runtime, n_ctx := most * runtime.block_size)
    if runtime.cache_tokens is not None:
        n_block = _blocks(runtime.cache_tokens, runtime)
    else:
        n_block = max(min(runtime.n_seq * _blocks(n_ctx, runtime), most), _blocks(n_ctx, runtime))
    fitted = Fit(lower, n_block)
    _check_memory(fitted, device, available)
    _check_ranges(lower, device, n_block)
    return fitted


def context_length(config: ModelConfig, wanted: int | None) -> int:
    """The positions to hold: what the user asks for, else what the model was trained on, but no more than a default.

    Raises: ConfigError: more than the model knows.
    """
    trained = config.n_ctx
    if wanted is None:
        return min(trained, DEFAULT_N_CTX)
    if not 1 <= wanted <= trained:
        raise ConfigError(f"n_ctx is {wanted}; this model was trained on {trained} positions", hint=f"choose 1 … {trained}")
    return wanted


def _blocks(n_token: int, runtime: RuntimeConfig) -> int:
    return -(-n_token // runtime.block_size)


def _most_blocks(lower: Lowering, device: DeviceInfo, budget: int) -> int:
    """The largest cache, in blocks, that the budget and one binding's reach allow."""
    of_all_layers = 2 * lower.graph.config.n_layer * lower.block_nbytes
    in_memory = (budget - Fit(lower, 0).needed) // of_all_layers
    return max(0, min(in_memory, device.limits.max_storage_buffer_range // lower.block_nbytes))


def _check_memory(fitted: Fit, device: DeviceInfo, available: int) -> None:
    needed = fitted.needed
    if needed > available:
        raise OutOfDeviceMemoryError(
            f"the model needs {needed / 2**30:.2f} GiB on {device.name}; {available / 2**30:.2f} GiB are free",
            hint="lower --n-ctx, use a smaller quantization, or another --device",
            needed=needed,
            available=available,
        )


def _check_ranges(lower: Lowering, device: DeviceInfo, n_block: int) -> None:
    """A matrix, a cache, or rows that reach further than one binding may."""
    limits, tables = device.limits, set(lower.graph.ropes)
    texels = tables if lower.layout.kind == "lane_row" else set()
    if lower.capacity > (rows := limits.max_workgroup_count[2]):
        raise ConfigError(
            f"prefill_chunk and n_seq ask for {lower.capacity} rows; {device.name} runs {rows} at a time",
            hint="lower prefill_chunk, or n_seq",
        )
    for name, nbytes in lower.buffer_bytes(n_block).items():
        most = limits.max_texel_elements * 16 if name in texels else limits.max_storage_buffer_range
        if nbytes > most:
            by_position = name in ("block_table", *tables) or name.startswith(("k.", "v."))
            raise ConfigError(
                f"buffer {name} would take {nbytes >> 20} MiB; {device.name} reaches {most >> 20} MiB of one",
                hint="lower n_ctx, or cache_tokens" if by_position else "lower prefill_chunk",
            )
    reach = max(limits.max_texel_elements * 16, 0 if texels else limits.max_storage_buffer_range)
    for matrix in lower.matrices:
        if matrix.nbytes > reach:
            raise UnsupportedModelError(
                f"{matrix.name} takes {matrix.nbytes >> 20} MiB; {device.name} reaches {reach >> 20} MiB of it",
                hint="use a smaller quantization, or another --device",
            )
