"""`vkllm import`: what it copies, what it refuses, and that it leaves nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import threading
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from made_models import MODELS, Made, write_model

from vkllm.cli import app
from vkllm.errors import ConfigError, FileFormatError, UnsupportedQuantError, VkllmError
from vkllm.files import GGUFFile, open_model, packaged_models
from vkllm.files.split import SplitGGUF
from vkllm.files.writer import GGUFWriter, encode, raw_metadata
from vkllm.quantize import convert as convert_module
from vkllm.quantize.convert import Plan
from vkllm.quantize.convert import write_model as convert
from vkllm.quantize.mixes import FILE_TYPES, file_type


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "f16.gguf", MODELS["edges"])


def run(source: Path, out: Path, kind: str = "Q4_K_M", **options: object) -> None:
    with GGUFFile.open(source) as file:
        convert(Plan.of(file, FILE_TYPES[kind]), out, **options)  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_metadata_is_copied_as_it_stands_with_its_types(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out.gguf", "Q5_K_M")
    before, after = raw_metadata(source), raw_metadata(tmp_path / "out.gguf")
    added = {"general.quantization_version": encode(2), "general.file_type": encode(17)}
    assert after == before | added
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["made.double"].types == [gguf.GGUFValueType.FLOAT64]
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q5_K_M


def test_values_are_written_with_the_types_that_readers_expect(tmp_path: Path) -> None:
    values = {
        "text": "a\udcff",  # a stray byte
        "yes": True,
        "whole": 7,
        "negative": -7,
        "large": 1 << 40,
        "real": 0.5,
        "texts": ["a", "", "ü"],
        "wholes": [1, -2],
        "flags": [True, False],
        "reals": np.array([1.5, 2.5]),
        "bytes": np.array([1, 2], np.uint8),
        "nothing": [],
    }
    with GGUFWriter(tmp_path / "out.gguf", values, [("t", (2, 3), "F32")]) as writer:
        writer.write(np.arange(6, dtype=np.float32).view(np.uint8))
    with GGUFFile.open(tmp_path / "out.gguf") as file:
        read = {key: list(value) if isinstance(value, np.ndarray) else value for key, value in file.metadata.items()}
        assert read == {key: list(value) if isinstance(value, np.ndarray) else value for key, value in values.items()}
        assert file.tensors["t"].shape == (2, 3)
        assert file.data("t").view(np.float32).tolist() == [[0, 1, 2], [3, 4, 5]]
    (tmp_path / "out.gguf").write_bytes((tmp_path / "out.gguf").read_bytes().replace(b"\xff", b"?"))
    types = {key: field.types for key, field in gguf.GGUFReader(tmp_path / "out.gguf").fields.items()}
    kind = gguf.GGUFValueType
    assert types["whole"] == [kind.UINT32]
    assert types["negative"] == [kind.INT32]
    assert types["large"] == [kind.UINT64]
    assert types["real"] == [kind.FLOAT32]
    assert types["yes"] == [kind.BOOL]
    assert types["wholes"] == [kind.ARRAY, kind.INT32]
    assert types["reals"] == [kind.ARRAY, kind.FLOAT32]


@pytest.mark.parametrize("value", [None, {"a": 1}, np.zeros((2, 2)), np.array(["a"]), ["a", 1]])
def test_what_is_no_metadata_is_refused(value: object) -> None:
    with pytest.raises(FileFormatError, match="cannot be metadata"):
        encode(value)


def test_the_alignment_of_the_source_is_kept(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "f16.gguf", "llama")
    writer.add_custom_alignment(256)
    writer.add_block_count(1)
    for i in range(3):
        writer.add_tensor(f"blk.0.{i}.weight", np.ones((2, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    run(tmp_path / "f16.gguf", tmp_path / "out.gguf", "Q8_0")
    with GGUFFile.open(tmp_path / "out.gguf") as file:
        assert [t.offset % 256 for t in file.tensors.values()] == [0, 0, 0]


def test_one_worker_and_many_write_the_same(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "1.gguf", threads=1)
    run(source, tmp_path / "5.gguf", threads=5)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "5.gguf").read_bytes()


def test_half_precision_norms_become_f32(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "f16.gguf", "llama")
    writer.add_block_count(1)
    writer.add_tensor("blk.0.attn_norm.weight", np.full(64, 1.5, np.float16))
    writer.add_tensor("blk.0.ffn_gate_inp.weight", np.full((4, 64), 0.5, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    run(tmp_path / "f16.gguf", tmp_path / "out.gguf")
    with GGUFFile.open(tmp_path / "out.gguf") as file:
        assert {t.type for t in file.tensors.values()} == {"F32"}
        assert set(file.data("blk.0.attn_norm.weight").view(np.float32).flat) == {1.5}


def test_a_split_model_becomes_one_file(source: Path, tmp_path: Path) -> None:
    with GGUFFile.open(source) as file:
        tensors = list(file.tensors.values())
        for i, part in enumerate((tensors[:5], tensors[5:])):
            head = {"split.no": np.uint16(i), "split.count": np.uint16(2), "split.tensors.count": np.int32(len(tensors))}
            rest = raw_metadata(source) if i == 0 else {}
            path = tmp_path / f"m-{i + 1:05d}-of-00002.gguf"
            with GGUFWriter(path, rest | head, [(t.name, t.shape, t.type) for t in part]) as writer:
                for t in part:
                    writer.write(file.data(t.name))
    run(source, tmp_path / "one.gguf")
    for part in (1, 2):  # any part names the model
        with SplitGGUF.open(tmp_path / f"m-0000{part}-of-00002.gguf") as file:
            with pytest.raises(FileFormatError, match="belongs to the source"):
                convert(Plan.of(file, FILE_TYPES["Q4_K_M"]), tmp_path / "m-00002-of-00002.gguf", force=True)
            convert(Plan.of(file, FILE_TYPES["Q4_K_M"]), tmp_path / "out.gguf", force=True)
        assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()


def test_a_hugging_face_folder_becomes_a_file(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "stories260K"
    with open_model(folder / "stories260K-hf") as file:
        convert(Plan.of(file, FILE_TYPES["F32"]), tmp_path / "out.gguf")
    with GGUFFile.open(folder / "stories260K-f32.gguf") as theirs, GGUFFile.open(tmp_path / "out.gguf") as ours:
        assert ours.tensors.keys() == theirs.tensors.keys()
        assert all((ours.data(name) == theirs.data(name)).all() for name in ours.tensors)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("tensor", ["blk.1.ffn_down.weight", "blk.0.attn_norm.weight"])
def test_what_is_no_number_names_its_tensor_and_leaves_nothing(value: float, tensor: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "f16.gguf", MODELS["edges"], {tensor: value})
    with pytest.raises(FileFormatError, match=f"{tensor} holds NaN or infinity"):
        run(source, tmp_path / "out.gguf")
    assert names(tmp_path) == ["f16.gguf"]


def test_an_interruption_leaves_nothing_and_keeps_what_was_there(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_bytes(b"before")
    seen: list[list[str]] = []

    def interrupt(_: int) -> None:
        seen.append(names(tmp_path))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out.gguf", force=True, advance=interrupt)
    assert any(name.endswith(".part") for name in seen[0])
    assert names(tmp_path) == ["f16.gguf", "out.gguf"]
    assert (tmp_path / "out.gguf").read_bytes() == b"before"


def test_a_full_disk_is_seen_before_anything_is_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=9999))
    with pytest.raises(FileFormatError, match=r"out.gguf needs 0.0\d MiB; 0.01 MiB are free"):
        run(source, tmp_path / "out.gguf")
    assert names(tmp_path) == ["f16.gguf"]


def test_targets_that_cannot_be_are_refused(source: Path, tmp_path: Path) -> None:
    before = source.read_bytes()
    (tmp_path / "there.gguf").touch()
    (tmp_path / "link.gguf").symlink_to(source)
    os.link(source, tmp_path / "same.gguf")
    for target, complaint in {
        "there.gguf": "is there already",
        "f16.gguf": "belongs to the source",
        "link.gguf": "belongs to the source",
        "same.gguf": "belongs to the source",
        "no/out.gguf": "does not exist",
        ".": "is a folder",
    }.items():
        with pytest.raises(FileFormatError, match=complaint):
            run(source, tmp_path / target, force=target != "there.gguf")
    assert source.read_bytes() == before


def test_a_quantized_source_is_refused_and_taken_on_demand(tmp_path: Path) -> None:
    with GGUFFile.open(packaged_models()["tiny"]) as file:
        with pytest.raises(UnsupportedQuantError, match=r"token_embd.weight is Q8_0 already"):
            Plan.of(file, FILE_TYPES["Q4_K_M"])
        assert Plan.of(file, FILE_TYPES["Q8_0"]).requantized == []  # a copy
        assert len(Plan.of(file, FILE_TYPES["F16"], allow_requantize=True).requantized) == 29


def test_a_file_without_a_language_model_is_refused(tmp_path: Path) -> None:
    with GGUFWriter(tmp_path / "a.gguf", {"general.architecture": "llama"}, []):
        pass
    with GGUFFile.open(tmp_path / "a.gguf") as file, pytest.raises(ConfigError, match=r"llama.block_count is missing"):
        Plan.of(file, FILE_TYPES["Q8_0"])


def test_file_types_are_known_by_name_in_any_case() -> None:
    assert file_type("q4_k").name == "Q4_K_M"
    assert file_type("bf16").id == gguf.LlamaFileType.MOSTLY_BF16
    assert all(t.id == gguf.LlamaFileType[("ALL_" if t.name == "F32" else "MOSTLY_") + t.name] for t in FILE_TYPES.values())
    with pytest.raises(VkllmError, match="no file type 'Q4_K_XL'"):
        file_type("Q4_K_XL")


def test_memory_stays_small_beside_the_model(tmp_path: Path) -> None:
    big = Made("llama", 1, 4, 4, {f"ffn_{part}.weight": (4096, 1024) for part in ("up", "gate", "down")}, {})
    source = write_model(tmp_path / "f16.gguf", big)
    run(source, tmp_path / "once.gguf", "Q8_0")  # what is imported and cached once
    tracemalloc.start()
    try:
        run(source, tmp_path / "out.gguf", "Q8_0", threads=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert source.stat().st_size > 25e6
    assert peak < 8e6


def test_a_slow_disk_holds_the_workers_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = Made("llama", 1, 4, 4, {"ffn_up.weight": (2048, 1024)}, {})
    source, converted, far_ahead = write_model(tmp_path / "f16.gguf", big), convert_module._converted, threading.Event()
    started: list[int] = []

    def counted(*args: object) -> np.ndarray:
        started.append(1)
        if len(started) > 4:
            far_ahead.set()
        return converted(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(convert_module, "_converted", counted)
    waits: list[bool] = []
    run(source, tmp_path / "out.gguf", "Q8_0", threads=1, advance=lambda _: waits or waits.append(far_ahead.wait(0.5)))
    assert waits == [False]  # while the first slab was written, the one worker did not start a fifth one
    assert len(started) == 16


def command(*args: str) -> tuple[int, str, str]:
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["import", *args], prog_name="vkllm", env={"COLUMNS": "200", "TERM": "dumb"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_command(source: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out.gguf")
    code, stdout, stderr = command(str(source), out, "--type", "q4_k_m", "--json")
    report = json.loads(stdout)
    assert (code, stderr) == (0, "")
    assert report["file_type"] == "Q4_K_M"
    assert report["file_bytes"] == os.path.getsize(out)
    assert sum(report["types"].values()) == 21
    code, stdout, stderr = command(str(source), out)
    assert (code, stdout) == (1, "")
    assert "is there already" in stderr
    code, _, stderr = command("tiny", out, "--force", "--allow-requantize")
    assert code == 0
    assert "29 tensors are quantized already" in stderr
    code, _, stderr = command(__file__, out, "--force")
    assert code == 1
    assert "expected b'GGUF'" in stderr
    code, _, stderr = command(str(source), out, "--force", "--type", "Q9")
    assert code == 1
    assert "choose one of F32, F16" in stderr


def test_an_imported_model_runs(device: object, tmp_path: Path) -> None:
    from vkllm.engine import LLMEngine
    from vkllm.sampler import SamplingParams

    with GGUFFile.open(packaged_models()["tiny"]) as file:
        convert(Plan.of(file, FILE_TYPES["Q6_K"], allow_requantize=True), tmp_path / "q6.gguf")
    texts = []
    for model in ("tiny", tmp_path / "q6.gguf"):
        with LLMEngine.init_model(model) as engine:
            texts.append(engine.generate("Once upon a time", SamplingParams(temperature=0.0, max_tokens=6)))
    assert texts[0] == texts[1]
