"""Encode rows as text: CSV, and a line of JSON each."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def encode_csv(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return the rows as CSV with a header; a value that a row lacks is empty."""
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue().encode()


def encode_json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return a line of JSON for each row."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
