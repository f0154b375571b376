"""`vkllm pull | list | rm` against a hub of our own: choice, licence, resuming, hashes, refusals. The internet is not asked."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_hub import SHA, Hub, Repository, served
from typer.testing import CliRunner

from vkllm.cli import app
from vkllm.errors import CapacityError, ConfigError, FileFormatError, RequestError, UnsupportedModelError, VkllmError
from vkllm.hub import download, pull, store

BIG = bytes(range(256)) * 5000
GGUF_REPO = {
    "README.md": b"---\nlicense: apache-2.0\n---\n# Title\n\nA small\x1b[31m model.\n\n<img src='x'>More.\n",
    "small-Q4_K_M.gguf": BIG,
    "small-Q8_0.gguf": BIG[::-1],
    "mmproj-small-f16.gguf": b"eyes",
    "imatrix.gguf": b"x",
}
FOLDER_REPO = {
    "config.json": b"{}",
    "tokenizer.json": b"{ }",
    "chat_template.jinja": b"{{ x }}",
    "model-00001-of-00002.safetensors": BIG,
    "model-00002-of-00002.safetensors": b"2",
    "consolidated.safetensors": b"twice",
    "pytorch_model.bin": b"pickle",
    "original/params.json": b"{}",
    "train.py": b"import os",
    "README.md": b"Hello",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The hub, as HF_ENDPOINT, and no models."""
    pytest.importorskip("huggingface_hub", reason="pip install vkllm[hub]")
    with served() as (held, url):
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("VKLLM_MODELS_DIR", str(tmp_path / "models"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr("vkllm.hub.download.PAUSES_S", (0.0, 0.0))
        yield held


def fetch(name: str, accepted: bool = False, ask: Any = None, shown: list[str] | None = None, **options: Any) -> store.Pulled:
    """`pull` without a terminal."""

    @contextmanager
    def meter(_: str, nbytes: int) -> Iterator[download.Progress]:
        steps: list[int] = []
        yield steps.append
        assert sum(steps) == nbytes

    show = (shown if shown is not None else []).append
    return pull.pull(name, accepted=accepted, show=show, ask=ask, meter=meter, **options)


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {".lock", "vkllm.json"}


def vkllm(*args: str, **options: Any) -> Any:
    return CliRunner().invoke(app, [*args], **options)


def test_a_quantization_by_its_name(hub: Hub) -> None:
    hub.repositories["a/small"] = Repository(GGUF_REPO)
    shown: list[str] = []
    model = fetch("a/small:q8_0", shown=shown)
    assert model.name == "a/small:Q8_0" and model.path.read_bytes() == BIG[::-1]
    assert names(model.folder) == {"small-Q8_0.gguf"}
    assert "licence: apache-2.0" in shown[0] and "A small [31m model.\nMore." in shown[0] and "\x1b" not in shown[0]
    assert fetch("a/small").variant == "Q4_K_M" and fetch("a/small:small-Q8_0.gguf").variant == "Q8_0"
    assert [m.name for m in store.pulled()] == ["a/small:Q4_K_M", "a/small:Q8_0"]


def test_a_folder_without_anything_that_could_run_code(hub: Hub) -> None:
    hub.repositories["a/folder"] = Repository(FOLDER_REPO)
    model = fetch("a/folder")
    parts = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert names(model.folder) == parts | {"config.json", "tokenizer.json", "chat_template.jinja"}
    assert model.name == "a/folder" and model.path == model.folder


def test_a_split_model_in_a_subfolder(hub: Hub) -> None:
    parts = {f"Q6_K/m-Q6_K-0000{i}-of-00002.gguf": b"%d" % i for i in (1, 2)}
    hub.repositories["a/split"] = Repository(parts)
    model = fetch("a/split")
    assert names(model.folder) == set(parts) and model.main == "Q6_K/m-Q6_K-00001-of-00002.gguf"
    del hub.repositories["a/split"].files["Q6_K/m-Q6_K-00002-of-00002.gguf"]
    with pytest.raises(FileFormatError, match="1 of 2"):
        fetch("a/split:Q6_K")


@pytest.mark.parametrize(
    ("files", "wanted", "error", "message"),
    [
        (GGUF_REPO, ":Q2_K", RequestError, "has no Q2_K; it has small-Q4_K_M.gguf, small-Q8_0.gguf"),
        ({"a-Q4_0.gguf": b"", "b-Q4_0.gguf": b""}, ":Q4_0", RequestError, "2 models of Q4_0"),
        ({"a.gguf": b"", "b.gguf": b""}, "", RequestError, "no obvious choice"),
        ({"pytorch_model.bin": b""}, "", UnsupportedModelError, "pickles only"),
        (FOLDER_REPO, ":pytorch_model.bin", UnsupportedModelError, "is a pickle"),
        ({"README.md": b""}, "", UnsupportedModelError, "no GGUF model"),
        ({"../evil.gguf": b""}, "", FileFormatError, "leaves its folder"),
        ({"a/../../evil.gguf": b""}, "", FileFormatError, "leaves its folder"),
        ({"/etc/evil.gguf": b""}, "", FileFormatError, "leaves its folder"),
        ({"c:evil.gguf": b""}, "", FileFormatError, "leaves its folder"),
        ({"a\\evil.gguf": b""}, "", FileFormatError, "leaves its folder"),
    ],
)
def test_what_cannot_be_chosen(hub: Hub, files: dict[str, bytes], wanted: str, error: type[VkllmError], message: str) -> None:
    hub.repositories["a/b"] = Repository(files)
    with pytest.raises(error, match=message) as refused:
        fetch("a/b" + wanted)
    assert refused.value.hint and hub.asked == [] and not store.models_dir().exists()


@pytest.mark.parametrize("sha", ["../../../../evil", "main", "", None])
def test_a_revision_that_is_no_commit_is_refused(hub: Hub, sha: Any) -> None:
    hub.repositories["a/b"] = Repository(GGUF_REPO, sha=sha)
    with pytest.raises(FileFormatError, match="revision"):
        fetch("a/b")


@pytest.mark.parametrize("name", ["plain", "a/b/c", "../x", "a/..", "a/b--c", "/a", "a/", "http://x/y", "a b/c"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(RequestError, match="names no repository"):
        store.split_name(name)


def test_an_interrupted_download_goes_on_where_it_stopped(hub: Hub) -> None:
    hub.repositories["a/small"] = Repository({"small-Q4_K_M.gguf": BIG})
    hub.cut_after = [500_000, 0, 0]
    with pytest.raises(ConfigError, match=f"500000 of {len(BIG)} bytes") as broken:
        fetch("a/small")
    assert "goes on where it stopped" in broken.value.hint
    assert store.pulled() == [] and len(list(store.incomplete())) == 1
    assert "incomplete" in vkllm("list").stdout
    hub.asked.clear()
    assert fetch("a/small").path.read_bytes() == BIG
    assert hub.asked == [("small-Q4_K_M.gguf", "bytes=500000-")] and list(store.incomplete()) == []


def test_short_breaks_are_bridged(hub: Hub) -> None:
    hub.repositories["a/small"] = Repository({"small-Q4_K_M.gguf": BIG})
    hub.cut_after = [400_000, 0, 400_000, 0]
    assert fetch("a/small").path.read_bytes() == BIG
    assert [r for _, r in hub.asked] == [None, "bytes=400000-", "bytes=400000-", "bytes=800000-", "bytes=800000-"]


def test_a_server_that_begins_again_is_followed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["a/small"] = Repository({"small-Q4_K_M.gguf": BIG})
    folder = store.entry_dir("a/small", "Q4_K_M", SHA)
    folder.mkdir(parents=True)
    (folder / "small-Q4_K_M.gguf.part").write_bytes(b"x" * 1000)
    opened = download._open
    with monkeypatch.context() as patch:
        patch.setattr(download, "_open", lambda remote, name, _: opened(remote, name, 0))
        hub.cut_after = [500, 500]
        with pytest.raises(ConfigError, match="500 of"):
            fetch("a/small")
    assert fetch("a/small").path.read_bytes() == BIG  # without what was there before


@pytest.mark.parametrize("file", ["small-Q4_K_M.gguf", "config.json"])
def test_a_wrong_hash_leaves_nothing(hub: Hub, file: str) -> None:
    repo = {"small-Q4_K_M.gguf": BIG} if file.endswith("gguf") else {"config.json": b"{}", "model.safetensors": b"1"}
    hub.repositories["a/b"] = Repository(repo, lies={file: repo[file][:-1] + b"!"})
    with pytest.raises(FileFormatError, match="hash") as wrong:
        fetch("a/b")
    assert wrong.value.hint and store.pulled() == []
    assert not [p for p in store.models_dir().rglob("*") if p.name.startswith(file)]
    hub.repositories["a/b"].lies.clear()
    assert fetch("a/b").files


def test_a_full_disk_is_told_before_and_during(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["a/small"] = Repository({"small-Q4_K_M.gguf": BIG})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(ConfigError, match="free") as full:
            fetch("a/small")
        assert "VKLLM_MODELS_DIR" in full.value.hint and hub.asked == []

    def small_disk(path: Any, *args: Any, **kwargs: Any) -> Any:
        file = really_open(path, *args, **kwargs)
        if str(path).endswith(".part") and "b" in args[0] and args[0] != "rb":
            write = file.write

            class Full:
                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: object) -> None:
                    file.close()

                def __getattr__(self, name: str) -> Any:
                    return getattr(file, name)

                def write(self, block: bytes) -> int:
                    write(block[:1000])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            return Full()
        return file

    really_open = builtins.open
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", small_disk)
        with pytest.raises(ConfigError, match=r"disk of .* is full"):
            fetch("a/small")
    assert store.pulled() == []
    assert fetch("a/small").path.read_bytes() == BIG


def test_offline_missing_and_refusing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="no repository a/nothing"):
        fetch("a/nothing")
    hub.repositories["a/small"] = Repository({"small-Q4_K_M.gguf": BIG})
    with pytest.raises(RequestError, match="no such revision"):
        fetch("a/small", revision="v9")
    hub.refuse = 403
    with pytest.raises(RequestError, match="gated") as gated:
        fetch("a/small")
    assert "HF_TOKEN" in gated.value.hint
    hub.refuse = 404
    with pytest.raises(ConfigError, match="404"):
        fetch("a/small")
    hub.refuse = 503
    with pytest.raises(ConfigError, match="0 of"):
        fetch("a/small")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        fetch("a/small")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"offline: http://127\.0\.0\.1:9 cannot be reached") as offline:
        fetch("a/small")
    assert "vkllm list" in offline.value.hint


def test_credentials_stay_with_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    port = os.environ["HF_ENDPOINT"].rpartition(":")[2]
    hub.repositories["a/small"] = Repository({"small-Q4_K_M.gguf": BIG})
    hub.elsewhere = f"http://localhost:{port}"
    fetch("a/small")
    assert hub.authorizations == ["Bearer hf_secret", None]


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(ConfigError, match="huggingface_hub") as missing:
        fetch("a/small")
    assert "pip install" in missing.value.hint


@pytest.mark.parametrize(
    "info",
    [
        {"gated": "manual"},
        {"cardData": {"license": "llama3.2"}},
        {"cardData": {"license": "other", "license_name": "x"}},
        {"cardData": {}},
    ],
)
def test_licences_with_conditions_are_asked_for_once_a_revision(hub: Hub, info: dict[str, Any]) -> None:
    hub.repositories["a/small"] = Repository(GGUF_REPO, info)
    with pytest.raises(ConfigError, match="asks to be accepted") as asked:
        fetch("a/small")
    assert "--accept-license" in asked.value.hint
    with pytest.raises(ConfigError, match="not accepted"):
        fetch("a/small", ask=lambda _: False)
    assert store.pulled() == [] and {name for name, _ in hub.asked} == {"README.md"}
    questions: list[str] = []
    fetch("a/small", ask=lambda q: not questions.append(q))
    shown: list[str] = []
    fetch("a/small:Q8_0", shown=shown)
    assert len(questions) == 1 and shown == []
    hub.repositories["a/small"].sha = SHA[::-1]
    with pytest.raises(ConfigError, match="asks to be accepted"):
        fetch("a/small")
    assert fetch("a/small", accepted=True).revision == SHA[::-1]


def test_a_name_works_as_a_model(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vkllm.files import resolve_model

    hub.repositories["a/tiny"] = Repository({"tiny-F16.gguf": resolve_model("tiny").read_bytes()})
    result = vkllm("pull", "a/tiny")
    assert (result.exit_code, result.stdout) == (0, "a/tiny:F16\n"), result.stderr
    assert "licence: apache-2.0" in result.stderr
    ids = vkllm("tokenize", "tiny", "Hi there").stdout
    assert ids and vkllm("tokenize", "a/tiny", "Hi there").stdout == vkllm("tokenize", "A/Tiny:f16", "Hi there").stdout == ids
    (store.models_dir() / store.ACCEPTED).unlink()
    refused = vkllm("tokenize", "a/tiny", "x")
    assert refused.exit_code == 1 and "not accepted" in refused.stderr
    fetch("a/tiny")
    store.find("a/tiny").path.unlink()  # type: ignore[union-attr]
    assert "lacks tiny-F16.gguf" in vkllm("tokenize", "a/tiny", "x").stderr
    missing = vkllm("tokenize", "b/other:Q4_K_M", "x")
    assert missing.exit_code == 1 and "vkllm pull b/other:Q4_K_M" in missing.stderr
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("a/tiny").write_bytes(b"a file of that name wins")
    assert store.resolve("a/tiny") == "a/tiny"


def test_several_variants_need_a_name(hub: Hub) -> None:
    hub.repositories["a/small"] = Repository(GGUF_REPO)
    fetch("a/small:Q4_K_M")
    fetch("a/small:Q8_0")
    with pytest.raises(RequestError, match="a/small:Q4_K_M and a/small:Q8_0"):
        store.resolve("a/small")
    assert store.resolve("a/small:Q8_0").endswith("small-Q8_0.gguf")


@pytest.mark.parametrize("model", ["tiny", "model.gguf", "dir/model.gguf", "./a/b", "/a/b", "a/b/c", "~/x", "x/../y", ""])
def test_paths_stay_paths(hub: Hub, model: str) -> None:
    assert store.resolve(model) == model


def test_list_and_rm(hub: Hub) -> None:
    assert "no models" in vkllm("list").stdout
    hub.repositories["a/small"] = Repository(GGUF_REPO)
    hub.repositories["a/folder"] = Repository(FOLDER_REPO)
    fetch("a/small")
    fetch("a/folder")
    listed = json.loads(vkllm("list", "--json").stdout)
    assert [m["name"] for m in listed["models"]] == ["a/folder", "a/small:Q4_K_M"] and listed["incomplete"] == []
    assert "a/small:Q4_K_M" in vkllm("list").stdout
    refused = vkllm("rm", "a/small")
    assert refused.exit_code == 1 and "--yes" in refused.stderr and len(store.pulled()) == 2
    assert vkllm("rm", "a/small", "--yes").exit_code == 0 and [m.name for m in store.pulled()] == ["a/folder"]
    assert not (store.models_dir() / "a--small").exists()
    gone = vkllm("rm", "a/small", "--yes")
    assert gone.exit_code == 1 and "no model a/small" in gone.stderr


def test_a_person_is_asked_on_the_terminal(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vkllm.hub_cli.someone_is_there", lambda: True)
    hub.repositories["a/small"] = Repository(GGUF_REPO, {"cardData": {"license": "gemma"}})
    no = vkllm("pull", "a/small", input="n\n")
    assert no.exit_code == 1 and "licence: gemma" in no.stderr and "nothing was pulled" in no.stderr
    assert vkllm("pull", "a/small", "--json", input="y\n").exit_code == 0
    assert vkllm("rm", "a/small", input="n\n").exit_code == 1 and len(store.pulled()) == 1
    assert vkllm("rm", "a/small", input="y\n").exit_code == 0 and store.pulled() == []


def test_rm_takes_what_was_never_finished(hub: Hub) -> None:
    hub.repositories["a/small"] = Repository({"small-Q4_K_M.gguf": BIG})
    hub.cut_after = [1000, 0, 0]
    with pytest.raises(ConfigError):
        fetch("a/small")
    assert vkllm("rm", "a/small", "--yes").exit_code == 0 and list(store.incomplete()) == []


def test_a_manifest_that_lies_is_no_model(hub: Hub) -> None:
    hub.repositories["a/small"] = Repository(GGUF_REPO)
    manifest = fetch("a/small").folder / store.MANIFEST
    good = json.loads(manifest.read_text())
    for change in ({"main": "../../../etc/passwd"}, {"files": {"../x": ""}}, {"repo": "b/other"}, {"files": 3}):
        manifest.write_text(json.dumps(good | change))
        assert store.pulled() == []
    manifest.write_text("{")
    assert store.pulled() == []


def test_two_pulls_of_one_model_do_not_mix(hub: Hub) -> None:
    pytest.importorskip("fcntl")
    hub.repositories["a/small"] = Repository(GGUF_REPO)
    with pull._alone(store.entry_dir("a/small", "Q4_K_M", SHA)), pytest.raises(CapacityError, match="another process"):
        fetch("a/small")
