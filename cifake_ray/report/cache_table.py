"""Show the entries of the cache of decoded images."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from cifake_ray.report.models_table import align_table


def format_cache(found: Mapping[str, Any]) -> str:
    """Return a table of the entries, and their total; `found` as `cifake-ray cache --json`."""
    entries, folder = found["entries"], found["folder"]
    total = sum(entry["size_bytes"] for entry in entries) / 1e9
    verb = "removed from" if found["removed"] else "in"
    line = f"{len(entries)} entries, {total:.2f} GB, {verb} {folder}"
    if not entries:
        return line
    rows = [
        [
            f"{entry['size_bytes'] / 1e9:.2f}",
            f"{datetime.fromtimestamp(entry['last_used'], UTC):%Y-%m-%d %H:%M}",
            _keep_printable(entry["about"] or entry["path"].rpartition("/")[2]),
            "" if entry["is_ours"] else "another user's",
        ]
        for entry in entries
    ]
    return align_table(["GB", "last used (UTC)", "images", ""], rows, "><<<") + "\n" + line


def _keep_printable(text: str) -> str:
    """Leave out what could control a terminal: another user may have written it."""
    return "".join(character for character in text if character.isprintable())
