"""Failing Vulkan results, injected into the dispatcher, come out as typed errors, and nothing crashes afterwards."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from glsl import DOUBLE, spirv

from vkllm.errors import DeviceError, DeviceLostError, MissingFeatureError, OutOfDeviceMemoryError
from vkllm.vk import Binding, Device, Recording, list_devices, open_device

native = pytest.importorskip("vkllm.vk._native")
OUT_OF_HOST, OUT_OF_DEVICE, INIT, LOST, NO_FEATURE, NO_DRIVER = -1, -2, -3, -4, -8, -9


def _recording(d: Device) -> Recording:
    y = d.buffer(64)
    y.write(np.zeros(16, np.float32))
    r = d.recording("chain")
    r.dispatch(d.pipeline("double", spirv(DOUBLE), ("storage",), 4), [Binding(y)], (2, 1, 1), struct.pack("<I", 16))
    r.finish()
    return r


def test_allocation_failure_tells_needed_and_available(device: Device) -> None:
    native.inject_fault("vkAllocateMemory", 1, OUT_OF_DEVICE)
    with pytest.raises(OutOfDeviceMemoryError, match=r"weights.*vkAllocateMemory.*needed 1\.0 MiB.*available") as e:
        device.buffer(1 << 20, name="weights")
    assert e.value.needed >= 1 << 20
    assert e.value.available
    assert device.buffer(1 << 20).nbytes == 1 << 20


def test_the_nth_call_fails(device: Device) -> None:
    native.inject_fault("vkAllocateMemory", 3, OUT_OF_DEVICE)
    device.buffer(64)
    device.buffer(64)
    with pytest.raises(OutOfDeviceMemoryError):
        device.buffer(64)


@pytest.mark.parametrize("call", ["vkCreateBuffer", "vkBindBufferMemory", "vkMapMemory"])
def test_buffer_failures(device: Device, call: str) -> None:
    native.inject_fault(call, 1, OUT_OF_HOST)
    with pytest.raises(OutOfDeviceMemoryError, match=call):
        device.buffer(64, host=True)


@pytest.mark.parametrize(
    "call", ["vkCreateDescriptorSetLayout", "vkCreatePipelineLayout", "vkCreateShaderModule", "vkCreateComputePipelines"]
)
def test_pipeline_failures(device: Device, call: str) -> None:
    native.inject_fault(call, 1, NO_FEATURE)
    with pytest.raises(MissingFeatureError, match=f"compiling fresh.*{call}"):
        device.pipeline("fresh", spirv(DOUBLE), ("storage",), 4, ((9, 1),))


@pytest.mark.parametrize("call", ["vkCreateCommandPool", "vkAllocateCommandBuffers", "vkCreateQueryPool", "vkBeginCommandBuffer"])
def test_recording_failures(device: Device, call: str) -> None:
    native.inject_fault(call, 1, OUT_OF_DEVICE)
    with pytest.raises(OutOfDeviceMemoryError, match=call):
        device.recording("r", timestamps=1)


@pytest.mark.parametrize("call", ["vkCreateDescriptorPool", "vkAllocateDescriptorSets", "vkEndCommandBuffer"])
def test_dispatch_failures(device: Device, call: str) -> None:
    device.pipeline("double", spirv(DOUBLE), ("storage",), 4)
    native.inject_fault(call, 1, OUT_OF_DEVICE)
    with pytest.raises(OutOfDeviceMemoryError, match=call):
        _recording(device)


@pytest.mark.parametrize("call", ["vkCreateFence", "vkQueueSubmit"])
def test_a_failed_submit_can_be_repeated(device: Device, call: str) -> None:
    r = _recording(device)
    native.inject_fault(call, 1, OUT_OF_DEVICE)
    with pytest.raises(OutOfDeviceMemoryError, match=f"submitting 'chain': {call}"):
        r.run()
    r.run()


@pytest.mark.parametrize("call", ["vkQueueSubmit", "vkDeviceWaitIdle"])
def test_a_lost_device_refuses_work(device: Device, call: str) -> None:
    d = open_device(device.info.index)
    r = _recording(d)
    native.inject_fault(call, 1, LOST)
    with pytest.raises(DeviceLostError, match=call):
        r.run() if call == "vkQueueSubmit" else d.wait_idle()
    assert d.lost
    for use in (r.run, lambda: d.buffer(64), lambda: d.recording(), d.wait_idle):
        with pytest.raises(DeviceLostError, match="was lost before"):
            use()
    d.close()


def test_device_lost_while_waiting(device: Device) -> None:
    d = open_device(device.info.index)
    r = _recording(d)
    r.submit()
    device.wait_idle()
    d.wait_idle()  # the fence may go when the fault pretends that the device is lost
    native.inject_fault("vkWaitForFences", 1, LOST)
    with pytest.raises(DeviceLostError, match="waiting for 'chain': vkWaitForFences"):
        r.wait()
    assert d.lost
    d.close()


@pytest.mark.parametrize(
    ("call", "nth", "result", "error"),
    [
        ("vkCreateInstance", 1, INIT, DeviceError),
        ("vkCreateInstance", 2, OUT_OF_HOST, OutOfDeviceMemoryError),  # the second one is Kompute's
        ("vkEnumeratePhysicalDevices", 1, OUT_OF_HOST, OutOfDeviceMemoryError),
        ("vkEnumeratePhysicalDevices", 3, OUT_OF_HOST, OutOfDeviceMemoryError),
        ("vkCreateDevice", 1, NO_FEATURE, MissingFeatureError),
        ("vkCreateDevice", 1, INIT, DeviceError),
        ("vkCreatePipelineCache", 1, OUT_OF_HOST, OutOfDeviceMemoryError),
    ],
)
def test_opening_failures(device: Device, tmp_path: Path, call: str, nth: int, result: int, error: type[DeviceError]) -> None:
    native.inject_fault(call, nth, result)
    with pytest.raises(error, match=call):
        open_device(device.info.index, cache_dir=tmp_path)
    native.inject_fault("", 0, 0)
    open_device(device.info.index).close()


def test_a_cache_that_the_driver_refuses_is_dropped(device: Device, tmp_path: Path) -> None:
    with open_device(device.info.index, cache_dir=tmp_path) as d:
        d.pipeline("double", spirv(DOUBLE), ("storage",), 4)
    native.inject_fault("vkCreatePipelineCache", 1, INIT)
    with open_device(device.info.index, cache_dir=tmp_path) as d:
        d.pipeline("double", spirv(DOUBLE), ("storage",), 4)


def test_no_driver_is_an_empty_list(device: Device) -> None:
    native.inject_fault("vkCreateInstance", 1, NO_DRIVER)
    assert list_devices() == []
