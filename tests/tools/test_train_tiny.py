"""The text of the tiny model is deterministic and clean, and the shipped file is what tools/train_tiny.py says."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import tiny_facts  # noqa: E402
import tiny_text  # noqa: E402

SHIPPED = ROOT / "vkllm" / "data" / "tiny.gguf"
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def documents(seed: int, n: int) -> list[str]:
    rng = random.Random(seed)
    return [tiny_text.document(rng) for _ in range(n)]


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(SHIPPED).fields.items()}


@pytest.fixture(scope="module")
def tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The vocabulary of the shipped file, without vkllm's own tokenizer."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    t = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    t.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken(token, special=True) for token, kind in zip(tokens, kinds, strict=True) if kind == 3])
    return t


def test_same_seed_same_text() -> None:
    assert documents(1, 60) == documents(1, 60)
    assert documents(1, 60) != documents(2, 60)


def test_text_is_varied_and_fully_expanded() -> None:
    texts = documents(3, 1500)
    assert len(set(texts)) > 1400
    for text in texts:
        assert not re.search(r"[{}\[\]]|  |None", text.replace("<|", "").replace("|>", "")), text
        assert text[0] in '<"' or text[0].isupper() or text[0].isdigit(), text


@pytest.mark.parametrize("kind", tiny_text.PLOTS)
def test_every_plot_names_its_people(kind: str) -> None:
    rng = random.Random(7)
    for _ in range(20):
        told = tiny_text.story(rng, kind=kind)
        assert told.hero["name"] in told.text
        assert told.friend is None or told.friend["name"] in told.text
        assert 200 < len(told.text) < 2500


def test_held_out_wordings_are_not_taught() -> None:
    taught = "\n".join(documents(4, 4000))
    for check in tiny_text.checks():
        if check.kind.startswith("chat"):
            assert check.prompt not in taught


def test_facts_are_right() -> None:
    groups = tiny_facts.facts_by_topic()
    replies = {fact.reply for facts in groups.values() for fact in facts}
    assert {"The capital of France is Paris.", "7 plus 8 is 15.", "The day after Sunday is Monday."} <= replies
    assert {"The month before January is December.", "A spider has eight legs.", "Japan is in Asia."} <= replies
    for name, sign in (("plus", "+"), ("minus", "-"), ("times", "*")):
        for fact in groups[name]:
            x, y, z = map(int, re.findall(r"\d+", fact.reply))
            assert z == {"+": x + y, "-": x - y, "*": x * y}[sign]


def test_text_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    texts = documents(5, 200)
    encoded = [tokenizer.encode(text).ids for text in texts]
    assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in encoded] == texts
    assert sum(map(len, texts)) > 3.5 * sum(map(len, encoded))  # the vocabulary fits the text
    odd = "Zoë paid 3½ €\n\n  then   ran … 日本"
    assert tokenizer.decode(tokenizer.encode(odd).ids) == odd


def test_shipped_metadata(metadata: dict[str, Any]) -> None:
    expected = {
        "general.architecture": "qwen2",
        "general.name": "tiny",
        "general.license": "apache-2.0",
        "qwen2.block_count": 4,
        "qwen2.embedding_length": 256,
        "qwen2.feed_forward_length": 768,
        "qwen2.attention.head_count": 4,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.context_length": 1024,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: metadata[key] for key in expected} == expected
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 2048
    assert tokens[metadata["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    assert control == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def test_shipped_template_gives_the_taught_form(metadata: dict[str, Any]) -> None:
    jinja2 = pytest.importorskip("jinja2")
    turns = [("system", "You are tiny."), ("user", "Hello!"), ("assistant", "Hi!"), ("user", "Who are you?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    text = jinja2.Template(metadata["tokenizer.chat_template"]).render(messages=messages, add_generation_prompt=True)
    assert text == tiny_text.chat_text(turns) + "<|im_start|>assistant\n"


def test_shipped_tensors() -> None:
    assert SHIPPED.stat().st_size < 6e6
    tensors = {t.name: t for t in gguf.GGUFReader(SHIPPED).tensors}
    assert len(tensors) == 2 + 4 * 12 and "output.weight" not in tensors  # tied embeddings
    for name, t in tensors.items():
        shape = [int(n) for n in t.shape]
        if len(shape) == 2:
            assert shape[0] % 256 == 0 and t.tensor_type == gguf.GGMLQuantizationType.Q8_0, name
        else:
            assert t.tensor_type == gguf.GGMLQuantizationType.F32, name
        assert np.isfinite(gguf.quants.dequantize(t.data, t.tensor_type)).all(), name
    assert sum(int(t.n_elements) for t in tensors.values()) == 3_674_368


def test_training_step_and_export(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra `train`")
    import train_tiny

    torch.manual_seed(0)
    model = train_tiny.Model(train_tiny.Shape())
    t = train_tiny.train_tokenizer(2048, 3000)
    ids, targets = train_tiny.batch(t, 0, 2, 64, 0.6)
    assert torch.equal(ids, train_tiny.batch(t, 0, 2, 64, 0.6)[0]) and ids.shape == targets.shape == (2, 64)
    assert ((ids[:, 1:] == targets[:, :-1]) | (targets[:, :-1] == train_tiny.IGNORED)).all()
    optims, losses = train_tiny.optimizers(model, 0.02, 0.003), []
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        loss.backward()
        for o in optims:
            o.step()
            o.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    train_tiny.export(tmp_path / "t.gguf", model, t, gguf.LlamaFileType.MOSTLY_Q8_0)
    with torch.no_grad():
        want, got = model(ids), train_tiny.load_gguf(tmp_path / "t.gguf")(ids)
    assert ((want - got).square().mean() / want.square().mean()).item() < 1e-3
