"""`pull`: ask, show the licence, check the space, fetch, and say that the model is there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from vkllm.errors import CapacityError, ConfigError
from vkllm.hub import download, licence, remote, store

SPARE_BYTES = 64 << 20
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Meter = Callable[[str, int], AbstractContextManager[download.Progress]]
"""A file's name and size to a context in which its progress is shown."""


def pull(
    name: str, *, revision: str | None = None, accepted: bool = False, show: licence.Show, ask: licence.Ask | None, meter: Meter
) -> store.Pulled:
    """Fetch a model: owner/name, with :FILE or :QUANTIZATION where the repository holds several.

    Nothing is fetched before the licence is settled; what is there already is not fetched again.
    Raises: RequestError, ConfigError, FileFormatError, UnsupportedModelError: see `remote`, `licence` and `download`.
    """
    repo, wanted = store.split_name(name)
    found = remote.look(repo, revision)
    choice = remote.choose(found, wanted)
    accept_licence(found, accepted, show, ask)
    folder = store.entry_dir(found.repo, choice.variant, found.revision)
    with _alone(folder):
        missing = [f for f in choice.files if not _is_there(folder, f)]
        _check_space(missing, folder)
        for file in missing:
            with meter(file.name, file.nbytes) as progress:
                download.fetch(found, file, folder / store.safe_path(file.name), progress)
    model = store.Pulled(
        repo=found.repo,
        variant=choice.variant,
        revision=found.revision,
        licence=found.licence,
        main=choice.main,
        nbytes=sum(f.nbytes for f in choice.files),
        pulled_at=datetime.now(UTC).isoformat(timespec="seconds"),
        files={f.name: f.digest for f in choice.files},
    )
    store.save(model)
    return model


def accept_licence(found: remote.RemoteModel, accepted: bool, show: licence.Show, ask: licence.Ask | None) -> None:
    """Show licence and card, unless this revision's are settled."""
    if not store.was_accepted(found.repo, found.revision):
        has_card = any(f.name == "README.md" and f.nbytes <= remote.CARD_BYTES for f in found.files)
        card = download.read_small(found, "README.md", remote.CARD_BYTES) if has_card else ""
        licence.settle(found, card, accepted, show, ask)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing the same files, where the system can lock (POSIX)."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / store.LOCK, "w") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                raise CapacityError(f"another process pulls into {folder}", hint="wait for it to end") from e
        yield


def _is_there(folder: Path, file: remote.RemoteFile) -> bool:
    """Was it fetched before? A file has its name only after its hash was right."""
    path = folder / store.safe_path(file.name)
    return path.is_file() and path.stat().st_size == file.nbytes


def _check_space(files: list[remote.RemoteFile], folder: Path) -> None:
    """Raises: ConfigError: the disk cannot take the files."""
    if not files:
        return
    have = sum(p.stat().st_size for p in folder.rglob("*.part"))
    needed, free = sum(f.nbytes for f in files) - have, shutil.disk_usage(folder).free
    if needed + SPARE_BYTES > free:
        raise ConfigError(
            f"{needed / 1e9:.1f} GB are to come, and the disk of {folder} has {free / 1e9:.1f} GB free",
            hint="free some space, choose a smaller quantization, or set VKLLM_MODELS_DIR to another disk",
        )
