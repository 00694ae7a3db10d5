"""The page at `/metrics`, in the text format of Prometheus; docs/serving.md describes the metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_search.retrieval.server.service import SearchService

PATHS = ("/retrieve", "/health", "/ready", "/metrics")
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class ServerMetrics:
    """The metrics of one server, in a separate registry because a process may have several servers."""

    def __init__(self, service: SearchService) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector

        self._registry = CollectorRegistry()
        self._requests = Counter(
            "trl_search_requests", "Requests answered.", ["path", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "trl_search_request_seconds",
            "Seconds a request took.",
            ["path"],
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._registry.register(_ServiceCollector(service))
        ProcessCollector(registry=self._registry)

    def count(self, path: str, status: int, seconds: float) -> None:
        path = path if path in PATHS else "other"  # else every path that a scanner tries would become a label
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self._registry)


class _ServiceCollector:
    """Reads the existing counters of the service."""

    def __init__(self, service: SearchService) -> None:
        self._service = service

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        service, stats = self._service, self._service.stats
        counters = {
            "queries": ("Queries searched, after the cache.", stats.queries),
            "query_failures": ("Queries whose search failed.", stats.failures),
            "queries_refused": ("Queries refused because the queue was full.", service.refused),
            "batches": ("Calls of the retriever.", stats.batches),
            "search_seconds": ("Seconds in the retriever.", stats.seconds),
            "cache_hits": ("Queries found in the cache.", service.cache.hits),
            "cache_misses": ("Queries not found in the cache.", service.cache.misses),
        }
        gauges = {
            "queued_queries": ("Queries waiting or being searched.", service.queued),
            "cache_entries": ("Results in the cache.", len(service.cache)),
            "cache_bytes": ("Bytes of the cache.", service.cache.size_bytes),
            "ready": ("1 when the index is loaded.", int(service.ready)),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"trl_search_{name}", text, value=value)
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"trl_search_{name}", text, value=value)


def join_replicas(texts: Mapping[str, bytes]) -> bytes:
    """Joins the metrics of several processes on one page, with the label `replica`."""
    from prometheus_client import CollectorRegistry, Metric, generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    families: dict[str, Metric] = {}
    for replica, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text.decode()):
            joined = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            joined.samples += [one._replace(labels={**one.labels, "replica": replica}) for one in family.samples]

    class Joined:
        def collect(self) -> Iterable[Metric]:
            return families.values()

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Joined())
    return generate_latest(registry)
