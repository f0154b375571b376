"""Imports point one way (DESIGN section 2), read from the source without running it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"vkllm_codegen": ROOT / "codegen", "vkllm_shaders": ROOT / "shaders", "vkllm": ROOT}

# Parts of vkllm in the order in which data flows; each may import only those before it (and itself).
STAGES = (
    *("errors", "debug", "config", "vocab", "files", "tokenizer", "chat", "quantize"),  # the file and the text
    *("hub", "hub_cli"),  # models by name
    *("vk",),  # devices; the only part that loads the native module
    *("plan", "models", "expand", "weights", "rope", "packed_cache", "packing"),  # the plan, and what it becomes
    *("kernel_archive", "kernel_cache", "tuned", "schedule", "persistent", "kernels", "memory"),
    *("kv_cache", "scheduler", "speculation", "sampler", "homeostasis", "sensors", "simulate"),  # policies
    *(
        "chain",
        "reference",
        "engine",
        "batching",
        "diff",
        "benchmark",
        "profile",
        "profile_cli",
        "tune",
        "tune_cli",
        "doctor",
        "soak",
        "soak_cli",
        "serve",
    ),
    *("perplexity", "evaluate", "evaluate_plot", "perplexity_cli"),
    *("homeostasis_cli", "import_cli", "cli", "__main__"),
)
PURE = ("kv_cache", "scheduler", "speculation", "sampler", "homeostasis", "plan", "models", "config")  # no Vulkan, no clock
THIRD_PARTY = {
    "vkllm_codegen": {"numpy"},
    "vkllm_shaders": {"numpy", "vkllm_codegen"},
}


def modules(package: str) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module of a package."""
    base = PACKAGES[package]
    for file in sorted((base / package).rglob("*.py")):
        parts = file.relative_to(base).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def imports(name: str, file: Path) -> Iterator[tuple[str, bool]]:
    """(module, is it imported at the top level) for every import of a file; `from a import b` gives a.b too."""
    tree = ast.parse(file.read_text())
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    top = {id(n) for n in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                yield a.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(p for p in (parent, node.module or "") if p)
            yield base, id(node) in top
            for a in node.names:
                yield f"{base}.{a.name}", id(node) in top


def stage(module: str) -> int | None:
    """The place of vkllm.<part>... in STAGES; None for vkllm itself and names that are no module of it."""
    parts = module.split(".")
    if parts[0] != "vkllm" or len(parts) == 1:
        return None
    return STAGES.index(parts[1]) if parts[1] in STAGES else None


@pytest.mark.parametrize("package", ["vkllm_codegen", "vkllm_shaders"])
def test_the_lower_packages_need_nothing_above_them(package: str) -> None:
    allowed = sys.stdlib_module_names | THIRD_PARTY[package] | {package}
    wrong = [
        f"{name} imports {m}"
        for name, file in modules(package)
        for m, top in imports(name, file)
        if (m.split(".")[0] not in allowed and not (m.startswith("gguf") and "reference" in name))  # oracle
        or (package == "vkllm_codegen" and m == "numpy" and top and "interpret" not in name)
    ]
    assert wrong == []


def test_every_module_of_vkllm_has_a_stage() -> None:
    unknown = {name for name, _ in modules("vkllm") if name != "vkllm" and stage(name) is None}
    assert unknown == set(), "give them a place in STAGES"


def test_imports_point_one_way() -> None:
    wrong = []
    for name, file in modules("vkllm"):
        here = stage(name)
        for m, _ in imports(name, file):
            there = stage(m)
            if here is not None and there is not None and there > here:
                wrong.append(f"{name} imports {m}")
    assert wrong == []


def test_only_vk_touches_the_native_module() -> None:
    wrong = [n for n, f in modules("vkllm") for m, _ in imports(n, f) if "_native" in m and not n.startswith("vkllm.vk")]
    assert wrong == []


def test_policies_are_pure() -> None:
    banned = ("vkllm.vk", "time", "datetime", "pynvml", "vkllm.sensors")
    wrong = []
    for name, file in modules("vkllm"):
        if name.split(".")[1:2] and name.split(".")[1] in PURE:
            wrong += [f"{name} imports {m}" for m, _ in imports(name, file) if m.startswith(banned)]
    assert wrong == []


def test_an_upward_import_would_be_seen(tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_text("def f():\n    from vkllm.engine import LLMEngine\n    from .chain import Chain\n    import vkllm.vk as v\n")
    found = {m for m, _ in imports("vkllm.config", file)}
    assert {"vkllm.engine", "vkllm.chain", "vkllm.vk"} <= found
    assert stage("vkllm.engine.LLMEngine") == STAGES.index("engine")
