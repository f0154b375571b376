"""What has been pulled. A model is a folder with `vkllm.json`, which is written last: without it, the download is incomplete.

<models>/owner--name/Q4_K_M@0123456789ab/…        the files, as the repository names them
<models>/accepted.json                            licences that were accepted, by repository and revision
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath

import platformdirs

from vkllm.errors import ConfigError, FileFormatError, RequestError

MANIFEST, ACCEPTED, LOCK = "vkllm.json", "accepted.json", ".lock"
FOLDER = "folder"
"""The variant of a model that is a whole Hugging Face folder, not one GGUF file."""
_GGUF = "gguf@"
_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")


def models_dir() -> Path:
    """Where pulled models are kept: VKLLM_MODELS_DIR, or the user's data folder."""
    return Path(os.environ.get("VKLLM_MODELS_DIR") or Path(platformdirs.user_data_dir("vkllm"), "models"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """A model that is complete. `main`: the file to open, in the folder's own names, or "" where it is the folder."""

    repo: str
    variant: str
    revision: str
    licence: str
    main: str
    nbytes: int
    pulled_at: str
    files: dict[str, str]

    @property
    def name(self) -> str:
        """How people call it: owner/name:VARIANT, without the variant for a folder."""
        return self.repo if self.variant == FOLDER else f"{self.repo}:{self.variant}"

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return entry_dir(self.repo, self.variant, self.revision)

    @property
    def path(self) -> Path:
        """What to open."""
        return self.folder / self.main


def split_name(name: str) -> tuple[str, str]:
    """owner/name[:FILE] as (owner/name, FILE or ""). Raises: RequestError: it is none."""
    repo, _, file = name.partition(":")
    parts = repo.split("/")
    if len(parts) != 2 or not all(_PART.fullmatch(p) and "--" not in p and ".." not in p for p in parts):
        raise RequestError(f"{name!r} names no repository", hint="give OWNER/NAME or OWNER/NAME:FILE, as on huggingface.co")
    return repo, file


def entry_dir(repo: str, variant: str, revision: str) -> Path:
    """The folder of one model at one revision. Its name is what a server calls the model."""
    return repo_dir(repo) / revision[:12] / (repo.partition("/")[2] if variant == FOLDER else _GGUF + variant)


def repo_dir(repo: str) -> Path:
    """The folder of all that was pulled from a repository."""
    return models_dir() / repo.replace("/", "--")


def safe_path(name: str) -> PurePosixPath:
    """A repository's file name as a relative path. Raises: FileFormatError: it would leave the folder."""
    path = PurePosixPath(name)
    odd = "\\" in name or ":" in name or any(ord(c) < 32 or ord(c) == 127 for c in name)
    if odd or not name or path.is_absolute() or ".." in path.parts or path.as_posix() != name:
        raise FileFormatError(f"the repository holds a file named {name!r}, which leaves its folder", hint="do not trust it")
    return path


def pulled() -> list[Pulled]:
    """All complete models, by name, the newest of each first."""
    found = [p for manifest in models_dir().glob(f"*--*/*/*/{MANIFEST}") if (p := _read(manifest)) is not None]
    return sorted(sorted(found, key=lambda p: p.pulled_at, reverse=True), key=lambda p: p.name.lower())


def incomplete() -> Iterator[Path]:
    """Folders of downloads that were never finished."""
    for folder in sorted(models_dir().glob("*--*/*/*")):
        if not (folder / MANIFEST).exists() and any(p.is_file() and p.name != LOCK for p in folder.rglob("*")):
            yield folder


def find(name: str) -> Pulled | None:
    """The newest pulled model of that name; a repository's only one needs no variant.

    Raises: RequestError: several variants were pulled, and the name tells none.
    """
    repo, variant = split_name(name)
    of_repo = [p for p in pulled() if p.repo.lower() == repo.lower()]
    found = [p for p in of_repo if variant.lower() in (p.variant.lower(), p.main.lower(), p.name.lower()[len(repo) + 1 :])]
    variants = sorted({p.name for p in of_repo})
    if variant or found:
        return found[0] if found else None
    if len(variants) > 1:
        raise RequestError(f"{repo} was pulled as {' and '.join(variants)}", hint="name one of them")
    return of_repo[0] if of_repo else None


def resolve(model: str) -> str:
    """The path of a pulled model, where `model` is its name; everything else as it is. A file or folder of that name wins.

    Raises: FileFormatError: it looks like a repository's name, and was not pulled, or parts of it are gone.
    """
    if os.path.exists(model) or model.count("/") != 1 or model.startswith((".", "/", "~")) or _is_file_name(model):
        return model
    try:
        split_name(model)
    except RequestError:
        return model
    found = find(model)
    if found is None:
        raise FileFormatError(f"there is no file {model}, and no model of that name was pulled", hint=f"vkllm pull {model}")
    gone = [name for name in found.files if not (found.folder / name).is_file()]
    if gone:
        raise FileFormatError(f"{found.name} lacks {gone[0]}", hint=f"vkllm pull {found.name}")
    if not was_accepted(found.repo, found.revision):
        raise ConfigError(f"the licence of {found.name} was not accepted", hint=f"vkllm pull {found.name} shows it")
    return str(found.path)


def save(model: Pulled) -> None:
    """Say that a model is complete."""
    replace_json(model.folder / MANIFEST, asdict(model))


def folders(name: str) -> list[Path]:
    """The folders of a model: all its revisions, and what was never finished. Raises: RequestError: there is none."""
    repo, variant = split_name(name)
    if (model := find(name)) is not None:
        repo, variant = model.repo, model.variant
    found = [p for p in sorted(repo_dir(repo).glob("*/*")) if variant.lower() in ("", _variant_in(p).lower())]
    if not found:
        raise RequestError(f"no model {name} was pulled", hint="`vkllm list` shows what there is")
    return found


def remove(folder: Path) -> None:
    """Delete one of `folders`."""
    (folder / MANIFEST).unlink(missing_ok=True)  # first: what is left after a failure is incomplete, not broken
    shutil.rmtree(folder)
    for above in folder.parents[:2]:  # the revision, the repository
        if not any(above.iterdir()):
            above.rmdir()


def was_accepted(repo: str, revision: str) -> bool:
    """Did someone accept this revision's licence, or need it no acceptance?"""
    return f"{repo}@{revision}" in _accepted()


def accept(repo: str, revision: str, licence: str) -> None:
    """Remember that the licence was accepted."""
    replace_json(models_dir() / ACCEPTED, {**_accepted(), f"{repo}@{revision}": licence})


def replace_json(path: Path, value: object) -> None:
    """Write a JSON file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def _accepted() -> Mapping[str, object]:
    try:
        value = json.loads((models_dir() / ACCEPTED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _variant_in(folder: Path) -> str:
    return folder.name.removeprefix(_GGUF) if folder.name.startswith(_GGUF) else FOLDER


def _is_file_name(model: str) -> bool:
    return model.lower().endswith((".gguf", ".safetensors", ".json", "/"))


def _read(manifest: Path) -> Pulled | None:
    """A manifest that is whole and lies where it says; None otherwise."""
    try:
        value = json.loads(manifest.read_text(encoding="utf-8"))
        model = Pulled(**{f.name: value[f.name] for f in fields(Pulled)})
        for name in [model.main, *model.files] if model.main else model.files:
            safe_path(name)
        same = model.folder == manifest.parent
    except (OSError, ValueError, KeyError, TypeError, AttributeError, FileFormatError):
        return None
    return model if same else None
