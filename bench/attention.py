"""Attention alone, at the shapes of KERNELS.md: wall and CPU time of one replayed dispatch. Ends in one JSON line.

    python bench/attention.py [--positions 4096] [--repeat 200] [--only 14/2]

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
from vkllm_shaders.records import LANES, n_group, record_nbytes
from vkllm_shaders.reference import q8_rows

SHAPES: dict[str, dict[str, Any]] = {
    "14/2": {"n_kv_head": 2, "group": 7},
    "14/2, records": {"n_kv_head": 2, "group": 7, "records": True},
    "14/2 q8_0": {"n_kv_head": 2, "group": 7, "cache": "q8_0"},
    "32/8": {"n_kv_head": 8, "group": 4},
    "32/8 q8_0": {"n_kv_head": 8, "group": 4, "cache": "q8_0"},
    "64/8, window 128, sinks (gpt-oss)": {"n_kv_head": 8, "group": 8, "windowed": True, "sinks": True},
    "8/4 x 256, softcap (gemma2)": {"n_kv_head": 4, "group": 2, "head_dim": 256, "softcap": 50.0},
    "8/4 x 256, softcap q8_0": {"n_kv_head": 4, "group": 2, "head_dim": 256, "softcap": 50.0, "cache": "q8_0"},
}
WINDOW = 128
FORMATS: dict[str, Any] = {"f32x4": "rgba32f", "u32x4": "rgba32ui", "u32": "r32ui"}


def measure(device: Device, spec: AttentionSpec, n_kv_head: int, n_position: int, repeat: int) -> dict[str, float]:
    """Milliseconds of one row's attention over `n_position` positions in shuffled blocks."""
    rng, kernel = np.random.default_rng(0), direct(spec)
    n_block = -(-n_position // spec.block_size)
    cache = (n_block, n_kv_head, spec.block_size, spec.head_dim)
    keep = q8_rows if spec.cache == "q8_0" else np.float16
    arrays: dict[str, Any] = {
        "q": rng.standard_normal((n_kv_head * spec.group, spec.head_dim)).astype(np.float32),
        "k": keep(rng.standard_normal(cache, np.float32)),
        "v": keep(rng.standard_normal(cache, np.float32)),
        "block_table": rng.permutation(n_block).astype(np.uint32),
        "params": np.array([0, 0, 0, n_position, 0, 0], np.uint32),
        "sinks": np.zeros(n_kv_head * spec.group, np.float32),
        "out": np.zeros((n_kv_head * spec.group, spec.head_dim), np.float32),
        "record": np.zeros(record_nbytes(1, n_kv_head * spec.group * spec.head_dim), np.uint8),
    }
    bindings = []
    for binding in kernel.bindings:
        buffer = device.buffer(arrays[binding.name].nbytes, name=binding.name)
        buffer.write(arrays[binding.name])
        bindings.append(Binding(buffer, 0, None, FORMATS[repr(binding.dtype)] if binding.kind == "texel" else None))
    pipeline = device.pipeline(kernel.name, kernel.spirv(), tuple(b.kind for b in kernel.bindings), kernel.push_bytes)
    recording = device.recording(kernel.name)
    push = {"n_token": 1, "n_kv_head": n_kv_head, "window": WINDOW, "n_group": n_group(n_kv_head * spec.group * spec.head_dim)}
    pushed = kernel.pack_push(**{name: push[name] for name, _, _ in kernel.push})
    recording.dispatch(pipeline, bindings, (1, n_kv_head, 1), pushed)
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
    arguments.add_argument("--only", default="", help="only shapes whose name holds this")
    options = arguments.parse_args()
    with open_device() as device:
        lanes, row = device.limits.subgroup_size, device.info.kind == "cpu"
        result: dict[str, object] = {
            "device": device.info.name,
            "driver": device.info.driver_info,
            "positions": options.positions,
        }
        for name, shape in SHAPES.items():
            if options.only not in name or ("records" in shape and not (row and lanes == LANES)):
                continue
            fields = {"head_dim": 64, "lanes": lanes, "schedule": "lane_row" if row else "lane_chunk"} | shape
            n_kv_head = fields.pop("n_kv_head")
            figures = measure(device, AttentionSpec(**fields), n_kv_head, options.positions, options.repeat)
            result[name] = {key: round(value, 3) for key, value in figures.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
