"""Hours of real work under the real controller: `vkllm soak`. The figures are those of `vkllm homeostasis simulate`, with energy.

options.py    what to run
clients.py    threads that keep several streams busy
recorder.py   what was seen, added up; the figures
run.py        engine, sensor, controller and clients together
"""

from vkllm.soak.options import SoakOptions
from vkllm.soak.recorder import Recorder, SoakFigures
from vkllm.soak.run import Moment, soak

__all__ = ["Moment", "Recorder", "SoakFigures", "SoakOptions", "soak"]
