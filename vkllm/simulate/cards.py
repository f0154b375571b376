"""Devices to simulate: orders of magnitude of real kinds, none fitted to one card or to the controller."""

from __future__ import annotations

from dataclasses import replace

from vkllm.sensors.simulated import ThermalModel

AIR = ThermalModel()
SERVER = ThermalModel(
    idle_w=75.0,
    max_w=700.0,
    die_j_per_k=150.0,
    die_k_per_w=0.02,
    sink_j_per_k=2500.0,
    sink_k_per_w=0.06,
    fan_least=0.5,
    slowdown_c=87.0,
    max_c=92.0,
)
LAPTOP = ThermalModel(
    idle_w=8.0,
    max_w=80.0,
    die_j_per_k=20.0,
    die_k_per_w=0.18,
    sink_j_per_k=150.0,
    sink_k_per_w=0.6,
    slowdown_c=95.0,
    max_c=100.0,
)
CARDS = {
    "air": AIR,  # 350 W, air-cooled
    "server": SERVER,  # 700 W
    "laptop": LAPTOP,  # 80 W
    "paste": replace(AIR, die_k_per_w=0.07, sink_k_per_w=0.09),  # a bad contact: 22 °C from die to cooler
    "coarse": replace(AIR, noise_c=0.0),  # whole degrees, and no noise to tell what is between them
    "fine": replace(AIR, quantum_c=0.0),  # tenths of degrees
}
