"""What a soak runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vkllm.errors import ConfigError

REFERENCE_S = 60.0  # at most, and a fifth of the run


@dataclass(frozen=True, slots=True)
class SoakOptions:
    """What to run. `seconds`: of the whole run, from the first token on; `reference_s`: of it at full speed, None: a fifth, at
    most a minute; `ambient_c`: of the thermal model where `simulated`; `watts`: the device's own power limit meanwhile.

    Raises: ConfigError: a value that makes no sense.
    """

    seconds: float
    streams: int = 8
    max_tokens: int = 128
    reference_s: float | None = None
    simulated: bool = False
    ambient_c: float = 35.0
    watts: float | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf or self.streams < 1 or self.max_tokens < 1:
            raise ConfigError(
                f"a soak of {self.seconds:g} s with {self.streams} streams of {self.max_tokens} tokens", "all must be above 0"
            )

    @property
    def full_speed_s(self) -> float:
        """How long the reference may take."""
        return min(REFERENCE_S, self.seconds / 5) if self.reference_s is None else self.reference_s
