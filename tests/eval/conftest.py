"""Models and the text of these tests: the packaged model in other types, and how long the chunks are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vkllm.files import open_model
from vkllm.quantize.convert import Plan, write_model
from vkllm.quantize.mixes import file_type

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _with_a_device(device: object) -> None:
    """Nearly all of these tests run a model: they skip where no device is."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny("Q4_K_M"): the packaged model in that type, made once."""
    folder = tmp_path_factory.mktemp("tiny")

    def make(kind: str) -> Path:
        path = folder / f"tiny-{kind}.gguf"
        if not path.exists():
            with open_model("tiny") as file:
                write_model(Plan.of(file, file_type(kind), allow_requantize=True), path)
        return path

    return make
