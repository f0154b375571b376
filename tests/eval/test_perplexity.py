"""Perplexity against llama-perplexity's figures, and against its definition computed from all logits in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vkllm import perplexity as module
from vkllm.cli import app
from vkllm.config import RuntimeConfig
from vkllm.engine import LLMEngine
from vkllm.errors import ConfigError, ContextTooLongError, RequestError
from vkllm.perplexity import Chunks, cut, negative_log_likelihood, perplexity
from vkllm.perplexity_cli import STORIES

# llama-perplexity -m MODEL -f vkllm/data/stories.txt -c 256 -b 256 --chunks 8 (ggml 0.25.3, CPU); tiny-* made by `vkllm import`
TINY = {"F16": (1.5349, 0.05993), "Q8_0": (1.5342, 0.05978), "Q4_K_M": (1.5357, 0.05982)}
STORIES260K = {"f32": (10.3652, 0.83250), "f16": (10.3650, 0.83240), "q8_0": (10.3835, 0.83476), "q4_0": (11.3447, 0.92763)}
N_CTX, N_CHUNK = 256, 8


def measured(model: Path, activations: str) -> module.Perplexity:
    with LLMEngine.init_model(model, RuntimeConfig(n_ctx=N_CTX, activations=activations)) as engine:  # type: ignore[arg-type]
        return perplexity(engine, cut(engine.tokenizer, STORIES.read_text(), N_CTX, N_CHUNK))


@pytest.mark.parametrize("activations", ["f32", "int8"])
@pytest.mark.parametrize("kind", TINY)
def test_the_packaged_model_as_llama_perplexity_finds_it(
    kind: str, activations: str, tiny: Callable[[str], Path], figure: Any
) -> None:
    found, (ppl, error) = measured(tiny(kind), activations), TINY[kind]
    figure(
        f"tiny {kind}, {activations}",
        "llama-perplexity",
        "relative difference of the perplexity",
        abs(found.ppl / ppl - 1),
        0.005,
    )
    assert found.ppl == pytest.approx(ppl, rel=0.005)
    assert found.error == pytest.approx(error, rel=0.02)
    assert (found.n_token, found.n_chunk) == (8 * 127, 8)


@pytest.mark.parametrize("kind", STORIES260K)
def test_stories260k_as_llama_perplexity_finds_it(kind: str, shared_data: Path, figure: Any) -> None:
    found, (ppl, error) = measured(shared_data / "stories260K" / f"stories260K-{kind}.gguf", "auto"), STORIES260K[kind]
    figure(f"stories260K {kind}", "llama-perplexity", "relative difference of the perplexity", abs(found.ppl / ppl - 1), 0.005)
    assert found.ppl == pytest.approx(ppl, rel=0.005)
    assert found.error == pytest.approx(error, rel=0.02)


@pytest.fixture(scope="module")
def engine() -> LLMEngine:
    with LLMEngine.init_model("tiny", RuntimeConfig(n_ctx=256, activations="f32")) as engine:
        yield engine  # type: ignore[misc]


@pytest.mark.parametrize("n_ctx", [4, 5, 33, 129, 130, 150])  # less than a prefill part, and over its edges
@pytest.mark.parametrize("bos", [None, 3])
def test_the_definition(engine: LLMEngine, n_ctx: int, bos: int | None) -> None:
    chunks = Chunks(cut(engine.tokenizer, STORIES.read_text(), n_ctx, 3).ids, bos)
    losses = []
    for ids in chunks.ids.tolist():
        logits = engine.logits([*([] if bos is None else [bos]), *ids[0 if bos is None else 1 :]]).astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        losses += [-log_p[i, ids[i + 1]] for i in range(n_ctx // 2, n_ctx - 1)]
    found = perplexity(engine, chunks)
    assert found.n_token == len(losses)
    assert found.nll == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.ppl == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert found.error == pytest.approx(found.ppl * np.std(losses) / np.sqrt(len(losses) - 1), rel=1e-5)


def test_the_estimate_runs(engine: LLMEngine) -> None:
    chunks = cut(engine.tokenizer, STORIES.read_text(), 64, 3)
    heard: list[tuple[int, module.Perplexity]] = []
    final = perplexity(engine, chunks, lambda chunk, so_far: heard.append((chunk, so_far)))
    assert [(chunk, p.n_chunk, p.n_token) for chunk, p in heard] == [(0, 1, 31), (1, 2, 62), (2, 3, 93)]
    assert heard[-1][1] == final
    assert heard[0][1] == perplexity(engine, Chunks(chunks.ids[:1], None))


def test_few_rows_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((7, 50), np.float32) * 5, rng.integers(0, 50, 7).astype(np.uint32)
    whole = negative_log_likelihood(logits, targets)
    monkeypatch.setattr(module, "SLAB", 120)
    np.testing.assert_array_equal(negative_log_likelihood(logits, targets), whole)


class Words:
    """A tokenizer of one id a word, which adds BOS and EOS."""

    add_bos = add_eos = True
    bos_id, eos_id = 1, 2

    def encode(self, text: str) -> list[int]:
        return [1, *(int(word) for word in text.split()), 2]


def test_chunks_begin_with_bos_and_keep_the_text_in_place() -> None:
    chunks = cut(Words(), " ".join(str(i) for i in range(10, 21)), 4)  # type: ignore[arg-type]
    assert chunks.ids.tolist() == [[1, 10, 11, 12], [13, 14, 15, 16], [17, 18, 19, 20]]  # the EOS does not count
    assert chunks.inputs(1) == [1, 14, 15]
    assert chunks.targets(1).tolist() == [16]


def test_what_cannot_be_measured(engine: LLMEngine, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"the text has \d tokens; a chunk takes 512"):
        cut(engine.tokenizer, "once upon", 512)
    with pytest.raises(RequestError, match="chunks of 3 tokens"):
        cut(engine.tokenizer, "once upon a time", 3)
    with pytest.raises(ContextTooLongError):
        perplexity(engine, cut(engine.tokenizer, STORIES.read_text(), 300, 1))
    with pytest.raises(ConfigError, match="trained on 1024"):
        measured_with(2048)


def measured_with(n_ctx: int) -> None:
    LLMEngine.init_model("tiny", RuntimeConfig(n_ctx=n_ctx)).close()


def command(*args: str) -> tuple[int, str, str]:
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, list(args), prog_name="vkllm", env={"COLUMNS": "200", "TERM": "dumb"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_command(tmp_path: Path) -> None:
    code, out, log = command("perplexity", "tiny", str(STORIES), "-c", "64", "--chunks", "2", "--json", "--activations", "f32")
    report = json.loads(out)
    assert (code, log, report["n_token"], report["n_ctx"]) == (0, "", 62, 64)
    code, out, log = command("perplexity", "tiny", str(STORIES), "-c", "64", "--chunks", "2", "--activations", "f32")
    assert out == f"PPL = {report['ppl']:.4f} ± {report['error']:.5f}\n"
    assert "2 chunks of 64 tokens" in log
    (tmp_path / "short.txt").write_text("once")
    for text, complaint in {"short.txt": " tokens; a chunk takes 512", "no.txt": "No such file", ".": "Is a directory"}.items():
        code, out, log = command("perplexity", "tiny", str(tmp_path / text))
        assert (code, out) == (1, "")
        assert complaint in log
