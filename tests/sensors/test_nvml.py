"""NVML through a module that answers, refuses or breaks as the real one does."""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vkllm.errors import DeviceError
from vkllm.homeostasis import HomeostasisConfig, Temperature, set_point_c
from vkllm.sensors import open_sensor
from vkllm.sensors.nvml import REASONS, open_nvml
from vkllm.sensors.simulated import SimulatedSensor, ThermalModel, ThermalPlant

BUS, UUID = "0000:17:00.0", uuid.UUID("12345678-9abc-def0-1234-56789abcdef0")


class NVMLError(Exception):
    """As pynvml's."""


class FakeNvml:
    """One GPU. `missing`: functions that fail; `lost`: all of them do."""

    NVML_TEMPERATURE_GPU = 0
    NVML_TEMPERATURE_THRESHOLD_SHUTDOWN, NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = 0, 1
    NVML_TEMPERATURE_THRESHOLD_MEM_MAX, NVML_TEMPERATURE_THRESHOLD_GPU_MAX = 2, 3
    NVML_FI_DEV_MEMORY_TEMP = 82

    def __init__(self, *missing: str) -> None:
        self.missing, self.lost, self.users, self.reasons, self.limit_mw = set(missing), False, 0, 0, 700_000
        self.core, self.memory = 61, 72
        self.refusal: NVMLError | None = None

    def nvmlInit(self) -> None:
        self._check("nvmlInit")
        self.users += 1

    def nvmlShutdown(self) -> None:
        self.users -= 1

    def _check(self, name: str) -> None:
        if self.lost or name in self.missing:
            raise NVMLError("Not Supported")

    def nvmlDeviceGetHandleByPciBusId(self, bus: bytes) -> str:
        self._check("nvmlDeviceGetHandleByPciBusId")
        if bus != BUS.encode():
            raise NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetHandleByUUID(self, name: bytes) -> str:
        if name != f"GPU-{UUID}".encode():
            raise NVMLError("Not Found")
        return "handle"

    def __getattr__(self, name: str) -> Any:
        answers: dict[str, Any] = {
            "nvmlDeviceGetName": lambda: "NVIDIA Test",
            "nvmlDeviceGetTemperature": lambda sensor: self.core,
            "nvmlDeviceGetTemperatureV": lambda sensor: self.core,
            "nvmlDeviceGetTemperatureThreshold": lambda kind: (95, 90, 100, 87)[kind],
            "nvmlDeviceGetMarginTemperature": lambda: 26,
            "nvmlDeviceGetFieldValues": lambda ids: [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=self.memory))],
            "nvmlDeviceGetPowerUsage": lambda: 345_600,
            "nvmlDeviceGetEnforcedPowerLimit": lambda: self.limit_mw,
            "nvmlDeviceGetPowerManagementLimit": lambda: self.limit_mw,
            "nvmlDeviceGetPowerManagementDefaultLimit": lambda: 700_000,
            "nvmlDeviceGetPowerManagementLimitConstraints": lambda: (200_000, 700_000),
            "nvmlDeviceSetPowerManagementLimit": self._set_limit,
            "nvmlDeviceGetTotalEnergyConsumption": lambda: 12_345_678,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda: self.reasons,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda: self.reasons,
        }
        if name not in answers:
            raise AttributeError(name)

        def call(handle: str, *arguments: Any) -> Any:
            self._check(name)
            assert handle == "handle"
            return answers[name](*arguments)

        return call

    def _set_limit(self, milliwatts: int) -> None:
        if self.refusal:
            raise self.refusal
        if not 200_000 <= milliwatts <= 700_000:
            raise NVMLError("Invalid Argument")
        self.limit_mw = milliwatts


def test_all_of_it() -> None:
    nvml = FakeNvml()
    sensor = open_nvml(BUS, nvml=nvml, clock=lambda: 5.0)
    assert sensor and sensor.name == "NVML NVIDIA Test"
    reading = sensor.read()
    assert reading and reading.time_s == 5.0
    assert reading.temperatures == {"core": Temperature(61.0, 87.0, 90.0, 95.0), "memory": Temperature(72.0, None, 100.0, None)}
    assert (reading.power_w, reading.power_limit_w, reading.energy_j) == (345.6, 700.0, 12345.678)
    assert reading.throttle == frozenset() and reading.busy is None
    assert set_point_c(HomeostasisConfig(), "core", reading.temperatures["core"]) == 75
    sensor.close()
    sensor.close()
    assert nvml.users == 0 and sensor.read() is None


def test_matched_by_uuid() -> None:
    assert open_nvml(None, UUID.bytes, nvml=FakeNvml())
    assert open_nvml("0000:99:00.0", UUID.bytes, nvml=FakeNvml())
    for nvml in (FakeNvml(),):
        assert open_nvml("0000:99:00.0", bytes(16), nvml=nvml) is None and open_nvml(None, b"x", nvml=nvml) is None
        assert nvml.users == 0


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (0x1, set()),
        (0x4, {"power_cap"}),
        (0x8, {"thermal"}),
        (0x60, {"thermal"}),
        (0x84, {"power_brake", "power_cap"}),
        (0x88, {"power_brake"}),
        (0xC8, {"power_brake", "thermal"}),
    ],
)
def test_throttle_reasons(bits: int, expected: set[str]) -> None:
    nvml = FakeNvml("nvmlDeviceGetCurrentClocksEventReasons")  # an older driver
    nvml.reasons = bits
    sensor = open_nvml(BUS, nvml=nvml)
    reading = sensor.read() if sensor else None
    assert reading and reading.throttle == expected


def test_what_a_card_does_not_tell_is_none() -> None:
    every = [n for n in dir(FakeNvml) if n.startswith("nvmlDeviceGetHandle")]
    nvml = FakeNvml(
        *("nvmlDeviceGetTemperatureThreshold", "nvmlDeviceGetMarginTemperature", "nvmlDeviceGetFieldValues", "nvmlDeviceGetName"),
        *("nvmlDeviceGetPowerUsage", "nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetTotalEnergyConsumption"),
        *("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons", "nvmlDeviceGetTemperatureV"),
    )
    assert every
    sensor = open_nvml(BUS, nvml=nvml)
    reading = sensor.read() if sensor else None
    assert (
        reading and reading.temperatures == {"core": Temperature(61.0)} and reading.power_w is None and reading.energy_j is None
    )


def test_the_margin_stands_in_for_the_threshold() -> None:
    sensor = open_nvml(BUS, nvml=FakeNvml("nvmlDeviceGetTemperatureThreshold"))
    reading = sensor.read() if sensor else None
    assert reading and reading.temperatures["core"] == Temperature(61.0, None, 87.0, None)


def test_no_memory_sensor() -> None:
    nvml = FakeNvml()
    nvml.memory = 0
    sensor = open_nvml(BUS, nvml=nvml)
    reading = sensor.read() if sensor else None
    assert reading and set(reading.temperatures) == {"core"}


def test_a_gpu_that_falls_off_the_bus() -> None:
    nvml = FakeNvml()
    sensor = open_nvml(BUS, nvml=nvml)
    assert sensor and sensor.read()
    nvml.lost = True
    assert sensor.read() is None
    nvml.lost = False
    assert sensor.read()


def test_no_driver() -> None:
    assert open_nvml(BUS, nvml=FakeNvml("nvmlInit")) is None
    mute = FakeNvml("nvmlDeviceGetTemperature", "nvmlDeviceGetTemperatureV")
    assert open_nvml(BUS, nvml=mute) is None and mute.users == 0


def test_the_power_limit_is_restored() -> None:
    nvml = FakeNvml()
    sensor = open_nvml(BUS, nvml=nvml)
    assert sensor
    with pytest.raises(ZeroDivisionError), sensor.power_limit(300.0):
        assert nvml.limit_mw == 300_000
        raise ZeroDivisionError
    assert nvml.limit_mw == 700_000
    with pytest.raises(DeviceError, match="50 W") as error, sensor.power_limit(50.0):
        pass
    assert "200 to 700 W" in error.value.hint and nvml.limit_mw == 700_000


def test_a_limit_that_is_refused_says_what_to_do() -> None:
    class Denied(NVMLError):
        value = 4  # NVML_ERROR_NO_PERMISSION

    class Unsupported(NVMLError):
        value = 3  # NVML_ERROR_NOT_SUPPORTED

    for kind, hint in ((Denied, "sudo nvidia-smi -pl 300"), (Unsupported, "no limit that can be set")):
        nvml = FakeNvml()
        nvml.refusal = kind("refused")
        sensor = open_nvml(BUS, nvml=nvml)
        assert sensor
        with pytest.raises(DeviceError, match="300 W") as error, sensor.power_limit(300.0):
            pass
        assert hint in error.value.hint and nvml.limit_mw == 700_000
    mute = open_nvml(BUS, nvml=FakeNvml("nvmlDeviceGetPowerManagementLimit", "nvmlDeviceGetPowerManagementDefaultLimit"))
    assert mute
    with pytest.raises(DeviceError, match="could not be restored"), mute.power_limit(300.0):
        pass


def test_the_real_module_has_every_name() -> None:
    """What we ask of NVML is in nvidia-ml-py as we call it."""
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    source = Path(open_nvml.__code__.co_filename).read_text()
    names = set(re.findall(r"\bnvml[A-Z]\w+|NVML_[A-Z_]+", source)) - {"nvmlClocksEventReasons", "nvmlReturn"}
    assert len(names) > 20 and [n for n in sorted(names) if not hasattr(pynvml, n)] == []
    kinds = ("SwPowerCap", "HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")
    assert [bit for bit, _ in REASONS] == [getattr(pynvml, f"nvmlClocksEventReason{kind}") for kind in kinds]
    for name in ("NVML_TEMPERATURE_GPU", "NVML_TEMPERATURE_THRESHOLD_SLOWDOWN", "NVML_TEMPERATURE_THRESHOLD_GPU_MAX"):
        assert getattr(FakeNvml, name) == getattr(pynvml, name)


def test_open_sensor_finds_the_right_one(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vkllm.sensors import nvml as module

    monkeypatch.setattr(module.importlib, "import_module", lambda name: FakeNvml())
    folder = tmp_path / "hwmon0"
    folder.mkdir()
    for file, value in {"name": "coretemp", "temp1_label": "Package id 0", "temp1_input": "50000"}.items():
        (folder / file).write_text(value)

    def info(vendor: int, kind: str, bus: str | None) -> Any:
        return SimpleNamespace(vendor_id=vendor, kind=kind, pci_bus=bus, uuid=bytes(16))

    found = open_sensor(info(0x10DE, "discrete", BUS), hwmon_root=tmp_path)
    assert found and found.name == "NVML NVIDIA Test"
    cpu = open_sensor(info(0x10005, "cpu", None), hwmon_root=tmp_path)
    assert cpu and cpu.name == "hwmon coretemp"
    assert open_sensor(info(0x1002, "discrete", "0000:03:00.0"), hwmon_root=tmp_path) is None


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pynvml", cast(Any, None))
    assert open_nvml(BUS) is None


def test_the_simulated_sensor() -> None:
    sensor = SimulatedSensor(ThermalPlant(ThermalModel(noise_w=0.0), 40.0), clock=lambda: 7.0)
    reading = sensor.read()
    assert reading and reading.time_s == 7.0 and reading.power_w == 35.0 and reading.power_limit_w == 350.0
    assert reading.temperatures["core"].value_c == round(reading.temperatures["core"].value_c)
    assert reading.temperatures["core"].slowdown_c == 90.0
    sensor.plant.die_c = sensor.plant.sink_c = 95.0
    sensor.plant.step(0.5, 1.0)
    throttled = sensor.read()
    assert throttled and throttled.throttle == {"thermal"}
    sensor.lost = True
    assert sensor.read() is None
    sensor.close()
