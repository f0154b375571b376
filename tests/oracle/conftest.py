"""Lets the tests of this folder import their shared helper: `from random_models import write_model`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
