"""Prometheus metrics: the batch engine's totals, read when they are asked for, and two histograms of waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from vkllm.serve.pacing import Metric as Figure
from vkllm.serve.pacing import Watched

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

Extra = Callable[[], Iterable[Figure]]
"""More metrics, of the homeostasis controller for example. Those of one name come one after another, with the same labels."""


class Metrics:
    """One server's metrics. `observe` goes to the batch engine, `watch` takes the engine, `text` is what /metrics says."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._waits = {
            "ttft": Histogram("vkllm_time_to_first_token_seconds", "From submission", buckets=SECONDS, registry=self._registry),
            "gap": Histogram("vkllm_time_between_tokens_seconds", "Of one stream", buckets=SECONDS, registry=self._registry),
        }
        self._replies = Counter("vkllm_http_replies", "By path and status", ["path", "status"], registry=self._registry)

    def observe(self, kind: str, seconds: float) -> None:
        """A wait that has ended: "ttft" or "gap"."""
        self._waits[kind].observe(seconds)

    def replied(self, path: str, status: int) -> None:
        """An HTTP request was answered."""
        self._replies.labels(path, str(status)).inc()

    def watch(self, batch: Watched, extra: Extra | None = None) -> None:
        """Report on this engine from now on."""
        self._registry.register(_Collector(batch, extra))

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class _Collector:
    def __init__(self, batch: Watched, extra: Extra | None) -> None:
        self._batch, self._extra = batch, extra

    def collect(self) -> Iterable[Metric]:
        s, batch = self._batch.stats, self._batch
        gauges: list[tuple[str, str, float]] = [
            ("requests_waiting", "Requests in the queue", s.n_waiting),
            ("requests_running", "Requests that have cache blocks", s.n_running),
            ("kv_blocks_used", "Cache blocks that a request owns", s.n_block_used),
            ("kv_blocks", "Cache blocks", batch.pool.n_block),
            ("kv_block_tokens", "Tokens in a block", batch.pool.block_size),
        ]
        totals: list[tuple[str, str, float]] = [
            ("prompt_tokens", "Prompt tokens taken", s.prompt_tokens),
            ("prefix_hit_tokens", "Prompt tokens found in the cache", s.cached_tokens),
            ("completion_tokens", "Tokens generated", s.completion_tokens),
            ("drafted_tokens", "Tokens that speculation tried", s.drafted_tokens),
            ("accepted_tokens", "Of those, right ones: steps saved", s.accepted_tokens),
            ("preemptions", "Sequences that gave their blocks back", s.n_preempted),
            ("device_losses", "Times that the device was lost and opened again", s.n_revived),
            ("steps", "Steps of the device", s.steps),
            ("rows", "Tokens computed", s.rows),
            ("busy_seconds", "Time in steps", s.busy_s),
            ("rest_seconds", "Time that pacing kept the device idle", s.rest_s),
        ]
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"vkllm_{name}", text, value=value)
        for name, text, value in totals:
            yield CounterMetricFamily(f"vkllm_{name}", text, value=value)
        ended = CounterMetricFamily("vkllm_requests", "Requests that ended", labels=["reason"])
        for reason, n in list(s.requests.items()):
            ended.add_metric([reason], n)
        yield ended
        if self._extra:
            yield from families(self._extra())


def families(figures: Iterable[Figure]) -> Iterable[Metric]:
    """One family for all figures of a name."""
    for (kind, name, text), group in groupby(figures, key=lambda f: (f.kind, f.name, f.help)):
        found = list(group)
        family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
        metric = family(f"vkllm_{name}", text, labels=list(found[0].labels))
        for figure in found:
            metric.add_metric(list(figure.labels.values()), figure.value)
        yield metric
