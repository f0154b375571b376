"""tokenizer.json's pre-tokenizer to GGUF's name for it (`tokenizer.ggml.pre`), by how it cuts text.

llama.cpp's converter looks up a hash of the ids that a test text gives; the structure says the same, of new vocabularies too.
Several names cut alike (starcoder, refact, command-r, smollm): the first of them stands for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vkllm.files.huggingface.json_file import Fields
from vkllm.vocab.splits import CONTRACTION, GPT2, PRE_TOKENIZERS

FALCON = ("Punctuation contiguous", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
_SPELLINGS = (
    (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}", CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}"),
    (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", CONTRACTION),
    ("\r", r"\r"),
    ("\n", r"\n"),
    (r"\p{N}{1}|", r"\p{N}|"),
    (r"\p{N}{1,1}|", r"\p{N}|"),
    (r"[!\"#", '[!"#'),
)
"""Spellings of the same expression, and the one by which we compare."""


def name(pre_tokenizer: Mapping[str, Any], *, ignore_merges: bool) -> str:
    """GGUF's name, or a description of a structure that has none (which `Tokenizer` refuses by it)."""
    splits = tuple(_spelled(s) for s in _splits(pre_tokenizer))
    if splits == FALCON:
        return "falcon"
    alike = {n: rule for n, rule in PRE_TOKENIZERS.items() if tuple(_spelled(s) for s in rule.splits) == splits}
    exact = (n for n, rule in alike.items() if rule.ignore_merges == ignore_merges)
    return next(exact, None) or next(iter(alike), None) or "unknown: " + (" + ".join(splits) or "none")


def _splits(pre: Mapping[str, Any]) -> Iterator[str]:
    """The expressions whose matches are words, one after the other; for anything else, a description."""
    kind = pre.get("type")
    if kind == "Sequence":
        for part in Fields(pre, "tokenizer.json: pre_tokenizer").items("pretokenizers"):
            yield from _splits(part if isinstance(part, dict) else {"type": part})
    elif kind == "ByteLevel" and not pre.get("add_prefix_space"):
        if pre.get("use_regex", True):
            yield GPT2
    elif kind == "Digits":
        yield r"\p{N}" if pre.get("individual_digits") else r"\p{N}+"
    elif kind == "Punctuation":
        yield f"Punctuation {str(pre.get('behavior', 'isolated')).lower()}"
    elif kind == "Split" and _isolates(pre):
        pattern = pre.get("pattern")
        yield str(pattern.get("Regex", pattern)) if isinstance(pattern, dict) else str(pattern)
    else:
        yield " ".join([str(kind), *(f"{k}={v}" for k, v in sorted(pre.items()) if k != "type")])


def _isolates(split: Mapping[str, Any]) -> bool:
    """Do the matches become words? Removing what does not match is the same, where the expression matches everything."""
    how = (str(split.get("behavior")).lower(), bool(split.get("invert")))
    return how in (("isolated", False), ("removed", True))


def _spelled(expression: str) -> str:
    for theirs, ours in _SPELLINGS:
        expression = expression.replace(theirs, ours)
    return expression
