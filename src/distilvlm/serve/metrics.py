"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .interface import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters of one server, and the numbers of its engines as they are when somebody looks.

    Args:
        engines: name of a base → its engine.
    """

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Numbers(engines))
        by_model = {"labelnames": ("model",), "registry": self._registry}
        self._responses = Counter(
            "distilvlm_http_responses", "Responses by path and status", ("path", "status"), registry=self._registry
        )
        self._answers = Counter(
            "distilvlm_answers", "Answers by how they ended", ("model", "finish"), registry=self._registry
        )
        self._prompt = Counter("distilvlm_prompt_tokens", "Positions read", **by_model)
        self._completion = Counter("distilvlm_completion_tokens", "Tokens chosen", **by_model)
        self._first = Histogram(
            "distilvlm_time_to_first_token_seconds", "From submission, the queue included", buckets=SECONDS, **by_model
        )
        self._between = Histogram(
            "distilvlm_inter_token_seconds", "Between two tokens of an answer", buckets=SECONDS, **by_model
        )
        self._whole = Histogram("distilvlm_answer_seconds", "From submission to the end", buckets=SECONDS, **by_model)

    def response(self, path: str, status: int) -> None:
        """A response began. `path`: a route's pattern, of which there are few."""
        self._responses.labels(path, status).inc()

    def first_token(self, model: str, seconds: float) -> None:
        self._first.labels(model).observe(seconds)

    def between(self, model: str, tokens: int, seconds: float) -> None:
        """`tokens` came together, `seconds` after what came before them."""
        for _ in range(tokens):
            self._between.labels(model).observe(seconds / tokens)

    def ended(self, model: str, finish: str, prompt: int, completion: int, seconds: float) -> None:
        """An answer is over. `finish`: stop, length, cancelled or failed."""
        self._answers.labels(model, finish).inc()
        self._prompt.labels(model).inc(prompt)
        self._completion.labels(model).inc(completion)
        self._whole.labels(model).observe(seconds)

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        return generate_latest(self._registry)


class _Numbers(Collector):
    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.engines = engines

    def collect(self) -> Iterable[Metric]:
        found: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for base, engine in self.engines.items():
            for name, value in engine.numbers().items():
                full = f"distilvlm_engine_{name}"
                kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
                family = found.setdefault(full, kind(full, "As the engine tells it", labels=["base"]))
                family.add_metric([base], value)
        return found.values()

    def describe(self) -> Iterable[Metric]:
        return ()  # the engines are not asked before somebody looks
