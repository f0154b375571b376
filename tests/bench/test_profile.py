"""vkllm profile: what a step is made of, counted against the model's shapes; trace events as viewers want them."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vkllm.cli import app
from vkllm.config import RuntimeConfig
from vkllm.engine import LLMEngine
from vkllm.errors import RequestError
from vkllm.profile import BARRIER, Interval, Profile, ProfiledStep, profile, summary, trace_events

N_DECODE, DEPTH = 2, 70


@pytest.fixture(scope="module")
def found() -> Profile:
    """Two steps of the tiny model after 70 random tokens."""
    return profile("tiny", RuntimeConfig(prefill_chunk=32), depth=DEPTH, n_decode=N_DECODE)


def test_a_full_chunk_and_every_step_are_there(found: Profile) -> None:
    assert [(s.kind, s.n_row, s.depth) for s in found.steps] == [
        ("prefill", 32, 63),
        ("decode", 1, DEPTH),
        ("decode", 1, DEPTH + 1),
    ]


def test_every_dispatch_and_barrier_is_there_in_order(found: Profile) -> None:
    """Of each op: no persistent kernels."""
    with LLMEngine.init_model("tiny", RuntimeConfig(prefill_chunk=32, persistent="off")) as engine:
        expected = engine.chain.dispatches_per_token
    for step in found.of("decode"):
        assert len(step.dispatches) == expected
        device = [i for i in step.intervals if i.track == "device"]
        assert device[-1].name == BARRIER
        assert all(a.start_us + a.us <= b.start_us + 1e-3 for a, b in itertools.pairwise(device))
        assert {"step", "write parameters", "submit", "wait", "sample"} <= {i.name for i in step.intervals if i.track == "host"}


def test_bytes_and_operations_are_those_of_the_model(found: Profile) -> None:
    with LLMEngine.init_model("tiny") as engine:
        c = engine.config
    decode, prefill = found.of("decode")[0], found.of("prefill")[0]
    head = next(d for d in decode.dispatches if d.op == "output")
    assert head.flop == 2 * c.n_embd * c.n_vocab
    assert head.nbytes >= c.n_embd * c.n_vocab * 34 // 32  # Q8_0
    attention = next(d for d in decode.dispatches if d.op == "blk.0.attn")
    assert attention.flop == 4 * c.n_head * c.head_dim * (DEPTH + 1)
    assert attention.nbytes == 2 * 2 * c.n_kv_head * c.head_dim * (DEPTH + 1)  # K and V, two bytes a number
    assert next(d for d in prefill.dispatches if d.op == "blk.0.attn").flop == 4 * c.n_head * c.head_dim * sum(range(33, 65))
    gate_up = [next(d for d in s.dispatches if d.op_kind == "ffn_gate_up") for s in (prefill, decode)]
    assert gate_up[0].flop == 32 * gate_up[1].flop == 32 * 2 * c.n_embd * 2 * c.n_ff
    assert gate_up[0].nbytes == gate_up[1].nbytes  # read once, whatever the number of rows


def test_the_tokens_are_those_of_the_engine() -> None:
    seen: list[int] = []
    from vkllm.profile import ProfiledChain

    def note(*args: object, **kwargs: object) -> object:
        token, step = original(*args, **kwargs)  # type: ignore[arg-type]
        seen.append(token)
        return token, step

    original = ProfiledChain.profiled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProfiledChain, "profiled", note)
        profile("tiny", RuntimeConfig(), prompt="Once upon a time", n_decode=3)
    with LLMEngine.init_model("tiny") as engine:
        from vkllm.sampler import SamplingParams

        expected = engine.generate_result("Once upon a time", SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    assert [seen[1], *seen[3:]] == list(expected.token_ids)  # the first prefill and the first step run twice


def dispatch(name: str, op: str, us: float, nbytes: int = 0) -> Interval:
    return Interval("device", name, 0.0, us, op, nbytes, 2 * nbytes)


def test_the_summary_takes_medians_over_steps_and_sums_over_layers() -> None:
    steps = [
        ProfiledStep(
            "decode", 1, 0, (dispatch("a", "blk.0.x", us, 1000), dispatch("a", "blk.1.x", us, 1000), dispatch("b", "y", 4.0))
        )
        for us in (10.0, 500.0, 8.0)
    ]
    x, y = summary(steps, lambda d: d.op_kind)
    assert (x.name, x.n_dispatch, x.us, x.nbytes) == ("x", 2, 20.0, 2000)
    assert (y.name, y.n_dispatch, y.us) == ("y", 1, 4.0)
    assert x.share == pytest.approx(20 / 24)
    assert x.gb_s == pytest.approx(0.1)
    assert x.gflop_s == pytest.approx(0.2)


def test_trace_events_hold_every_interval(found: Profile) -> None:
    trace = json.loads(json.dumps(trace_events(found)))
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(events) == sum(len(s.intervals) for s in found.steps)
    assert min(e["ts"] for e in events) == 0
    assert all(e["dur"] >= 0 and e["pid"] == 1 and e["tid"] in (1, 2) for e in events)
    head = next(e for e in events if e["name"] == "output")
    assert {"kernel", "workgroups", "bytes", "GB/s", "GFLOP/s"} == set(head["args"])
    assert {e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"} >= {"host", found.device}


def test_times_that_do_not_grow_are_no_division_by_zero() -> None:
    still = replace(dispatch("a", "x", 0.0, 10))
    assert (still.gb_s, still.gflop_s) == (0.0, 0.0)
    assert summary([ProfiledStep("decode", 1, 0, (still,))], lambda d: d.name)[0].share == 0.0


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    result = CliRunner().invoke(app, ["profile", "tiny", "-p", "Once", "-n", "1", "-o", str(out), "--json"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    decode = figures["decode"]
    assert decode["n_dispatch"] == sum(row["n_dispatch"] for row in decode["by_op"])
    assert sum(row["share"] for row in decode["by_kernel"]) == pytest.approx(1.0)
    assert json.loads(out.read_text())["traceEvents"]
    people = CliRunner().invoke(app, ["profile", "tiny", "--depth", "3", "-n", "1"])
    assert "ffn_down" in people.stdout
    assert "GFLOP/s" in people.stdout


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="10"):
        profile("tiny", RuntimeConfig(n_ctx=10), depth=9, n_decode=2)
    result = CliRunner().invoke(app, ["profile", "tiny", "-o", str(tmp_path / "no" / "trace.json")])
    assert result.exit_code == 2
