"""Figures of a running build for Prometheus, exported by Ray on every node's metrics port."""

from typing import Any, Final

PREFIX: Final = "genrecal_build_"


class BuildMetrics:
    """Counters and gauges; named after the build's cache by their tag ``cache``."""

    def __init__(self, *, uri: str) -> None:
        """Register the metrics with the Ray that this process is connected to."""
        from ray.util.metrics import Counter, Gauge, Histogram

        tags: dict[str, Any] = {"tag_keys": ("cache",)}
        self._samples = Counter(f"{PREFIX}samples", description="Samples computed or skipped.", **tags)
        self._tokens = Counter(f"{PREFIX}tokens", description="Teacher tokens computed.", **tags)
        self._skipped = Counter(f"{PREFIX}skipped_samples", description="Bad samples left out.", **tags)
        self._failures = Counter(f"{PREFIX}failed_attempts", description="Attempts at shards that failed.", **tags)
        self._missing = Gauge(f"{PREFIX}missing_shards", description="Shards that are not committed.", **tags)
        self._running = Gauge(f"{PREFIX}running_replicas", description="Replicas at work on a shard.", **tags)
        seconds: list[float] = [10, 30, 60, 120, 300, 600, 1800, 3600]
        self._seconds = Histogram(
            f"{PREFIX}shard_seconds", description="Time to build a shard.", boundaries=seconds, **tags
        )
        for metric in (self._samples, self._tokens, self._skipped, self._failures, self._missing, self._running):
            metric.set_default_tags({"cache": uri})
        self._seconds.set_default_tags({"cache": uri})

    def advanced(self, *, samples: int, tokens: int) -> None:
        """Count computed samples."""
        _add(self._samples, samples)
        _add(self._tokens, tokens)

    def committed(self, *, seconds: float, skipped: int) -> None:
        """Count a committed shard."""
        self._seconds.observe(seconds)
        _add(self._skipped, skipped)

    def failed(self) -> None:
        """Count a failed attempt."""
        self._failures.inc()

    def state(self, *, missing_shards: int, running_replicas: int) -> None:
        """Tell how the build stands."""
        self._missing.set(missing_shards)
        self._running.set(running_replicas)


def _add(counter: Any, amount: int) -> None:
    if amount > 0:  # a counter refuses 0
        counter.inc(amount)
