"""`vkllm bench`: prefill and decode speed, load time, time to the first token and memory of one model on one device."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

from vkllm.chain import Rows, Span
from vkllm.config import ModelConfig, RuntimeConfig
from vkllm.engine import LLMEngine
from vkllm.errors import RequestError
from vkllm.files import open_model
from vkllm.sampler import SamplingParams

SHALLOW = 16  # tokens before the decode steps that deep ones are compared with
TURN = 4  # steps at one depth before the other one's turn


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Medians over the runs. Rates in tokens per second, `tg_gb_s`: 1e9 bytes of weights; `busy`: CPUs that others used.

    `shallow_tok_s`, `deep_tok_s`: decode after SHALLOW and after `depth` tokens, `fill_tok_s`: the prefill up to there; all 0
    where no depth was asked for.
    """

    model: str
    device: str
    driver: str
    activations: str
    n_prompt: int
    n_generate: int
    repeat: int
    pp_tok_s: float
    tg_tok_s: float
    tg_gb_s: float
    load_s: float
    ttft_s: float
    rss_bytes: int
    file_bytes: int
    dispatches_per_token: int
    dispatches_per_layer: float
    depth: int
    fill_tok_s: float
    shallow_tok_s: float
    deep_tok_s: float
    busy: float


def rss_bytes() -> int:
    """Resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def cpu_ticks() -> tuple[float, float]:
    """(busy seconds of the whole machine, of this process) since some fixed time."""
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    busy = sum(fields) - fields[3] - fields[4]
    return busy / 100.0, time.process_time()


def benchmark(model: str, runtime: RuntimeConfig, n_prompt: int, n_generate: int, repeat: int, depth: int = 0) -> BenchReport:
    """Load `model`, then time `repeat` prefills of `n_prompt` random tokens and `repeat` runs of `n_generate` decode steps.

    `depth`: also fill the cache with so many tokens, and time decode steps after them and after SHALLOW tokens, in turns.
    `ttft_s` is the time from the call that loads the model to the first token of a one-token prompt.
    Raises: RequestError: more tokens than the context holds; otherwise as LLMEngine.init_model.
    """
    runtime = replace(
        runtime,
        speculate="off",
        n_ctx=_context(model, runtime, max(n_prompt, n_generate + 2, depth and max(depth, SHALLOW) + TURN)),
    )
    started = time.perf_counter()
    with LLMEngine.init_model(model, runtime) as engine:
        prompt = random.Random(1).choices(range(engine.config.n_vocab), k=max(n_prompt, 1))
        engine.prefill(prompt[:1])
        ttft_s = time.perf_counter() - started
        wall, (busy0, own0) = time.perf_counter(), cpu_ticks()
        pp = [_prefill_rate(engine, prompt) for _ in range(repeat + 1)][1:] if n_prompt else [0.0]
        decode = SamplingParams(temperature=0.0, max_tokens=n_generate + 1, ignore_eos=True)
        tg = [engine.generate_result(prompt[:1], decode).timings.decode_tok_s for _ in range(repeat)] if n_generate else [0.0]
        fill, shallow, deep = _by_depth(engine, depth, 4 * repeat) if depth else (0.0, 0.0, 0.0)
        wall, (busy1, own1) = time.perf_counter() - wall, cpu_ticks()
        tg_tok_s = statistics.median(tg)
        return BenchReport(
            model=engine.config.name or model,
            device=engine.device.info.name,
            driver=engine.device.info.driver_info,
            activations=engine.chain.activations,
            n_prompt=n_prompt,
            n_generate=n_generate,
            repeat=repeat,
            pp_tok_s=statistics.median(pp),
            tg_tok_s=tg_tok_s,
            tg_gb_s=tg_tok_s * engine.chain.bytes_per_token / 1e9,
            load_s=engine.load_s,
            ttft_s=ttft_s,
            rss_bytes=rss_bytes(),
            file_bytes=engine.file.nbytes,
            dispatches_per_token=engine.chain.dispatches_per_token,
            dispatches_per_layer=engine.chain.dispatches_per_layer,
            depth=depth,
            fill_tok_s=fill,
            shallow_tok_s=shallow,
            deep_tok_s=deep,
            busy=max(0.0, (busy1 - busy0) - (own1 - own0)) / wall,
        )


def _context(model: str, runtime: RuntimeConfig, need: int) -> int:
    """The context to allocate: as asked for, else what the runs need and 512 at least, within what the model knows."""
    with open_model(model) as file:
        trained = ModelConfig.from_gguf(file).n_ctx
    n_ctx = runtime.n_ctx or min(max(need, 512), trained)
    if need > n_ctx:
        raise RequestError(
            f"the runs need {need} positions; the context holds {n_ctx}", hint="lower -p, -n and --depth, or raise --n-ctx"
        )
    return n_ctx


def _prefill_rate(engine: LLMEngine, prompt: list[int]) -> float:
    """Tokens per second of one prefill from an empty cache."""
    engine.forget()
    started = time.perf_counter()
    engine.prefill(prompt)
    return len(prompt) / (time.perf_counter() - started)


def _by_depth(engine: LLMEngine, depth: int, turns: int) -> tuple[float, float, float]:
    """Tokens per second of a prefill of `depth` tokens, of decode after SHALLOW and of decode after `depth` tokens: of the
    median step. The two depths take turns of TURN steps, so that what else the machine does hits both."""
    chunk, n = engine.chain.prefill_chunk, max(depth, SHALLOW)
    ids = random.Random(2).choices(range(engine.config.n_vocab), k=n)
    times: dict[int, list[float]] = {SHALLOW: [], depth: []}
    with engine.scratch_sequence(n + TURN) as table:
        started = time.perf_counter()
        for start in range(0, n, chunk):
            engine.chain.forward(Rows.of(Span(ids[start : start + chunk], start, table)))
        fill_s = time.perf_counter() - started
        for _ in range(turns):
            for position, found in times.items():
                for i in range(TURN):
                    rows = Rows.of(Span(ids[:1], position + i, table, n_output=1))
                    before = time.perf_counter()
                    engine.chain.forward(rows)
                    found.append(time.perf_counter() - before)
    return n / fill_s, 1.0 / statistics.median(times[SHALLOW]), 1.0 / statistics.median(times[depth])
