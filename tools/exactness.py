#!/usr/bin/env python3
"""Make docs/exactness.md: run the tests that hold vkllm to an oracle, and table the figures that they note.

Usage: tools/exactness.py [OUT.md]      needs `pip install vkllm[oracle]`; `make exactness` does all of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/oracle", "tests/shaders/test_matmul.py", "tests/eval", "tests/text", "tests/engine/test_architectures.py")
HEAD = """# Exactness: what was proved, against which oracle, with which figure

Made by `make exactness` on {day}; do not edit. Oracles are programs that others wrote. A figure at or below its limit is proved;
NMSE is |ours - theirs|² / |theirs|². Logits keep about 1e-6 from oracles in f32 because keys and values are cached in f16.
"""


def main() -> int:
    """Returns: the tests' exit status."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "exactness.md"
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, "figures.jsonl")
        command = [sys.executable, "-m", "pytest", *TESTS, "-q", "--timeout=1800"]
        status = subprocess.run(command, cwd=ROOT, env=os.environ | {"VKLLM_FIGURES": str(figures)}).returncode
        lines = figures.read_text().splitlines() if figures.exists() else []
    out.write_text(page([json.loads(line) for line in lines]))
    print(f"{out}: {len(lines)} figures, tests {'passed' if status == 0 else 'FAILED'}")
    return status


def page(figures: list[dict[str, object]]) -> str:
    """The page: a table for each file of tests."""
    files = dict.fromkeys(str(f["test"]).split("::")[0] for f in figures)
    sections = [section(name, [f for f in figures if str(f["test"]).startswith(name + "::")]) for name in files]
    return "\n".join([HEAD.format(day=date.today().isoformat()), *sections])


def section(name: str, figures: Iterable[dict[str, object]]) -> str:
    rows = [
        f"| {f['what']} | {f['oracle']} | {f['measure']} | {number(f['figure'])} | {number(f['limit'])} | {verdict(f)} |"
        for f in figures
    ]
    head = ["| what | oracle | measure | figure | limit | |", "|---|---|---|---|---|---|"]
    return "\n".join([f"## {name}", "", *head, *rows, ""])


def number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def verdict(figure: dict[str, object]) -> str:
    value, limit = figure["figure"], figure["limit"]
    assert isinstance(value, int | float) and isinstance(limit, int | float)
    return "proved" if value <= limit else "**not reached**"


if __name__ == "__main__":
    sys.exit(main())
