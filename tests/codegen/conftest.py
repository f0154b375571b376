"""Lets the tests of this folder import their shared helpers: `from codegen_samples import SAMPLES`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
