"""Buffers, pipelines and recordings on a real device."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from glsl import DOUBLE, KINDS, SPIN, spirv

from vkllm.errors import DeviceError, DeviceLostError, MissingFeatureError, OutOfDeviceMemoryError
from vkllm.vk import Binding, Device, Recording, choose_device, list_devices, open_device
from vkllm.vk.device import STAGING_BYTES


@pytest.fixture(scope="module", params=[False, True], ids=["mapped", "staged"])
def any_device(request: pytest.FixtureRequest, device: Device) -> Iterator[Device]:
    """The device with its own memory, and with device buffers that the host cannot see."""
    if not request.param:
        yield device
        return
    with open_device(device.info.index, force_unmapped=True) as d:
        yield d


@pytest.mark.parametrize("n", [1, 7, 8, 1000])
def test_dispatch_with_every_binding_kind(any_device: Device, n: int) -> None:
    d, rng = any_device, np.random.default_rng(n)
    w, x = rng.integers(0, 100, (n, 4), dtype=np.uint32), rng.random((n, 4), dtype=np.float32)
    bw, bx, by, host = d.buffer(w.nbytes), d.buffer(x.nbytes), d.buffer(4 * n), d.buffer(4 * n, host=True)
    bw.write(w)
    bx.write(x)
    p = d.pipeline("kinds", spirv(KINDS), ("texel", "uniform_texel", "storage"), 8, ((0, 8), (1, 5), (2, 0.25)))
    r = d.recording("kinds")
    ranges = [Binding(bw, nbytes=16 * n, format="rgba32ui"), Binding(bx, nbytes=16 * n, format="rgba32f"), Binding(by)]
    r.dispatch(p, ranges, (-(-n // 8), 1, 1), struct.pack("<If", n, 2.0))
    r.barrier()
    r.copy(by, host, 4 * n)
    r.finish()
    expected = w[:, 1] * np.float32(2) + x[:, 0] * 5 + np.float32(0.25)
    for _ in range(2):
        host.write(np.zeros(n, np.float32))
        r.run()
        np.testing.assert_allclose(host.view(np.float32)[:n], expected, rtol=1e-6)
        np.testing.assert_allclose(by.read(4 * n, dtype=np.float32), expected, rtol=1e-6)


def test_chain_is_replayed_in_order(device: Device) -> None:
    y = device.buffer(4 * 100)
    p = device.pipeline("double", spirv(DOUBLE), ("storage",), 4)
    r = device.recording()
    for _ in range(10):
        r.dispatch(p, [Binding(y)], (13, 1, 1), struct.pack("<I", 100))
        r.barrier()
    y.write(np.zeros(100, np.float32))
    for run in (1, 2):
        r.run()
        assert y.read(400, dtype=np.float32).tolist() == [2.0 ** (10 * run) - 1] * 100


def test_offsets_and_ranges(device: Device) -> None:
    step = max(device.limits.storage_alignment, 64)
    y = device.buffer(4 * step)
    y.write(np.ones(step, np.float32))
    p = device.pipeline("double", spirv(DOUBLE), ("storage",), 4)
    r = device.recording()
    r.dispatch(p, [Binding(y, step, step)], (step // 32, 1, 1), struct.pack("<I", step // 4))
    r.run()
    values = y.read(dtype=np.float32).reshape(4, -1)
    assert (values[1] == 3).all()
    assert (values[[0, 2, 3]] == 1).all()


@pytest.mark.parametrize("nbytes", [1, 16, STAGING_BYTES - 4, STAGING_BYTES + 4, 3 * STAGING_BYTES + 12])
def test_staging_brings_back_what_was_written(any_device: Device, nbytes: int) -> None:
    data = np.random.default_rng(0).integers(0, 255, nbytes, dtype=np.uint8)
    b = any_device.buffer(nbytes + 8, name="staged")
    b.write(np.full(b.nbytes, 7, np.uint8))
    b.write(data, offset=4)
    got = b.read()
    assert (got[4 : 4 + nbytes] == data).all()
    assert (got[:4] == 7).all()
    assert (got[4 + nbytes :] == 7).all()
    assert (b.read(nbytes, offset=4) == data).all()


def test_mapping(any_device: Device) -> None:
    assert any_device.buffer(64, host=True).mapped
    b = any_device.buffer(64)
    if b.mapped:
        b.view(np.uint32)[3] = 5
        assert b.read(4, 12, np.uint32)[0] == 5
    else:
        with pytest.raises(ValueError, match="not mapped"):
            b.view()


def test_freed_buffers_stay_until_nothing_uses_them(device: Device) -> None:
    b, c = device.buffer(64, name="b"), device.buffer(64)
    b.write(np.arange(16, dtype=np.uint32))
    r = device.recording()
    r.copy(b, c, 64)
    view = b.view(np.uint32)
    b.free()
    b.free()
    r.run()
    assert (c.read(dtype=np.uint32) == np.arange(16)).all()
    assert view[15] == 15
    with pytest.raises(ValueError, match="freed"):
        b.read()


def test_pipelines_are_shared(device: Device) -> None:
    code = spirv(DOUBLE)
    assert device.pipeline("a", code, ("storage",), 4) is device.pipeline("a", code, ("storage",), 4)
    other = device.pipeline("k", spirv(KINDS), ("texel", "uniform_texel", "storage"), 8, ((0, 8),))
    assert other is not device.pipeline("k", spirv(KINDS), ("texel", "uniform_texel", "storage"), 8, ((0, 16),))


def test_timestamps_rise(device: Device) -> None:
    y = device.buffer(4 * 1000)
    p = device.pipeline("double", spirv(DOUBLE), ("storage",), 4)
    r = device.recording(timestamps=3)
    assert r.timestamp() == 0
    for i in (1, 2):
        r.dispatch(p, [Binding(y)], (125, 1, 1), struct.pack("<I", 1000))
        r.barrier()
        assert r.timestamp() == i
    with pytest.raises(ValueError, match="timestamp"):
        r.timestamp()
    for _ in range(3):
        r.run()
        t = r.timestamps_us()
        assert t[0] == 0
        assert 0 < t[1] < t[2]


def test_many_dispatches_need_many_descriptor_pools(device: Device) -> None:
    y = device.buffer(64)
    y.write(np.zeros(16, np.float32))
    p = device.pipeline("double", spirv(DOUBLE), ("storage",), 4)
    r = device.recording()
    for _ in range(200):
        r.dispatch(p, [Binding(y)], (1, 1, 1), struct.pack("<I", 0))
        r.barrier()
    r.run()
    assert not y.read().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"push": b"12345678"}, "8 bytes of push constants, expected 4"),
        ({"groups": (1 << 30, 1, 1)}, "workgroups, at most"),
        ({"bindings": 2}, "2 bindings, expected 1"),
        ({"offset": 1}, "no multiple of"),
        ({"nbytes": 1 << 40}, "of 1024 bytes"),
        ({"format": "rgba32f"}, "expected none"),
    ],
)
def test_wrong_dispatches_are_refused(device: Device, change: dict[str, object], message: str) -> None:
    p = device.pipeline("double", spirv(DOUBLE), ("storage",), 4)
    b = Binding(device.buffer(1024), **{k: v for k, v in change.items() if k in ("offset", "nbytes", "format")})  # type: ignore[arg-type]
    groups, push = change.get("groups", (1, 1, 1)), change.get("push", b"1234")
    with pytest.raises(ValueError, match=message):
        device.recording().dispatch(p, [b] * int(str(change.get("bindings", 1))), groups, push)  # type: ignore[arg-type]


def test_timeout_names_the_recording_and_can_be_waited_for_again(device: Device) -> None:
    r = _spin(device)
    r.submit()
    with pytest.raises(DeviceLostError, match=r"spin did not end within 1e-05 s"):
        r.wait(timeout_s=1e-5)
    r.wait()
    assert not device.lost


def test_wait_releases_the_gil(device: Device) -> None:
    r = _spin(device)
    ticks, stop = [0], threading.Event()

    def count() -> None:
        while not stop.wait(0.001):
            ticks[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    start = time.perf_counter()
    r.run()
    took, seen = time.perf_counter() - start, ticks[0]
    stop.set()
    thread.join()
    assert seen > took * 1000 / 20, f"{seen} ticks of 1 ms in {took:.3f} s"


def _spin(device: Device, groups: int = 300) -> Recording:
    y = device.buffer(4 * (8 + 8 * groups))
    y.write(np.zeros(8, np.uint32))
    r = device.recording("spin")
    r.dispatch(device.pipeline("spin", spirv(SPIN), ("storage",), 4), [Binding(y)], (groups, 1, 1), struct.pack("<I", 60000))
    r.finish()
    return r


def test_too_large_buffers_say_what_is_needed_and_available(device: Device) -> None:
    available, total = device.memory_budget()
    assert 0 < available <= total
    with pytest.raises(OutOfDeviceMemoryError, match="available") as e:
        device.require(1 << 60, "the model")
    assert e.value.needed == 1 << 60
    assert e.value.available is not None
    with pytest.raises(DeviceError, match="allocates at most"):
        device.buffer(device.limits.max_buffer_bytes + 1)


def test_missing_features_are_named(device: Device) -> None:
    code = spirv(DOUBLE)
    with pytest.raises(MissingFeatureError, match="telepathy"):
        device.pipeline("double", code, ("storage",), 4, features=frozenset({"telepathy"}))
    with pytest.raises(MissingFeatureError, match="subgroups of 4096"):
        device.pipeline("double", code, ("storage",), 4, required_subgroup_size=4096)
    with pytest.raises(MissingFeatureError, match="push constants"):
        device.pipeline("double", code, ("storage",), 4096)


def test_required_subgroup_size(device: Device) -> None:
    if "subgroup_size_control" not in device.limits.features:
        pytest.skip("no subgroup size control")
    p = device.pipeline("double", spirv(DOUBLE), ("storage",), 4, required_subgroup_size=device.limits.min_subgroup_size)
    y = device.buffer(64)
    y.write(np.zeros(16, np.float32))
    r = device.recording()
    r.dispatch(p, [Binding(y)], (2, 1, 1), struct.pack("<I", 16))
    r.run()
    assert (y.read(dtype=np.float32) == 1).all()


def test_device_choice(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VKLLM_DEVICE", raising=False)
    a = replace(device.info, index=0, name="Slow CPU", kind="cpu")
    b = replace(device.info, index=1, name="Little GPU", kind="integrated")
    c = replace(device.info, index=2, name="Big GPU", kind="discrete")
    assert choose_device([a, b, c]) is c
    assert choose_device([a, b]) is b
    assert choose_device([a, b, c], 0) is a
    assert choose_device([a, b, c], "little") is b
    monkeypatch.setenv("VKLLM_DEVICE", "gpu")
    assert choose_device([a, b, c]) is c
    assert choose_device([a, b, c], "1") is b
    with pytest.raises(DeviceError, match=r"'voodoo'[\s\S]*Little GPU"):
        choose_device([a, b, c], "voodoo")
    with pytest.raises(DeviceError, match="no Vulkan device"):
        choose_device([])


def test_list_is_stable(device: Device) -> None:
    assert [d.name for d in list_devices()] == [d.name for d in list_devices()]
    assert device.info.limits.max_storage_buffer_range >= 1 << 27


def test_lavapipe_lanes(device: Device) -> None:
    if "Mesa 22" not in device.info.driver_info or "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs Debian 12's lavapipe on a CPU with AVX-512 (Mesa 26 ignores the wish for 16)")
    code = (
        "from vkllm.vk import list_devices as l; print([d.limits.subgroup_size for d in l() if d.driver_name == 'llvmpipe'][0])"
    )
    for lanes in ("8", "16"):
        env = {k: v for k, v in os.environ.items() if not k.startswith("LP_")} | {"VKLLM_LAVAPIPE_LANES": lanes}
        assert (
            subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.strip()
            == lanes
        )


def test_imported_memory_is_used_where_it_lies(device: Device) -> None:
    alignment = device.limits.import_alignment
    if not alignment:
        pytest.skip("the device imports no host memory")
    memory = mmap.mmap(-1, 2 * alignment)
    data = np.frombuffer(memory, np.uint8)
    data[:] = 7
    found = device.import_buffer(data, alignment + 16, "imported")
    assert found is not None
    assert found.nbytes == alignment + 16
    host = device.buffer(alignment, host=True)
    r = device.recording()
    r.copy(found, host, alignment, src_offset=16)
    del data  # the buffer keeps it
    found.view()[16] = 9
    r.run()
    assert host.read(3).tolist() == [9, 7, 7]


def test_memory_that_cannot_be_imported(device: Device) -> None:
    pages = np.frombuffer(mmap.mmap(-1, 1 << 17), np.uint8)
    assert device.import_buffer(pages[16 : (1 << 16) + 16], 64) is None
    assert device.import_buffer(pages[:100], 64) is None
    assert device.import_buffer(pages[:0], 0) is None
    with open_device(device.info.index, force_unmapped=True) as unmapped:
        assert unmapped.import_buffer(pages, 64) is None


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back where glibc is")
def test_trim_gives_code_back(device: Device) -> None:
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile:"))

    x = np.arange(1000, dtype=np.uint32)
    buffer = device.buffer(x.nbytes)
    buffer.write(x)
    with open_device(device.info.index):  # drivers are loaded anew, or looked at again
        before = resident()
        device.trim()
        assert resident() < before
    np.testing.assert_array_equal(buffer.read(dtype=np.uint32), x)


@pytest.mark.parametrize("kind", ["storage", "texel"])
def test_more_buffers_than_a_kernel_may_bind_are_refused(device: Device, kind: str) -> None:
    """lavapipe would hang."""
    most = device.limits.max_storage_buffers if kind == "storage" else device.limits.max_texel_buffers
    with pytest.raises(MissingFeatureError, match=f"binds {most + 1} {kind} buffers; .* has {most}"):
        device.pipeline("many", b"", (kind,) * (most + 1), 0)
