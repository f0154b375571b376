"""SentencePiece's score-ordered merging ("llama" vocabularies): our own lines.

Merge lists derived from the scores, as the `tokenizers` library would need them, order equal scores and the several splits of one
token differently, and so do not always give the ids a model was trained on.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from itertools import pairwise

SPACE = "\u2581"
"""SentencePiece's stand-in for a space."""


class SentencePiece:
    """SentencePiece BPE: of all neighbours that form a token, merge the one with the best score, leftmost first.

    Text is first cut wherever no token holds the two characters side by side: no merge can cross such a place, so the result
    is the same, words repeat and are remembered, and time grows linearly with the text.
    Source: https://github.com/google/sentencepiece (bpe_model.cc).
    """

    MAX_CACHED, MAX_CACHED_CHARS = 1 << 17, 48

    def __init__(self, vocab: dict[str, int], scores: Sequence[float], byte_ids: Sequence[int]) -> None:
        self._vocab, self._scores, self._byte_ids = vocab, scores, byte_ids
        self._inside = {pair for text in vocab for pair in pairwise(text)}
        self._cache: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        text = text.replace(" ", SPACE)
        ids: list[int] = []
        inside, start = self._inside, 0
        for i, pair in enumerate(pairwise(text), 1):
            if pair not in inside:
                ids += self._word(text[start:i])
                start = i
        ids += self._word(text[start:])
        return ids

    def _word(self, word: str) -> tuple[int, ...]:
        found = self._cache.get(word)
        if found is None:
            found = tuple(self._ids(self._merge(list(word))))
            if len(word) <= self.MAX_CACHED_CHARS:
                if len(self._cache) >= self.MAX_CACHED:
                    self._cache.clear()
                self._cache[word] = found
        return found

    def _ids(self, parts: Iterable[str]) -> Iterable[int]:
        for part in parts:
            token = self._vocab.get(part)
            if token is None:
                yield from (self._byte_ids[b] for b in part.encode())
            else:
                yield token

    def _merge(self, parts: list[str]) -> list[str]:
        """Merge single characters as far as scores lead. A linked list, and a heap of (-score, left, right, length)."""
        before, after = list(range(-1, len(parts) - 1)), [*range(1, len(parts)), -1]
        queue: list[tuple[float, int, int, int]] = []

        def consider(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                joined = parts[left] + parts[right]
                token = self._vocab.get(joined)
                if token is not None:
                    heapq.heappush(queue, (-self._scores[token], left, right, len(joined)))

        for right in range(1, len(parts)):
            consider(right - 1, right)
        while queue:
            _, left, right, length = heapq.heappop(queue)
            if not parts[left] or not parts[right] or len(parts[left]) + len(parts[right]) != length:
                continue  # one of the two has grown or gone since
            parts[left] += parts[right]
            parts[right] = ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            consider(before[left], left)
            consider(left, after[left])
        return [part for part in parts if part]
