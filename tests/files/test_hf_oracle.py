"""Every architecture against llama.cpp's own converter: random small models of transformers, tensors bit for bit.

Needs VKLLM_LLAMA_CPP, the folder of llama.cpp's sources, and torch, transformers, sentencepiece and protobuf, here or in the
Python that VKLLM_HF_PYTHON names. Takes about 10 s.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hf_oracle import BYTE_LEVEL, MODELS, TOKENS, VARIANTS

from vkllm.config import ModelConfig
from vkllm.files import GGUFFile, ModelFile, open_model
from vkllm.models import build_graph
from vkllm.reference import ReferenceExecutor
from vkllm.tokenizer import Tokenizer
from vkllm.weights import check_weights

NAMES = [*MODELS, "gptoss_mxfp4"]
NOT_OURS = {"general.name", "general.type", "general.size_label", "general.quantization_version", "tokenizer.ggml.add_sep_token"}
TEXT = "the cat of a house is not the houser: I've  1234 rivers\n\n\t<turn>ok<|end|> naïve 東京 🙂 ll"


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with NAME/ and NAME.gguf for every model."""
    here = all(find_spec(name) for name in ("torch", "transformers", "sentencepiece"))
    source, python = os.environ.get("VKLLM_LLAMA_CPP"), os.environ.get("VKLLM_HF_PYTHON", sys.executable if here else "")
    if not source or not python:
        pytest.skip("VKLLM_LLAMA_CPP is not set, or there is no torch, transformers and sentencepiece (VKLLM_HF_PYTHON)")
    out = tmp_path_factory.mktemp("oracle")
    script = Path(__file__).with_name("hf_oracle.py")
    done = subprocess.run([python, str(script), source, str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def both(converted: Path, name: str) -> tuple[ModelFile, GGUFFile]:
    return open_model(converted / name), GGUFFile.open(converted / f"{name}.gguf")


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_the_converter_s(converted: Path, name: str) -> None:
    ours, theirs = both(converted, name)
    with ours, theirs:
        assert ours.tensors.keys() == theirs.tensors.keys()
        for t in theirs.tensors.values():
            own = ours.tensors[t.name]
            assert (own.shape, own.type, own.nbytes) == (t.shape, t.type, t.nbytes), t.name
            assert np.array_equal(ours.data(t.name), theirs.data(t.name)), t.name


@pytest.mark.parametrize("name", NAMES)
def test_metadata_is_the_converter_s(converted: Path, name: str) -> None:
    """Every key of the model that it writes, with its value; more only where GGUF's default says the same."""
    ours, theirs = both(converted, name)
    with ours, theirs:
        arch = str(theirs.metadata["general.architecture"])
        wanted = {k: v for k, v in theirs.metadata.items() if k not in NOT_OURS and not k.startswith("tokenizer.")}
        assert {k: ours.metadata.get(k) for k in wanted} == wanted
        extra = {k.removeprefix(f"{arch}.") for k in ours.metadata.keys() - theirs.metadata.keys() if k.startswith(arch)}
        assert extra <= {"vocab_size", "rope.freq_base", "rope.scaling.type"}
        if name != "phi3":  # the converter leaves the type of scaling to the tensors
            one, other = ModelConfig.from_gguf(ours), ModelConfig.from_gguf(theirs)
            assert {**vars_of(one), "name": ""} == {**vars_of(other), "name": ""}
        check_weights(build_graph(ModelConfig.from_gguf(ours), ours.tensors), ours)


def vars_of(config: ModelConfig) -> dict[str, object]:
    return {field: getattr(config, field) for field in config.__dataclass_fields__}


@pytest.mark.parametrize("name", NAMES)
def test_vocabulary_is_the_converter_s(converted: Path, name: str) -> None:
    """Byte-level: key by key. SentencePiece: the converter reads tokenizer.model, we make the same of tokenizer.json."""
    ours, theirs = both(converted, name)
    with ours, theirs:
        keys = [k for k in theirs.metadata if k.startswith("tokenizer.") and k not in NOT_OURS]
        if name.removesuffix("_mxfp4") in BYTE_LEVEL:
            for key in keys:
                assert np.array_equal(np.asarray(ours.metadata[key]), np.asarray(theirs.metadata[key])), key
            return
        n = 310  # what tokenizer.model knows; two added tokens and padding follow
        for key in ("tokens", "scores", "token_type"):
            one, other = (np.asarray(f.metadata[f"tokenizer.ggml.{key}"])[3:n] for f in (ours, theirs))
            assert np.array_equal(one, other), key
        assert list(ours.metadata["tokenizer.ggml.tokens"])[n : n + 2] == ["<turn>", "<|end|>"]  # type: ignore[call-overload]
        for key in ("bos_token_id", "eos_token_id", "add_bos_token", "model", "pre"):
            assert ours.metadata.get(f"tokenizer.ggml.{key}") == theirs.metadata.get(f"tokenizer.ggml.{key}"), key


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen3", "phi3"])
def test_ids_are_transformers_own(converted: Path, name: str) -> None:
    """The `tokenizers` library on the folder's tokenizer.json is the oracle.

    But for a text that begins with a space: where tokenizer.json has Metaspace, that space serves as the prefix, in SentencePiece
    and llama.cpp there are two. Nor is there a space after special tokens.
    """
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(converted / name / "tokenizer.json"))
    with open_model(converted / name) as file:
        ours = Tokenizer.from_gguf(file.metadata)
        for text in (TEXT.replace("<turn>", "").replace("<|end|>", ""), "", "a", "\n", "the  cats\n\n of  "):
            assert ours.encode(text) == library.encode(text).ids, text


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_give_the_logits_of_transformers(converted: Path, name: str) -> None:
    """Keys that the converter does not write, understood by the graph: NMSE of the numpy reference (its cache is f16)."""
    expected = np.load(converted / f"{name}.npy").astype(np.float64)
    with open_model(converted / name) as file:
        graph = build_graph(ModelConfig.from_gguf(file), file.tensors)
        check_weights(graph, file)
        logits = ReferenceExecutor(graph, file, n_ctx=64).forward(TOKENS).astype(np.float64)
    assert np.sum((logits - expected) ** 2) <= 2e-6 * np.sum(expected**2)
