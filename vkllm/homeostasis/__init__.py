"""The thermal controller: readings in, a duty cycle and a batch limit out. A pure policy: no Vulkan, no clock, no sensor.

state = initial_state(config)
state = next_state(config, state, reading, now_s)   # at every reading, or when one failed to come (None)
... submit ...; sleep(gap_s(state, busy_s))         # the idle gap after a submit that ran for busy_s seconds

readings.py     what a device says, and how far each sensor is from its set point
config.py       how to hold the temperature
load.py         what the work does with the device: heat of a busy second, use of the allowed time
laws.py         `ramp` and `pi`: from a margin to a duty
controller.py   state and steps: fresh readings, lost sensors, trips
"""

from vkllm.homeostasis.config import SAMPLE_S, HomeostasisConfig, Mode
from vkllm.homeostasis.controller import Condition, State, batch_limit, gap_s, initial_state, next_state, retry_after_s
from vkllm.homeostasis.laws import ramp_gap_s
from vkllm.homeostasis.readings import Reading, Temperature, Throttle, set_point_c, smallest_margin

__all__ = [
    "SAMPLE_S",
    "Condition",
    "HomeostasisConfig",
    "Mode",
    "Reading",
    "State",
    "Temperature",
    "Throttle",
    "batch_limit",
    "gap_s",
    "initial_state",
    "next_state",
    "ramp_gap_s",
    "retry_after_s",
    "set_point_c",
    "smallest_margin",
]
