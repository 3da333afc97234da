"""Format shares and values with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def format_share(value: float | None) -> str:
    """Format a share in [0, 1] as percent with one digit; a dash for None."""
    return "-" if value is None else f"{value:.1%}"


def format_interval(interval: Mapping[str, Any], *, percent: bool = False) -> str:
    """Format as `93.1% (92.6-93.6)` or `0.989 (0.988-0.991)`; its reason or a dash if undefined."""
    value, low, high = interval["value"], interval["low"], interval["high"]
    if value is None:
        return str(interval.get("reason", "-"))
    scale, digits = (100, 1) if percent else (1, 3)
    text = f"{value * scale:.{digits}f}" + "%" * percent
    if low is None or high is None:
        return text
    return f"{text} ({low * scale:.{digits}f}-{high * scale:.{digits}f})"
