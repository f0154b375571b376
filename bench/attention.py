"""Attention alone, at the shapes of KERNELS.md: wall and CPU time of one replayed dispatch. Ends in one JSON line.

    python bench/attention.py [--positions 4096] [--repeat 200]

The figure to beat on lavapipe (KERNELS.md, 2 threads, quiet machine): 0.41-0.56 ms at 14/2 heads, 4,096 positions. `cpu_ms` is
the CPU time of all threads of this process a run: it does not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np

from vkllm.vk import Binding, Device, open_device
from vkllm_shaders.attention import AttentionSpec, direct

SHAPES = {"14/2": (14, 2), "32/8": (32, 8)}
FORMATS: dict[str, Any] = {"f32x4": "rgba32f", "u32x4": "rgba32ui", "u32": "r32ui"}


def measure(device: Device, spec: AttentionSpec, n_kv_head: int, n_position: int, repeat: int) -> dict[str, float]:
    """Milliseconds of one row's attention over `n_position` positions in shuffled blocks."""
    rng, kernel = np.random.default_rng(0), direct(spec)
    n_block = -(-n_position // spec.block_size)
    cache = (n_block * spec.block_size, n_kv_head, spec.head_dim)
    arrays: dict[str, Any] = {
        "q": rng.standard_normal((n_kv_head * spec.group, spec.head_dim)).astype(np.float32),
        "k": rng.standard_normal(cache, np.float32).astype(np.float16),
        "v": rng.standard_normal(cache, np.float32).astype(np.float16),
        "block_table": rng.permutation(n_block).astype(np.uint32),
        "params": np.array([0, 0, 0, n_position, 0, 0], np.uint32),
        "out": np.zeros((n_kv_head * spec.group, spec.head_dim), np.float32),
    }
    bindings = []
    for binding in kernel.bindings:
        buffer = device.buffer(arrays[binding.name].nbytes, name=binding.name)
        buffer.write(arrays[binding.name])
        bindings.append(Binding(buffer, 0, None, FORMATS[repr(binding.dtype)] if binding.kind == "texel" else None))
    pipeline = device.pipeline(kernel.name, kernel.spirv(), tuple(b.kind for b in kernel.bindings), kernel.push_bytes)
    recording = device.recording(kernel.name)
    recording.dispatch(pipeline, bindings, (1, n_kv_head, 1), kernel.pack_push(n_token=1, n_kv_head=n_kv_head))
    recording.barrier()
    recording.finish()

    times, start = [], time.perf_counter()
    recording.run()
    first = time.perf_counter() - start
    cpu = time.process_time()
    for _ in range(repeat):
        start = time.perf_counter()
        recording.run()
        times.append((time.perf_counter() - start) * 1e3)
    cpu_ms = (time.process_time() - cpu) / repeat * 1e3
    return {"median_ms": statistics.median(times), "best_ms": min(times), "cpu_ms": cpu_ms, "first_ms": first * 1e3}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    arguments.add_argument("--positions", type=int, default=4096)
    arguments.add_argument("--repeat", type=int, default=200)
    options = arguments.parse_args()
    with open_device() as device:
        lanes, row = device.limits.subgroup_size, device.info.kind == "cpu"
        result: dict[str, object] = {
            "device": device.info.name,
            "driver": device.info.driver_info,
            "positions": options.positions,
        }
        for name, (n_head, n_kv_head) in SHAPES.items():
            spec = AttentionSpec(64, n_head // n_kv_head, lanes=lanes, schedule="lane_row" if row else "lane_chunk")
            figures = measure(device, spec, n_kv_head, options.positions, options.repeat)
            result[name] = {key: round(value, 3) for key, value in figures.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
