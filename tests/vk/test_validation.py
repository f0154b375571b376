"""Does the validation layer see what we claim it sees? Two dependent dispatches with and without our barrier."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from glsl import INCREMENT, spirv

from vkllm.vk import Device

CHAIN = """
import sys
from vkllm.vk import Binding, open_device
with open_device() as d:
    x, y, z = (Binding(d.buffer(4096)) for _ in range(3))
    p = d.pipeline("increment", open(sys.argv[1], "rb").read(), ("storage", "storage"))
    r = d.recording()
    r.dispatch(p, [x, y], (1, 1, 1))
    if sys.argv[2] == "barrier":
        r.barrier()
    r.dispatch(p, [y, z], (1, 1, 1))
    r.run()
    print("done")
"""


@pytest.mark.parametrize("barrier", [True, False])
def test_barriers_are_what_orders_a_chain(device: Device, tmp_path: Path, barrier: bool) -> None:
    if "VK_INSTANCE_LAYERS" not in os.environ:
        pytest.skip("the validation layer is not installed (vulkan-validationlayers) or turned off")
    code = tmp_path / "increment.spv"
    code.write_bytes(spirv(INCREMENT))
    settings = tmp_path / "vk_layer_settings.txt"  # as for every test, but to standard output
    lines = Path(os.environ["VK_LAYER_SETTINGS_PATH"]).read_text().splitlines(keepends=True)
    settings.write_text("".join(line for line in lines if "log_filename" not in line))
    env = os.environ | {"VK_LAYER_SETTINGS_PATH": str(settings)}
    argv = [sys.executable, "-c", CHAIN, str(code), "barrier" if barrier else "none"]
    out = subprocess.run(argv, env=env, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "done" in out
    assert ("SYNC-HAZARD" in out) is not barrier, out
    if barrier:
        assert out.strip() == "done"
