"""Writes llama_tokenize.json: what llama.cpp's llama-tokenize makes of TEXTS, with every vocabulary of vocabularies.py.

    PYTHONPATH=tests/text python tests/text/pin_llama_tokenize.py path/to/llama-tokenize

Special tokens are parsed and added, as llama-tokenize does by default.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from vocabularies import OTHERS, TEXTS, byte_level

from vkllm.vocab.splits import PRE_TOKENIZERS

OUT = Path(__file__).with_name("llama_tokenize.json")


def write(path: Path, metadata: Mapping[str, object]) -> None:
    """A GGUF file with a vocabulary and nothing else."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def ids(program: str, metadata: Mapping[str, object]) -> list[list[int]]:
    """What llama-tokenize prints for each text."""
    with tempfile.TemporaryDirectory() as folder:
        model, prompt = Path(folder, "vocab.gguf"), Path(folder, "prompt.txt")
        write(model, metadata)
        found = []
        for text in TEXTS:
            prompt.write_bytes(text.encode())
            command = [program, "-m", str(model), "-f", str(prompt), "--ids"]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    return found


def main(program: str) -> None:
    """Pre-tokenizers with the same ids share an entry."""
    pinned: list[dict[str, list[Any]]] = [{"names": [name], "ids": ids(program, metadata)} for name, metadata in OTHERS.items()]
    for name in PRE_TOKENIZERS:
        if name not in ("gpt2", "gemma4"):  # our own other spelling; not byte-level
            found = ids(program, byte_level(name))
            same = next((entry for entry in pinned[len(OTHERS) :] if entry["ids"] == found), None)
            if same:
                same["names"].append(name)
            else:
                pinned.append({"names": [name], "ids": found})
    OUT.write_text("[\n" + ",\n".join(_lines(entry) for entry in pinned) + "\n]\n")


def _lines(entry: dict[str, list[Any]]) -> str:
    """An entry as JSON, a text a line."""
    rows = ",\n".join(f"  {json.dumps(row, separators=(',', ':'))}" for row in entry["ids"])
    return f' {{"names": {json.dumps(entry["names"])}, "ids": [\n{rows}]}}'


if __name__ == "__main__":
    main(sys.argv[1])
