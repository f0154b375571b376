"""make bench: rounds, medians, verdicts, pictures and files, with engines that take no time; one real run of the tiny model."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import compare
import plots
import pytest
import run
import targets
from ceiling import fma_kernel, read_kernel

PROFILE = {"nbytes": 1000, "gb_s": 5.0, "gflop_s": 10.0, "us": 900.0, "share": 0.9, "name": "ffn"}
SMALL = PROFILE | {"name": "argmax", "nbytes": 0, "gb_s": 0.0, "gflop_s": 0.0, "us": 100.0, "share": 0.1}


def turn(own: float, peer: float, busy: float = 0.0) -> dict[str, Any]:
    """A round in which decode ran at these rates."""
    return {"vkllm": {"tg_tok_s": own, "pp_tok_s": 2 * own, "busy": 0.0}, targets.CPU: {"tg_tok_s": peer, "busy": busy}}


def model(**changes: Any) -> dict[str, Any]:
    """The report of a model that meets its targets."""
    kind = {"n_row": 1, "depth": 80, "kernel_us": 1e3, "barrier_us": 0.0, "by_op": [PROFILE, SMALL], "by_kernel": []}
    report = {"name": "qwen2.5-0.5b-Q4_K_M", "n_prompt": 512, "n_generate": 64, "n_layer": 24, "dispatches_per_token": 124}
    report |= {"file_bytes": 100, "vkllm": {"tg_tok_s": 40.0, "pp_tok_s": 130.0, "rss_bytes": 120, "start_s": 0.9}}
    report |= {targets.CPU: {"tg_tok_s": 50.0, "pp_tok_s": 250.0, "start_s": 1.0}, "profile": {"decode": kind, "prefill": kind}}
    report |= {"ratios": {f"tg over {targets.CPU}": 0.8, f"pp over {targets.CPU}": 0.52}}
    report |= {"depth": {"depth": 4096, "fill_tok_s": 90.0, "shallow_tok_s": 40.0, "deep_tok_s": 32.0}}
    return report | changes


def verdicts(**changes: Any) -> dict[str, bool | None]:
    return {v.test: v.ok for v in targets.verdicts([model(**changes)])}


def test_figures_are_medians_and_ratios_are_paired() -> None:
    found = compare.figures([turn(10, 20), turn(30, 90), turn(20, 20, busy=0.4)])
    assert found["vkllm"]["tg_tok_s"] == 20
    assert found[targets.CPU] == {"tg_tok_s": 20, "busy": 0.0}
    assert found["ratios"] == {f"tg over {targets.CPU}": 0.5}  # of 1/2, 1/3 and 1: not 20 / 20
    assert found["quiet"]


def test_a_busy_machine_is_said() -> None:
    assert not compare.figures([turn(10, 20, busy=0.2)])["quiet"]


def test_engines_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(compare, "own_bench", lambda *_: order.append("own") or {})
    monkeypatch.setattr(compare, "own_start_s", lambda *_: 1.0)
    monkeypatch.setattr(compare.Peer, "bench", lambda self, *_: order.append(self.name) or {})
    monkeypatch.setattr(compare.Peer, "start_s", lambda *_: 2.0)
    peers = [compare.Peer("cpu", Path()), compare.Peer("slow", Path(), seldom=True)]
    found = compare.rounds("m.gguf", compare.Size(1, 1, 1), peers, 3, [], lambda text: None)
    assert order == ["own", "cpu", "slow", "cpu", "own", "own", "cpu"]
    assert [sorted(t) for t in found] == [["cpu", "slow", "vkllm"], ["cpu", "vkllm"], ["cpu", "vkllm"]]


def test_a_command_is_measured() -> None:
    done = compare.measured([sys.executable, "-c", "x = bytearray(60 << 20); print('hello')"])
    assert done.stdout == "hello\n"
    assert done.rss_bytes > 60 << 20
    assert done.wall_s > 0
    with pytest.raises(RuntimeError, match="went wrong"):
        compare.measured([sys.executable, "-c", "raise SystemExit('it went wrong')"])


def test_verdicts_hold_where_they_should() -> None:
    assert set(verdicts().values()) == {True, None}  # None: no Vulkan peer ran


@pytest.mark.parametrize(
    ("changes", "test"),
    [
        ({"ratios": {f"tg over {targets.CPU}": 0.59}}, "decode / llama.cpp CPU"),
        ({"vkllm": {"rss_bytes": 126, "start_s": 1.0}}, "resident memory / file"),
        ({"vkllm": {"rss_bytes": 100, "start_s": 1.1}}, "start to first token / max(0.5 s, llama.cpp)"),
        ({"dispatches_per_token": 125}, "dispatches a token beyond 5 a layer"),
        ({"depth": {"depth": 4096, "shallow_tok_s": 40.0, "deep_tok_s": 29.0}}, "decode at 4,096 / at 16 tokens, slower"),
    ],
)
def test_a_missed_target_is_told(changes: dict[str, Any], test: str) -> None:
    assert verdicts(**changes)[test] is False


def test_what_was_not_measured_is_neither_reached_nor_missed() -> None:
    assert verdicts(n_prompt=128)["prefill 512 / llama.cpp CPU"] is None
    assert (
        verdicts(depth={"depth": 960, "shallow_tok_s": 2.0, "deep_tok_s": 1.0})["decode at 4,096 / at 16 tokens, slower"] is None
    )
    assert targets.verdicts([model(name="another-model")]) == []


def report(**changes: Any) -> dict[str, Any]:
    ceiling = {"device_read_gb_s": 30.0, "host_read_gb_s": 40.0, "device_fma_gflop_s": 97.0, "host_gemm_gflop_s": 207.0}
    ceiling |= {"read_gb_s": 40.0, "f32_gflop_s": 207.0}
    about = {
        "date": "2026-01-02",
        "device": "a <device>",
        "driver": "d & e",
        "ceiling": ceiling,
        "models": [model()],
        "kernels": [],
    }
    return about | {"targets": [], "busy": 0.0, "quiet": True, "seconds": 1} | changes


def test_results_and_pictures_are_written_and_kept(tmp_path: Path) -> None:
    first, second = run.save(report(), tmp_path), run.save(report(), tmp_path)
    assert (first.name, second.name) == ("2026-01-02.json", "2026-01-02-2.json")
    assert json.loads(first.read_text())["models"][0]["name"] == "qwen2.5-0.5b-Q4_K_M"
    for name in ("tokens", "roofline", "token-time"):
        root = ET.parse(first.with_name(f"2026-01-02-{name}.svg")).getroot()
        assert "a <device>" in "".join(root.itertext())
    numbers = "".join(ET.parse(first.with_name("2026-01-02-tokens.svg")).getroot().itertext())
    assert all(figure in numbers for figure in ("40", "130", "250", "llama.cpp CPU"))


def test_a_tokens_time_is_the_measured_one() -> None:
    picture = run.draw(report())["token-time"]
    assert "25.00 ms" in picture  # 1 / 40 tok/s
    assert "ffn: 22.500 ms, 90%" in picture


def test_small_parts_are_put_together() -> None:
    assert plots.gathered({"a": 98.0, "b": 1.0, "c": 1.0}) == {"a": 98.0, "other": 2.0}


def test_the_ceilings_kernels_compute_what_they_say(device: Any) -> None:
    import numpy as np

    from vkllm.vk import Binding

    width, groups = 8, 2
    kernel, x = read_kernel(width), np.random.default_rng(0).integers(0, 2**32, (groups, 4096, 4), dtype=np.uint32)
    buffers = [device.buffer(x.nbytes), device.buffer(groups * width * 4)]
    buffers[0].write(x)
    pipeline = device.pipeline(kernel.name, kernel.spirv(), tuple(b.kind for b in kernel.bindings), kernel.push_bytes)
    recording = device.recording()
    recording.dispatch(pipeline, [Binding(buffers[0], format="rgba32ui"), Binding(buffers[1])], (groups, 1, 1))
    recording.barrier()
    recording.finish()
    recording.run()
    mixed = (x[..., 0] + x[..., 1]) ^ (x[..., 2] + x[..., 3])  # every word counts: none may be left unread
    sums = mixed.reshape(groups, -1, 4, width).sum(axis=1, dtype=np.uint32)
    expected = (sums[:, 0] + sums[:, 1]) ^ (sums[:, 2] + sums[:, 3])
    assert (buffers[1].read(dtype=np.uint32).reshape(groups, width) == expected).all()
    assert fma_kernel(width).spirv()


def test_options() -> None:
    args = run.parsed(["tiny", "--device", "0", "--activations", "f32", "-r", "1"])
    assert args.models[0].endswith("tiny.gguf")
    assert args.vkllm_args == ["--activations", "f32", "--device", "0"]
    with pytest.raises(SystemExit):
        run.parsed(["tiny", "--peer", "nowhere"])


def test_a_real_run_of_the_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["run.py", "tiny", "-p", "16", "-n", "2", "-r", "1", "--depth", "32", "--kernel-repeat", "0"]
    )
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--out", str(tmp_path)])
    monkeypatch.setattr(run, "ceilings", lambda device: report()["ceiling"])
    run.main()
    out = capsys.readouterr().out
    file = Path(json.loads(out.splitlines()[-1])["file"])
    tiny = json.loads(file.read_text())["models"][0]
    assert tiny["vkllm"]["tg_tok_s"] > 0
    assert tiny["depth"]["depth"] == 32
    assert {r["name"] for r in tiny["profile"]["decode"]["by_op"]} >= {"ffn_gate_up", "attn", "output"}
    assert "whole process to its first token, s" in out
