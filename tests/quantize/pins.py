"""What llama-quantize makes of the models of `made_models` and of the packaged one, as text that the tests compare with.

Types: one letter a tensor, in the file's order. Bytes: SHA-256 of all tensors' types and data.
Usage, to make them anew: python tests/quantize/pins.py PATH/TO/llama-quantize
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from made_models import MODELS, write_model

from vkllm.files import GGUFFile, packaged_models
from vkllm.quantize.mixes import FILE_TYPES

PINS = Path(__file__).with_name("llama_quantize.json")
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4")
LETTERS = dict(zip(TYPES, "fhb8ABCD23456m", strict=True))
WITH_BYTES = ("edges", "tiny")


def types_of(path: Path) -> str:
    with GGUFFile.open(path) as file:
        return "".join(LETTERS[file.tensors[name].type] for name in file.tensors)


def bytes_of(path: Path) -> str:
    digest = hashlib.sha256()
    with GGUFFile.open(path) as file:
        for name, info in file.tensors.items():
            digest.update(f"{name} {info.type} {info.shape}\n".encode())
            digest.update(file.data(name).tobytes())
    return digest.hexdigest()


def sources(folder: Path) -> dict[str, Path]:
    """The files to quantize, by name; made ones are written to `folder`."""
    made = {name: write_model(folder / f"{name}.gguf", made) for name, made in MODELS.items()}
    return made | {"tiny": packaged_models()["tiny"]}


def main(program: str) -> None:
    pins: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        for name, source in sources(Path(folder)).items():
            for kind in FILE_TYPES:
                subprocess.run([program, "--allow-requantize", source, out, kind, "1"], check=True, capture_output=True)
                pins.setdefault(name, {})[kind] = types_of(out)
                if name in WITH_BYTES:
                    pins[name][f"{kind} bytes"] = bytes_of(out)
    PINS.write_text(json.dumps(pins, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
