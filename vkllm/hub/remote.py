"""A repository on the hub: its files, their hashes, and which of them make a model. The `huggingface_hub` library asks."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from vkllm.errors import ConfigError, FileFormatError, RequestError, UnsupportedModelError, VkllmError
from vkllm.hub.store import FOLDER, safe_path, split_name

INSTALL = "pip install 'vkllm[hub]'"
QUANT = re.compile(r"(?:^|[-._])((?:IQ|Q|TQ)[1-8]_[A-Z0-9]+(?:_[A-Z]+)*|F16|F32|BF16|MXFP4(?:_MOE)?)(?=[-._]|$)", re.IGNORECASE)
SHARD = re.compile(r"-\d{5}-of-(\d{5})$")
BESIDE = ("mmproj", "imatrix", "ggml-vocab")  # GGUF files that are no model
PREFERRED = ("Q4_K_M", "Q4_K_S", "Q5_K_M", "MXFP4", "MXFP4_MOE", "Q4_0", "Q6_K", "Q8_0", "BF16", "F16", "F32")
"""Which quantization to take where nobody says: small first, as long as it is good."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CARD_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of the repository. `digest`: sha256 of its bytes (large files), or git's sha1 of its blob."""

    name: str
    nbytes: int
    digest: str

    @property
    def is_gguf_model(self) -> bool:
        """Is it (a part of) a model in GGUF?"""
        base = PurePosixPath(self.name).name.lower()
        return base.endswith(".gguf") and not any(word in base for word in BESIDE)


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """A repository at one revision (a commit's hash). `gated`: its owners ask for consent on the hub."""

    repo: str
    revision: str
    licence: str
    licence_link: str
    gated: bool
    summary: str
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """The files of one model. `main`: the file to open, or "" for the folder."""

    variant: str
    main: str
    files: tuple[RemoteFile, ...]


def library() -> Any:
    """The `huggingface_hub` package. Raises: ConfigError: it is not installed."""
    try:
        import huggingface_hub
    except ImportError as e:
        raise ConfigError("pulling models needs the package huggingface_hub", hint=INSTALL) from e
    return huggingface_hub


def look(repo: str, revision: str | None = None) -> RemoteModel:
    """Ask the hub about a repository.

    Raises: RequestError: no such repository or revision, or it may not be read; ConfigError: no network, or no library;
    FileFormatError: it names files outside itself.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ConfigError(
            "HF_HUB_OFFLINE is set, so nothing is pulled", hint="unset it; what `vkllm list` shows works without it"
        )
    api = library().HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        info = api.model_info(repo, revision=revision, files_metadata=True, timeout=20.0)
    except Exception as e:  # the library's, and those of whichever HTTP library it uses
        raise explained(e, repo) from e
    if not re.fullmatch("[0-9a-f]{40}", info.sha or "") or split_name(info.id)[1]:
        raise FileFormatError(f"the hub answered with revision {info.sha!r} of {info.id!r}", hint="check HF_ENDPOINT")
    card = info.card_data or {}
    tags = [t.removeprefix("license:") for t in info.tags or [] if t.startswith("license:")]
    return RemoteModel(
        repo=info.id,
        revision=info.sha,
        licence=str(card.get("license_name") or card.get("license") or (tags[0] if tags else "")),
        licence_link=str(card.get("license_link") or ""),
        gated=bool(info.gated),
        summary=", ".join(str(v) for v in (info.pipeline_tag, info.library_name, _listed(card.get("base_model"))) if v),
        files=tuple(_file(s) for s in info.siblings or ()),
    )


def gated(repo: str) -> RequestError:
    """The error for files that only known users may read."""
    hint = f"ask for access at https://huggingface.co/{repo}, then log in (`hf auth login`, or the variable HF_TOKEN)"
    return RequestError(f"{repo} is gated: the hub wants to know who reads it", hint=hint)


def explained(error: Exception, repo: str) -> VkllmError:
    """What went wrong on the way to the hub, for people."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return gated(repo)
    if isinstance(error, errors.RepositoryNotFoundError):
        return RequestError(
            f"there is no repository {repo}, or it is private", hint="check the name, or log in with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return RequestError(f"{repo} has no such revision", hint="leave --revision out for the newest")
    if isinstance(error, errors.HFValidationError):
        return RequestError(f"{repo!r} names no repository", hint="give OWNER/NAME")
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        return ConfigError(f"the hub answered {error.response.status_code} for {repo}", hint="try again later")
    where = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return ConfigError(
        f"offline: {where} cannot be reached ({type(error).__name__}: {error})",
        hint="check the network; models that `vkllm list` shows work without it",
    )


def choose(remote: RemoteModel, wanted: str) -> Choice:
    """The files to fetch. `wanted`: a file's name, a quantization such as Q4_K_M, or "" for what suits most.

    Raises: RequestError: no such file, or several that fit; UnsupportedModelError: nothing that we can run.
    """
    if wanted.lower().endswith(PICKLES):
        raise UnsupportedModelError(
            f"{wanted} is a pickle, which can run any code when it is opened", hint="choose safetensors or GGUF"
        )
    models = [f for f in remote.files if f.is_gguf_model]
    if wanted:
        return _gguf(remote, models, wanted)
    folder = _folder(remote)
    if folder:
        return Choice(FOLDER, "", folder)
    for quant in PREFERRED:
        if any(_quant(f) == quant for f in models):
            return _gguf(remote, models, quant)
    if len({SHARD.sub("", PurePosixPath(f.name).stem) for f in models}) == 1:
        return _gguf(remote, models, models[0].name)
    raise _nothing(remote, models)


def _folder(remote: RemoteModel) -> tuple[RemoteFile, ...]:
    """What a Hugging Face folder needs, from the top of the repository; () where it is none."""
    top = [f for f in remote.files if "/" not in f.name]
    weights = [f for f in top if f.name.endswith(".safetensors")]
    weights = [f for f in weights if f.name.startswith("model")] or weights  # not Mistral's second copy
    if not weights or not any(f.name == "config.json" for f in top):
        return ()
    return (*weights, *(f for f in top if f.name.endswith(".json") or f.name == "chat_template.jinja"))


def _gguf(remote: RemoteModel, models: Sequence[RemoteFile], wanted: str) -> Choice:
    """One GGUF model, with all its parts."""
    exact = [f for f in models if wanted in (f.name, PurePosixPath(f.name).name)]
    found = exact or [f for f in models if _quant(f) == wanted.upper()]
    stems = {SHARD.sub("", f.name.removesuffix(".gguf")) for f in found}
    if len(stems) > 1:
        raise RequestError(f"{remote.repo} has {len(stems)} models of {wanted}: {_some(found)}", hint="name one of the files")
    if not found:
        raise _nothing(remote, models, wanted)
    stem = stems.pop()
    parts = sorted((f for f in models if SHARD.sub("", f.name.removesuffix(".gguf")) == stem), key=lambda f: f.name)
    count = SHARD.search(parts[0].name.removesuffix(".gguf"))
    if count and len(parts) != int(count[1]):
        raise FileFormatError(f"{remote.repo} lacks parts of {stem}: {len(parts)} of {int(count[1])}", hint="choose another file")
    return Choice(_quant(parts[0]) or PurePosixPath(stem).name, parts[0].name, tuple(parts))


def _nothing(remote: RemoteModel, models: Sequence[RemoteFile], wanted: str = "") -> VkllmError:
    if models:
        return RequestError(f"{remote.repo} has no {wanted or 'obvious choice'}; it has {_some(models)}", hint="give REPO:FILE")
    if any(f.name.lower().endswith(PICKLES) for f in remote.files):
        return UnsupportedModelError(
            f"{remote.repo} holds its weights as pickles only, which can run any code when they are opened",
            hint="look for a GGUF or safetensors version of it",
        )
    return UnsupportedModelError(
        f"{remote.repo} holds no GGUF model and no safetensors with a config.json", hint="choose another"
    )


def _some(files: Sequence[RemoteFile]) -> str:
    names = [f.name for f in files]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _quant(file: RemoteFile) -> str:
    """The quantization in a file's name, or ""."""
    found = QUANT.findall(SHARD.sub("", PurePosixPath(file.name).name.removesuffix(".gguf")))
    return found[-1].upper() if found else ""


def _file(sibling: Any) -> RemoteFile:
    safe_path(sibling.rfilename)
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    return RemoteFile(sibling.rfilename, int(sibling.size or 0), str(digest or ""))


def _listed(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")
