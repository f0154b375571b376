"""Lets the tests of this folder import their shared helper: `from command import vkllm`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
