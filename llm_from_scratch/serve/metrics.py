"""What Prometheus is told: requests, texts, tokens, times, and how full the cache is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llm_from_scratch.serve.orders import Watch

if TYPE_CHECKING:
    from llm_from_scratch.generate.texts import Result
    from llm_from_scratch.serve.orders import Desk
    from llm_from_scratch.serve.service import Service

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SPEEDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


class Metrics(Watch):
    """A server's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "scratchlm_requests", "HTTP requests answered.", ["method", "route", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "scratchlm_request_seconds", "How long the answers took.", ["route"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.first = Histogram(
            "scratchlm_time_to_first_token_seconds", "From a request to its first text.",
            ["model"], buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.speed = Histogram(
            "scratchlm_text_tokens_per_second", "New tokens over the time of their text.",
            ["model"], buckets=SPEEDS, registry=self.registry,
        )  # fmt: skip
        self.ends = Counter(
            "scratchlm_texts", "Texts finished, by the reason of their end.",
            ["model", "finish_reason"], registry=self.registry,
        )  # fmt: skip

    def look_at(self, service: Service) -> None:
        """Show the service's counts, as they are when somebody asks."""
        self.registry.register(_Counts(service))

    def first_token(self, model: str, seconds: float) -> None:
        self.first.labels(model).observe(seconds)

    def text(self, model: str, result: Result) -> None:
        self.ends.labels(model, result.finish_reason).inc()
        if result.tokens:
            self.speed.labels(model).observe(result.tokens_per_second)

    def page(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)


class _Counts(Collector):
    """What the service and its worker count themselves."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Metric]:
        text = "HTTP requests that are being answered."
        yield GaugeMetricFamily("scratchlm_requests_in_flight", text, value=self.service.in_flight)
        gauges = {
            "running_texts": ("Texts that are being written.", lambda desk: desk.running),
            "waiting_texts": ("Texts that wait to be begun.", lambda desk: desk.waiting),
            "cache_pages": ("Pages of keys and values.", lambda desk: _pages(desk)[0]),
            "cache_pages_held": ("Pages that texts hold.", lambda desk: _pages(desk)[1]),
        }
        counters = {
            "steps": ("Passes of the model.", lambda desk: desk.steps),
            "prompt_tokens": ("Tokens of prompts.", lambda desk: desk.tokens_read),
            "new_tokens": ("Tokens written.", lambda desk: desk.tokens_written),
        }
        for kind, table in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in table.items():
                family = kind(f"scratchlm_{name}", text, labels=["model"])
                for desk in dict.fromkeys(self.service.worker.desks.values()):
                    if desk.served.kind == "writer":  # adapters are counted with their base
                        family.add_metric([desk.served.name], value(desk))
                yield family


def _pages(desk: Desk) -> tuple[int, int]:
    engine = desk.engine
    if engine is None:
        return 0, 0
    pages = engine.engine.pages
    return pages.count - 1, pages.held
