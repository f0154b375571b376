"""tokenizer.json's pre-tokenizer to GGUF's name for it (`tokenizer.ggml.pre`), by its structure.

llama.cpp's converter looks a hash of the ids of a test text up; the structure says the same, and says it of new vocabularies too.
Names that split text alike (starcoder, refact, command-r, smollm) share one structure, and get the first of them.

Source: the tokenizer.json of the models; llama-vocab.cpp for what each name means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Step = tuple[str, ...]
Structure = tuple[Step, ...]

BYTES: Step = ("bytes",)  # ByteLevel without its expression: only the alphabet
WORDS: Step = ("words",)  # ByteLevel with GPT-2's expression
DIGIT: Step = ("digits", "1")  # one by one
NUMBER: Step = ("digits", "many")

_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_MODERN = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN35 = _SUFFIX + (r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_LETTERS = (
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌ"
    r"ῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_HAN = r"[一-龥ࠀ-一가-퟿]+"


def _split(*expressions: str) -> Structure:
    return tuple(("split", e) for e in expressions)


NAMES: dict[Structure, str] = {
    (WORDS,): "gpt-2",
    (DIGIT, WORDS): "starcoder",
    (("punctuation", "contiguous"), WORDS, NUMBER, *_split(r"[0-9][0-9][0-9]")): "falcon",
    (*_split(_MODERN % "{1,3}"), BYTES): "llama-bpe",
    (*_split(_MODERN % ""), BYTES): "qwen2",
    (*_split(_QWEN35), BYTES): "qwen35",
    (*_split(_CASED % ("", "") + r"|\p{N}" + _CASED_REST), BYTES): "tekken",
    (*_split(_CASED % (_SUFFIX + "?", _SUFFIX + "?") + r"|\p{N}{1,3}" + _CASED_REST), BYTES): "gpt-4o",
    (*_split(r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3), BYTES): "deepseek-v3",
    (*_split(r"[\r\n]", _DEEPSEEK_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _HAN), NUMBER, BYTES): "deepseek-llm",
    (*_split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN), DIGIT, BYTES): "deepseek-coder",
}
"""What each structure is called."""

WITHOUT_IGNORE_MERGES = {"llama-bpe": "dbrx"}
"""The name where the vocabulary's whole words do not win over merges, for names that imply they do."""

_SPELLINGS = (
    ("'(?i:[sdmt]|ll|ve|re)", _SUFFIX),
    (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _SUFFIX),
    ("\r", r"\r"),
    ("\n", r"\n"),
    (r"\p{N}{1}|", r"\p{N}|"),
)
"""Other spellings of the same expression, and ours."""


def name(pre_tokenizer: Mapping[str, Any] | None, *, ignore_merges: bool) -> str:
    """GGUF's name, or a description of a structure that has none (which `Tokenizer` refuses by it)."""
    steps = tuple(_steps(pre_tokenizer or {}))
    found = NAMES.get(steps)
    if found is None:
        return "unknown: " + (" + ".join(" ".join(step) for step in steps) or "none")
    return found if ignore_merges else WITHOUT_IGNORE_MERGES.get(found, found)


def _steps(pre: Mapping[str, Any]) -> Iterator[Step]:
    """A pre-tokenizer as steps that can be compared."""
    kind = pre.get("type")
    if kind == "Sequence":
        for part in pre.get("pretokenizers") or []:
            yield from _steps(part if isinstance(part, dict) else {"type": part})
    elif kind == "ByteLevel" and not pre.get("add_prefix_space"):
        yield WORDS if pre.get("use_regex", True) else BYTES
    elif kind == "Digits":
        yield DIGIT if pre.get("individual_digits") else NUMBER
    elif kind == "Punctuation":
        yield ("punctuation", str(pre.get("behavior", "isolated")).lower())
    elif kind == "Split" and _isolates(pre):
        yield ("split", _canonical(pre.get("pattern")))
    else:
        yield (str(kind), *(f"{k}={v}" for k, v in sorted(pre.items()) if k != "type"))


def _isolates(split: Mapping[str, Any]) -> bool:
    """Do the matches become the words? Removing what does not match is the same, where the expression matches everything."""
    how = (str(split.get("behavior")).lower(), bool(split.get("invert")))
    return how in (("isolated", False), ("removed", True))


def _canonical(pattern: object) -> str:
    """An expression in our spelling."""
    expression = str(pattern.get("Regex", pattern)) if isinstance(pattern, dict) else str(pattern)
    for theirs, ours in _SPELLINGS:
        expression = expression.replace(theirs, ours)
    return expression
