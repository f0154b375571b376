"""tokenizer.json and its companions to GGUF's metadata: tokens, scores, types, special tokens, templates, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hf_folders import CONFIG, SPACE, special, spm_tokenizer, write_folder
from tokenizers import decoders, models, pre_tokenizers, trainers

from vkllm.errors import UnsupportedModelError, VkllmError
from vkllm.files import open_model
from vkllm.files.huggingface.pre_tokenizers import name as pre_name
from vkllm.files.huggingface.vocabulary import TokenizerFiles, metadata
from vkllm.tokenizer import Tokenizer
from vkllm.vocab.splits import CONTRACTION, GPT2, MODERN, PRE_TOKENIZERS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
Change = Callable[[dict[str, Any]], None]


def files(tokenizer: dict[str, Any], template: str | None = None, **parts: dict[str, Any]) -> TokenizerFiles:
    empty: dict[str, dict[str, Any]] = {name: {} for name in ("config", "special", "model_config", "generation")}
    return TokenizerFiles(tokenizer=tokenizer, template=template, **(empty | parts))


def read(tokenizer: dict[str, Any] | None = None, n_vocab: int = 16, template: str | None = None, **parts: Any) -> dict[str, Any]:
    """The metadata without their prefix."""
    pairs = metadata(files(tokenizer or spm_tokenizer(), template, **parts), n_vocab)
    return {key.removeprefix("tokenizer.ggml.").removeprefix("tokenizer."): value for key, value in pairs.items()}


def changed(change: Change, tokenizer: dict[str, Any] | None = None) -> dict[str, Any]:
    copied = copy.deepcopy(tokenizer or spm_tokenizer())
    change(copied)
    return copied


def byte_level() -> dict[str, Any]:
    """A small byte-level BPE as the library saves it, with Llama 3's words, a control and a user-defined token."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(MODERN % 3), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the cat sat on the mat, and the hat"] * 9, trainer)
    backend.add_tokens(["<turn>"])
    found: dict[str, Any] = json.loads(backend.to_str())
    return found


def test_sentencepiece() -> None:
    """Scores fall in the order of merges, then of ids, as in the SentencePiece models that they were made from."""
    found = read(config={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": {"content": "</s>"}})
    assert found["model"] == "llama" and found["pre"] == "default" and found["add_space_prefix"] is True
    assert found["tokens"][:5] == ["<unk>", "<s>", "</s>", "<0x0A>", SPACE + "a"] and found["tokens"][13:] == [
        "[PAD13]",
        "[PAD14]",
        "[PAD15]",
    ]
    assert found["token_type"] == [UNKNOWN, CONTROL, CONTROL, BYTE] + [NORMAL] * 9 + [UNUSED] * 3
    by_score = sorted(range(4, 13), key=lambda i: -found["scores"][i])
    assert [found["tokens"][i] for i in by_score] == [SPACE + "a", "ab", SPACE + "ab", "cc", "ccc", SPACE, "a", "b", "c"]
    assert found["scores"][:4] == [0.0] * 4 and found["scores"][4] == 0.0 and found["scores"][5] == -1.0
    assert (found["bos_token_id"], found["eos_token_id"], found["unknown_token_id"]) == (1, 2, 0)
    assert found["add_bos_token"] is True and found["add_eos_token"] is False and "eot_token_id" not in found


@pytest.mark.parametrize(
    ("normalizer", "pre", "prefix"),
    [
        (None, {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}, True),
        (None, {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never"}, False),
        (None, {"type": "Metaspace", "replacement": SPACE, "add_prefix_space": False}, False),
        (None, {"type": "Metaspace", "replacement": SPACE}, True),
        (
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
            False,
        ),
    ],
)
def test_space_prefix(normalizer: Any, pre: Any, prefix: bool) -> None:
    found = read(changed(lambda t: t.update(normalizer=normalizer, pre_tokenizer=pre)))
    assert found["add_space_prefix"] is prefix


def test_byte_level_gives_the_library_s_ids() -> None:
    """Through all of our tokenizer, the `tokenizers` library on the same JSON as the oracle."""
    source = byte_level()
    found = read(source, 300, config={"eos_token": "</s>"})
    assert found["model"] == "gpt2" and found["pre"] == "llama-bpe" and found["add_bos_token"] is False and "scores" not in found
    assert (
        found["token_type"][:3] == [CONTROL, CONTROL, NORMAL]
        and found["token_type"][found["tokens"].index("<turn>")] == USER_DEFINED
    )
    library = tokenizers.Tokenizer.from_str(json.dumps(source))
    ours = Tokenizer.from_gguf({f"tokenizer.ggml.{k}": v for k, v in found.items()})
    for text in ("the cat  sat on\n\n the mat", "hat<turn>hat 1234567 it's IT'S", "naïve 東京 🙂", "<s>x</s>"):
        assert ours.encode(text, parse_special=True) == library.encode(text).ids, text


def test_merges_of_both_spellings() -> None:
    """Older files have "a b", newer ones ["a", "b"]; a space in a token becomes its stand-in."""
    new = byte_level()
    old = changed(lambda t: t["model"].update(merges=[" ".join(m) for m in t["model"]["merges"]]), new)
    assert read(new, 300)["merges"] == read(old, 300)["merges"] != []
    spaced = changed(lambda t: t["model"].update(merges=[["a b", "c"]]), new)
    assert read(spaced, 300)["merges"] == ["aĠb c"]


def test_holes_are_filled_and_late_additions_left_out() -> None:
    """As the converter does: an id without a token is unused; an added token without an embedding cannot be asked for."""
    holed = changed(lambda t: t["model"]["vocab"].pop("b") and t["model"].update(merges=[]))
    holed["added_tokens"] += [special(14, "<x>", False), special(99, "<image>")]
    found = read(holed)
    assert found["tokens"][9] == "[PAD9]" and found["token_type"][9] == UNUSED and found["scores"][9] == -10000.0
    assert found["tokens"][14] == "<x>" and found["token_type"][14] == USER_DEFINED and found["scores"][14] == -1000.0
    assert "<image>" not in found["tokens"] and len(found["tokens"]) == len(found["scores"]) == 16


def test_added_tokens() -> None:
    """Some that are not marked as special are by their looks; SentencePiece's spaces in others are spaces."""
    extra = [special(13, "<|call|>", False), special(14, SPACE * 2, False), special(15, "<unused9>", False)]
    found = read(changed(lambda t: t["added_tokens"].extend(extra)))
    assert found["tokens"][13:] == ["<|call|>", "  ", "<unused9>"] and found["token_type"][13:] == [
        CONTROL,
        USER_DEFINED,
        CONTROL,
    ]


def template(*parts: str) -> dict[str, Any]:
    single = [{"Sequence": {"id": "A"}} if part == "A" else {"SpecialToken": {"id": part}} for part in parts]
    return {"type": "TemplateProcessing", "single": single}


BYTES = {"type": "ByteLevel", "trim_offsets": False}
FRAMES: dict[str, tuple[Any, dict[str, Any], tuple[object, object]]] = {
    "bos": (template("<s>", "A"), {}, (True, False)),
    "bos and eos": (template("<s>", "A", "</s>"), {}, (True, True)),
    "another token": (template("<unk>", "A"), {}, (False, False)),
    "in a sequence": ({"type": "Sequence", "processors": [BYTES, template("<s>", "A")]}, {}, (True, False)),
    "template wins": (template("<s>", "A"), {"add_bos_token": False}, (True, False)),
    "nothing in the template": (template("A"), {}, (False, False)),
    "nothing in the template, but asked for": (template("A"), {"add_bos_token": True, "add_eos_token": True}, (True, True)),
    "byte level": (BYTES, {}, (False, False)),
    "none": (None, {}, (None, None)),
    "none, but asked for": (None, {"add_bos_token": True, "add_eos_token": False}, (True, False)),
}


@pytest.mark.parametrize("name", FRAMES)
def test_what_text_begins_and_ends_with(name: str) -> None:
    post, config, expected = FRAMES[name]
    config = config | {"bos_token": "<s>", "eos_token": "</s>"}
    found = read(changed(lambda t: t.update(post_processor=post)), config=config)
    assert (found.get("add_bos_token"), found.get("add_eos_token")) == expected


ENDS: dict[str, tuple[dict[str, Any], tuple[object, ...]]] = {
    "of the tokenizer": ({"config": {"eos_token": "</s>"}}, (2, None, None)),
    "of special_tokens_map": ({"special": {"eos_token": {"content": "</s>"}}}, (2, None, None)),
    "of config.json": ({"model_config": {"eos_token_id": 5}}, (5, None, None)),
    "a list in config.json": ({"model_config": {"eos_token_id": [5, 6]}}, (5, 6, None)),
    "of generation_config": ({"generation": {"eos_token_id": 7}}, (7, None, None)),
    "all": ({"config": {"eos_token": "</s>"}, "generation": {"eos_token_id": [5, 2, 6]}}, (2, 5, 6)),
    "unknown text": ({"config": {"eos_token": "</nothing>"}, "model_config": {"eos_token_id": 5}}, (5, None, None)),
    "beyond the vocabulary": ({"model_config": {"eos_token_id": 400}}, (None, None, None)),
    "nonsense": ({"model_config": {"eos_token_id": "x"}, "generation": {"eos_token_id": [None, -1, True]}}, (None, None, None)),
}


@pytest.mark.parametrize("name", ENDS)
def test_end_tokens(name: str) -> None:
    parts, expected = ENDS[name]
    found = read(**parts)
    assert tuple(found.get(f"{key}_token_id") for key in ("eos", "eot", "eom")) == expected


def test_chat_templates() -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert read(config={"chat_template": "inline"})["chat_template"] == "inline"
    assert read(config={"chat_template": named})["chat_template"] == "plain"
    assert read(config={"chat_template": named[:1]})["chat_template"] == "tools"
    assert read(config={"chat_template": "inline"}, template="of the file")["chat_template"] == "of the file"
    assert "chat_template" not in read(config={"chat_template": 3}) and "chat_template" not in read()


def test_the_files_of_a_folder_are_read(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "f",
        tokenizer_config={"bos_token": "<s>", "unk_token": "<unk>"},
        special_tokens_map={"eos_token": "</s>"},
        generation_config={"eos_token_id": [2, 5]},
    )
    (folder / "chat_template.jinja").write_text("{{ 'héllo' }}")
    with open_model(folder) as file:
        meta = file.metadata
        assert meta["tokenizer.chat_template"] == "{{ 'héllo' }}" and len(meta["tokenizer.ggml.tokens"]) == CONFIG["vocab_size"]  # type: ignore[arg-type]
        assert (meta["tokenizer.ggml.eos_token_id"], meta["tokenizer.ggml.eot_token_id"]) == (2, 5)
        assert {2, 5} <= Tokenizer.from_gguf(meta).eos_ids


REFUSED: dict[str, tuple[Change, str]] = {
    "no model": (lambda t: t.pop("model"), "no tokens"),
    "model a list": (lambda t: t.update(model=[]), "expected an object"),
    "unigram": (lambda t: t["model"].update(type="Unigram"), "this Unigram model"),
    "wordpiece": (lambda t: t["model"].update(type="WordPiece"), "this WordPiece model"),
    "subword prefix": (lambda t: t["model"].update(continuing_subword_prefix="##"), "this BPE model"),
    "neither kind": (lambda t: t["model"].update(byte_fallback=False), "neither byte-level nor"),
    "no vocabulary": (lambda t: t["model"].update(vocab={}), "no tokens"),
    "vocabulary too large": (lambda t: t["model"]["vocab"].update(z=16), "ids up to 16, but the model 16 embeddings"),
    "id twice": (lambda t: t["model"]["vocab"].update(z=5), "token 'z' has the id 5"),
    "negative id": (lambda t: t["model"]["vocab"].update(z=-1), "token 'z' has the id -1"),
    "id a text": (lambda t: t["model"]["vocab"].update(z="13"), "token 'z' has the id 13"),
    "id a boolean": (lambda t: t["model"]["vocab"].update(z=True), "token 'z' has the id True"),
    "id a fraction": (lambda t: t["model"]["vocab"].update(z=13.0), "token 'z' has the id 13.0"),
    "added token of another id": (lambda t: t["added_tokens"].append(special(5, "<x>")), "id 5 is both 'ab' and '<x>'"),
    "added token with two ids": (lambda t: t["added_tokens"].append(special(14, "ab")), "'ab' has the ids 5 and 14"),
    "added token without id": (lambda t: t["added_tokens"].append({"content": "x"}), "lacks id"),
    "added token no object": (lambda t: t["added_tokens"].append("x"), "lacks id"),
    "added token negative": (lambda t: t["added_tokens"].append(special(-3, "x")), "id is -3"),
    "merge of three": (lambda t: t["model"]["merges"].append(["a", "b", "c"]), "is no pair"),
    "merge of one": (lambda t: t["model"]["merges"].append("ab"), "is no pair"),
    "merge of numbers": (lambda t: t["model"]["merges"].append([1, 2]), "is no pair"),
    "merges of no SentencePiece model": (
        lambda t: t["model"]["merges"].remove(["c", "cc"]),
        "'ccc' is never merged from 'c' and 'cc'",
    ),
    "lower case": (lambda t: t.update(normalizer={"type": "Lowercase"}), "normalizer .*Lowercase"),
    "precompiled": (
        lambda t: t.update(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}),
        "normalizer .*Precompiled",
    ),
    "words": (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer .*Whitespace"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(VkllmError, match=message) as error:
        read(changed(change))
    assert error.value.hint


def test_byte_level_with_another_normalizer_is_refused() -> None:
    read(changed(lambda t: t.update(normalizer={"type": "NFC"}), byte_level()), 300)
    with pytest.raises(UnsupportedModelError, match="normalizer Lowercase"):
        read(changed(lambda t: t.update(normalizer={"type": "Lowercase"}), byte_level()), 300)


def split(expression: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": behavior, "invert": invert}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


PLAIN, WORDS = (
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    {"type": "ByteLevel", "add_prefix_space": False},
)
DIGIT, NUMBER = {"type": "Digits", "individual_digits": True}, {"type": "Digits", "individual_digits": False}
PUNCTUATION = {"type": "Punctuation", "behavior": "Contiguous"}
TIKTOKEN = MODERN.replace(CONTRACTION, r"'(?i:[sdmt]|ll|ve|re)", 1)
STRUCTURES: dict[str, tuple[dict[str, Any], bool, str]] = {
    "gpt-2": (WORDS, False, "gpt-2"),
    "starcoder, smollm, granite": (sequence(DIGIT, WORDS), False, "starcoder"),
    "falcon": (sequence(PUNCTUATION, WORDS, NUMBER, split("[0-9][0-9][0-9]")), False, "falcon"),
    "llama 3": (sequence(split(MODERN % 3), PLAIN), True, "llama-bpe"),
    "phi-4": (sequence(split(MODERN % 3, "Removed", True), PLAIN), False, "dbrx"),
    "tiktoken's spelling": (sequence(split(TIKTOKEN % 3), PLAIN), False, "dbrx"),
    "qwen2": (sequence(split(MODERN.replace("{1,%d}", "")), PLAIN), False, "qwen2"),
    "deepseek-coder": (
        sequence(split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"), DIGIT, PLAIN),
        False,
        "deepseek-coder",
    ),
    "gpt-oss": (sequence(split(PRE_TOKENIZERS["gpt-4o"].splits[0]), PLAIN), True, "gpt-4o"),
    "a prefix space": ({"type": "ByteLevel", "add_prefix_space": True}, False, "unknown: ByteLevel add_prefix_space=True"),
    "another expression": (sequence(split("[a-z]+"), PLAIN), False, "unknown: [a-z]+"),
    "another behavior": (sequence(split(GPT2, "MergedWithNext"), PLAIN), False, "unknown: Split behavior=MergedWithNext"),
    "none": ({}, False, "unknown: None"),
    "a broken sequence": (sequence(*[3]), False, "unknown: 3"),  # type: ignore[list-item]
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_pre_tokenizers_by_structure(name: str) -> None:
    structure, ignore_merges, expected = STRUCTURES[name]
    found = pre_name(structure, ignore_merges=ignore_merges)
    assert found == expected or (expected.startswith("unknown") and found.startswith(expected))


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_is_found_by_its_expressions(name: str) -> None:
    """The name found cuts text alike."""
    rule = PRE_TOKENIZERS[name]
    found = PRE_TOKENIZERS[pre_name(sequence(*map(split, rule.splits), PLAIN), ignore_merges=rule.ignore_merges)]
    assert (found.splits, found.ignore_merges) == (rule.splits, rule.ignore_merges)


def test_an_unknown_structure_is_refused_by_the_tokenizer() -> None:
    found = read(changed(lambda t: t.update(pre_tokenizer=sequence(split("[a-z]+"), PLAIN)), byte_level()), 300)
    with pytest.raises(UnsupportedModelError, match=r"unknown: \[a-z\]\+"):
        Tokenizer.from_gguf({f"tokenizer.ggml.{k}": v for k, v in found.items()})


def as_tokenizer_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A GGUF vocabulary as transformers would have saved it: scores as merges, in the order of its SentencePiece converter."""
    tokens, types = list(meta["tokenizer.ggml.tokens"]), [int(t) for t in meta["tokenizer.ggml.token_type"]]
    kinds = (UNKNOWN, CONTROL, USER_DEFINED)
    ours = [i for i, kind in enumerate(types) if kind in kinds and not tokens[i].startswith("[PAD")]
    added = [special(i, tokens[i], types[i] != USER_DEFINED) for i in ours]
    vocab = {text: i for i, text in enumerate(tokens) if types[i] in (NORMAL, BYTE)}
    if meta["tokenizer.ggml.model"] == "gpt2":
        splits = PRE_TOKENIZERS[meta["tokenizer.ggml.pre"]]
        model = {"vocab": vocab, "merges": list(meta["tokenizer.ggml.merges"]), "ignore_merges": splits.ignore_merges}
        return {"model": model, "added_tokens": added, "pre_tokenizer": sequence(*map(split, splits.splits), PLAIN)}
    scores = meta["tokenizer.ggml.scores"]
    cuts = ((text[:i], text[i:]) for text in vocab for i in range(1, len(text)))
    merges = [[left, right] for left, right in cuts if left in vocab and right in vocab]
    merges.sort(key=lambda m: (-scores[vocab[m[0] + m[1]]], len(m[0]), len(m[1])))
    return spm_tokenizer() | {"model": {"vocab": vocab, "merges": merges, "byte_fallback": True}, "added_tokens": added}


@pytest.mark.parametrize("name", ["llama-spm", "phi-3", "llama-bpe", "qwen2", "gpt-2"])
def test_real_vocabularies(shared_data: Path, name: str) -> None:
    """Tokens, types, and the ids of llama.cpp's own test texts survive the way through tokenizer.json."""
    path = shared_data / "vocab" / f"ggml-vocab-{name}.gguf"
    with open_model(path) as file:
        theirs = dict(file.metadata)
    found = metadata(files(as_tokenizer_json(theirs), config={"unk_token": "<unk>"}), len(theirs["tokenizer.ggml.tokens"]))
    specials = (UNKNOWN, CONTROL, USER_DEFINED)  # which of them is what, older converters decided otherwise
    columns = (found[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    for text, ours, kind in zip(*columns, theirs["tokenizer.ggml.token_type"], strict=True):  # type: ignore[call-overload]
        assert ours == kind or (ours in specials and kind in specials) or text.startswith("[PAD"), text
    tokenizer = Tokenizer.from_gguf(found)
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    for text, line in zip(texts, Path(f"{path}.out").read_text().split("\n"), strict=False):
        assert tokenizer.encode(text, add_special=False) == [int(i) for i in line.split()], text
