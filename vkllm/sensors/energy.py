"""Joules from readings: of the device's own counter, or of its power over time where it counts none."""

from __future__ import annotations

from vkllm.homeostasis import Reading

GAP_S = 5.0  # power is not carried over a longer silence: what was not measured is not counted


class EnergyMeter:
    """Adds up what readings tell. `joules` counts from the first reading on, and never goes back."""

    def __init__(self) -> None:
        self.joules = 0.0
        self.measured = False  # has anything been counted?
        self._last: Reading | None = None

    def add(self, reading: Reading) -> None:
        """Count what the device used since the last reading."""
        last, self._last = self._last, reading
        used = None if last is None else used_j(last, reading)
        if used is not None:
            self.joules, self.measured = self.joules + used, True


def used_j(last: Reading, now: Reading) -> float | None:
    """Joules between two readings; None where nothing tells. A counter that went back was reset: then power counts."""
    if last.energy_j is not None and now.energy_j is not None and now.energy_j >= last.energy_j:
        return now.energy_j - last.energy_j
    span = now.time_s - last.time_s
    if last.power_w is None or now.power_w is None or not 0 <= span <= GAP_S:
        return None
    return max(0.0, 0.5 * (last.power_w + now.power_w) * span)
