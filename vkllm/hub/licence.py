"""Licences: which models anyone may use, and what people are shown before the others."""

from __future__ import annotations

import re
from collections.abc import Callable

from vkllm.errors import ConfigError
from vkllm.hub import store
from vkllm.hub.remote import RemoteModel

OPEN = frozenset(
    {"apache-2.0", "mit", "mit-0", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "cc0-1.0", "cc-by-3.0", "cc-by-4.0"}
    | {"cc-by-sa-3.0", "cc-by-sa-4.0", "gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl", "lgpl-3.0", "mpl-2.0", "artistic-2.0"}
    | {"zlib", "wtfpl", "odc-by", "pddl", "cdla-permissive-1.0", "cdla-permissive-2.0", "afl-3.0", "ecl-2.0", "ms-pl", "epl-2.0"}
)
"""Licences that allow every use. Others have conditions that a person should have seen."""

SUMMARY_CHARS = 600
Show = Callable[[str], None]
Ask = Callable[[str], bool]


def needs_acceptance(remote: RemoteModel) -> bool:
    """Must a person agree first? Yes for gated models, licences with conditions, and where none is told."""
    return remote.gated or remote.licence.lower() not in OPEN


def settle(remote: RemoteModel, card: str, accepted: bool, show: Show, ask: Ask | None) -> None:
    """Show licence and card, and get them accepted where that is needed; remembered for this revision.

    Args: card: the repository's README; accepted: by an option; ask: asks a person, None where there is none.
    Raises: ConfigError: it was not accepted.
    """
    if store.was_accepted(remote.repo, remote.revision):
        return
    show(described(remote, card))
    if needs_acceptance(remote) and not accepted:
        hint = "read it, then add --accept-license"
        if ask is None:
            raise ConfigError(f"the licence of {remote.repo} asks to be accepted", hint=hint)
        if not ask("Do you accept the licence?"):
            raise ConfigError(f"the licence of {remote.repo} was not accepted, so nothing was pulled", hint=hint)
    store.accept(remote.repo, remote.revision, remote.licence)


def described(remote: RemoteModel, card: str) -> str:
    """What people are shown of a model."""
    page = f"https://huggingface.co/{remote.repo}"
    lines = [
        f"{remote.repo} at {remote.revision[:12]}" + (f" ({remote.summary})" if remote.summary else ""),
        f"licence: {remote.licence or 'the card tells none'} {remote.licence_link}".rstrip()
        + ("; gated" if remote.gated else ""),
        f"card: {page}",
    ]
    return plain("\n".join(lines + ([summary] if (summary := first_paragraphs(card)) else [])))


def first_paragraphs(card: str) -> str:
    """The beginning of a README, without its metadata block, HTML, images and headings, SUMMARY_CHARS at most."""
    text = re.sub(r"\A---\n.*?\n---\n", "", card.replace("\r\n", "\n"), count=1, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->|<[^<>]{0,500}>|!\[[^\]]*\]\([^)]*\)", "", text, flags=re.DOTALL)
    kept = [p.strip() for p in text.split("\n\n") if p.strip() and not re.match(r"\s*(#|\||```|\[!)", p)]
    joined = "\n".join(kept)
    return joined if len(joined) <= SUMMARY_CHARS else joined[:SUMMARY_CHARS].rsplit(" ", 1)[0] + " …"


def plain(text: str) -> str:
    """Without control characters: a card shall not steer the terminal."""
    return "".join(c if c == "\n" or c.isprintable() else " " for c in text)
