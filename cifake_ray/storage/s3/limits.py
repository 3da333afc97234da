"""Limit the concurrency, the retries and the time of requests to S3."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class S3Limits:
    """Concurrency, retries and timeouts of requests; the defaults suit AWS."""

    max_in_flight: int = 64  # requests of one process at once
    max_ahead_bytes: int = 256 * 2**20  # fetched or being fetched before the consumer asks
    max_attempts: int = 8
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 30.0  # without a byte
    deadline_s: float = 180.0  # one request with all its attempts
    first_pause_s: float = 0.2  # doubled with each attempt; any part of it is waited
    max_pause_s: float = 20.0


DEFAULT_LIMITS = S3Limits()
