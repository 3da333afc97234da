"""Read what audit has stored of each image, and choose rows of a listing by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from cifake_ray.config import ConvertConfig
from cifake_ray.core.audit.duplicates import GROUP_COLUMNS, choose_duplicates
from cifake_ray.core.audit.match_classes import TRAIT_COLUMNS, choose_unmatched
from cifake_ray.core.schema import AUDIT_FIELDS
from cifake_ray.errors import StorageError, UsageError
from cifake_ray.storage.io.files import read_bytes, write_bytes
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.io.records import PARQUET_ERRORS, check_columns
from cifake_ray.storage.runs.run import Run, is_finished, require_run
from cifake_ray.storage.runs.shards import read_shard
from cifake_ray.storage.sources.source import NOT_AUDITED, Listing

DUPLICATES_NAME = "_duplicates.parquet"  # readers of Parquet folders skip such names
_DUPLICATES_FIELDS = [
    *(field for field in AUDIT_FIELDS if field.name in ("key", "label", "split", "source")),
    *(pa.field(name, pa.int64()) for name in GROUP_COLUMNS),
]
_LISTED = ("key", "label", "split")


def read_audit_rows(run: Run, columns: Sequence[str] | None = None) -> pa.Table:
    """Return columns of all rows of an audit, or all its columns."""
    tables = []
    for shard in range(run.manifest.num_shards):
        table = read_shard(run.shard_path(shard), AUDIT_FIELDS).replace_schema_metadata(None)
        tables.append(table if columns is None else table.select(columns))
    return pa.concat_tables(tables)


def write_duplicates(run: Run, duplicates: pa.Table) -> None:
    """Write the rows that have a duplicate, beside the rows of all images."""
    sink = pa.BufferOutputStream()
    pq.write_table(duplicates.cast(pa.schema(_DUPLICATES_FIELDS)), sink, compression="zstd")
    write_bytes(run.out / DUPLICATES_NAME, sink.getvalue().to_pybytes())


def _read_duplicates(out: AnyPath) -> pa.Table:
    path = out / DUPLICATES_NAME
    try:
        table = pq.read_table(pa.BufferReader(read_bytes(path)))
        check_columns(table.schema, _DUPLICATES_FIELDS)
    except PARQUET_ERRORS as error:
        raise StorageError(
            f"{path}: damaged ({error}); remove {out / '_SUCCESS'} and run the audit again"
        ) from error
    return table


def require_audit(out: AnyPath) -> Run:
    """Return the finished audit of a folder. UsageError when there is another run, or half one."""
    run = require_run(out)
    if run.command != "audit":
        raise UsageError(f"--audit {out}: it is the output of {run.command}; give that of audit")
    if not is_finished(run):
        raise UsageError(f"--audit {out}: it has not finished; run the same audit again")
    return run


class AuditedRows:
    """Leaves out of a listing what `--dedupe` and `--match` leave out, by reason.

    Memory holds the keys of the audit, while the listing is read.
    """

    def __init__(self, run: Run, config: ConvertConfig) -> None:
        self.run, self.config = run, config

    def choose(self, listing: Listing) -> None:
        listing.change_batches(lambda batches: self._keep_chosen(listing, batches))

    def _keep_chosen(
        self, listing: Listing, batches: Iterator[pa.RecordBatch]
    ) -> Iterator[pa.RecordBatch]:
        audited = self._judge_rows()
        for batch in batches:
            kept = []
            rows = zip(*(batch.column(name).to_pylist() for name in _LISTED), strict=True)
            for key, label, split in rows:
                if key not in audited:
                    reason: str | None = NOT_AUDITED
                else:
                    seen_label, seen_split, reason = audited[key]
                    self._check_row(key, (seen_label, seen_split), (label, split))
                kept.append(reason is None)
                if reason is not None:
                    listing.left_out[reason] += 1
            if any(kept):
                yield batch.filter(pa.array(kept))

    def _check_row(
        self, key: str, seen: tuple[object, object], listed: tuple[object, object]
    ) -> None:
        if seen != listed:
            raise UsageError(
                f"--audit {self.run.out}: {key!r} has another label or split there than here"
                f" ({seen[0]} and {seen[1]}, {listed[0]} and {listed[1]}); audit the same source"
                " with the same options"
            )

    def _judge_rows(self) -> dict[str, tuple[int | None, str | None, str | None]]:
        """Return label, split and the reason to leave it out, or None, of each key."""
        traits = self.config.match
        columns = [name for trait in traits for name in TRAIT_COLUMNS[trait]]
        rows = read_audit_rows(self.run, [*_LISTED, "error", *columns])
        reasons = dict[str, str]()
        if self.config.dedupe != "none":
            groups = f"{self.config.dedupe}_group"
            reasons |= choose_duplicates(_read_duplicates(self.run.out), groups)
        if traits:
            unmatched = list(choose_unmatched(rows, traits, reasons, self.config.seed))
            reasons |= dict.fromkeys(unmatched, f"not matched by {' and '.join(traits)}")
        shared = dict[tuple[int | None, str | None, str | None], tuple[object, ...]]()
        audited = {}
        for key, label, split in zip(*(rows.column(n).to_pylist() for n in _LISTED), strict=True):
            fact = (label, split, reasons.get(key))
            audited[key] = shared.setdefault(fact, fact)  # of millions, only a few differ
        return audited  # type: ignore[return-value]
