"""Write and read result shards; the footer of each names its run and seals what is before it.

A footer holds the size and the sha256 of all bytes before it, so the digest of a shard is that of
its footer alone: a few kilobytes tell whether a shard is there and which one it is.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
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
    SEAL_KEY,
    THUMBNAIL_FIELD,
    datasets_metadata,
)
from cifake_ray.errors import StorageError
from cifake_ray.storage.io.digest import hash_file, read_end
from cifake_ray.storage.io.files import make_folder, read_bytes, read_if_exists, write_bytes
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.io.records import PARQUET_ERRORS, check_columns, parse_record
from cifake_ray.storage.runs.run import Run, ShardStats
from cifake_ray.version import __version__

MAX_GROUP_BYTES = 512 * 2**20  # of images in a row group
END_BYTES = 2**16  # read of a shard at first; a footer of many row groups may be longer
LENGTH_BYTES = 8  # behind a footer: its length, and "PAR1"
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
    end = data[-_measure_footer(data) :]
    return _describe_shard(shard, _read_footer(end), len(data), _hash_bytes(end))


def encode_shard(table: pa.Table, footer: dict[str, Any]) -> bytes:
    """Return the bytes of a result file with a footer of ours, which seals what is before it."""
    schema = table.schema.with_metadata(
        {FOOTER_KEY: json.dumps(footer).encode(), **datasets_metadata(table.schema)}
    )
    # Images are compressed already: zstd would waste time on them.
    packed = ("image.", THUMBNAIL_FIELD.name)
    compression = {
        path: "none" if path.startswith(packed) else "zstd" for path in _leaf_paths(schema)
    }
    dictionary = [name for name in DICTIONARY_COLUMNS if name in schema.names]
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        schema,
        compression=compression,
        use_dictionary=dictionary,
        write_page_checksum=True,
    ) as writer:
        for group in _split_groups(table.cast(schema)):
            writer.write_table(group, row_group_size=max(group.num_rows, 1))
        seal = {"bytes_before": sink.tell(), "sha256_before": _hash_bytes(sink.getbuffer())}
        writer.add_key_value_metadata({SEAL_KEY: json.dumps(seal).encode()})
    return sink.getvalue()


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

    The size and the footer are read: what has changed before it is for `verify` to find. Only a
    shard of an earlier version, which has no seal, is read whole, page checksums included.
    """
    try:
        if (found := _read_end(run.shard_path(shard))) is None:
            return None
        size_bytes, end = found
        footer = _read_footer(end)
        if footer.run != run.identify_shard(shard):
            return None
        if footer.sha256_before is None:
            return _inspect_whole(run, shard)
        if size_bytes != footer.bytes_before + len(end):
            return None
    except PARQUET_ERRORS:
        return None
    return _describe_shard(shard, footer, size_bytes, _hash_bytes(end))


def _read_end(path: AnyPath) -> tuple[int, bytes] | None:
    """Return the size of a shard and the bytes from its footer on; None when there is none."""
    found = read_end(path, END_BYTES)
    if found is not None and _measure_footer(found[1]) > len(found[1]):
        found = read_end(path, _measure_footer(found[1]))
    return found and (found[0], found[1][-_measure_footer(found[1]) :])


def _inspect_whole(run: Run, shard: int) -> ShardStats | None:
    """Do what `inspect_shard` does for a shard whose footer has no seal."""
    if (data := read_if_exists(run.shard_path(shard))) is None:
        return None
    part = open_shard(data)
    footer = _read_footer(data)
    num_rows = sum(group.num_rows for group in _read_groups(part))
    if num_rows != footer.rows:
        return None
    return _describe_shard(shard, footer, len(data), _hash_bytes(data))


def hash_shard(path: AnyPath, size_bytes: int | None = None) -> str:
    """Read a shard whole, in parts, and return its digest. StorageError when it cannot be read.

    It is the sha256 of the footer if that has the sha256 of what is before it, else of all bytes.
    """
    with suppress(*PARQUET_ERRORS):
        if (found := _read_end(path)) is not None:
            footer, before = _read_footer(found[1]), found[0] - len(found[1])
            if before == footer.bytes_before and hash_file(path, before) == footer.sha256_before:
                return _hash_bytes(found[1])
    return hash_file(path, size_bytes)


def breaks_seal(path: AnyPath) -> bool:
    """Return whether the bytes before a shard's footer are not those that the footer seals."""
    with suppress(*PARQUET_ERRORS):
        found = _read_end(path)
        if found is not None and _read_footer(found[1]).sha256_before is not None:
            return hash_shard(path) != _hash_bytes(found[1])
    return False  # `inspect_shard` sees all that there is to see


def _hash_bytes(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _measure_footer(end: bytes | memoryview) -> int:
    """Return the bytes of a Parquet footer with its length, which the last bytes of a file have."""
    return int.from_bytes(end[-LENGTH_BYTES:-4], "little") + LENGTH_BYTES


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
        footer = _read_footer(data)
        if footer.run not in run.earlier_identities:
            return None
        check_columns(part.schema_arrow, SCORE_FIELDS)
        table = part.read()
        kept = ("bundle", "preprocessing", "precision", "thresholds")
        found = {name: getattr(footer, name) for name in kept}
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
    precision: str | None = None
    thresholds: str | None = None
    bytes_before: int = 0  # the footer
    sha256_before: str | None = None  # of these bytes; None in shards of earlier versions


@dataclass(frozen=True)
class _Thresholds:
    values: dict[str, float]


def _read_footer(end: bytes | memoryview) -> _Footer:
    """Return what the footer of a file says, of its last bytes. ValueError for another file's."""
    metadata = pq.read_metadata(pa.BufferReader(end))
    words = metadata.metadata or {}
    facts, seal = (json.loads(words.get(key, b"{}")) for key in (FOOTER_KEY, SEAL_KEY))
    if not (isinstance(facts, dict) and isinstance(seal, dict)):
        raise ValueError("its footer is not one of ours")
    footer = parse_record(_Footer, {**facts, **seal})
    if metadata.num_rows != footer.rows:
        raise ValueError(f"{metadata.num_rows} rows, not {footer.rows}")
    return footer


def _describe_shard(shard: int, footer: _Footer, size_bytes: int, sha256: str) -> ShardStats:
    return ShardStats(
        shard=shard,
        rows=footer.rows,
        errors=footer.errors,
        unlike_training=footer.unlike_training,
        called_fake=footer.called_fake,
        provenance=footer.provenance,
        size_bytes=size_bytes,
        sha256=sha256,
    )
