"""The controller against the thermal model, thousands of times faster than a clock: `vkllm homeostasis simulate`."""

from vkllm.simulate.cards import CARDS
from vkllm.simulate.loop import Figures, Trace, best_constant_duty, simulate
from vkllm.simulate.plot import svg
from vkllm.simulate.scenarios import SCENARIOS, Conditions, Scenario, scenario

__all__ = [
    "CARDS",
    "SCENARIOS",
    "Conditions",
    "Figures",
    "Scenario",
    "Trace",
    "best_constant_duty",
    "scenario",
    "simulate",
    "svg",
]
