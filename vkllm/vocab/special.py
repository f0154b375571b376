"""Special tokens, as llama.cpp treats them: what a file's types leave out is known by the tokens' texts.

User-defined tokens are found in every text, control tokens only where special tokens are parsed, the longest first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vkllm.vocab.metadata import VocabMetadata
from vkllm.vocab.strings import find

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPECIAL = frozenset({UNKNOWN, CONTROL, USER_DEFINED})

END_TEXTS = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<EOT>", "_<EOT>"}
    | {"<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "</s>", "<eos>", "[EOT]", "[EOS]", "<end_of_utterance>", "<turn|>"}
    | {"<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["}
)
"""Tokens that end a turn in every model that has them, whether or not the file's metadata say so."""

FILL_TEXTS: dict[str, frozenset[str]] = {
    key: frozenset(texts.split())
    for key, texts in {
        "fim_pre": "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>",
        "fim_suf": "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>",
        "fim_mid": "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>",
        "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
        "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
        "fim_sep": "<|file_sep|>",
    }.items()
}
"""Tokens for filling in the middle of code, by the key that names them (where the file does)."""

OLD_FILL_KEYS = {"fim_pre": "prefix", "fim_suf": "suffix", "fim_mid": "middle"}
FILL_ENDS = ("fim_pad", "fim_rep", "fim_sep")  # after these the model goes on with another file
HARMONY = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})  # gpt-oss: parts of its answer's text
_NAMED = END_TEXTS.union(HARMONY, *FILL_TEXTS.values())

STRIPPED = " \t\n\v\f\r"
KEEPS_SPACE = frozenset({"<unk>", "<s>", "<|endoftext|>"})


class SpecialTokens:
    """A vocabulary's special tokens. `types`: each token's, corrected; `end_ids`: after which generation ends."""

    def __init__(self, meta: VocabMetadata, tokens: Sequence[str]) -> None:
        self._tokens = tokens
        n = len(tokens)
        typed = meta.get("token_type") is not None
        self.types: list[int] = list(map(int, meta.numbers("token_type", n))) if typed else [NORMAL] * n
        found = {text: i for i, text in find(tokens, _NAMED)}
        fill = {key: meta.token_id(key, n, meta.token_id(OLD_FILL_KEYS.get(key, key), n)) for key in FILL_TEXTS}
        for key, texts in FILL_TEXTS.items():
            if fill[key] is None:  # the file does not name one
                ids = [found[text] for text in texts if text in found]
                self._retype(ids, CONTROL)
                fill[key] = min(ids, default=None)
        ends = {found[text] for text in END_TEXTS if text in found}
        self._retype(ends, CONTROL)
        self._retype((found[text] for text in HARMONY if text in found), USER_DEFINED)
        ends |= {i for key in FILL_ENDS if (i := fill[key]) is not None}
        ends |= {i for key in ("eos", "eot", "eom") if (i := meta.token_id(key, n, _default_eos(meta, key))) is not None}
        self.end_ids = frozenset(self._without_false_ends(ends, found))
        self._ids = [i for i, kind in enumerate(self.types) if kind != NORMAL and kind in SPECIAL and tokens[i]]
        self._ids.sort(key=lambda i: -len(tokens[i].encode("utf-8", "surrogateescape")))
        self._stripping = self._ids_that_strip(str(meta.pairs.get("general.name", "")).lower())

    def partition(self, text: str, parse_special: bool) -> list[str | int]:
        """Cut special tokens out of the text, the longest first. Phi-3's take the white space that follows them."""
        parts: list[str | int] = [text] if text else []
        for i in self._ids:
            if (parse_special or self.types[i] == USER_DEFINED) and self._tokens[i] in text:
                parts = [piece for part in parts for piece in ([part] if isinstance(part, int) else self._cut(part, i))]
        return parts

    def _cut(self, text: str, token_id: int) -> list[str | int]:
        parts: list[str | int] = []
        special, strips, start = self._tokens[token_id], token_id in self._stripping, 0
        while (at := text.find(special, start)) >= 0:
            if at > start:
                parts.append(text[start:at])
            parts.append(token_id)
            start = at + len(special)
            while strips and text[start : start + 1] and text[start] in STRIPPED:
                start += 1
        return [*parts, text[start:]] if start < len(text) else parts

    def _without_false_ends(self, ends: set[int], found: dict[str, int]) -> set[int]:
        """gpt-oss ends a message, not its turn, with <|end|>; in Gemma 4, </s> is plain text."""
        texts = {self._tokens[i] for i in ends}
        if "<|end|>" in texts and texts & {"<|return|>", "<|flush|>"} and texts & {"<|call|>", "<|calls|>"}:
            self._retype([found["<|end|>"]], USER_DEFINED)
            ends -= {found["<|end|>"]}
        if "</s>" in texts and "<|tool_response>" in texts:
            self._retype([found["</s>"]], NORMAL)
            ends -= {found["</s>"]}
        return ends

    def _ids_that_strip(self, model_name: str) -> frozenset[int]:
        if "phi-3" not in model_name and "phi3" not in model_name:
            return frozenset()
        return frozenset(i for i in self._ids if self._tokens[i] not in KEEPS_SPACE)

    def _retype(self, ids: Iterable[int], kind: int) -> None:
        for i in ids:
            self.types[i] = kind


def _default_eos(meta: VocabMetadata, key: str) -> int | None:
    return 2 if key == "eos" and meta.get("model") == "llama" else None
