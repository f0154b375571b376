"""Any value anywhere in a folder's JSON files: a typed error, or a model whose every tensor and token can be read."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hf_folders import CONFIG, spm_tokenizer, write_folder, write_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_vocabulary import BYTES, byte_level, template

from vkllm.config import ModelConfig
from vkllm.errors import VkllmError
from vkllm.files import open_model
from vkllm.tokenizer import Tokenizer

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 7, 3.5, 1e300, 10**400, 2**31, 2**63]),
    st.sampled_from(["", "x", "llama3", "yarn", "longrope", "sliding_attention", "BPE", "\ud800", "\0"]),
    st.sampled_from([[], {}, [None], [[]], [{}], {"type": 3}, {"type": "Sequence"}, {"rope_type": "llama3", "factor": 8.0}]),
)
ROPE = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}
FULL_CONFIG = CONFIG | {"rope_scaling": ROPE, "head_dim": 8, "sliding_window": 16, "hidden_act": "silu", "text_config": {}}
SPM = spm_tokenizer() | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}
BPE = byte_level() | {"post_processor": {"type": "Sequence", "processors": [BYTES, template("<s>", "A")]}}
BPE["model"]["vocab"] = {text: i for text, i in BPE["model"]["vocab"].items() if i < 8}
BPE["model"]["merges"] = [["a", "b"], "c d"]
BPE["added_tokens"] = BPE["added_tokens"][:2]
FILES: dict[str, dict[str, Any]] = {
    "config": FULL_CONFIG,
    "tokenizer": SPM,
    "tokenizer_config": {
        "bos_token": {"content": "<s>"},
        "chat_template": [{"name": "a", "template": "b"}],
        "add_bos_token": True,
    },
    "generation_config": {"eos_token_id": [1, 2]},
}


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in a JSON tree."""
    for key in node if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from places(node[key])


@pytest.mark.parametrize("name", [*FILES, "byte level"])
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_only_typed_errors(tmp_path: Path, name: str, draw: st.DataObject) -> None:
    tree = copy.deepcopy(BPE if name == "byte level" else FILES[name])
    for _ in range(draw.draw(st.integers(1, 3))):
        container, key = draw.draw(st.sampled_from(list(places(tree))))
        container[key] = copy.deepcopy(draw.draw(VALUES))
    folder = tmp_path / "f"
    if not folder.exists():
        write_folder(folder)
    write_json(folder / "tokenizer.json", json.loads(json.dumps(SPM)))
    write_json(folder / ("tokenizer.json" if name == "byte level" else f"{name}.json"), tree)
    try:
        with open_model(folder) as file:
            for t in file.tensors.values():
                assert file.data(t.name).nbytes == t.nbytes
            tokenizer = Tokenizer.from_gguf(file.metadata)
            ModelConfig.from_gguf(file)
            tokenizer.decode(tokenizer.encode("ab c"))
    except VkllmError as error:
        assert error.hint
