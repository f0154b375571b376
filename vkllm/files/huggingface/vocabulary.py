"""tokenizer.json and the files beside it to GGUF's `tokenizer.*` metadata.

Two kinds, as in GGUF: byte-level BPE ("gpt2": tokens, merges, the pre-tokenizer's name), and BPE made from a SentencePiece model
("llama": tokens and scores). tokenizer.json has ranked merges for the latter instead of scores: they are the splits of each token
in the order of its score, so the order gives the scores back, up to their scale.

Source: https://huggingface.co/docs/tokenizers; gguf-py's vocab.py for the special tokens.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vkllm.errors import ConfigError, FileFormatError, UnsupportedModelError
from vkllm.files.huggingface import pre_tokenizers
from vkllm.files.huggingface.json_file import Fields
from vkllm.vocab.special import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from vkllm.vocab.spm import SPACE

_PAIR = re.compile("[^ ]+ [^ ]+")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)
N_CHECKED = 4096  # tokens whose splits are looked at
_HINT = "the folder's tokenizer files are damaged or do not belong together: download the folder again"


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The parsed files; empty where a folder has none. `template`: of chat_template.jinja, or None."""

    tokenizer: Mapping[str, Any]
    config: Mapping[str, Any]
    special: Mapping[str, Any]
    model_config: Mapping[str, Any]
    generation: Mapping[str, Any]
    template: str | None


def metadata(files: TokenizerFiles, n_vocab: int) -> dict[str, object]:
    """The tokenizer's metadata, for a model with `n_vocab` embeddings.

    Raises: FileFormatError: ids twice, negative, or beyond the embeddings; UnsupportedModelError: another kind of tokenizer.
    """
    root = Fields(files.tokenizer, "tokenizer.json")
    model = root.fields("model")
    kind = model.text("type", "BPE")
    if kind != "BPE" or model.has("continuing_subword_prefix") or model.has("end_of_word_suffix"):
        raise UnsupportedModelError(
            f"tokenizer.json: this {kind} model is not supported", hint="supported: byte-level BPE, SentencePiece BPE"
        )
    vocab, added = _vocabulary(model, root, n_vocab)
    is_spm = model.flag("byte_fallback", False)
    pairs = _sentencepiece(root, model, vocab) if is_spm else _byte_level(root, model)
    texts = [vocab.get(i, f"[PAD{i}]") for i in range(n_vocab)]
    unknown = model.pairs.get("unk_token") or _text(files.config.get("unk_token"))
    types = [_type(texts[i], i in vocab, added.get(i), is_spm, unknown) for i in range(n_vocab)]
    tokens = [t.replace(SPACE, " ") if kind == USER_DEFINED else t for t, kind in zip(texts, types, strict=True)]
    if is_spm:
        pairs["tokenizer.ggml.scores"] = _scores(model, vocab, types)
    pairs |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    return pairs | _specials(files, {text: i for i, text in vocab.items()}, is_spm) | _template(files)


def _vocabulary(model: Fields, root: Fields, n_vocab: int) -> tuple[dict[int, str], dict[int, bool]]:
    """Tokens by id, and of the added ones: are they special. Added tokens beyond the embeddings are left out."""
    vocab: dict[int, str] = {}
    for text, i in model.fields("vocab").pairs.items():
        if type(i) is not int or i < 0 or i in vocab:
            raise FileFormatError(
                f"tokenizer.json: token {text[:40]!r} has the id {str(i)[:20]}: no number, or another's", hint=_HINT
            )
        vocab[i] = text
    if not vocab or max(vocab) >= n_vocab:
        found = f"ids up to {max(vocab)}" if vocab else "no tokens"
        raise ConfigError(f"tokenizer.json has {found}, but the model {n_vocab} embeddings", hint=_HINT)
    added: dict[int, bool] = {}
    ids = dict(model.fields("vocab").pairs)
    for entry in root.items("added_tokens"):
        token = Fields(entry if isinstance(entry, dict) else {}, "tokenizer.json: added_tokens")
        i, text = token.integer("id", least=0), token.text("content")
        if i >= n_vocab:
            continue
        if vocab.get(i, text) != text:
            raise FileFormatError(f"tokenizer.json: id {i} is both {vocab[i][:40]!r} and {text[:40]!r}", hint=_HINT)
        if ids.setdefault(text, i) != i:
            raise FileFormatError(f"tokenizer.json: {text[:40]!r} has the ids {ids[text]} and {i}", hint=_HINT)
        vocab[i], added[i] = text, token.flag("special", False)
    return vocab, added


def _type(text: str, known: bool, special: bool | None, is_spm: bool, unknown: object) -> int:
    """GGUF's kind of a token. `special` None: not an added one."""
    if not known:
        return UNUSED
    if is_spm and text == unknown:
        return UNKNOWN
    if special or (special is not None and _LOOKS_SPECIAL.fullmatch(text)):
        return CONTROL
    if special is not None:
        return USER_DEFINED
    return BYTE if is_spm and _BYTE.fullmatch(text) else NORMAL


def _byte_level(root: Fields, model: Fields) -> dict[str, object]:
    """What only byte-level BPE has: merges, and how text is cut into words."""
    pre = root.fields("pre_tokenizer").pairs
    decoder = root.fields("decoder").pairs
    if "ByteLevel" not in {*_kinds(pre), *_kinds(decoder)}:
        raise UnsupportedModelError("tokenizer.json: BPE neither byte-level nor SentencePiece's", hint="use another model")
    for kind in _kinds(root.fields("normalizer").pairs):
        if kind not in ("NFC", "Sequence"):  # llama.cpp too leaves the composition of accents to the text
            raise UnsupportedModelError(f"tokenizer.json: normalizer {kind} is not supported", hint="use another model")
    name = pre_tokenizers.name(pre, ignore_merges=model.flag("ignore_merges", False))
    merges = [m if type(m) is str and _PAIR.fullmatch(m) else " ".join(_without_spaces(_pair(m))) for m in model.items("merges")]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}


def _without_spaces(parts: Iterable[str]) -> Iterable[str]:
    """Tokens with the stand-in for a space: a merge's text has a space between its two."""
    return (part.replace(" ", "Ġ") for part in parts)


def _pair(merge: object) -> list[str]:
    """The two tokens of a merge: given as a list, or as text with a space between."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
        raise FileFormatError(f"tokenizer.json: merge {str(merge)[:60]!r} is no pair of tokens", hint=_HINT)
    return pair


def _kinds(part: Mapping[str, Any]) -> list[str]:
    """The types of a component and of those in it."""
    inner = [
        p for key in ("normalizers", "pretokenizers", "decoders", "processors") for p in Fields(part, "tokenizer.json").items(key)
    ]
    own = [str(part["type"])] if "type" in part else []
    return own + [kind for p in inner if isinstance(p, dict) for kind in _kinds(p)]


def _sentencepiece(root: Fields, model: Fields, vocab: Mapping[int, str]) -> dict[str, object]:
    """What only SentencePiece's BPE has: whether text begins with a space. Other normalizers than its own are refused."""
    normalizer, pre = root.fields("normalizer").pairs, root.fields("pre_tokenizer").pairs
    steps = root.fields("normalizer").items("normalizers") or ([normalizer] if normalizer else [])
    prefix = False
    for step in steps:
        if step == {"type": "Prepend", "prepend": SPACE}:
            prefix = True
        elif step != {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}:
            raise UnsupportedModelError(f"tokenizer.json: normalizer {str(step)[:80]} is not supported", hint="use another model")
    if pre.get("type") == "Metaspace" and pre.get("replacement", SPACE) == SPACE:
        prefix = pre.get("prepend_scheme", "always" if pre.get("add_prefix_space", True) else "never") != "never"
    elif pre and (pre.get("type"), pre.get("pattern")) != ("Split", {"String": " "}):  # Gemma's, which finds no space any more
        raise UnsupportedModelError(f"tokenizer.json: pre-tokenizer {str(pre)[:80]} is not supported", hint="use another model")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _scores(model: Fields, vocab: Mapping[int, str], types: list[int]) -> list[float]:
    """Scores that order tokens as the merges do: 0, -1, -2, ... for what merges make, then for the other normal tokens.

    Only for normal tokens; 0 for bytes and control tokens, low ones for the rest, as in files from llama.cpp.
    """
    rank: dict[str, int] = {}
    merges = [_pair(merge) for merge in model.items("merges")]
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    _check_splits(merges, rank, model.fields("vocab").pairs)
    by_rank = sorted(vocab, key=lambda i: (rank.get(vocab[i], len(rank)), i))
    scores = [{USER_DEFINED: -1000.0, UNUSED: -10000.0}.get(kind, 0.0) for kind in types]
    for place, i in enumerate(i for i in by_rank if types[i] == NORMAL):
        scores[i] = -float(place)
    return scores


def _check_splits(merges: Sequence[Sequence[str]], rank: Mapping[str, int], vocab: Mapping[str, int]) -> None:
    """Merges made from scores list every way to split a token in two; those of a vocabulary that was trained as BPE do not."""
    listed = {(left, right) for left, right in merges}
    for text in itertools.islice(rank, N_CHECKED):
        for i in range(1, len(text)):
            if text[:i] in vocab and text[i:] in vocab and (text[:i], text[i:]) not in listed:
                raise UnsupportedModelError(
                    f"tokenizer.json: {text!r} is never merged from {text[:i]!r} and {text[i:]!r}: no SentencePiece model",
                    hint="use a GGUF file of this model",
                )


def _specials(files: TokenizerFiles, ids: Mapping[str, int], is_spm: bool) -> dict[str, object]:
    """The ids of special tokens, and whether text begins and ends with them."""
    found: dict[str, int] = {}
    for ours, theirs in SPECIAL_TOKENS.items():
        token = _special_id(files, theirs, ids)
        if token is not None:
            found[ours] = token
    frame = _frame(files.tokenizer)
    first, last = frame or ("", "")
    if "bos" not in found and first in ids:
        found["bos"] = ids[first]
    pairs: dict[str, object] = {f"tokenizer.ggml.{name}_token_id": token for name, token in found.items()}
    ends = [i for i in _end_ids(files) if i != found.get("eos") and i in ids.values()]
    names = ("eot", "eom") if "eos" in found else ("eos", "eot", "eom")
    pairs |= {f"tokenizer.ggml.{name}_token_id": i for name, i in zip(names, ends, strict=False)}
    for key, text in (("bos", first), ("eos", last)):
        asked = files.config.get(f"add_{key}_token")
        if text:
            pairs[f"tokenizer.ggml.add_{key}_token"] = text in ids and ids[text] == found.get(key)
        elif isinstance(asked, bool) or frame or not is_spm:  # nothing at all: the reader's default, SentencePiece's custom
            pairs[f"tokenizer.ggml.add_{key}_token"] = asked is True
    return pairs


SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
"""Special tokens by their names in GGUF and in Hugging Face's files."""


def _special_id(files: TokenizerFiles, name: str, ids: Mapping[str, int]) -> int | None:
    """The id of a special token: by its text in the tokenizer's files, or by the number in config.json."""
    for pairs in (files.config, files.special):
        text = _text(pairs.get(f"{name}_token"))
        if text in ids:
            return ids[text]
    number = files.model_config.get(f"{name}_token_id")
    number = number[0] if isinstance(number, list) and number else number
    return number if type(number) is int and number in ids.values() else None


def _text(token: object) -> str:
    """The text of a token in the tokenizer's files: itself, or an object with `content`; '' where there is none."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _end_ids(files: TokenizerFiles) -> list[int]:
    """Ids after which generation ends, from generation_config.json and config.json, each once."""
    ends: list[int] = []
    for pairs in (files.generation, files.model_config):
        value = pairs.get("eos_token_id")
        for i in value if isinstance(value, list) else [value]:
            if type(i) is int and i >= 0 and i not in ends:
                ends.append(i)
    return ends


def _frame(tokenizer: Mapping[str, Any]) -> tuple[str, str] | None:
    """The special tokens that the post-processor puts first and last, '' for none; None: there is no post-processor."""
    post = tokenizer.get("post_processor")
    if not isinstance(post, dict):
        return None
    first = last = ""
    for step in Fields(post, "tokenizer.json: post_processor").items("processors") or [post]:
        single = step.get("single") if isinstance(step, dict) else None
        if isinstance(single, list) and len(single) > 1:
            first, last = _template_token(single[0]) or first, _template_token(single[-1]) or last
    return first, last


def _template_token(step: object) -> str:
    special = step.get("SpecialToken") if isinstance(step, dict) else None
    return _text(special.get("id")) if isinstance(special, dict) else ""


def _template(files: TokenizerFiles) -> dict[str, object]:
    """The chat template: of chat_template.jinja, else of tokenizer_config.json, where several have names."""
    template: object = files.template or files.config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default", next(iter(named.values()), None))
    return {"tokenizer.chat_template": template} if isinstance(template, str) else {}
