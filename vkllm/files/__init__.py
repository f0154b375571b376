"""Model files: bytes on disk become metadata and mapped tensors, without a copy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkllm.errors import FileFormatError
from vkllm.files.gguf import GGUFFile
from vkllm.files.model_file import ModelFile, TensorInfo
from vkllm.files.split import SHARD, SplitGGUF, is_split
from vkllm.files.types import TYPES, TypeInfo

if TYPE_CHECKING:
    from vkllm.files.huggingface import HuggingFaceFolder

__all__ = [
    "TYPES",
    "GGUFFile",
    "HuggingFaceFolder",
    "ModelFile",
    "SplitGGUF",
    "TensorInfo",
    "TypeInfo",
    "open_model",
    "packaged_models",
    "resolve_model",
]

_DATA = Path(__file__).resolve().parent.parent / "data"


def packaged_models() -> dict[str, Path]:
    """Models that come with vkllm, by name."""
    return {p.stem: p for p in sorted(_DATA.glob("*.gguf"))}


def resolve_model(model: str | Path) -> Path:
    """The file or folder that `model` names: a path, or a packaged model (`tiny`). A file of that name wins.

    Raises: FileFormatError: neither.
    """
    path = Path(model)
    if path.is_file():
        return path
    packaged = packaged_models()
    if str(model) in packaged:
        return packaged[str(model)]
    if path.is_dir():
        return path
    known = ", ".join(packaged) or "none"
    raise FileFormatError(
        f"no model file {model}", hint=f"give the path of a GGUF file or a Hugging Face folder, or a packaged model ({known})"
    )


def open_model(model: str | Path) -> ModelFile:
    """Open a model: a GGUF file, any part of a split one, a Hugging Face folder, a folder with one GGUF, or a packaged name.

    Raises: FileFormatError, ConfigError: missing, damaged or contradictory; UnsupportedModelError: what we cannot run.
    """
    path = resolve_model(model)
    if path.is_dir():
        if (path / "config.json").exists() or not any(path.glob("*.gguf")):
            from vkllm.files.huggingface import HuggingFaceFolder

            return HuggingFaceFolder.open(path)
        path = _only_gguf(path)
    file = GGUFFile.open(path)
    if not is_split(file):
        return file
    file.close()
    return SplitGGUF.open(path)


def _only_gguf(folder: Path) -> Path:
    """The one GGUF model of a folder: a file, or the first part of a split one."""
    models: dict[str, Path] = {}
    for path in sorted(folder.glob("*.gguf")):
        shard = SHARD.fullmatch(path.name)
        models.setdefault(shard["stem"] if shard else path.name, path)
    if len(models) > 1:
        names = ", ".join(sorted(models))[:200]
        raise FileFormatError(f"{folder} holds {len(models)} models: {names}", hint="give the path of one")
    return next(iter(models.values()))


def __getattr__(name: str) -> Any:
    """Folders are read with libraries that take long to import: GGUF files need none of them."""
    if name == "HuggingFaceFolder":
        from vkllm.files.huggingface import HuggingFaceFolder

        return HuggingFaceFolder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
