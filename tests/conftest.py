"""Fixtures for every test: devices, shared data, and the Khronos validation layers over the whole run.

Where the validation layer is installed, every test that touches a device runs under it, with synchronization validation, and
any message fails the test. VKLLM_TEST_VALIDATION=0 turns that off.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vkllm.vk import Device, NullDevice, list_devices, open_device

LAYER = "VK_LAYER_KHRONOS_validation"
LAYER_DIRS = ("/usr/share/vulkan/explicit_layer.d", "/etc/vulkan/explicit_layer.d", "/usr/local/share/vulkan/explicit_layer.d")
SETTINGS = {
    "debug_action": "VK_DBG_LAYER_ACTION_LOG_MSG",
    "report_flags": "error,warn,perf",
}
SYNC_SETTINGS = {"validate_sync": "true", "syncval_shader_accesses_heuristic": "true"}
OLD_SYNC_SETTINGS = {"enables": "VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT"}  # up to Vulkan SDK 1.3.2xx

_scratch = tempfile.TemporaryDirectory(prefix="vkllm-tests-")
_log = Path(_scratch.name, "validation.log")


def sync_settings() -> dict[str, str] | None:
    """The settings that turn synchronization validation on in the installed layer; None where there is no layer."""
    dirs = [*os.environ.get("VK_LAYER_PATH", "").split(":"), *LAYER_DIRS]
    for manifest in (Path(d, "VkLayer_khronos_validation.json") for d in dirs if d):
        if manifest.exists():
            version = json.loads(manifest.read_text())["layer"]["api_version"]
            return OLD_SYNC_SETTINGS if [int(n) for n in version.split(".")] < [1, 3, 280] else SYNC_SETTINGS
    return None


def pytest_configure() -> None:
    """Before any device is opened: a pipeline cache of our own, and the layers."""
    os.environ.setdefault("VKLLM_CACHE_DIR", str(Path(_scratch.name, "cache")))
    sync = sync_settings()
    if os.environ.get("VKLLM_TEST_VALIDATION", "1") != "0" and sync is not None:
        file, lines = Path(_scratch.name, "vk_layer_settings.txt"), SETTINGS | sync | {"log_filename": str(_log)}
        file.write_text("".join(f"khronos_validation.{key} = {value}\n" for key, value in lines.items()))
        os.environ["VK_LAYER_SETTINGS_PATH"] = str(file)
        os.environ["VK_INSTANCE_LAYERS"] = LAYER


@pytest.fixture(autouse=True)
def _no_validation_messages() -> Iterator[None]:
    """Fails the test during which the validation layer said something."""
    before = _log.stat().st_size if _log.exists() else 0
    yield
    if _log.exists() and _log.stat().st_size > before:
        with _log.open("rb") as f:
            f.seek(before)
            message = f.read().replace(b"\0", b"").decode(errors="replace").strip()
        if message:
            pytest.fail(f"the Vulkan validation layer reports:\n{message}", pytrace=False)


Figure = Callable[[str, str, str, float, float], None]


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """Notes what a test proved, for docs/exactness.md: (what, oracle, measure, figure, limit), as a line of JSON in the file that
    VKLLM_FIGURES names. `tools/exactness.py` makes the page from them."""

    def note(what: str, oracle: str, measure: str, value: float, limit: float) -> None:
        path = os.environ.get("VKLLM_FIGURES")
        if path:
            line = {
                "what": what,
                "oracle": oracle,
                "measure": measure,
                "figure": value,
                "limit": limit,
                "test": request.node.nodeid,
            }
            with open(path, "a") as f:
                f.write(json.dumps(line) + "\n")

    return note


@pytest.fixture(scope="session")
def device() -> Iterator[Device]:
    """A real device: the one that VKLLM_DEVICE names, else the best one. Skips where there is none."""
    if not list_devices():
        pytest.skip("no Vulkan device: install mesa-vulkan-drivers")
    with open_device() as d:
        yield d


@pytest.fixture
def null_device() -> NullDevice:
    """A device without Vulkan, with the smallest limits."""
    return NullDevice()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and vocabularies beside the checkout. Skips where it is missing."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is not there")
    return folder
