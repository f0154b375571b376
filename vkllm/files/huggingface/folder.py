"""A Hugging Face folder as a model file: config.json, tokenizer.json and safetensors, presented as if they were GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vkllm.errors import FileFormatError
from vkllm.files.huggingface.checkpoint import Checkpoint, inside, refuse_unfinished
from vkllm.files.huggingface.config import HFConfig
from vkllm.files.huggingface.json_file import read
from vkllm.files.huggingface.tensors import Recipe, make, recipes
from vkllm.files.huggingface.vocabulary import TokenizerFiles, metadata
from vkllm.files.model_file import TensorInfo

CONFIG, TOKENIZER, TEMPLATE = "config.json", "tokenizer.json", "chat_template.jinja"
MAX_TEMPLATE_BYTES = 1 << 20
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}
MXFP4_FILE_TYPE = 38
"""GGUF's general.file_type, by the type of most weights; of one with MXFP4 experts."""


class HuggingFaceFolder:
    """An open folder. Make one with `open`; use it as a context manager, or call `close`."""

    def __init__(self, path: Path, pairs: Mapping[str, object], checkpoint: Checkpoint, tensors: Mapping[str, Recipe]) -> None:
        self.path = path
        self.nbytes = checkpoint.nbytes
        self.format = "safetensors" if checkpoint.n_file == 1 else f"safetensors, {checkpoint.n_file} files"
        self.metadata: Mapping[str, object] = MappingProxyType(dict(pairs))
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType({name: r.info for name, r in tensors.items()})
        self._checkpoint, self._recipes = checkpoint, dict(tensors)

    @classmethod
    def open(cls, path: str | Path) -> HuggingFaceFolder:
        """Map the weights and read everything else.

        Raises: FileFormatError, ConfigError: a file is missing, damaged, contradicts another, or leads out of the folder;
        UnsupportedModelError: an architecture, tokenizer or type that we cannot run, or pickle files only.
        """
        path = Path(path)
        folder = path.resolve()
        raw = read(_required(folder, CONFIG))
        config = HFConfig(raw)
        checkpoint = Checkpoint.open(folder)
        try:
            tensors = recipes(config, checkpoint)
            general = {"general.name": _name(folder), "general.file_type": _file_type(tensors)}
            text = metadata(_tokenizer_files(folder, raw), config.n_vocab)
            return cls(path, config.metadata() | general | text, checkpoint, tensors)
        except BaseException:
            checkpoint.close()
            raise

    def data(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, uint8 [n_row, row_bytes], read-only: mapped where conversion changes nothing, else made.

        Raises: FileFormatError: no such tensor, or the folder is closed.
        """
        return make(self._recipe(name), self._checkpoint)

    def release(self, name: str) -> None:
        """Tell the kernel that the pages of a tensor will not be needed soon. Views stay valid."""
        for source in self._recipe(name).sources:
            self._checkpoint.release(source)

    def close(self) -> None:
        """Unmap all files. Views that are still alive stay valid."""
        self._checkpoint.close()

    def __enter__(self) -> HuggingFaceFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _recipe(self, name: str) -> Recipe:
        recipe = self._recipes.get(name)
        if recipe is None:
            raise FileFormatError(
                f"{self.path.name} holds no tensor {name}", hint="the folder is incomplete or of another architecture"
            )
        return recipe


def _required(folder: Path, name: str) -> Path:
    path = inside(folder, name)
    if path.is_file():
        return path
    refuse_unfinished(folder, name)
    hint = "download the folder again, all its files"
    if name == TOKENIZER and (folder / "tokenizer.model").exists():
        hint = "save it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    raise FileFormatError(f"{folder.name} holds no {name}", hint=hint)


def _optional(folder: Path, name: str) -> dict[str, Any]:
    path = inside(folder, name)
    return read(path) if path.is_file() else {}


def _tokenizer_files(folder: Path, config: Mapping[str, Any]) -> TokenizerFiles:
    text = config.get("text_config")
    return TokenizerFiles(
        tokenizer=read(_required(folder, TOKENIZER)),
        config=_optional(folder, "tokenizer_config.json"),
        special=_optional(folder, "special_tokens_map.json"),
        model_config={**config, **(text if isinstance(text, dict) else {})},
        generation=_optional(folder, "generation_config.json"),
        template=_chat_template(folder),
    )


def _chat_template(folder: Path) -> str | None:
    path = inside(folder, TEMPLATE)
    if not path.is_file():
        return None
    size = path.stat().st_size
    if size > MAX_TEMPLATE_BYTES:
        raise FileFormatError(f"{TEMPLATE} has {size} bytes; the limit is {MAX_TEMPLATE_BYTES}", hint="download it again")
    return path.read_bytes().decode("utf-8", "replace")


def _name(folder: Path) -> str:
    """The model's name: the folder's, or the repository's in Hugging Face's cache (models--ORG--NAME/snapshots/REVISION)."""
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


def _file_type(tensors: Mapping[str, Recipe]) -> int:
    nbytes: dict[str, int] = {}
    for recipe in tensors.values():
        nbytes[recipe.info.type] = nbytes.get(recipe.info.type, 0) + recipe.info.nbytes
    if "MXFP4" in nbytes:
        return MXFP4_FILE_TYPE
    return FILE_TYPES[max(nbytes, key=lambda kind: nbytes[kind])]
