"""Folders as a whole: shards, paths that escape, pickles, half-finished downloads, and the same model as GGUF."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hf_folders import CONFIG, llama_tensors, raw_safetensors, spm_tokenizer, write_folder, write_json
from safetensors.numpy import save_file

from vkllm.config import ModelConfig
from vkllm.errors import ConfigError, FileFormatError, UnsupportedModelError, VkllmError
from vkllm.files import GGUFFile, HuggingFaceFolder, open_model, resolve_model
from vkllm.tokenizer import Tokenizer
from vkllm.vk import list_devices

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_shards(folder: Path) -> Path:
    """A sound folder in two shards."""
    write_folder(folder)
    (folder / "model.safetensors").unlink()
    tensors = llama_tensors()
    names = sorted(tensors)
    placed = {name: SHARDS[i % 2] for i, name in enumerate(names)}
    for shard in SHARDS:
        save_file({name: tensors[name] for name in names if placed[name] == shard}, folder / shard)
    write_json(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": placed})
    return folder


def placed(folder: Path) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return weight_map


def put_index(folder: Path, weight_map: object) -> None:
    write_json(folder / INDEX, {"weight_map": weight_map})


def test_shards_are_one_model(tmp_path: Path) -> None:
    with open_model(write_folder(tmp_path / "one")) as one, open_model(write_shards(tmp_path / "two")) as two:
        assert two.format == "safetensors, 2 files" and one.format == "safetensors" and two.path == tmp_path / "two"
        assert one.tensors.keys() == two.tensors.keys() and two.metadata["general.name"] == "two"
        assert {k: v for k, v in one.metadata.items() if k != "general.name"} == {
            k: v for k, v in two.metadata.items() if k != "general.name"
        }
        assert all(np.array_equal(one.data(name), two.data(name)) for name in one.tensors)
        assert two.nbytes == sum((tmp_path / "two" / shard).stat().st_size for shard in SHARDS)
        for name in two.tensors:
            two.release(name)


def move(folder: Path, tensor: str, file: str) -> None:
    put_index(folder, placed(folder) | {tensor: file})


def outside(folder: Path) -> Path:
    """A sound weight file beside the folder."""
    path = folder.parent / "outside.safetensors"
    path.write_bytes((folder / SHARDS[0]).read_bytes())
    return path


def link(folder: Path, name: str, target: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


def pickles_only(folder: Path, name: str = "pytorch_model.bin") -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    (folder / name).write_bytes(b"\x80\x02")


def cut_short(folder: Path) -> None:
    data = (folder / SHARDS[1]).read_bytes()
    (folder / SHARDS[1]).write_bytes(data[:-100])


def half_downloaded(folder: Path, partial: str) -> None:
    (folder / SHARDS[1]).unlink()
    (folder / partial).parent.mkdir(parents=True, exist_ok=True)
    (folder / partial).write_bytes(b"")


def replace_all(folder: Path, name: str) -> None:
    put_index(folder, dict.fromkeys(placed(folder), name))


def pipe(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()
    os.mkfifo(folder / SHARDS[1])


DAMAGE: dict[str, tuple[Callable[[Path], object], type[VkllmError], str]] = {
    "missing shard": (lambda f: (f / SHARDS[1]).unlink(), FileFormatError, r"model-00002-of-00002.safetensors is missing, which"),
    "no weights": (lambda f: [p.unlink() for p in (*f.glob("*.safetensors"), f / INDEX)], FileFormatError, "holds neither"),
    "unknown tensor in index": (lambda f: move(f, "model.nothing", SHARDS[0]), FileFormatError, "looks for model.nothing in"),
    "tensor elsewhere": (
        lambda f: move(f, "lm_head.weight", SHARDS[1]),
        FileFormatError,
        "looks for lm_head.weight in model-00002",
    ),
    "tensor not in index": (
        lambda f: put_index(f, {k: v for k, v in placed(f).items() if k != "lm_head.weight"}),
        FileFormatError,
        "holds lm_head.weight, but model.safetensors.index.json does not list it",
    ),
    "tensor in two shards": (
        lambda f: save_file(llama_tensors(), f / SHARDS[0]),
        FileFormatError,
        "places it in model-00002-of-00002",
    ),
    "empty index": (lambda f: put_index(f, {}), FileFormatError, "weight_map must name"),
    "index of numbers": (lambda f: put_index(f, {"a": 3}), FileFormatError, "weight_map must name"),
    "index of pickles": (lambda f: put_index(f, {"a": "pytorch_model.bin"}), FileFormatError, "weight_map must name"),
    "index a list": (lambda f: put_index(f, []), VkllmError, "expected an object"),
    "index no JSON": (lambda f: (f / INDEX).write_bytes(b"{"), FileFormatError, "index.json is not JSON"),
    "name twice in index": (
        lambda f: (f / INDEX).write_bytes(b'{"weight_map": {"a": "x", "a": "y"}}'),
        FileFormatError,
        "'a' twice",
    ),
    "parent": (lambda f: (outside(f), replace_all(f, "../outside.safetensors")), FileFormatError, "leads out of the folder"),
    "hidden parent": (
        lambda f: (outside(f), (f / "sub").mkdir(), replace_all(f, "sub/../../outside.safetensors")),
        FileFormatError,
        "leads out of the folder",
    ),
    "parent, and back": (lambda f: replace_all(f, f"../f/{SHARDS[0]}"), FileFormatError, "leads out of the folder"),
    "absolute": (lambda f: replace_all(f, str(outside(f))), FileFormatError, "leads out of the folder"),
    "absolute and inside": (lambda f: replace_all(f, str(f / SHARDS[0])), FileFormatError, "leads out of the folder"),
    "NUL": (lambda f: replace_all(f, "a\0b.safetensors"), FileFormatError, "cannot be followed"),
    "link out": (lambda f: link(f, SHARDS[0], outside(f)), FileFormatError, "leads out of the folder"),
    "link out of config": (lambda f: link(f, "config.json", Path("/etc/hostname")), FileFormatError, "leads out of the folder"),
    "link out of tokenizer": (
        lambda f: link(f, "tokenizer.json", Path("/etc/hostname")),
        FileFormatError,
        "leads out of the folder",
    ),
    "link out of template": (lambda f: link(f, "chat_template.jinja", Path("/etc/hostname")), FileFormatError, "leads out of"),
    "link to itself": (lambda f: link(f, SHARDS[0], f / SHARDS[0]), FileFormatError, SHARDS[0]),
    "dangling link": (lambda f: link(f, SHARDS[0], f / "nothing"), FileFormatError, f"{SHARDS[0]} is missing"),
    "pipe": (pipe, FileFormatError, "no regular file"),
    "a folder as shard": (lambda f: ((f / SHARDS[1]).unlink(), (f / SHARDS[1]).mkdir()), FileFormatError, "no regular file"),
    "cut short": (cut_short, FileFormatError, r"model-00002.*half-finished"),
    "empty shard": (lambda f: (f / SHARDS[1]).write_bytes(b""), FileFormatError, "is empty"),
    "header bomb": (
        lambda f: (f / SHARDS[1]).write_bytes(raw_safetensors(b"", 9, length=1 << 62)),
        FileFormatError,
        "model-00002.*limit",
    ),
    "incomplete": (
        lambda f: half_downloaded(f, SHARDS[1] + ".incomplete"),
        FileFormatError,
        r"00002.safetensors is missing, and model-.*\.incomplete is a half-finished download",
    ),
    "incomplete in the cache": (
        lambda f: half_downloaded(f, ".cache/huggingface/download/x.1234.incomplete"),
        FileFormatError,
        "x.1234.incomplete is a half-finished",
    ),
    "aria2": (lambda f: half_downloaded(f, SHARDS[1] + ".aria2"), FileFormatError, "half-finished"),
    "pickle bin": (pickles_only, UnsupportedModelError, r"pickle files \(pytorch_model.bin\)"),
    "pickle pt": (lambda f: pickles_only(f, "model.pt"), UnsupportedModelError, "never opened"),
    "pickle pth": (lambda f: pickles_only(f, "consolidated.00.pth"), UnsupportedModelError, "never opened"),
    "no config": (lambda f: (f / "config.json").unlink(), FileFormatError, "holds no config.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), FileFormatError, "holds no tokenizer.json"),
    "half a config": (
        lambda f: (f / "config.json").rename(f / "config.json.part"),
        FileFormatError,
        "config.json.part is a half-finished",
    ),
    "config no JSON": (lambda f: (f / "config.json").write_bytes(b"\x00"), FileFormatError, "config.json is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_bytes(b"[]"), FileFormatError, "config.json is a JSON list"),
    "deep config": (lambda f: (f / "config.json").write_bytes(b'{"a":' * 100_000), FileFormatError, "nested too deeply"),
    "large template": (
        lambda f: (f / "chat_template.jinja").write_bytes(bytes(2 << 20)),
        FileFormatError,
        "the limit is 1048576",
    ),
    "vocabulary too large": (
        lambda f: write_json(f / "config.json", CONFIG | {"vocab_size": 12}),
        ConfigError,
        "config.json makes it",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_a_typed_error(tmp_path: Path, name: str) -> None:
    damage, kind, message = DAMAGE[name]
    folder = write_shards(tmp_path / "f")
    damage(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(kind, match=message) as error:
        open_model(folder)
    assert error.value.hint and sorted(folder.rglob("*")) == before


def test_a_tokenizer_model_alone_has_its_own_hint(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(FileFormatError, match=r"no tokenizer\.json") as error:
        open_model(folder)
    assert "save_pretrained" in error.value.hint


def test_the_cache_of_hugging_face_may_link_to_its_blobs(tmp_path: Path) -> None:
    """snapshots/REVISION links to blobs/HASH; the model is named after the repository."""
    repository = tmp_path / "models--org--Small-Model"
    snapshot = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    for i, path in enumerate(sorted(write_folder(snapshot).iterdir())):
        blob = path.rename(repository / "blobs" / str(i))
        path.symlink_to(Path("..", "..", "blobs", blob.name))
    with open_model(snapshot) as file:
        assert file.metadata["general.name"] == "Small-Model" and file.data("output.weight").shape == (24, 64)
    link(snapshot, "config.json", write_folder(tmp_path / "other") / "config.json")
    with pytest.raises(FileFormatError, match="leads out of"):
        open_model(snapshot)


def test_links_within_a_folder_and_to_it_are_followed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f")
    (folder / "model.safetensors").rename(folder / "weights")
    link(folder, "model.safetensors", folder / "weights")
    (tmp_path / "there").symlink_to(folder)
    with open_model(tmp_path / "there") as file:
        assert len(file.tensors) == 12


def test_what_open_model_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gguf = resolve_model("tiny").read_bytes()
    write_folder(Path("tiny"))
    with open_model("tiny") as packaged, open_model("./tiny") as folder:
        assert isinstance(packaged, GGUFFile) and isinstance(folder, HuggingFaceFolder)
    Path("one").mkdir()
    Path("one/model.gguf").write_bytes(gguf)
    with open_model("one") as file:
        assert file.path == Path("one/model.gguf")
    Path("one/another.gguf").write_bytes(gguf)
    with pytest.raises(FileFormatError, match=r"one holds 2 models: another\.gguf, model\.gguf"):
        open_model("one")
    Path("empty").mkdir()
    with pytest.raises(FileFormatError, match=r"empty holds no config\.json"):
        open_model("empty")
    with pytest.raises(FileFormatError, match="no model file nothing"):
        open_model("nothing")


def test_the_same_model_as_gguf(shared_data: Path) -> None:
    """stories260K in both forms: the same configuration, tensors and vocabulary, bit for bit."""
    ours = open_model(shared_data / "stories260K" / "stories260K-hf")
    theirs = open_model(shared_data / "stories260K" / "stories260K-f32.gguf")
    with ours, theirs:
        assert {t.name: (t.shape, t.type, t.nbytes) for t in ours.tensors.values()} == {
            t.name: (t.shape, t.type, t.nbytes) for t in theirs.tensors.values()
        }
        assert all(np.array_equal(ours.data(name), theirs.data(name)) for name in theirs.tensors)
        own = {"general.name", "general.license"}
        for key in theirs.metadata.keys() - own:
            assert np.array_equal(np.asarray(ours.metadata[key]), np.asarray(theirs.metadata[key])), key
        extra = {"llama.attention.key_length": 8, "llama.attention.value_length": 8, "tokenizer.ggml.pre": "default"}
        assert {key: ours.metadata[key] for key in ours.metadata.keys() - theirs.metadata.keys()} == extra
        assert ModelConfig.from_gguf(ours).n_ff == 172
        one, other = Tokenizer.from_gguf(ours.metadata), Tokenizer.from_gguf(theirs.metadata)
        text = (shared_data / "vocab" / "ggml-vocab-llama-spm.gguf.inp").read_text() + "Once upon a time, there was a cat."
        assert one.encode(text) == other.encode(text) and one.eos_ids == other.eos_ids


def test_runs_from_end_to_end(shared_data: Path) -> None:
    """A folder generates what its GGUF generates."""
    if not list_devices():
        pytest.skip("no Vulkan device: install mesa-vulkan-drivers")
    from vkllm import LLMEngine, SamplingParams

    folder = shared_data / "stories260K" / "stories260K-hf"
    expected = json.loads((folder.parent / "expected.json").read_text())["continuations"]["Once upon a time"]
    with LLMEngine.init_model(folder) as engine:
        text = "Once upon a time" + engine.generate("Once upon a time", SamplingParams(temperature=0.0, max_tokens=24))
    assert len(text) > 60 and expected.startswith(text)


def test_the_tokenizer_of_a_folder_works(tmp_path: Path) -> None:
    with open_model(write_folder(tmp_path / "f", tokenizer=spm_tokenizer())) as file:
        tokenizer = Tokenizer.from_gguf(file.metadata)
        assert tokenizer.encode("ab") == [1, 6] and tokenizer.decode([1, 6]) == "ab"
