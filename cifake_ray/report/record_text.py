"""Write a record as lines of text for a terminal, which no value in it can control."""

from __future__ import annotations

import math
import sys
from typing import Any


def clean_text(text: str) -> str:
    """Escape control characters, so that a file name cannot control the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def format_record(record: dict[str, Any]) -> str:
    """Format a record as `name  value` lines."""
    width = max(len(name) for name in record)
    return "\n".join(
        f"{name.ljust(width)}  "
        + clean_text(format_size(value) if name.endswith("_bytes") else _format_value(value))
        for name, value in record.items()
    )


def format_checks(found: dict[str, Any]) -> str:
    """Format what doctor found: a tick before each finding, a cross before each problem."""
    try:
        tick, cross = "\u2713", "\u2717"
        (tick + cross).encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        tick, cross = "ok", "!!"
    facts = {name.replace("_", " "): v for name, v in found.items() if name != "problems"}
    lines = [f"{tick} {line}" for line in format_record(facts).splitlines()]
    lines += [f"{cross} {clean_text(problem)}" for problem in found["problems"]]
    return "\n".join(lines)


def format_time(seconds: float) -> str:
    """Format seconds as `3:07` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_size(num_bytes: float) -> str:
    """Format bytes as `122.9 MB`."""
    if num_bytes < 1000:
        return f"{num_bytes:,} bytes"
    power = min(int(math.log10(num_bytes) // 3), 4)
    return f"{num_bytes / 1000**power:,.1f} {('', 'kB', 'MB', 'GB', 'TB')[power]}"


def _format_value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_format_value(v)}" for name, v in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_format_value, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:,.4f}".rstrip("0").rstrip(".")
    return f"{value:,}" if isinstance(value, int) else str(value)
