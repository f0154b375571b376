"""What the machine can do at most: reading memory and multiplying f32, by the device and by the host's own code.

python bench/ceiling.py [--mib 256]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from vkllm.vk import Binding, Buffer, Device, Recording, open_device
from vkllm_codegen import Block, Kernel, Value, f32, texel, trace, u32, u32x4, write
from vkllm_codegen import Buffer as KernelBuffer

REGION = 4096  # texels that a workgroup reads: 64 KiB
UNROLL = 4
CHAINS, TURNS = 16, 4096  # of the multiply-add kernel: independent sums a lane, and turns of its loop
GEMM = 2048
TRIES_S = 1.5  # a figure is the best of as many tries as fit


def threads() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def ceilings(device: Device, mib: int = 256) -> dict[str, float]:
    """Best of several tries each: GB/s of reads, GFLOP/s of f32 (a multiplication and an addition are two).

    `read_gb_s`, `f32_gflop_s`: the ceiling of the device's kernels, which where it is the host's CPU is the better of both ways.
    """
    found = {
        "device_read_gb_s": device_read(device, mib << 20),
        "device_fma_gflop_s": device_fma(device),
        "host_read_gb_s": host_read(mib << 20),
        "host_gemm_gflop_s": host_gemm(),
    }
    own, host = ("device_read_gb_s", "device_fma_gflop_s"), ("host_read_gb_s", "host_gemm_gflop_s")
    on_cpu = device.info.kind == "cpu"
    read, f32_rate = (max(found[a], found[b] if on_cpu else 0.0) for a, b in zip(own, host, strict=True))
    return found | {"read_gb_s": read, "f32_gflop_s": f32_rate}


def best(work: Callable[[], object], amount: float) -> float:
    """`amount` (bytes, operations) by the shortest time, in 1e9 a second."""
    work()
    shortest, end = 1e9, time.perf_counter() + TRIES_S
    while (start := time.perf_counter()) < end:
        work()
        shortest = min(shortest, time.perf_counter() - start)
    return amount / shortest / 1e9


def read_kernel(width: int) -> Kernel:
    """Each workgroup of `width` invocations adds up REGION texels of x. Dispatch: (n_texel / REGION, 1, 1)."""

    def body(b: Block, bufs: dict[str, KernelBuffer], given: dict[str, Value]) -> None:
        start = b.workgroup_id(0) * REGION + b.local_id(0)
        sums = [b.var(u32, 0) for _ in range(UNROLL)]
        with b.range(0, REGION, step=width * UNROLL) as i:
            for j, total in enumerate(sums):
                v = bufs["x"][start + i + j * width]
                total.add((v[0] + v[1]) ^ (v[2] + v[3]))
        bufs["y"][b.workgroup_id(0) * width + b.local_id(0)] = (sums[0].get() + sums[1].get()) ^ (sums[2].get() + sums[3].get())

    return trace(f"ceiling_read_{width}", {"x": texel(u32x4), "y": write(u32)}, {}, {}, width, body)


def fma_kernel(width: int) -> Kernel:
    """CHAINS independent sums a lane, TURNS times. Dispatch: (any, 1, 1). Push: factor, addend."""

    def body(b: Block, bufs: dict[str, KernelBuffer], given: dict[str, Value]) -> None:
        sums = [b.var(f32, float(i)) for i in range(CHAINS)]
        with b.range(0, TURNS):
            for total in sums:
                total.set(b.fma(total.get(), given["factor"], given["addend"]))
        result = sums[0].get()
        for other in sums[1:]:
            result = result + other.get()
        bufs["y"][b.workgroup_id(0) * width + b.local_id(0)] = result

    return trace(f"ceiling_fma_{width}", {"y": write(f32)}, {"factor": f32, "addend": f32}, {}, width, body)


def _width(device: Device) -> int:
    """Invocations of a workgroup: one subgroup on CPUs."""
    return device.limits.subgroup_size if device.info.kind == "cpu" else 256


def _recorded(device: Device, kernel: Kernel, bindings: list[Binding], groups: int, push: bytes) -> Recording:
    pipeline = device.pipeline(kernel.name, kernel.spirv(), tuple(b.kind for b in kernel.bindings), kernel.push_bytes)
    recording = device.recording(kernel.name)
    recording.dispatch(pipeline, bindings, (groups, 1, 1), push)
    recording.barrier()
    recording.finish()
    return recording


def device_read(device: Device, nbytes: int) -> float:
    """GB/s of a kernel that streams a buffer through texel loads, each workgroup a region of its own."""
    groups, width = nbytes // 16 // REGION, _width(device)
    x, y = _filled(device, nbytes), device.buffer(groups * width * 4, name="y")
    kernel = read_kernel(width)
    run = _recorded(device, kernel, [Binding(x, format="rgba32ui"), Binding(y)], groups, b"").run
    rate = best(run, nbytes)
    x.free()
    y.free()
    return rate


def _filled(device: Device, nbytes: int) -> Buffer:
    """A buffer whose every page was written: one that was not reads as a single page of zeros."""
    buffer = device.buffer(nbytes, name="x")
    buffer.write(np.arange(nbytes // 8, dtype=np.uint64))
    return buffer


def device_fma(device: Device) -> float:
    """GFLOP/s of multiply-adds in registers."""
    width = _width(device)
    groups = 64 * threads() if device.info.kind == "cpu" else 4096
    y = device.buffer(groups * width * 4, name="y")
    kernel = fma_kernel(width)
    run = _recorded(device, kernel, [Binding(y)], groups, kernel.pack_push(factor=0.999, addend=0.001)).run
    rate = best(run, 2.0 * CHAINS * TURNS * width * groups)
    y.free()
    return rate


def host_read(nbytes: int) -> float:
    """GB/s of numpy's reductions, a part of memory for each thread."""
    parts = np.array_split(np.arange(nbytes // 8, dtype=np.int64), threads())
    with ThreadPoolExecutor(len(parts)) as pool:
        return max(best(partial(_over, pool, reduce, parts), nbytes) for reduce in (np.add.reduce, np.maximum.reduce))


def _over(pool: ThreadPoolExecutor, reduce: Callable[[np.ndarray], object], parts: list[np.ndarray]) -> None:
    list(pool.map(reduce, parts))


def host_gemm() -> float:
    """GFLOP/s of numpy's f32 matrix product, on as many threads as its BLAS takes."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((GEMM, GEMM), dtype=np.float32) for _ in range(2))
    out = np.empty_like(a)
    return best(lambda: np.matmul(a, b, out=out), 2.0 * GEMM**3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="memory to read")
    args = parser.parse_args()
    with open_device() as device:
        print(json.dumps({"device": device.info.name, "driver": device.info.driver_info, **ceilings(device, args.mib)}))


if __name__ == "__main__":
    main()
