"""What a server counts, as Prometheus reads it: requests, latency and batches by size, the queue, versions."""

from __future__ import annotations

from typing import Final, final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from matta.serving.batching import Ran

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@final
class ServingMetrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._requests = Counter("matta_requests", "Requests to infer", ("size", "status"), registry=registry)
        self._seconds = Histogram(
            "matta_request_seconds",
            "From a request's arrival to its answer",
            ("size",),
            buckets=SECONDS,
            registry=registry,
        )
        self._batch_seconds = Histogram(
            "matta_batch_seconds", "Computing a batch", ("size",), buckets=SECONDS, registry=registry
        )
        self._batch_rows = Histogram("matta_batch_rows", "Rows of a batch", ("size",), buckets=ROWS, registry=registry)
        self._queue = Gauge("matta_queue_rows", "Rows that wait", registry=registry)
        self._version = Gauge("matta_model_version", "The version that is served", registry=registry)
        self._swapped = Counter("matta_versions_swapped", "Versions swapped in", registry=registry)
        self._refused = Counter("matta_versions_refused", "Versions that were broken", registry=registry)

    def answered(self, size: str, status: int, seconds: float) -> None:
        """Count a request; the size is "" where none answered."""
        self._requests.labels(size, str(status)).inc()
        if status == 200:
            self._seconds.labels(size).observe(seconds)

    def ran(self, batch: Ran) -> None:
        """Count a batch."""
        self._batch_seconds.labels(batch.size).observe(batch.seconds)
        self._batch_rows.labels(batch.size).observe(batch.rows)

    def swapped(self, version: str) -> None:
        """Count a version that is served now."""
        self._swapped.inc()
        self.serves(version)

    def serves(self, version: str) -> None:
        """Note which version is served."""
        self._version.set(float(version))

    def refused(self) -> None:
        """Count a version that was not taken."""
        self._refused.inc()

    def text(self, queue_rows: int) -> bytes:
        """All of them in Prometheus' text format."""
        self._queue.set(queue_rows)
        return generate_latest(self.registry)
