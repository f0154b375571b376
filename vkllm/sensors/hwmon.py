"""Linux hwmon: amdgpu, xe, i915 and nouveau by PCI address, CPU packages for software devices. Plain files, no root.

Attributes (Documentation/hwmon/sysfs-interface in the kernel tree): temp*_input, _crit, _emergency, _max in m°C; power*_average,
_input, _cap, _max in µW; energy*_input in µJ. What a file does not hold (missing, EAGAIN of a sleeping GPU, rubbish) is None.

The sustained power limit is power1_cap of amdgpu, power1_max of nouveau. Of Intel's drivers it is power1_max (PL1), where 0
means "none"; their power1_cap is the limit of bursts (PL2). Channel 1 is the card, channel 2 its package: the first that tells
something. CPUs tell no power here, but count energy in /sys/class/powercap (RAPL), which many systems let only root read.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vkllm.errors import DeviceError
from vkllm.homeostasis import Reading, Temperature
from vkllm.sensors import WITHOUT_LIMIT

log = logging.getLogger("vkllm.sensors")
ROOT = Path("/sys/class/hwmon")
CPU_DRIVERS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal", "scpi_sensors", "acpitz")  # the best first
INTEL = ("xe", "i915")
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
    """One hwmon folder. `packages`: files that count a CPU's energy in µJ, where the folder tells no power."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic, packages: tuple[Path, ...] = ()) -> None:
        self.folder, self.name = folder, f"hwmon {_text(folder / 'name')}"
        self.channels = channels(folder)
        self._clock = clock
        self._power, energy, self._limit = _rail(folder)
        self._energies = (energy,) if energy else () if self._power else packages
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
        counted = [n for file in self._energies if (n := _number(file)) is not None]
        joules = sum(counted) / 1e6 if counted and len(counted) == len(self._energies) else None
        power = _number(self._power) if self._power else None
        watts = power / 1e6 if power is not None else self._from_energy(now, joules)
        limit = _number(self._limit) if self._limit else None
        return Reading(now, found, watts, limit / 1e6 if limit else None, joules)

    def _from_energy(self, now: float, joules: float | None) -> float | None:
        """Mean power since the last reading. A counter that went back tells nothing."""
        if joules is None:
            return None
        last, self._last = self._last, (now, joules)
        if last is None or now <= last[0] or joules < last[1]:
            return None
        return (joules - last[1]) / (now - last[0])

    @contextmanager
    def power_limit(self, watts: float) -> Iterator[None]:
        """Set the device's sustained power limit, and restore it at the end. Needs permission to write the file.

        Raises: DeviceError: there is no such limit, or the driver refuses.
        """
        file = self._limit
        before = _number(file) if file else None
        if file is None or before is None:
            raise DeviceError(f"{self.name} has no power limit that can be set", WITHOUT_LIMIT)
        least, most = (_number(file.with_name(f"{file.name}_{n}")) for n in ("min", "max"))
        if (least is not None and watts * 1e6 < least) or (most and watts * 1e6 > most):
            span = f"{(least or 0) / 1e6:g} to {most / 1e6:g} W" if most else f"at least {(least or 0) / 1e6:g} W"
            raise DeviceError(f"the power limit of {watts:g} W is refused by {self.name}", f"this device takes {span}")
        try:
            file.write_text(f"{round(watts * 1e6)}\n")
        except OSError as error:
            hint = f"it needs root, or the right to write {file}; or {WITHOUT_LIMIT}"
            raise DeviceError(f"the power limit of {watts:g} W is refused: {error.strerror}", hint) from error
        try:
            yield
        finally:
            try:
                file.write_text(f"{before:.0f}\n")
            except OSError as error:
                log.error("the power limit stays at %g W: %s; write %.0f to %s", watts, error.strerror, before, file)

    def close(self) -> None:
        """Nothing is held open."""


def open_hwmon(
    kind: str, pci_bus: str | None, *, root: Path | None = None, clock: Callable[[], float] = time.monotonic
) -> HwmonSensor | None:
    """The hwmon folder of the PCI device, or of the CPU for a device of kind "cpu" (and "integrated" that has none itself)."""
    root = root or ROOT
    packages: tuple[Path, ...] = ()
    folders = sorted(root.glob("hwmon*"), key=lambda f: int("0" + re.sub(r"\D", "", f.name)))
    found = [f for f in folders if pci_bus is not None and _pci_address(f) == pci_bus.lower()]
    if not found and kind in ("cpu", "integrated"):
        ranked = [(CPU_DRIVERS.index(name), i, f) for i, f in enumerate(folders) if (name := _text(f / "name")) in CPU_DRIVERS]
        found = [f for _, _, f in sorted(ranked)]
        packages = _packages(root.parent / "powercap")
    for folder in found:
        sensor = HwmonSensor(folder, clock, packages)
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


def _rail(folder: Path) -> tuple[Path | None, Path | None, Path | None]:
    """(power, energy, sustained limit) of the first channel that tells power or energy, else of the first with a limit."""
    limits = ("max",) if _text(folder / "name") in INTEL else ("cap", "max")
    with_limit: Path | None = None
    for i in (1, 2):
        power = _first(folder, f"power{i}_average", f"power{i}_input")
        energy = _first(folder, f"energy{i}_input")
        limit = _first(folder, *(f"power{i}_{n}" for n in limits))
        if power or energy:
            return power, energy, limit
        with_limit = with_limit or limit
    return None, None, with_limit


def _packages(powercap: Path) -> tuple[Path, ...]:
    """The energy counters of a machine's CPU packages that may be read. ("psys" counts the whole platform.)"""
    zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if _text(zone / "name").startswith("package")]
    return tuple(file for zone in zones if _number(file := zone / "energy_uj") is not None)


def _first(folder: Path, *names: str) -> Path | None:
    """The first of these files that holds a number."""
    return next((folder / n for n in names if _number(folder / n) is not None), None)


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
