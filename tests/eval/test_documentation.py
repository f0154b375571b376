"""The Python in docs/import.md and docs/perplexity.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize(("name", "shown"), [("import.md", "Q4_K\n"), ("perplexity.md", " ± ")])
def test_the_example_runs(
    name: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # the example writes a file
    for code in re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.S):
        exec(compile(code, name, "exec"), {})
    assert shown in capsys.readouterr().out
