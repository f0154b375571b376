"""Small GLSL shaders for the device tests, compiled by glslang: these tests stand without our own compiler."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest

# y[i] = y[i] * 2 + 1
DOUBLE = """#version 450
layout(local_size_x = 8) in;
layout(binding = 0) buffer Y { float y[]; };
layout(push_constant) uniform P { uint n; };
void main() { uint i = gl_GlobalInvocationID.x; if (i < n) y[i] = y[i] * 2.0 + 1.0; }
"""

# y[i] = x[i] + 1, with x read-only: the layer is silent about write-after-write through the same kind of storage binding.
INCREMENT = """#version 450
layout(local_size_x = 8) in;
layout(binding = 0) readonly buffer X { float x[]; };
layout(binding = 1) writeonly buffer Y { float y[]; };
void main() { uint i = gl_GlobalInvocationID.x; y[i] = x[i] + 1.0; }
"""

# y[i] = w[i].y * s + x[i].x * K: one binding of each kind, push and specialization constants.
KINDS = """#version 450
layout(local_size_x_id = 0) in;
layout(constant_id = 1) const uint K = 3;
layout(constant_id = 2) const float F = 0.0;
layout(binding = 0, rgba32ui) uniform readonly uimageBuffer w;
layout(binding = 1) uniform samplerBuffer x;
layout(binding = 2) buffer Y { float y[]; };
layout(push_constant) uniform P { uint n; float s; };
void main() {
    uint i = gl_GlobalInvocationID.x;
    if (i < n) y[i] = float(imageLoad(w, int(i)).y) * s + texelFetch(x, int(i)).x * K + F;
}
"""

# Spins for `n` turns, so that a wait has something to wait for. (lavapipe ends every loop after 65,535 turns.)
SPIN = """#version 450
layout(local_size_x = 8) in;
layout(binding = 0) buffer Y { uint y[]; };
layout(push_constant) uniform P { uint n; };
void main() {
    uint v = gl_GlobalInvocationID.x;
    for (uint i = 0; i < n; i++) v = v * 1664525u + y[v % 8u];
    y[8u + gl_GlobalInvocationID.x] = v;
}
"""


@lru_cache
def spirv(source: str) -> bytes:
    """Compile; skips the test where glslang is missing."""
    tool = shutil.which("glslangValidator")
    if tool is None:
        pytest.skip("glslangValidator is not there: install glslang-tools")
    with tempfile.TemporaryDirectory() as folder:
        text, out = Path(folder, "a.comp"), Path(folder, "a.spv")
        text.write_text(source)
        subprocess.run([tool, "-V", "--target-env", "vulkan1.1", text, "-o", out], check=True, capture_output=True)
        return out.read_bytes()
