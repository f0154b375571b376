"""What special tokens are and where they stand, as llama.cpp decides it from types, texts and the model's name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vkllm.tokenizer import Tokenizer
from vkllm.vocab.bpe import BYTE_OF
from vkllm.vocab.special import CONTROL, NORMAL, USER_DEFINED


def tokenizer(special: dict[str, int], name: str = "", **changes: Any) -> Tokenizer:
    """Bytes, then the tokens of `special` with their types."""
    metadata: dict[str, object] = {
        "general.name": name,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.tokens": [*BYTE_OF, *special],
        "tokenizer.ggml.token_type": np.array([NORMAL] * 256 + list(special.values()), np.int32),
        "tokenizer.ggml.merges": [],
    }
    return Tokenizer.from_gguf(metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()})


def pieces(t: Tokenizer, text: str, parse_special: bool = True) -> list[str]:
    """The special tokens of a text, and between them its plain text."""
    joined: list[str] = []
    plain = False
    for i in t.encode(text, parse_special=parse_special):
        piece = t.token_bytes(i).decode()
        if plain and i < 256:
            joined[-1] += piece
        else:
            joined.append(piece)
        plain = i < 256
    return joined


def test_harmony_ends_a_turn_with_return_or_call_and_keeps_its_channels_in_the_text() -> None:
    names = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
    t = tokenizer(dict.fromkeys(names, CONTROL), eos_token_id=261)
    assert t.eos_ids == {261, 262}
    ids = t.encode("<|channel|>final<|message|>Hi<|end|><|return|>", parse_special=True)
    assert t.decode(ids) == "<|channel|>final<|message|>Hi<|end|>"
    assert tokenizer({"<|end|>": CONTROL, "<|return|>": CONTROL}).eos_ids == {256, 257}


def test_control_looking_tokens_are_control_tokens() -> None:
    t = tokenizer({"<|im_end|>": NORMAL, "<fim_prefix>": USER_DEFINED, "<|file_sep|>": NORMAL, "<other>": USER_DEFINED})
    assert t.eos_ids == {256, 258}
    assert [t.is_control(i) for i in range(256, 260)] == [True, True, True, False]
    assert pieces(t, "<|im_end|>a<other>b", parse_special=False) == ["<|im_end|>a", "<other>", "b"]
    assert pieces(t, "<|im_end|>a<fim_prefix>") == ["<|im_end|>", "a", "<fim_prefix>"]


def test_what_the_file_names_is_left_as_it_is() -> None:
    special = {"<fim_prefix>": USER_DEFINED, "<pre>": CONTROL}
    assert not tokenizer(special, fim_pre_token_id=257).is_control(256)
    assert not tokenizer(special, prefix_token_id=257).is_control(256)
    assert tokenizer(special).is_control(256)


def test_gemma_4_has_strikethrough_not_an_end() -> None:
    t = tokenizer({"</s>": USER_DEFINED, "<|tool_response>": CONTROL, "<turn|>": CONTROL})
    assert t.eos_ids == {257, 258} and not t.is_special(256)
    assert tokenizer({"</s>": USER_DEFINED}).eos_ids == {256}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Phi-3 mini", ["<|user|>", "a \n", "<|end|>", "b", "<s>", "  c", "<|end|>"]),
        ("phi3", ["<|user|>", "a \n", "<|end|>", "b", "<s>", "  c", "<|end|>"]),
        ("Llama", ["<|user|>", "\n a \n", "<|end|>", "\t\nb", "<s>", "  c", "<|end|>", " "]),
    ],
)
def test_phi_3_takes_the_white_space_after_its_tokens(name: str, expected: list[str]) -> None:
    t = tokenizer({"<|user|>": CONTROL, "<|end|>": CONTROL, "<s>": CONTROL}, name)
    assert pieces(t, "<|user|>\n a \n<|end|>\t\nb<s>  c<|end|> ") == expected


def test_white_space_that_is_a_user_defined_token_as_in_gemma() -> None:
    t = tokenizer({"  ": USER_DEFINED, "    ": USER_DEFINED, "\n\n": USER_DEFINED})
    assert pieces(t, "a       b\n\n\nc", parse_special=False) == ["a", "    ", "  ", " b", "\n\n", "\nc"]
    assert t.decode(t.encode("a       b\n\n\nc")) == "a       b\n\n\nc"
