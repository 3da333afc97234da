"""Metrics of the workers, which Prometheus reads from Ray's metrics agents.

Ray adds the prefix `ray_` to all names and the suffix `_total` to those of counters.
"""

from __future__ import annotations

import pyarrow as pa
from ray.util.metrics import Counter, Histogram

SHARD_SECONDS = [0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]  # bounds of the buckets
DONE = "done"  # an outcome besides the errors of `core.schema.IMAGE_ERRORS`


class WorkMetrics:
    """Metrics of one worker of convert, score, evaluate or audit."""

    def __init__(self, verb: str) -> None:
        self.verb = {"verb": verb}
        self.images = Counter("cifake_images", "Images worked on", ("verb", "outcome"))
        self.size_bytes = Counter("cifake_image_bytes", "Encoded bytes of them", ("verb",))
        self.shard_s = Histogram(
            "cifake_shard_seconds", "From a shard's begin to its commit", SHARD_SECONDS, ("verb",)
        )

    def count_images(self, result: pa.Table, size_bytes: int) -> None:
        """Count images by outcome, and the bytes that they have together."""
        for outcome in result.column("error").value_counts().to_pylist():
            tags = {**self.verb, "outcome": outcome["values"] or DONE}
            self.images.inc(outcome["counts"], tags)
        if size_bytes:
            self.size_bytes.inc(size_bytes, self.verb)

    def time_shard(self, elapsed_s: float) -> None:
        """Record how long a committed shard took."""
        self.shard_s.observe(elapsed_s, self.verb)
