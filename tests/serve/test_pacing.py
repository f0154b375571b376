"""The homeostasis loop in a server: a device that gets hot is slowed down, then stopped, and recovers by itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from vkllm import LLMEngine, SamplingParams
from vkllm.batching import BatchEngine
from vkllm.errors import ThermalLimitError
from vkllm.homeostasis import HomeostasisConfig, Reading, Temperature
from vkllm.serve.pacing import HomeostasisPacer

httpx = pytest.importorskip("httpx", reason="httpx is not installed")


class Plant:
    """A sensor and its clock, both of which the test sets."""

    name = "test device"

    def __init__(self) -> None:
        self.core_c: float | None = 50.0
        self.now_s = 100.0

    def read(self) -> Reading | None:
        if self.core_c is None:
            return None
        return Reading(self.now_s, {"core": Temperature(self.core_c)}, power_w=42.0)

    def close(self) -> None: ...

    def pass_time(self, pacer: HomeostasisPacer, seconds: float) -> None:
        for _ in range(int(seconds * 2)):
            self.now_s += 0.5
            pacer.pace(0.4)
            pacer.poll()


@pytest.fixture
def plant() -> Plant:
    return Plant()


@pytest.fixture
def pacer(plant: Plant) -> Iterator[HomeostasisPacer]:
    pacer = HomeostasisPacer(plant, HomeostasisConfig(), clock=lambda: plant.now_s, start=False)
    yield pacer
    pacer.close()


def test_the_history_is_coarser_than_the_controller(plant: Plant, pacer: HomeostasisPacer) -> None:
    for _ in range(10):
        plant.now_s += 0.2
        pacer.poll()
    times = [sample.time_s for sample in pacer.samples]
    assert 3 <= len(times) <= 5
    assert all(b - a >= 0.5 for a, b in itertools.pairwise(times))


def test_cool_hot_tripped_lost(plant: Plant, pacer: HomeostasisPacer) -> None:
    plant.pass_time(pacer, 60)
    assert pacer.pace(1.0) < 0.05 and pacer.batch_limit is None
    plant.core_c = 76.5
    plant.pass_time(pacer, 30)
    assert pacer.pace(1.0) > 0.5
    plant.core_c = 90.0
    plant.pass_time(pacer, 5)
    assert pacer.batch_limit == 0 and pacer.retry_after_s > 0
    plant.core_c = 60.0
    plant.pass_time(pacer, 60)
    assert pacer.batch_limit != 0 and pacer.state.trips == 1
    plant.core_c = None
    plant.pass_time(pacer, 10)
    assert 0 < pacer.state.duty < 1, "never full speed in the dark"


def test_a_server_that_is_too_hot_says_so(session_server: Any, single: LLMEngine, plant: Plant, pacer: HomeostasisPacer) -> None:
    from vkllm.serve.app import ServerOptions, create_app
    from vkllm.serve.command import Address, Server
    from vkllm.serve.metrics import Metrics

    metrics, ask = Metrics(), {"model": "tiny", "prompt": "Hi", "max_tokens": 3}
    with BatchEngine(single, pacer=pacer) as batch:
        server = Server(create_app(batch, ServerOptions("tiny"), metrics), Address(port=0), stop_s=5.0)
        server.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as client:
            plant.pass_time(pacer, 30)
            assert client.post("/v1/completions", json=ask).status_code == 200
            assert client.get("/health").json()["status"] == "ready"
            plant.core_c = 95.0
            plant.pass_time(pacer, 5)
            refused, health = client.post("/v1/completions", json=ask), client.get("/health")
            assert (refused.status_code, health.status_code) == (503, 503)
            assert int(refused.headers["Retry-After"]) > 0 and int(health.headers["Retry-After"]) > 0
            assert health.json()["status"] == "tripped" and refused.json()["error"]["code"] == "overloaded"
            with pytest.raises(ThermalLimitError):
                batch.submit("Hi", SamplingParams())
            found = client.get("/v1/homeostasis").json()
            assert found["state"]["condition"] == "tripped" and found["history"][-1]["temperature_c"] == 95.0
            text = client.get("/metrics").text
            for line in (
                'vkllm_temperature_celsius{sensor="core"} 95.0',
                "vkllm_power_watts 42.0",
                "vkllm_thermal_trips_total 1.0",
            ):
                assert line in text
            last = found["history"][-2]["time_s"]
            assert len(client.get("/v1/homeostasis", params={"since": last}).json()["history"]) == 1
            assert client.get("/v1/homeostasis", params={"since": "noon"}).json()["error"]["param"] == "since"
            plant.core_c = 60.0
            plant.pass_time(pacer, 60)
            assert client.post("/v1/completions", json=ask).status_code == 200
        server.stop()
