"""Model files: bytes on disk become metadata and mapped tensors, without a copy."""

from __future__ import annotations

from pathlib import Path

from vkllm.errors import FileFormatError
from vkllm.files.gguf import GGUFFile, TensorInfo
from vkllm.files.types import TYPES, TypeInfo

__all__ = ["TYPES", "GGUFFile", "TensorInfo", "TypeInfo", "packaged_models", "resolve_model"]

_DATA = Path(__file__).resolve().parent.parent / "data"


def packaged_models() -> dict[str, Path]:
    """Models that come with vkllm, by name."""
    return {p.stem: p for p in sorted(_DATA.glob("*.gguf"))}


def resolve_model(model: str | Path) -> Path:
    """The file that `model` names: a path, or a packaged model (`tiny`). A file of that name wins.

    Raises: FileFormatError: neither.
    """
    path = Path(model)
    if path.is_file():
        return path
    packaged = packaged_models()
    if str(model) in packaged:
        return packaged[str(model)]
    known = ", ".join(packaged) or "none"
    raise FileFormatError(f"no model file {model}", hint=f"give the path of a GGUF file, or a packaged model ({known})")
