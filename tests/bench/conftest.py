"""Lets the tests of this folder import the benchmark's modules: `from compare import figures`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
