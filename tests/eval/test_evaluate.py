"""Comparisons of a quantized model with its parent, against llama-perplexity's figures and against definitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from test_perplexity import N_CHUNK, N_CTX, command

from vkllm.config import RuntimeConfig
from vkllm.engine import LLMEngine
from vkllm.errors import RequestError
from vkllm.evaluate import Difference, Positions, check_vocabularies, compare, difference, kl_divergence
from vkllm.evaluate_plot import svg
from vkllm.perplexity import Chunks, cut
from vkllm.perplexity_cli import STORIES


def compared(quantized: Path | str, parent: Path | str, activations: str, n_ctx: int = N_CTX) -> tuple[Difference, Positions]:
    runtime = RuntimeConfig(n_ctx=n_ctx, activations=activations)  # type: ignore[arg-type]
    with LLMEngine.init_model(quantized, runtime) as small, LLMEngine.init_model(parent, runtime) as large:
        return compare(small, large, cut(small.tokenizer, STORIES.read_text(), n_ctx, N_CHUNK))


def test_stories260k_as_llama_perplexity_finds_it(shared_data: Path) -> None:
    """llama-perplexity -c 256 -b 256 --chunks 8, --save-all-logits of the F16 file, then --kl-divergence of the Q4_0 file."""
    folder = shared_data / "stories260K"
    found, _ = compared(folder / "stories260K-q4_0.gguf", folder / "stories260K-f16.gguf", "int8")
    assert found.kl_mean == pytest.approx(0.131845, rel=0.02)
    assert found.kl_error == pytest.approx(0.005922, rel=0.05)
    assert found.kl_median == pytest.approx(0.086356, rel=0.05)
    assert found.kl_p90 == pytest.approx(0.288283, rel=0.05)
    assert found.kl_p99 == pytest.approx(0.752140, rel=0.1)
    assert found.kl_max == pytest.approx(2.821973, rel=0.1)
    assert found.same_top == pytest.approx(0.79626, abs=0.01)
    assert found.same_top_error == pytest.approx(0.01264, rel=0.05)
    assert found.p_shift_rms == pytest.approx(0.09902, rel=0.05)
    assert found.log_ratio == pytest.approx(0.090638, abs=0.005)
    assert found.log_ratio_error == pytest.approx(0.019680, rel=0.05)
    assert found.ppl_delta_error == pytest.approx(0.233421, rel=0.05)


def test_the_packaged_model_as_llama_perplexity_finds_it(tiny: Callable[[str], Path]) -> None:
    """As above, Q8_0 and Q4_K_M against F16. Its greatest divergences of this confident model are off: it keeps the parent's
    logarithms of probability in 16 bits, and none below -16. In Q8_0 the highest hundredth, ten positions, is what the rounding
    of activations makes of them, so it may only be smaller."""
    found, _ = compared(tiny("Q8_0"), tiny("F16"), "int8")
    assert found.kl_mean == pytest.approx(5.3e-5, abs=0.9e-5)
    assert found.kl_p90 == pytest.approx(9.6e-5, rel=0.1)
    assert found.kl_p99 <= 9.55e-4 * 1.1
    assert found.same_top == pytest.approx(0.99803, abs=0.0015)
    found, _ = compared(tiny("Q4_K_M"), tiny("F16"), "int8")
    assert found.kl_median == pytest.approx(2.55e-4, rel=0.1)
    assert found.kl_p90 == pytest.approx(5.051e-3, rel=0.1)
    assert found.same_top == pytest.approx(0.98622, abs=0.0037)


def test_a_model_does_not_differ_from_itself() -> None:
    found, at = compared("tiny", "tiny", "f32", n_ctx=64)
    assert (found.kl_mean, found.kl_max, found.same_top) == (0.0, 0.0, 1.0)
    assert (found.ppl_delta, found.ppl_delta_error, found.p_shift_rms) == (0.0, 0.0, 0.0)
    assert len(at.kl) == found.quantized.n_token == N_CHUNK * 31


def test_the_divergence_is_from_the_parent(tiny: Callable[[str], Path]) -> None:
    runtime = RuntimeConfig(n_ctx=32, activations="f32")
    with LLMEngine.init_model(tiny("Q4_0"), runtime) as small, LLMEngine.init_model("tiny", runtime) as large:
        chunks = cut(small.tokenizer, STORIES.read_text(), 32, 1)
        q, p = (engine.logits(chunks.inputs(0))[16:].astype(np.float64) for engine in (small, large))
        found, at = compare(small, large, chunks)
    log_q, log_p = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) for logits in (q, p))
    np.testing.assert_allclose(at.kl, (np.exp(log_p) * (log_p - log_q)).sum(axis=1), rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(at.nll, -log_q[np.arange(15), chunks.targets(0)], rtol=1e-5, atol=1e-6)
    assert found.ppl_delta == found.quantized.ppl - found.parent.ppl != 0.0


@pytest.mark.parametrize(("tokens", "n_vocab"), [(["a", "c"], 2), (["a", "b"], 3)])
def test_other_vocabularies_are_seen(tokens: list[str], n_vocab: int) -> None:
    def engine(tokens: list[str], n_vocab: int) -> LLMEngine:
        file = SimpleNamespace(metadata={"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens})
        return SimpleNamespace(file=file, config=SimpleNamespace(n_vocab=n_vocab))  # type: ignore[return-value]

    check_vocabularies(engine(["a", "b"], 2), engine(["a", "b"], 2))
    with pytest.raises(RequestError, match="different vocabularies"):
        check_vocabularies(engine(["a", "b"], 2), engine(tokens, n_vocab))


def test_models_of_other_vocabularies_are_refused(shared_data: Path) -> None:
    with pytest.raises(RequestError, match="different vocabularies, of 2048 and 512 tokens"):
        compared("tiny", shared_data / "stories260K" / "stories260K-f16.gguf", "f32")


def test_divergence_is_the_textbook_sum() -> None:
    rng = np.random.default_rng(0)
    p = (rng.standard_normal((40, 300)) * 6).astype(np.float32)
    q = p + rng.standard_normal((40, 300)).astype(np.float32) * np.float32(0.01)
    wide = [logits.astype(np.float64) for logits in (p, q)]
    log_p, log_q = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) for logits in wide)
    np.testing.assert_allclose(kl_divergence(p, q), (np.exp(log_p) * (log_p - log_q)).sum(axis=1), rtol=1e-9, atol=1e-15)


def positions(n: int = 600) -> Positions:
    rng = np.random.default_rng(1)
    parent = rng.exponential(1.0, n)
    return Positions(rng.exponential(0.01, n), rng.random(n) < 0.9, np.abs(parent + rng.normal(0, 0.2, n)), parent)


def test_errors_of_differences_count_what_both_models_share() -> None:
    """llama.cpp adds the squared errors of both perplexities less twice their covariance."""
    at = positions()
    found, n = difference(at, Chunks(np.zeros((1, 1201), np.uint32), None)), 600
    covariance = np.mean((at.nll - at.nll.mean()) * (at.parent_nll - at.parent_nll.mean())) / (n - 1)
    a, b = found.quantized, found.parent
    together = a.error**2 + b.error**2 - 2 * a.ppl * b.ppl * covariance
    assert found.ppl_delta_error == pytest.approx(np.sqrt(together))
    assert found.ppl_delta == pytest.approx(np.exp(at.nll.mean()) - np.exp(at.parent_nll.mean()))
    assert found.same_top_error == pytest.approx(np.sqrt(found.same_top * (1 - found.same_top) / (n - 1)))


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1.0, 1e4])
def test_the_plot_is_sound_xml_whatever_the_divergences(scale: float) -> None:
    at = positions()
    at = Positions(at.kl * scale, at.same_top, at.nll, at.parent_nll)
    chunks = Chunks(np.zeros((6, 201), np.uint32), None)
    root = ElementTree.fromstring(svg(at, difference(at, chunks), chunks, "a <b> & c"))
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "a <b> & c"
    assert any(text and text.startswith("median") for text in texts)
    heights = [float(bar.get("height", "0")) for bar in root.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert 100 < max(heights) <= 230
    numbers = [
        float(v)
        for line in root.iter("{http://www.w3.org/2000/svg}polyline")
        for v in line.get("points", "").replace(",", " ").split()
    ]
    assert np.isfinite(numbers).all()


def test_the_command(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    models, short = (str(tiny("Q4_0")), "tiny"), ("-c", "64", "--chunks", "2")
    code, out, log = command("eval-quant", *models, *short, "--json", "--plot", str(tmp_path / "kl.svg"))
    report = json.loads(out)
    assert (code, log) == (0, "")
    assert 0 < report["kl_median"] < report["kl_mean"] < report["kl_p99"] <= report["kl_max"]
    assert report["quantized"]["n_token"] == 62
    assert "tiny-Q4_0.gguf against tiny" in (tmp_path / "kl.svg").read_text()
    code, out, _ = command("eval-quant", "tiny", "tiny", *short, "--json", "--cache-type", "q8_0", "--activations", "f32")
    assert 0 < json.loads(out)["kl_mean"] < report["kl_mean"] / 10  # the options reach the first model alone
    code, out, _ = command("eval-quant", *models, *short, "--text", str(STORIES))
    assert code == 0
    assert f"{report['same_top']:.3%}" in out
    code, _, log = command("eval-quant", *models, "--plot", str(tmp_path / "no" / "kl.svg"))
    assert code == 2
    assert "does not exist" in log
