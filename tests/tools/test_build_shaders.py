"""What `make shaders` builds ahead: the committed list of kernels is of these sources."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import build_shaders  # noqa: E402
import pytest  # noqa: E402

OUT_OF_DATE = "shaders/catalog.txt is out of date: run `make shaders` and commit it"


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LP_NUM_THREADS", build_shaders.THREADS)


def test_the_list_is_of_these_kernels() -> None:
    """A few of each family: the same SPIR-V, and no more or fewer kernels asked for."""
    calls, listed = build_shaders.wanted({}), build_shaders.TEXT.read_text()
    assert build_shaders.header(calls) in listed, OUT_OF_DATE
    for key in sorted(calls)[::16]:
        assert build_shaders.described(build_shaders.made(calls[key])) in listed, f"{key}: {OUT_OF_DATE}"


def test_persistent_kernels_are_listed() -> None:
    """Those of the smallest model."""
    model = build_shaders.MODELS[:1]
    known = {key: build_shaders.made(recipe) for key, recipe in build_shaders.wanted({}, model).items()}
    made_of_them = {key: recipe for key, recipe in build_shaders.wanted(known, model).items() if key not in known}
    assert made_of_them
    listed = build_shaders.TEXT.read_text()
    for recipe in made_of_them.values():
        kernel = build_shaders.made(recipe)
        assert kernel.name.startswith("persistent")
        assert build_shaders.described(kernel) in listed, OUT_OF_DATE


def test_what_is_asked_for_is_what_a_chain_asks_for() -> None:
    """Decode and prefill, both schedules, the fused products of mixes."""
    names = {line for line in build_shaders.TEXT.read_text().splitlines() if line[:1].isalpha()}
    for part in ("lane_pair", "lane_chunk", "gemm_16x16x16", "gemm_plain", "_s64_", "q4_k", "_and_q6_k", "qkv_half64", "heads"):
        assert any(part in name for name in names), part
