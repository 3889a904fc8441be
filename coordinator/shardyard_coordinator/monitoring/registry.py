"""The metrics of this process, for Prometheus: what was counted, and what was looked up last."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from shardyard_coordinator.monitoring.families import OBSERVED, SAMPLED, Family, Kind

Samples = Mapping[Family, Sequence[tuple[tuple[str, ...], float]]]
"""(label values, value) pairs of each family that was looked up."""


class Metrics:
    """The metrics of one process. `add` and `observe` may be called from any thread."""

    def __init__(self, sampled: Callable[[], Samples]) -> None:
        """`sampled` answers at once with what was looked up last."""
        # A second series for each counter, with the time when it was made, is of no use here.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry(auto_describe=False)
        self._made: dict[Family, Counter | Gauge | Histogram] = {family: self._make(family) for family in OBSERVED}
        self._children: dict[tuple[Family, tuple[str, ...]], Counter | Gauge | Histogram] = {}
        self._registry.register(_Sampled(sampled))
        ProcessCollector(registry=self._registry)

    def begin(self, family: Family, *labels: str) -> None:
        """Makes a series of a counter, with 0: from a series that begins with 1, the first increase cannot be seen."""
        self._child(family, labels)

    def add(self, family: Family, amount: float, *labels: str) -> None:
        """Adds to a counter or a gauge."""
        child = self._child(family, labels)
        assert isinstance(child, Counter | Gauge)
        child.inc(amount)

    def observe(self, family: Family, value: float, *labels: str) -> None:
        """Adds one observation to a histogram."""
        child = self._child(family, labels)
        assert isinstance(child, Histogram)
        child.observe(value)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format. Takes milliseconds: call it in a thread."""
        return generate_latest(self._registry)

    def _child(self, family: Family, labels: tuple[str, ...]) -> Counter | Gauge | Histogram:
        """The series of these labels; kept, because looking it up takes longer than adding to it."""
        key = family, labels
        child = self._children.get(key)
        if child is None:
            made = self._made[family]
            child = self._children[key] = made.labels(*labels) if labels else made
        return child

    def _make(self, family: Family) -> Counter | Gauge | Histogram:
        if family.kind is Kind.HISTOGRAM:
            return Histogram(
                family.name, family.meaning, family.labels, registry=self._registry, buckets=family.buckets
            )
        kind = Counter if family.kind is Kind.COUNTER else Gauge
        return kind(family.name, family.meaning, family.labels, registry=self._registry)


class _Sampled(Collector):
    """Hands what was looked up to the registry."""

    def __init__(self, sampled: Callable[[], Samples]) -> None:
        self._sampled = sampled

    def collect(self) -> Iterable[Metric]:
        """The families that have samples now; a family without any is left out, as Prometheus expects."""
        samples = self._sampled()
        for family in SAMPLED:
            if not (found := samples.get(family)):
                continue
            make = CounterMetricFamily if family.kind is Kind.COUNTER else GaugeMetricFamily
            metric = make(family.name, family.meaning, labels=family.labels)
            for labels, value in found:
                metric.add_metric(labels, value)
            yield metric
