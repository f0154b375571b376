"""The files that `vkllm import` writes against llama-quantize's: types and bytes, pinned for where that program is not.

`python tests/quantize/pins.py PATH/TO/llama-quantize` made the pins (llama.cpp of ggml 0.25.3).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from made_models import MODELS, write_model
from pins import LETTERS, PINS, bytes_of, types_of

from vkllm.files import GGUFFile, packaged_models
from vkllm.quantize.convert import Plan
from vkllm.quantize.convert import write_model as convert
from vkllm.quantize.mixes import FILE_TYPES, Model, choose_types

PEER = os.environ.get("VKLLM_LLAMA_QUANTIZE") or shutil.which("llama-quantize") or ""
COMPLETION = Path(PEER).with_name("llama-completion") if PEER else Path()
pinned = json.loads(PINS.read_text())


def imported(source: Path, kind: str, out: Path) -> Path:
    with GGUFFile.open(source) as file:
        convert(Plan.of(file, FILE_TYPES[kind], allow_requantize=True), out, force=True)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_gets_the_type_that_llama_quantize_chooses(name: str, tmp_path: Path) -> None:
    with GGUFFile.open(write_model(tmp_path / "f16.gguf", MODELS[name])) as file:
        model = Model.from_metadata(file.metadata)
        for kind, target in FILE_TYPES.items():
            chosen = choose_types(file.tensors, model, target)
            assert len(chosen) == len(file.tensors)
            wrong = [
                f"{tensor}: {ours}, pinned {letter}"
                for (tensor, ours), letter in zip(chosen.items(), pinned[name][kind], strict=True)
                if LETTERS[ours] != letter
            ]
            assert wrong == [], kind


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_the_packaged_model_comes_out_byte_for_byte(kind: str, tmp_path: Path) -> None:
    out = imported(packaged_models()["tiny"], kind, tmp_path / "out.gguf")
    assert (types_of(out), bytes_of(out)) == (pinned["tiny"][kind], pinned["tiny"][f"{kind} bytes"])


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_zeros_constants_lone_and_vanishing_weights_come_out_byte_for_byte(kind: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "f16.gguf", MODELS["edges"])
    assert bytes_of(imported(source, kind, tmp_path / "out.gguf")) == pinned["edges"][f"{kind} bytes"]


@pytest.mark.skipif(not Path(PEER).is_file(), reason="llama-quantize is not here (VKLLM_LLAMA_QUANTIZE may name it)")
@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K_L", "Q4_K_M", "Q5_K_S", "Q6_K", "Q5_1", "BF16"])
def test_whole_files_equal_those_of_the_llama_quantize_that_is_here(kind: str, tmp_path: Path) -> None:
    source, theirs = write_model(tmp_path / "f16.gguf", MODELS["edges"]), tmp_path / "theirs.gguf"
    subprocess.run([PEER, source, theirs, kind, "1"], check=True, capture_output=True)
    assert imported(source, kind, tmp_path / "ours.gguf").read_bytes() == theirs.read_bytes()


@pytest.mark.skipif(not COMPLETION.is_file(), reason="llama-completion is not beside llama-quantize")
def test_llama_cpp_runs_what_we_write(tmp_path: Path) -> None:
    model = imported(packaged_models()["tiny"], "Q4_K_M", tmp_path / "q4.gguf")
    command = [COMPLETION, "-m", model, "-p", "Once upon a time", "-n", "4", "--temp", "0", "-no-cnv", "-t", "2"]
    done = subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, text=True, timeout=120)
    assert "Once upon a time, there" in done.stdout
