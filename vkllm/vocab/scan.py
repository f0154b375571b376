"""Byte pair encoding of a short text without an index of the vocabulary.

The `tokenizers` library needs 0.3 s and 50 MB to index 150,000 tokens and merges. What a few words can become is little: every
piece of a word that could be a token or a merge is listed, and one pass over each list finds those that are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from vkllm.vocab.strings import find

MAX_CANDIDATES = 1 << 14


def encode_words(words: Sequence[str], tokens: Sequence[str], merges: Sequence[str], *, ignore_merges: bool) -> list[int] | None:
    """The ids of words in a byte-level alphabet, merged one by one.

    None where this is no way to do it: words are too long, a character or the result of a merge is no token.

    `tokens`: by id; of equal ones the last counts. `merges`: two parts and a space between them; the first counts.
    `ignore_merges`: a word that is a token is that token, whatever the merges say.
    """
    if sum(len(w) ** 3 for w in set(words)) > 6 * MAX_CANDIDATES:
        return None
    pieces = {w[i:k] for w in words for i in range(len(w)) for k in range(i + 1, len(w) + 1)}
    pairs = {f"{p[:cut]} {p[cut:]}" for p in pieces for cut in range(1, len(p))}
    ids = {text: i for i, text in find(tokens, pieces)}
    ranks: dict[str, int] = {}
    for rank, merge in find(merges, pairs):
        ranks.setdefault(merge, rank)
    if any(merge.replace(" ", "") not in ids for merge in ranks) or any(c not in ids for w in words for c in w):
        return None
    found: list[int] = []
    for word in words:
        parts = [word] if ignore_merges and word in ids else _merged(word, ranks)
        found += [ids[part] for part in parts]
    return found


def _merged(word: str, ranks: dict[str, int]) -> list[str]:
    """Of all pairs that may be merged, the first one of the lowest rank, until there is none."""
    parts = list(word)
    while pairs := [(ranks[pair], i) for i, ab in enumerate(pairwise(parts)) if (pair := " ".join(ab)) in ranks]:
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
