"""Small vocabularies made by rule, and texts that tell one tokenizer from another. Shared by tests and pin_llama_tokenize.py."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from vkllm.vocab.bpe import BYTE_OF
from vkllm.vocab.special import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

Metadata = dict[str, object]
CHARACTER = {value[0]: character for character, value in BYTE_OF.items()}

TEXTS = (
    "Hello world! don't DON'T I'LL we've THEY'RE 'S's ’s Rize'den",
    "1 12 123 1234 12345 1234567 3.14 ²³ Ⅷ ١٢٣ 1,000,000 v2 a1b2",
    "  two  spaces   three\ttab\t\tend \n",
    "line\nline\r\n\r\n\n  indented\n\n\n",
    "    def f(x):\n        return x*2  # //note\n/path/to\n//x !=\n",
    "日本語 にほんご カタカナ 한국어 中文字。、！ㄅ",
    "Éa éA ÀÉ straßeß ΑΒγ Жук ǅabc camelCase HTTPServer iPhone",
    "e\u0301 नमस्ते ไทย \u0308x مرحبا שלום",
    "🦙🦙 👨‍👩‍👧 ✅ €5 £ ~`^|<>=+$",
    '...!!! ?!\n-- "quoted" (a)[b]{c} a_b #tag @x a.b, c;d!x',
    "\u00a0nbsp\u2003em\u3000wide \u0085nel \ufeff",
    "x  \n y \t\n\tz   ",
    " ",
    "\n\n",
    "'ſ K Ω İ ı",
    "<|user|> <s>a </s> \t b<|end|>\n c[user]d  e<0x0A>▁x\n\n\n<fim_prefix>  <|endoftext|>  f",
)


def _metadata(**pairs: Any) -> Metadata:
    return {f"tokenizer.ggml.{key}": value for key, value in pairs.items()}


@cache
def _merges() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE: every run of two to four characters in TEXTS, merged from the left."""
    merges: dict[str, None] = {}
    for size in (2, 3, 4):
        for text in TEXTS[:-1]:
            for at in range(len(text) - size + 1):
                characters = [CHARACTER[b] for b in text[at : at + size].encode()]
                for n in range(1, len(characters)):
                    merges["".join(characters[:n]) + " " + characters[n]] = None
    return [*CHARACTER.values(), *(m.replace(" ", "") for m in merges)], list(merges)


def byte_level(pre: str, **changes: Any) -> Metadata:
    """The BPE of `_merges`, with three words that no merge makes, and special tokens."""
    tokens, merges = _merges()
    tokens = [*dict.fromkeys(tokens), "Hello", "Ġindented", "HTTPServer"]
    special = {"<|user|>": CONTROL, "<|end|>": NORMAL, "</s>": CONTROL, "[user]": USER_DEFINED, "<fim_prefix>": NORMAL}
    return _metadata(
        model="gpt2",
        pre=pre,
        tokens=[*tokens, *special],
        token_type=np.array([*[NORMAL] * len(tokens), *special.values()], np.int32),
        merges=merges,
        bos_token_id=len(tokens),
        eos_token_id=len(tokens) + 2,
        **changes,
    )


def lines(**changes: Any) -> Metadata:
    """Gemma 4's kind: plain text with U+2581 for spaces, newlines that are tokens, and bytes."""
    merges: dict[str, None] = {}
    for text in TEXTS[:-4]:
        for left, right in pairwise(text.replace(" ", "▁")):
            if "\n" not in (left, right) and text.count(left) > 1:
                merges[f"{left} {right}"] = None
    characters = dict.fromkeys(c for m in merges for c in m.split(" "))
    special = {
        "<pad>": CONTROL,
        "<eos>": CONTROL,
        "<bos>": CONTROL,
        "<unk>": UNKNOWN,
        "<|user|>": CONTROL,
        "[user]": USER_DEFINED,
    }
    plain = [*characters, *(m.replace(" ", "") for m in merges), "\n", "\n\n", "\n\n\n"]
    return _metadata(
        model="gemma4",
        tokens=[*special, *(f"<0x{b:02X}>" for b in range(256)), *plain],
        token_type=np.array([*special.values(), *[BYTE] * 256, *[NORMAL] * len(plain)], np.int32),
        merges=list(merges),
        bos_token_id=2,
        eos_token_id=1,
        **changes,
    )


def sentencepiece(name: str = "", **changes: Any) -> Metadata:
    """SentencePiece: controls, bytes, user-defined white space (as Gemma's files hold it), and scored runs of TEXTS."""
    special = dict.fromkeys(("<unk>", "<s>", "</s>", "<|user|>", "<|end|>", "<|endoftext|>"), CONTROL)
    special |= {"<unk>": UNKNOWN, "[user]": USER_DEFINED}
    white = ["  ", "   ", "\n\n", "\n\n\n", "\t\t"]
    runs = dict.fromkeys(
        text[at : at + size].replace(" ", "▁")
        for size in (1, 2, 3)
        for text in TEXTS[:-2]
        for at in range(0, len(text) - size, 2)
        if "\n" not in text[at : at + size]
    )
    runs = dict.fromkeys(r for r in runs if r not in special)
    scores = [-float(len(r) * 7 % 5) - i % 11 for i, r in enumerate(runs)]
    kinds = [*special.values(), *[BYTE] * 256, *[USER_DEFINED] * len(white), *[NORMAL] * len(runs)]
    return {"general.name": name} | _metadata(
        model="llama",
        tokens=[*special, *(f"<0x{b:02X}>" for b in range(256)), *white, *runs],
        token_type=np.array(kinds, np.int32),
        scores=np.array([0.0] * (len(kinds) - len(runs)) + scores, np.float32),
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
        **changes,
    )


OTHERS: dict[str, Metadata] = {
    "gemma4 lines": lines(),
    "llama": sentencepiece(),
    "llama without space prefix (gemma)": sentencepiece(add_space_prefix=False),
    "phi-3": sentencepiece("Phi-3 mini"),
    "llama with end": sentencepiece(add_eos_token=True),
}
"""Vocabularies that are no byte-level BPE, by what they show."""
