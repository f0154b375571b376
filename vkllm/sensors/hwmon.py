"""Linux hwmon: amdgpu, xe, i915 and nouveau by PCI address, CPU packages for software devices. Plain files, no root.

Attributes (Documentation/hwmon/sysfs-interface in the kernel tree): temp*_input, _crit, _emergency, _max in m°C; power*_average,
_input, _cap, _max in µW; energy*_input in µJ. What a file does not hold (missing, EAGAIN of a sleeping GPU, rubbish) is None.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vkllm.homeostasis import Reading, Temperature

ROOT = Path("/sys/class/hwmon")
CPU_DRIVERS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal", "scpi_sensors", "acpitz")  # the best first
PLACES = {  # the driver's label → our name
    "edge": "core",
    "pkg": "core",
    "tdie": "core",
    "tctl": "core",
    "gpu core": "core",
    "junction": "hotspot",
    "mem": "memory",
    "vram": "memory",
}


@dataclass(frozen=True, slots=True)
class Channel:
    """One temperature: its file and its thresholds, which are read once."""

    file: Path
    target_c: float | None
    slowdown_c: float | None
    max_c: float | None


class HwmonSensor:
    """One hwmon folder."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self.name = folder, f"hwmon {_text(folder / 'name')}"
        self.channels = channels(folder)
        self._clock = clock
        self._power = next((f for n in ("power1_average", "power1_input") if _number(f := folder / n) is not None), None)
        self._energy = next((f for f in sorted(folder.glob("energy*_input")) if _number(f) is not None), None)
        self._last: tuple[float, float] | None = None  # time, energy: power of drivers that tell only energy

    def read(self) -> Reading | None:
        """All temperatures that can be read now; None when there is none."""
        now = self._clock()
        found = {
            name: Temperature(value / 1e3, c.target_c, c.slowdown_c, c.max_c)
            for name, c in self.channels.items()
            if (value := _number(c.file)) is not None
        }
        if not found:
            return None
        energy = _number(self._energy) if self._energy else None
        joules = energy / 1e6 if energy is not None else None
        power = _number(self._power) if self._power else None
        watts = power / 1e6 if power is not None else self._from_energy(now, joules)
        limits = (_number(self.folder / n) for n in ("power1_cap", "power1_max"))
        limit = next((v / 1e6 for v in limits if v), None)
        return Reading(now, found, watts, limit, joules)

    def _from_energy(self, now: float, joules: float | None) -> float | None:
        """Mean power since the last reading. A counter that went back tells nothing."""
        if joules is None:
            return None
        last, self._last = self._last, (now, joules)
        if last is None or now <= last[0] or joules < last[1]:
            return None
        return (joules - last[1]) / (now - last[0])

    def close(self) -> None:
        """Nothing is held open."""


def open_hwmon(
    kind: str, pci_bus: str | None, *, root: Path | None = None, clock: Callable[[], float] = time.monotonic
) -> HwmonSensor | None:
    """The hwmon folder of the PCI device, or of the CPU for a device of kind "cpu" (and "integrated" that has none itself)."""
    folders = sorted((root or ROOT).glob("hwmon*"), key=lambda f: int("0" + re.sub(r"\D", "", f.name)))
    found = [f for f in folders if pci_bus is not None and _pci_address(f) == pci_bus.lower()]
    if not found and kind in ("cpu", "integrated"):
        ranked = [(CPU_DRIVERS.index(name), i, f) for i, f in enumerate(folders) if (name := _text(f / "name")) in CPU_DRIVERS]
        found = [f for _, _, f in sorted(ranked)]
    for folder in found:
        sensor = HwmonSensor(folder, clock)
        if sensor.channels:
            return sensor
    return None


def channels(folder: Path) -> dict[str, Channel]:
    """Our name → channel of every temperature that can be read now. A second one of the same name keeps its label.

    A CPU's package stands for its cores: their own channels are left out where a package is.
    """
    found: dict[str, Channel] = {}
    for file in sorted(folder.glob("temp*_input"), key=lambda f: int("0" + re.sub(r"\D", "", f.name))):
        if _number(file) is None:
            continue
        base = file.name.removesuffix("_input")
        label = _text(folder / f"{base}_label").lower()
        if label.startswith(("core ", "tccd")):
            continue
        name = "core" if label.startswith("package") else PLACES.get(label, label or "core")
        target, crit, emergency = (_celsius(folder / f"{base}_{n}") for n in ("max", "crit", "emergency"))
        if name in found:
            name = f"{label or 'temp'} {base.removeprefix('temp')}"
        found[name] = Channel(file, target, crit, emergency if emergency is not None else crit)
    return found


def _pci_address(folder: Path) -> str:
    """ "0000:03:00.0" of the device that a hwmon folder belongs to; "" for none."""
    try:
        return (folder / "device").resolve(strict=True).name.lower()
    except (OSError, RuntimeError):
        return ""


def _text(file: Path) -> str:
    """A file's text without blanks at the ends; "" when it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(file: Path) -> float | None:
    """A file's whole number; None when it cannot be read or holds something else."""
    text = _text(file)
    return float(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else None


def _celsius(file: Path) -> float | None:
    """A threshold; drivers say 0 or absurd figures for "none"."""
    value = _number(file)
    return value / 1e3 if value is not None and 20_000 <= value <= 150_000 else None
