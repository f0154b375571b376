"""Lets the tests of this folder import their shared helpers: `from hf_folders import write_folder`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
