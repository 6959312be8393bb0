"""/metrics: what the engine counts, in Prometheus' text format."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from quire.outputs import Metric

if TYPE_CHECKING:
    from quire.engine.async_engine import AsyncEngine

OWN_PREFIX = "quire:"


class EngineCollector(Collector):
    """Asks the engine at each scrape; keeps nothing."""

    def __init__(self, engine: "AsyncEngine", model_name: str, prefix: str) -> None:
        self._engine = engine
        self._model_name = model_name
        self._prefix = prefix

    def describe(self) -> Iterable[Family]:
        """Nothing in advance: registering must not scrape."""
        return []

    def collect(self) -> Iterable[Family]:
        """One family for each name, labelled with the model's name and, as vLLM does, the engine's number."""
        families: dict[str, Family] = {}
        for metric in self._engine.get_metrics():
            name = f"{self._prefix}:{metric.name.removeprefix(OWN_PREFIX)}"
            labels = {"model_name": self._model_name, "engine": "0", **dict(metric.labels)}
            family = families.get(name)
            if family is None:
                family = families[name] = _KINDS[metric.kind](name, metric.help, labels=list(labels))
            _add(family, list(labels.values()), metric)
        return families.values()


_KINDS: dict[str, type[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


def _add(family: Family, labels: list[str], metric: Metric) -> None:
    if isinstance(family, HistogramMetricFamily):
        buckets = [(f"{bound:g}", float(count)) for bound, count in metric.buckets]
        family.add_metric(labels, [*buckets, ("+Inf", metric.value)], metric.total)
    elif isinstance(family, CounterMetricFamily | GaugeMetricFamily):
        family.add_metric(labels, metric.value)


def make_registry(engine: "AsyncEngine", model_name: str, prefix: str) -> CollectorRegistry:
    """A registry of its own for one server; nothing is global."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(EngineCollector(engine, model_name, prefix))
    return registry
