"""Speed of the matmul kernels on a device: matvec in GB/s of ggml bytes, prefill in GFLOP/s. Ends in one JSON line.

python bench/kernels.py --fmt Q5_0,Q4_K --tile 1,8 --rows 4864 --cols 896 [--activations int8] [--repeat 20]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from typing import Any

import numpy as np

from vkllm.vk import Binding, Buffer, Device, open_device
from vkllm_shaders.formats import FORMATS, Layout, coded_of, pack, packed_nbytes, row_order
from vkllm_shaders.matmul import MatmulSpec, matmul
from vkllm_shaders.records import n_group, record_nbytes, squares_stride

TEXEL = {"u32x4": "rgba32ui", "f32x4": "rgba32f"}


def random_rows(fmt: str, n_row: int, n_col: int) -> np.ndarray:
    """Random numbers, or bits: the speed does not depend on them as long as they are finite and not denormal."""
    f, rng = FORMATS[fmt], np.random.default_rng(0)
    if f.n_sub == 0:
        values = rng.standard_normal((n_row, n_col), dtype=np.float32)
        if fmt == "BF16":
            return np.ascontiguousarray(values.view(np.uint16)[:, 1::2]).view(np.uint8)
        return values.astype(np.float16 if fmt == "F16" else np.float32).view(np.uint8)
    blocks = rng.integers(0, 60, (n_row, n_col // f.block, f.block_bytes), dtype=np.uint8)
    if fmt == "MXFP4":
        blocks[..., 0] += 90  # exponents
    return blocks.reshape(n_row, -1)


def filled(device: Device, data: np.ndarray, huge: bool = False) -> Buffer:
    buffer = device.buffer(data.nbytes, host=True)
    if huge:  # ask for 2 MiB pages before the first touch (lavapipe's memory is the process's own)
        start = -(-buffer.view().ctypes.data // 4096) * 4096
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(data.nbytes - 4096), 14)
    buffer.write(data)
    return buffer


def measure(
    device: Device, spec: MatmulSpec, n_row: int, n_col: int, n_token: int, repeat: int, copies: int = 0, huge: bool = False
) -> dict[str, Any]:
    """The best of `repeat` runs, each of enough dispatches over distinct weights to miss the caches."""
    f = FORMATS[spec.fmt]
    n_rows = (n_row // 2, n_row // 2) if spec.epilogue == "swiglu" else (n_row,)
    order = row_order(spec.epilogue, spec.layout, n_rows)
    ggml_bytes = n_row * f.row_bytes(n_col)
    copies = copies or (max(1, min(64, (96 << 20) // ggml_bytes)) if n_token == 1 else 1)
    packed = np.zeros(packed_nbytes(f, len(order), n_col, spec.layout), np.uint8)
    t0 = time.perf_counter()
    pack(f, random_rows(spec.fmt, n_row, n_col), n_col, spec.layout, packed, order)
    pack_s = time.perf_counter() - t0
    width, rng = -(-n_col // 64) * 64, np.random.default_rng(1)
    if spec.from_records:
        x = rng.integers(0, 1 << 32, (record_nbytes(n_token, n_col) // 16, 4), dtype=np.uint32)
        x[:, 1::2] = np.float32(0.01).view(np.uint32)  # scales
    else:
        x = np.zeros((n_token, width), np.float32)
        x[:, :n_col] = rng.standard_normal((n_token, n_col))
    weights = [filled(device, packed, huge) for _ in range(copies)]
    shared = {
        "x": filled(device, x),
        "norm_w": filled(device, np.ones(width, np.float32)),
        "squares": filled(device, np.ones((n_token, squares_stride(n_col)), np.float32)),
        "y": device.buffer(4 * n_token * n_row, host=True),
    }
    t0 = time.perf_counter()
    kernel = matmul(spec)
    code = kernel.spirv()
    trace_s = time.perf_counter() - t0
    pipeline = device.pipeline(kernel.name, code, tuple(b.kind for b in kernel.bindings), kernel.push_bytes)
    values = {
        "n_chunk": (coded_of(spec.fmt) if spec.from_records else f).n_chunk(n_col),
        "n_group": spec.layout.n_group(len(order)),
        "x_stride": n_group(n_col) if spec.from_records else width // 4,
        "squares_stride": squares_stride(n_col) // 4,
        "n_token": n_token,
        "n_row": n_rows[0],
        "first_row": 0,
        "y_stride": n_rows[0],
        "n_col": n_col,
        "eps": 1e-6,
    }
    push = kernel.pack_push(**{name: values[name] for name, _, _ in kernel.push})
    recording = device.recording()
    for w in weights:
        bindings = [
            Binding(w if b.name == "w" else shared[b.name], format=TEXEL[str(b.dtype)] if b.kind == "texel" else None)  # type: ignore[arg-type]
            for b in kernel.bindings
        ]
        recording.dispatch(pipeline, bindings, spec.groups(len(order), n_token), push)
    recording.finish()
    t0 = time.perf_counter()
    recording.run()
    first_s = time.perf_counter() - t0
    best = cpu = 1e9
    for _ in range(repeat):
        t0, c0 = time.perf_counter(), time.process_time()
        recording.run()
        best, cpu = min(best, time.perf_counter() - t0), min(cpu, time.process_time() - c0)
    for buffer in [*weights, *shared.values()]:
        buffer.free()
    return {
        "kernel": kernel.name,
        "n_row": n_row,
        "n_col": n_col,
        "n_token": n_token,
        "gb_s": round(copies * ggml_bytes / best / 1e9, 2),
        "cpu_gb_s": round(copies * ggml_bytes / cpu / 1e9, 2),
        "cpu_gflop_s": round(2 * copies * n_row * n_col * n_token / cpu / 1e9, 1),
        "gflop_s": round(2 * copies * n_row * n_col * n_token / best / 1e9, 1),
        "dispatch_us": round(best / copies * 1e6, 1),
        "trace_ms": round(trace_s * 1e3),
        "first_run_ms": round((first_s - best) * 1e3),
        "pack_gb_s": round(ggml_bytes / pack_s / 1e9, 2),
        "spirv_bytes": len(code),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fmt", default="Q5_0,Q8_0,Q4_K,Q6_K,F16")
    parser.add_argument("--tile", default="1,8")
    parser.add_argument("--tokens", type=int, default=0, help="tokens of a dispatch; default: 1 for tile 1, else 64")
    parser.add_argument("--rows", type=int, default=4864)
    parser.add_argument("--cols", type=int, default=0, help="default: 896, or 1024 for K-quants")
    parser.add_argument("--lane-rows", type=int, default=4)
    parser.add_argument("--copies", type=int, default=0, help="distinct weights; default: enough to miss the caches")
    parser.add_argument("--side-by-side", type=int, default=2, help="row groups a workgroup takes together (int8, tile 1)")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--activations", default="f32")
    parser.add_argument("--epilogue", default="store")
    parser.add_argument("--huge", action="store_true", help="2 MiB pages for the weights")
    parser.add_argument("--norm", action="store_true")
    parser.add_argument("--schedule", default="lane_row")
    args = parser.parse_args()
    device = open_device()
    pair = args.schedule == "lane_row" and args.activations == "int8"
    layout = Layout("lane_chunk", 1, args.lane_rows)
    if args.schedule == "lane_row":
        layout = Layout("lane_pair") if pair else Layout("lane_row", device.limits.subgroup_size, args.lane_rows)
    results = []
    for fmt in args.fmt.split(","):
        n_col = args.cols or (1024 if FORMATS[fmt].block == 256 else 896)
        for tile in map(int, args.tile.split(",")):
            spec = MatmulSpec(
                fmt,
                layout,
                tile,
                norm=args.norm,
                epilogue=args.epilogue,
                activations=args.activations,
                side_by_side=args.side_by_side if pair and tile == 1 else 1,
                subgroup=device.limits.subgroup_size,
            )
            n_token = args.tokens or (1 if tile == 1 else 64 // tile * tile)
            result = measure(device, spec, args.rows, n_col, n_token, args.repeat, args.copies, args.huge)
            results.append(result)
            print(
                f"{result['kernel']:60} {result['gb_s']:7.2f} GB/s {result['gflop_s']:7.1f} GFLOP/s "
                f"{result['dispatch_us']:9.1f} µs  "
                f"per CPU second {result['cpu_gb_s']:6.2f} GB {result['cpu_gflop_s']:6.1f} GFLOP  "
                f"trace {result['trace_ms']} ms, JIT {result['first_run_ms']} ms, pack {result['pack_gb_s']} GB/s",
                flush=True,
            )
    print(json.dumps({"device": device.info.name, "driver": device.info.driver_info, "results": results}))


if __name__ == "__main__":
    main()
