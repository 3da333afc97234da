"""Write and read result shards; the footer of each names its run."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cifake_ray.core.evaluation.policy import Policy, find_verdicts, set_verdicts
from cifake_ray.core.provenance.read_provenance import count_provenance
from cifake_ray.core.schema import (
    FOOTER_KEY,
    SCHEMA_VERSION,
    SCORE_FIELDS,
    THUMBNAIL_FIELD,
    datasets_metadata,
)
from cifake_ray.errors import StorageError
from cifake_ray.storage.io.files import make_folder, read_bytes, read_if_exists, write_bytes
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.io.records import PARQUET_ERRORS, check_columns, parse_record
from cifake_ray.storage.runs.run import Run, ShardStats
from cifake_ray.version import __version__

MAX_GROUP_BYTES = 512 * 2**20  # of images in a row group
DICTIONARY_COLUMNS = (
    *("label", "split", "source", "format", "mode", "error"),
    *("verdict", "threshold", "unsure_from", "bundle", "decided_by"),
)


def commit_shard(
    run: Run, shard: int, table: pa.Table, extra: dict[str, str], unlike_training: dict[str, int]
) -> ShardStats:
    """Write one result shard and return its counts and digest."""
    errors = Counter(error for error in table.column("error").to_pylist() if error)
    footer = {
        "schema_version": SCHEMA_VERSION,
        "tool_version": __version__,
        "fingerprint": run.fingerprint,
        "run": run.identify_shard(shard),
        "rows": table.num_rows,
        "errors": dict(sorted(errors.items())),
        "unlike_training": unlike_training,
        "called_fake": _count_fake(table, extra),
        "provenance": count_provenance(table),
        **extra,
    }
    data = encode_shard(table, footer)
    make_folder(run.results_folder, parents=False)
    # The names of all shards are forced to disk at once: see `force_names`.
    write_bytes(run.shard_path(shard), data, force_name=False)
    return _describe_shard(shard, parse_record(_Footer, footer), data)


def encode_shard(table: pa.Table, footer: dict[str, Any]) -> bytes:
    """Return the bytes of a result file with a footer of ours."""
    schema = table.schema.with_metadata(
        {FOOTER_KEY: json.dumps(footer).encode(), **datasets_metadata(table.schema)}
    )
    # Images are compressed already: zstd would waste time on them.
    packed = ("image.", THUMBNAIL_FIELD.name)
    compression = {
        path: "none" if path.startswith(packed) else "zstd" for path in _leaf_paths(schema)
    }
    dictionary = [name for name in DICTIONARY_COLUMNS if name in schema.names]
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        schema,
        compression=compression,
        use_dictionary=dictionary,
        write_page_checksum=True,
    ) as writer:
        for group in _split_groups(table.cast(schema)):
            writer.write_table(group, row_group_size=max(group.num_rows, 1))
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _count_fake(table: pa.Table, extra: dict[str, str]) -> dict[str, int]:
    """Count the images that each threshold of a bundle calls FAKE, and a policy."""
    verdicts = {
        name: find_verdicts(table, threshold, None)
        for name, threshold in json.loads(extra.get("thresholds", "{}")).items()
    }
    if "policy" in extra:
        verdicts["policy"] = table.column("is_fake")
    return {name: pc.sum(is_fake).as_py() or 0 for name, is_fake in verdicts.items()}


def _leaf_paths(schema: pa.Schema) -> list[str]:
    return [
        f"{field.name}.{child.name}" if pa.types.is_struct(field.type) else field.name
        for field in schema
        for child in (field.type if pa.types.is_struct(field.type) else [field])
    ]


def _split_groups(table: pa.Table) -> Iterator[pa.Table]:
    """Yield the row groups of a shard: one, or as many as keep the images of each in bounds.

    Arrow cannot read more than 2 GiB of images from one.
    """
    if "image" not in table.schema.names:
        yield table
        return
    sizes = pc.binary_length(pc.struct_field(table.column("image"), "bytes"))
    ends = np.cumsum(sizes.fill_null(0).to_numpy(), dtype=np.int64)
    starts = [0, *(np.flatnonzero(np.diff(ends // MAX_GROUP_BYTES)) + 1).tolist(), table.num_rows]
    for start, end in pairwise(starts):
        yield table.slice(start, end - start)


def _read_groups(shard: pq.ParquetFile) -> Iterator[pa.Table]:
    """Yield the row groups one by one: all at once may be more than Arrow can read."""
    yield from map(shard.read_row_group, range(shard.num_row_groups))


def open_shard(data: bytes) -> pq.ParquetFile:
    """Open the bytes of a shard. It is always read whole: one GET, and its bytes are hashed."""
    return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)


def read_shard(path: AnyPath, wanted: Iterable[pa.Field] = ()) -> pa.Table:
    """Read one result shard and verify its checksums.

    StorageError when it is damaged, or lacks one of the columns in `wanted`.
    """
    try:
        shard = open_shard(read_bytes(path))
        check_columns(shard.schema_arrow, wanted)
        return pa.concat_tables(_read_groups(shard))
    except PARQUET_ERRORS as error:
        raise StorageError(f"{path}: damaged ({error}); `cifake-ray repair` restores it") from error


def inspect_shard(run: Run, shard: int) -> ShardStats | None:
    """Return what `commit_shard` returned for a shard of this run, None when it must be made.

    The whole shard is read, page checksums included, so a damaged one is made again.
    """
    if (data := read_if_exists(run.shard_path(shard))) is None:
        return None
    try:
        part = open_shard(data)
        footer = _read_footer(part)
        if footer.run != run.identify_shard(shard):
            return None
        num_rows = sum(group.num_rows for group in _read_groups(part))
        return _describe_shard(shard, footer, data) if num_rows == footer.rows else None
    except PARQUET_ERRORS:
        return None


def decide_shard(
    run: Run, shard: int, threshold: float, policy: Policy | None = None
) -> ShardStats | None:
    """Return what `inspect_shard` does; a shard with other verdicts of the same scores is changed.

    Only `is_fake` and the footer change.
    """
    stats = inspect_shard(run, shard)
    if stats is not None or (data := read_if_exists(run.shard_path(shard))) is None:
        return stats
    try:
        part = open_shard(data)
        footer = _read_footer(part)
        if footer.run not in run.earlier_identities or footer.rows != part.metadata.num_rows:
            return None
        check_columns(part.schema_arrow, SCORE_FIELDS)
        table = part.read()
        found = {name: getattr(footer, name) for name in ("bundle", "preprocessing", "thresholds")}
        extra = {name: value for name, value in found.items() if value is not None}
        parse_record(_Thresholds, {"values": json.loads(extra.get("thresholds", "{}"))})
        table = set_verdicts(table, threshold, policy)
    except PARQUET_ERRORS:
        return None
    extra |= describe_threshold(threshold, policy)
    return commit_shard(run, shard, table, extra, footer.unlike_training)


def describe_threshold(threshold: float, policy: Policy | None) -> dict[str, str]:
    """Return what the footer of a shard says of the meaning of `is_fake`."""
    return {"threshold": str(threshold)} if policy is None else {"policy": policy.id}


@dataclass(frozen=True)
class _Footer:
    """What the footer of a shard says; `commit_shard` writes it."""

    run: str
    rows: int
    errors: dict[str, int]
    unlike_training: dict[str, int]
    called_fake: dict[str, int] = field(default_factory=dict)
    provenance: dict[str, int] = field(default_factory=dict)
    bundle: str | None = None
    preprocessing: str | None = None
    thresholds: str | None = None


@dataclass(frozen=True)
class _Thresholds:
    values: dict[str, float]


def _read_footer(part: pq.ParquetFile) -> _Footer:
    """Return what the footer says. ValueError for that of another file."""
    data = (part.schema_arrow.metadata or {}).get(FOOTER_KEY, b"{}")
    return parse_record(_Footer, json.loads(data))


def _describe_shard(shard: int, footer: _Footer, data: bytes) -> ShardStats:
    return ShardStats(
        shard=shard,
        rows=footer.rows,
        errors=footer.errors,
        unlike_training=footer.unlike_training,
        called_fake=footer.called_fake,
        provenance=footer.provenance,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
