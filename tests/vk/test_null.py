"""The null device keeps commands and checks like a real one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vkllm.errors import MissingFeatureError
from vkllm.vk import BarrierCommand, Binding, CopyCommand, DispatchCommand, NullDevice, TimestampCommand


def test_commands_are_kept(null_device: NullDevice) -> None:
    d = null_device
    x, y = d.buffer(100, name="x"), d.buffer(4096)
    assert x.nbytes == 112
    p = d.pipeline("k", b"spirv", ("storage", "texel"), 4)
    assert p is d.pipeline("k", b"spirv", ("storage", "texel"), 4)
    r = d.recording("chain", timestamps=1)
    bindings = (Binding(x), Binding(y, format="rgba32f"))
    r.dispatch(p, bindings, (2, 1, 1), b"1234")
    r.barrier()
    r.copy(x, y, 16, dst_offset=32)
    assert r.timestamp() == 0
    r.finish()
    assert r.commands == [
        DispatchCommand(p, bindings, (2, 1, 1), b"1234"), BarrierCommand(), CopyCommand(x, y, 16, 0, 32), TimestampCommand(0),
    ]  # fmt: skip
    r.run()
    r.run()
    assert r.runs == 2
    assert r.timestamps_us() == [0.0]
    assert d.recordings == [r]


def test_buffers_hold_data(null_device: NullDevice) -> None:
    b = null_device.buffer(64)
    b.write(np.arange(4, dtype=np.float32), offset=16)
    assert b.view(np.float32)[5] == 1
    assert b.read(8, 16, np.float32).tolist() == [0, 1]
    with pytest.raises(ValueError, match="outside"):
        b.write(np.zeros(65, np.uint8))


def test_checks(null_device: NullDevice) -> None:
    p = null_device.pipeline("k", b"", ("texel",), 0)
    b = null_device.buffer(1 << 21)
    small = NullDevice(limits=replace(null_device.limits, max_texel_elements=1 << 16))
    with pytest.raises(ValueError, match=r"131072 texels, at most 65536: split it by rows"):
        small.recording().dispatch(p, [Binding(b, format="rgba32ui")], (1, 1, 1))
    q = null_device.pipeline("s", b"", ("storage",), 0)
    with pytest.raises(ValueError, match=r"134217744 bytes, at most 134217728: split it by rows"):
        null_device.recording().dispatch(q, [Binding(null_device.buffer((1 << 27) + 1))], (1, 1, 1))
    with pytest.raises(ValueError, match="expected one of"):
        null_device.recording().dispatch(p, [Binding(b)], (1, 1, 1))
    with pytest.raises(MissingFeatureError, match="coopmat"):
        null_device.pipeline("gemm", b"", (), features=frozenset({"coopmat"}))
