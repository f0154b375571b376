"""The contract of the command line: what scripts may rely on. Standard output holds the answer, standard error the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Outcome, vkllm

from vkllm.cli import app, jsonable, others
from vkllm.config import ModelConfig
from vkllm.diff import nmse
from vkllm.files import resolve_model
from vkllm.files.gguf import GGUFFile
from vkllm.models import build_graph
from vkllm.reference import ReferenceExecutor
from vkllm.tokenizer import Tokenizer
from vkllm.vk import list_devices

pytestmark = pytest.mark.usefixtures("device")

STORY = "Once upon a time"
QUESTION = "What is the capital of France?"
RUN = ("run", "tiny", "-p", STORY, "-n", "6", "--temp", "0")


def json_of(*args: str, stdin: str | bytes | None = None) -> Any:
    """The one JSON value, on one line, that a successful command prints."""
    result = vkllm(*args, stdin=stdin)
    assert result.code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def reference_logits(ids: list[int]) -> np.ndarray:
    with GGUFFile.open(resolve_model("tiny")) as file:
        graph = build_graph(ModelConfig.from_gguf(file), file.tensors)
        return ReferenceExecutor(graph, file, n_ctx=128).forward(ids)


def tokenizer() -> Tokenizer:
    with GGUFFile.open(resolve_model("tiny")) as file:
        return Tokenizer.from_gguf(file.metadata)


# -- run and chat ---------------------------------------------------------------------------------------------------------------


def test_run_json() -> None:
    result = json_of(*RUN, "--json")
    assert {"text", "token_ids", "finish_reason", "timings"} <= set(result)
    assert result["finish_reason"] == "length"
    assert len(result["token_ids"]) == 6
    assert result["text"] == tokenizer().decode([*tokenizer().encode(STORY), *result["token_ids"]])[len(STORY) :]
    assert {"prompt_s", "decode_s", "ttft_s", "prompt_tok_s", "decode_tok_s", "load_s"} <= set(result["timings"])
    assert all(value >= 0 for value in result["timings"].values())


def test_run_prints_prompt_and_continuation_and_speed_elsewhere() -> None:
    expected = json_of(*RUN, "--json")["text"]
    result = vkllm(*RUN)
    assert (result.code, result.stdout) == (0, f"{STORY}{expected}\n")
    assert "tok/s" in result.stderr
    assert result.stderr.count("\n") == 1


def test_run_options_reach_the_sampler() -> None:
    hot = ("run", "tiny", "-p", STORY, "-n", "8", "--temp", "2", "--top-k", "0", "--top-p", "1", "--min-p", "0", "--json")
    assert json_of(*hot, "--seed", "1")["token_ids"] == json_of(*hot, "--seed", "1")["token_ids"]
    assert json_of(*hot, "--seed", "1")["token_ids"] != json_of(*hot, "--seed", "2")["token_ids"]
    greedy = json_of(*RUN, "--json")
    word = greedy["text"].split()[2]
    stopped = json_of(*RUN, "--stop", "nowhere in the text", "--stop", word, "--json")
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == greedy["text"][: greedy["text"].index(word)]
    assert json_of("run", "tiny", "-p", STORY, "-n", "0", "--json")["token_ids"] == []


def test_chat_answers_a_taught_fact_line_by_line() -> None:
    result = vkllm("chat", "tiny", "--temp", "0", stdin=f"{QUESTION}\n\n/reset\n{QUESTION}\n")
    assert result.code == 0
    first, second = result.stdout.splitlines()
    assert "Paris" in first
    assert first == second


def test_chat_goes_on_after_a_question_that_does_not_fit() -> None:
    result = vkllm("chat", "tiny", "--temp", "0", "--n-ctx", "64", stdin=f"{QUESTION * 20}\n{QUESTION}\n")
    assert result.code == 0
    assert "Paris" in result.stdout
    assert "64" in result.stderr and "/reset" in result.stderr


# -- numbers --------------------------------------------------------------------------------------------------------------------


def test_bench_json() -> None:
    result = json_of("bench", "tiny", "-p", "8", "-n", "4", "-r", "1", "--json")
    positive = ("pp_tok_s", "tg_tok_s", "load_s", "ttft_s", "rss_bytes", "dispatches_per_token")
    assert all(result[key] > 0 for key in positive)
    assert result["device"] in {d.name for d in list_devices()}
    assert result["dispatches_per_layer"] <= 7
    assert isinstance(result["rss_bytes"], int)


def test_bench_without_one_half() -> None:
    assert json_of("bench", "tiny", "-p", "0", "-n", "2", "-r", "1", "--json")["pp_tok_s"] == 0
    assert json_of("bench", "tiny", "-p", "4", "-n", "0", "-r", "1", "--json")["tg_tok_s"] == 0


def test_bench_for_people() -> None:
    result = vkllm("bench", "tiny", "-p", "4", "-n", "2", "-r", "2")
    assert result.code == 0
    assert "tg_tok_s" in result.stdout


@pytest.mark.parametrize("step", [(), ("--step",)], ids=["prefill", "step"])
def test_logits_of_ids(tmp_path: Path, step: tuple[str, ...]) -> None:
    out = tmp_path / "logits.npy"
    ids = [1, 2, 3, 300, 5]
    result = vkllm("logits", "tiny", "--ids", ",".join(map(str, ids)), "-o", str(out), "--activations", "f32", *step)
    assert (result.code, result.stdout) == (0, "")
    found, expected = np.load(out), reference_logits(ids)
    assert (found.dtype, found.shape) == (np.float32, expected.shape)
    assert nmse(found, expected) < 1e-6


@pytest.mark.parametrize("step", [(), ("--step",)], ids=["prefill", "step"])
def test_logits_of_a_text(tmp_path: Path, step: tuple[str, ...]) -> None:
    out = tmp_path / "named.f32"  # written under the very name that was given
    assert vkllm("logits", "tiny", "-p", STORY, "-o", str(out), "--activations", "f32", "--n-ctx", "32", *step).code == 0
    assert nmse(np.load(out), reference_logits(tokenizer().encode(STORY))) < 1e-6


def test_diff_json_over_more_than_one_chunk() -> None:
    result = json_of("diff", "tiny", "-p", f"{STORY} there was a small dog who lived near the river. " * 8, "--json")
    assert result["first_divergence"] is None
    assert all(op["finite"] and op["nmse"] < 1e-6 for op in result["ops"])
    names = [op["op"] for op in result["ops"]]
    assert names[0] == "token_embd" and names[-1] == "output"
    assert "blk.3.ffn_down" in names


def test_diff_names_the_first_op_over_the_limit() -> None:
    result = vkllm("diff", "tiny", "-p", STORY, "--limit", "0")
    assert result.code == 1
    assert "first divergence: blk.0.qkv" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("activations", ["auto", "f32", "int8"])
def test_every_command_that_runs_a_model_takes_activations(tmp_path: Path, activations: str) -> None:
    option = ("--activations", activations)
    assert json_of(*RUN, *option, "--json")["text"]
    assert "Paris" in vkllm("chat", "tiny", "--temp", "0", *option, stdin=f"{QUESTION}\n").stdout
    assert json_of("bench", "tiny", "-p", "2", "-n", "1", "-r", "1", *option, "--json")["activations"] in ("f32", "int8")
    assert json_of("diff", "tiny", "-p", STORY, "--limit", "0.1", *option, "--json")["first_divergence"] is None
    assert vkllm("logits", "tiny", "--ids", "1,2", "-o", str(tmp_path / "x.npy"), *option).code == 0
    error = nmse(np.load(tmp_path / "x.npy"), reference_logits([1, 2]))
    assert 1e-6 < error < 1e-2 if activations == "int8" else error < 1e-2


# -- files, text and shaders ----------------------------------------------------------------------------------------------------


def test_tokenize() -> None:
    text = "Hello <|im_end|> wörld"
    own = tokenizer()
    assert json_of("tokenize", "tiny", text) == own.encode(text, add_special=True, parse_special=True)
    assert json_of("tokenize", "tiny", text, "--no-special") == own.encode(text, add_special=False, parse_special=False)
    assert json_of("tokenize", "tiny", text) != json_of("tokenize", "tiny", text, "--no-special")
    assert json_of("tokenize", "tiny", "-", stdin=text) == own.encode(text, parse_special=True)
    assert json_of("tokenize", "tiny", "") == own.encode("")


def test_bytes_that_are_no_text_are_replaced() -> None:
    replaced = tokenizer().encode("a\ufffd")
    assert json_of("tokenize", "tiny", "-", stdin=b"a\xff") == replaced
    assert json_of("tokenize", "tiny", os.fsdecode(b"a\xff")) == replaced


def test_inspect() -> None:
    short, long = json_of("inspect", "tiny", "--json"), json_of("inspect", "tiny", "--tensors", "--json")
    assert short["config"]["arch"] == "qwen2"
    assert short["tensors"] == len(long["tensors"]) == sum(short["types"].values())
    by_name = {t["name"]: t for t in long["tensors"]}
    assert by_name["token_embd.weight"]["shape"] == [short["config"]["n_vocab"], short["config"]["n_embd"]]
    table = vkllm("inspect", "tiny", "--tensors")
    assert table.code == 0
    assert "blk.0.attn_q.weight" in table.stdout


def test_inspect_says_why_a_model_cannot_run(tmp_path: Path) -> None:
    model = resolve_model("tiny").read_bytes()
    path = tmp_path / "other.gguf"
    path.write_bytes(model.replace(b"blk.3.ffn_up.weight", b"blk.3.ffn_xx.weight"))
    found = json_of("inspect", str(path), "--json")
    assert found["config"]["n_layer"] == 4
    assert "blk.3.ffn_up.weight is missing" in found["problem"]
    path.write_bytes(model.replace(b"qwen2.block_count", b"qwen2.block_xxxxx"))
    found = json_of("inspect", str(path), "--json")
    assert found["config"] is None
    assert "block_count" in found["problem"]
    assert found["metadata"]["general.architecture"] == "qwen2"
    assert "block_count" in vkllm("inspect", str(path)).stdout
    assert json_of("inspect", "tiny", "--json")["problem"] is None


def test_json_of_what_json_lacks() -> None:
    value = {"a": [float("nan"), (1.5, float("-inf"))], "b": b"\x01\xff", "c": frozenset({"y", "x"}), "d": None}
    assert jsonable(value) == {"a": [None, [1.5, None]], "b": "01ff", "c": ["x", "y"], "d": None}


def test_shaders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vkllm_shaders.catalog as catalog

    some = catalog.entries()[::13]
    monkeypatch.setattr(catalog, "entries", lambda: some)
    out = tmp_path / "new" / "folder"
    result = vkllm("shaders", str(out))
    assert (result.code, result.stdout) == (0, "")
    kernels = {k["name"]: k for k in json.loads((out / "manifest.json").read_text())["kernels"]}
    assert len(kernels) == len(some)
    assert {p.name for p in out.iterdir()} == {"manifest.json"} | {
        f"{name}.{kind}" for name in kernels for kind in ("spv", "spvasm", "comp")
    }
    for name, kernel in kernels.items():
        code = (out / f"{name}.spv").read_bytes()
        assert code[:4] == b"\x03\x02\x23\x07"
        assert len(code) == kernel["spirv_bytes"]
        assert kernel["bindings"] and len(kernel["local_size"]) == 3
        assert "OpEntryPoint" in (out / f"{name}.spvasm").read_text()
        assert (out / f"{name}.comp").read_text().splitlines()[1].startswith("#version")


# -- devices --------------------------------------------------------------------------------------------------------------------


def test_devices_json_lists_the_chosen_one_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VKLLM_DEVICE", raising=False)
    rows = json_of("devices", "--json")["devices"]
    assert sorted(row["index"] for row in rows) == list(range(len(list_devices())))
    assert {"name", "kind", "driver_name", "memory_bytes", "available_bytes", "features", "subgroup_size"} <= set(rows[0])
    assert json_of(*RUN, "--json")["device"] == rows[0]["name"]
    assert vkllm("devices").stdout.count("\n") >= 4


def test_a_device_by_index_name_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    info = list_devices()[0]
    for selector in (str(info.index), info.name[:5].upper()):
        assert json_of(*RUN, "--device", selector, "--json")["device"] == info.name
        monkeypatch.setenv("VKLLM_DEVICE", selector)
        assert json_of(*RUN, "--json")["device"] == info.name
    monkeypatch.setenv("VKLLM_DEVICE", "no such device")
    assert_refused(vkllm(*RUN), "no such device", info.name)
    assert json_of(*RUN, "--device", "0", "--json")["device"] == info.name  # the option wins


# -- errors ---------------------------------------------------------------------------------------------------------------------


def assert_refused(result: Outcome, *words: str) -> None:
    """Exit status 1, a message with a hint on standard error, nothing on standard output."""
    assert (result.code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert "\nhint: " in result.stderr
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("run", "nowhere.gguf", "-p", "x"), ("nowhere.gguf", "tiny")),
        (("inspect", "nowhere.gguf"), ("nowhere.gguf",)),
        (("tokenize", "nowhere.gguf", "x"), ("nowhere.gguf",)),
        (("bench", "nowhere.gguf"), ("nowhere.gguf",)),
        (("run", "[red]x[/red]", "-p", "x"), ("[red]x[/red]",)),
        (("run", "[/nothing]", "-p", "x"), ("[/nothing]",)),
        (("run", "tiny", "-p", ""), ("empty",)),
        (("run", "tiny", "-p", "x", "--n-ctx", "1000000"), ("1000000", "1024")),
        (("run", "tiny", "-p", STORY * 50, "--n-ctx", "16"), ("16",)),
        (("run", "tiny", "-p", "x", "--temp", "1e9"), ("temperature",)),
        (("run", "tiny", "-p", "x", "--top-p", "0"), ("top_p",)),
        (("run", "tiny", "-p", "x", "--stop", ""), ("stop",)),
        (("bench", "tiny", "-p", "8", "-n", "1", "--n-ctx", "4"), ("--n-ctx",)),
        (("bench", "tiny", "-p", "5000", "-n", "1"), ("1024",)),
        (("diff", "tiny", "-p", ""), ("empty",)),
        (("diff", "tiny", "-p", STORY * 5, "--n-ctx", "8"), ("8",)),
        (("logits", "tiny", "--ids", "1,999999", "-o", "{tmp}/x.npy"), ("999999", "2048")),
        (("logits", "tiny", "--ids", "-1", "-o", "{tmp}/x.npy"), ("-1",)),
        (("logits", "tiny", "--ids", "1", "-o", "{tmp}"), ("directory",)),
        (("shaders", "{tmp}/file"), ("file", "exists")),
        (("run", "{tmp}/file", "-p", "x"), ("file",)),
        (("chat", "{tmp}/plain.gguf"), ("chat template", "vkllm run")),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_errors_are_messages_with_hints(args: tuple[str, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a model")
    if "{tmp}/plain.gguf" in args:
        without_chat_template(tmp_path / "plain.gguf")
    assert_refused(vkllm(*(arg.format(tmp=tmp_path) if "{tmp}" in arg else arg for arg in args)), *words)
    assert not list(tmp_path.glob("*.npy"))


def without_chat_template(path: Path) -> None:
    """The tiny model, its template's key renamed to another of the same length."""
    path.write_bytes(resolve_model("tiny").read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_templat_"))


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("run", "tiny"), "prompt"),
        (("run",), "model"),
        (("run", "tiny", "-p", "x", "-n", "-1"), "--max-tokens"),
        (("run", "tiny", "-p", "x", "-n", "many"), "--max-tokens"),
        (("run", "tiny", "-p", "x", "--temp", "-0.5"), "--temp"),
        (("run", "tiny", "-p", "x", "--top-k", "-1"), "--top-k"),
        (("run", "tiny", "-p", "x", "--top-p", "1.5"), "--top-p"),
        (("run", "tiny", "-p", "x", "--seed", "-7"), "--seed"),
        (("run", "tiny", "-p", "x", "--n-ctx", "0"), "--n-ctx"),
        (("run", "tiny", "-p", "x", "--activations", "int4"), "auto, f32, int8"),
        (("chat", "tiny", "--activations", "F32"), "auto, f32, int8"),
        (("bench", "tiny", "-r", "0"), "-r"),
        (("bench", "tiny", "-p", "-1"), "-p"),
        (("diff", "tiny", "-p", "x", "--limit", "-1"), "--limit"),
        (("logits", "tiny", "-o", "x.npy"), "--ids or -p"),
        (("logits", "tiny", "-o", "x.npy", "--ids", "1", "-p", "x"), "--ids or -p"),
        (("logits", "tiny", "-o", "x.npy", "--ids", "1,two"), "1,two"),
        (("logits", "tiny", "-o", "no/such/folder/x.npy", "--ids", "1"), "no/such/folder"),
        (("logits", "tiny", "--ids", "1"), "out"),
        (("nothing",), "nothing"),
        (("run", "tiny", "-p", "x", "--nothing"), "--nothing"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
)
def test_wrong_usage(args: tuple[str, ...], word: str) -> None:
    result = vkllm(*args)
    assert (result.code, result.stdout) == (2, "")
    assert word.lower() in result.stderr.lower()


def test_help_names_every_command() -> None:
    result = vkllm("--help")
    assert result.code == 0
    for command in ("run", "chat", "devices", "doctor", "inspect", "tokenize", "diff", "bench", "logits", "shaders"):
        assert command in result.stdout
        assert vkllm(command, "--help").code == 0


def test_the_documentation_names_every_command_and_no_other() -> None:
    text = Path(__file__).parents[2].joinpath("docs", "cli.md").read_text()
    rows = {line.split("`")[1].split()[0] for line in text.split("## For scripts")[0].splitlines() if line.startswith("| `")}
    assert rows == {c.name or c.callback.__name__ for a in (app, others()) for c in a.registered_commands if c.callback}


# -- real processes -------------------------------------------------------------------------------------------------------------


def process(*args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "vkllm", *args], input=stdin, capture_output=True, timeout=120)


def test_a_process_prints_one_object_and_exits_with_the_status() -> None:
    done = process(*RUN, "--json")
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["token_ids"] == json_of(*RUN, "--json")["token_ids"]
    refused = process("run", "nowhere.gguf", "-p", "x")
    assert (refused.returncode, refused.stdout) == (1, b"")
    assert refused.stderr.startswith(b"error: no model file nowhere.gguf\nhint: ")
    assert process("run").returncode == 2


def test_a_process_reads_bytes_and_survives_a_closed_pipe() -> None:
    assert json.loads(process("tokenize", "tiny", "-", stdin="wörld".encode()).stdout) == tokenizer().encode("wörld")
    command = f"{sys.executable} -m vkllm inspect tiny --tensors --json | head -c 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=120)
    assert (done.stdout, done.stderr) == (b"{", b"")


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_a_terminal_of_any_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    done = process("chat", "tiny", "--temp", "0", stdin=b"w\xf6rld\n" + QUESTION.encode() + b"\n")
    assert done.returncode == 0
    assert b"Paris" in done.stdout
    done = process("run", "tiny", "-p", "w\u00f6rld", "-n", "0")
    assert (done.returncode, done.stdout[-4:]) == (0, b"rld\n")


def test_the_script_is_installed() -> None:
    script = Path(sys.executable).with_name("vkllm")
    if not script.exists():
        pytest.skip("vkllm is not installed in this environment")
    done = subprocess.run([script, "tokenize", "nowhere.gguf", "x"], capture_output=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: ")
