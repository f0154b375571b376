"""The DEBUG ladder: `DEBUG=n vkllm …` tells on standard error what happens, each level with all below it.

1 device and memory · 2 every dispatch of a step: µs, GB/s · 3 the plan: dispatches and barriers as recorded ·
4 the IR of each kernel · 5 its SPIR-V
"""

from __future__ import annotations

import os
import sys


def _level() -> int:
    text = os.environ.get("DEBUG", "0")
    return int(text) if text.isdigit() else 0


LEVEL = _level()
DEVICE, DISPATCHES, PLAN, IR, SPIRV = range(1, 6)


def log(level: int, text: str) -> None:
    """Print a line when the ladder has been climbed that far."""
    if level <= LEVEL:
        print(f"DEBUG {level}: {text}", file=sys.stderr)
