"""hwmon over trees like those that the drivers make."""

from __future__ import annotations

from pathlib import Path

import pytest

from vkllm.sensors.hwmon import HwmonSensor, open_hwmon

BUS = "0000:03:00.0"


def chip(root: Path, index: int, name: str, files: dict[str, object], device: str | None = None) -> Path:
    """One hwmon folder, with its `device` link into a tree of PCI devices."""
    folder = root / "class" / f"hwmon{index}"
    folder.mkdir(parents=True)
    for file, value in {"name": name, **files}.items():
        (folder / file).write_text(f"{value}\n")
    if device:
        target = root / "devices" / device
        target.mkdir(parents=True, exist_ok=True)
        (folder / "device").symlink_to(target)
    return folder


class Clock:
    now = 10.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    chip(tmp_path, 0, "nvme", {"temp1_input": 40850, "temp1_crit": 84850}, "nvme0")
    core = {"temp1_label": "Package id 0", "temp1_input": 61000, "temp1_max": 80000, "temp1_crit": 100000}
    chip(tmp_path, 1, "coretemp", {**core, "temp2_label": "Core 0", "temp2_input": 63000}, "coretemp.0")
    amd = {
        "temp1_label": "edge",
        "temp1_input": 64000,
        "temp1_crit": 100000,
        "temp1_emergency": 105000,
        "temp2_label": "junction",
        "temp2_input": 71000,
        "temp2_crit": 110000,
        "temp2_emergency": 115000,
        "temp3_label": "mem",
        "temp3_input": 70000,
        "temp3_crit": 100000,
        "temp3_emergency": 105000,
        "power1_average": 211000000,
        "power1_cap": 300000000,
        "fan1_input": 1200,
    }
    chip(tmp_path, 2, "amdgpu", amd, BUS)
    xe = {"temp2_label": "pkg", "temp2_input": 55000, "temp2_crit": 100000, "temp3_label": "vram", "temp3_input": 60000}
    chip(tmp_path, 10, "xe", {**xe, "energy1_input": 5_000_000, "power1_max": 190_000_000}, "0000:04:00.0")
    return tmp_path / "class"


def test_amdgpu(tree: Path) -> None:
    sensor = open_hwmon("discrete", BUS, root=tree, clock=Clock())
    assert sensor and sensor.name == "hwmon amdgpu"
    reading = sensor.read()
    assert reading and reading.time_s == 10.0 and set(reading.temperatures) == {"core", "hotspot", "memory"}
    hotspot = reading.temperatures["hotspot"]
    assert (hotspot.value_c, hotspot.slowdown_c, hotspot.max_c) == (71.0, 110.0, 115.0)
    assert (reading.power_w, reading.power_limit_w, reading.energy_j) == (211.0, 300.0, None)


def test_power_from_energy(tree: Path) -> None:
    """Intel's drivers count energy."""
    clock = Clock()
    sensor = open_hwmon("discrete", "0000:04:00.0", root=tree, clock=clock)
    assert sensor
    first = sensor.read()
    assert first and first.power_w is None and first.energy_j == 5.0 and first.power_limit_w == 190.0
    assert set(first.temperatures) == {"core", "memory"}
    clock.now += 2
    (sensor.folder / "energy1_input").write_text("205000000\n")
    second = sensor.read()
    assert second and second.power_w == pytest.approx(100.0)
    clock.now += 1
    (sensor.folder / "energy1_input").write_text("17\n")  # wrapped
    third = sensor.read()
    assert third and third.power_w is None


def test_power_and_limit_of_one_channel(tmp_path: Path) -> None:
    """xe: the card (1) may tell nothing, its package (2) does; the burst limits (_cap) are not meant, and 0 is no limit."""
    pkg = {"temp2_label": "pkg", "temp2_input": 55000, "energy2_input": 1, "power2_max": 75_000_000, "power1_max": 150_000_000}
    chip(tmp_path, 0, "xe", {**pkg, "power2_cap": 99_000_000}, BUS)
    chip(tmp_path, 1, "i915", {"temp1_input": 44000, "energy1_input": 7, "power1_max": 0}, "0000:04:00.0")
    first = open_hwmon("discrete", BUS, root=tmp_path / "class")
    second = open_hwmon("discrete", "0000:04:00.0", root=tmp_path / "class")
    package, card = first.read() if first else None, second.read() if second else None
    assert package and package.power_limit_w == 75.0
    assert card and card.power_limit_w is None and card.energy_j == pytest.approx(7e-6)


def test_the_card_and_not_its_tile(tmp_path: Path) -> None:
    """i915 has a hwmon folder for each tile, with energy but no temperature, at the same address."""
    chip(tmp_path, 0, "i915_gt0", {"energy1_input": 1}, BUS)
    chip(tmp_path, 1, "i915", {"temp1_input": 44000, "energy1_input": 7}, BUS)
    sensor = open_hwmon("discrete", BUS.upper(), root=tmp_path / "class")
    assert sensor and sensor.name == "hwmon i915"


def test_a_cpu_has_its_package(tree: Path) -> None:
    sensor = open_hwmon("cpu", None, root=tree)
    assert sensor
    reading = sensor.read()
    assert reading and set(reading.temperatures) == {"core"}
    core = reading.temperatures["core"]
    assert (core.value_c, core.target_c, core.slowdown_c, core.max_c) == (61.0, 80.0, 100.0, 100.0)


def test_k10temp(tmp_path: Path) -> None:
    files = {"temp1_label": "Tctl", "temp1_input": 51250, "temp3_label": "Tccd1", "temp3_input": 48000}
    chip(tmp_path, 0, "k10temp", files)
    sensor = open_hwmon("cpu", None, root=tmp_path / "class")
    reading = sensor.read() if sensor else None
    assert reading and {n: t.value_c for n, t in reading.temperatures.items()} == {"core": 51.25}


def test_a_discrete_device_gets_no_other_ones_sensor(tree: Path, tmp_path: Path) -> None:
    assert open_hwmon("discrete", "0000:09:00.0", root=tree) is None
    assert open_hwmon("discrete", None, root=tree) is None
    assert open_hwmon("cpu", None, root=tmp_path / "nothing") is None


def test_a_cpu_counts_energy_elsewhere(tree: Path) -> None:
    clock = Clock()
    zones = {"0": ("package-0", 100), "0:0": ("core", 70), "1": ("package-1", 50), "2": ("psys", 500)}
    for number, (name, joules) in zones.items():
        zone = tree.parent / "powercap" / f"intel-rapl:{number}"
        zone.mkdir(parents=True)
        (zone / "name").write_text(f"{name}\n")
        (zone / "energy_uj").write_text(f"{joules * 1_000_000}\n")
    sensor = open_hwmon("cpu", None, root=tree, clock=clock)
    first = sensor.read() if sensor else None
    assert sensor and first and first.energy_j == 150.0 and first.power_w is None
    clock.now += 2
    (tree.parent / "powercap" / "intel-rapl:1" / "energy_uj").write_text("90000000\n")
    second = sensor.read()
    assert second and second.power_w == pytest.approx(20.0)
    (tree.parent / "powercap" / "intel-rapl:1" / "energy_uj").write_text("denied\n")
    third = sensor.read()
    assert third and third.energy_j is None, "half a sum is none"
    discrete = open_hwmon("discrete", BUS, root=tree)
    reading = discrete.read() if discrete else None
    assert reading and reading.energy_j is None, "a card's energy is not the CPU's"


def test_two_packages(tmp_path: Path) -> None:
    files = {"temp1_label": "Package id 0", "temp1_input": 50000, "temp9_label": "Package id 1", "temp9_input": 90000}
    folder = chip(tmp_path, 0, "coretemp", files)
    reading = HwmonSensor(folder).read()
    assert reading and sorted(t.value_c for t in reading.temperatures.values()) == [50.0, 90.0]


@pytest.mark.parametrize("content", ["", "N/A", "12.5", "9" * 400, "\x00\xff", None])
def test_rubbish_is_no_reading(tree: Path, content: str | None) -> None:
    sensor = open_hwmon("discrete", BUS, root=tree)
    assert sensor
    for file in sensor.folder.glob("temp*_input"):
        if content is None:
            file.unlink()
        else:
            file.write_text(content)
    assert sensor.read() is None
    assert open_hwmon("discrete", BUS, root=tree) is None


def test_a_sensor_that_falls_silent_leaves_the_others(tree: Path) -> None:
    sensor = open_hwmon("discrete", BUS, root=tree)
    assert sensor
    (sensor.folder / "temp3_input").unlink()
    (sensor.folder / "power1_average").write_text("busy")
    reading = sensor.read()
    assert reading and set(reading.temperatures) == {"core", "hotspot"} and reading.power_w is None
