"""The Python in the documentation runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = [
    (name, code)
    for name in ("docs/kernels.md", "README.md")
    for code in re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S)
]


@pytest.mark.parametrize(("name", "code"), BLOCKS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BLOCKS)])
def test_the_example_runs(device: object, tmp_path: Path, name: str, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.util

    file = tmp_path / "example.py"  # a file, because errors of the kernel language name one
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("example", file)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert capsys.readouterr().out
