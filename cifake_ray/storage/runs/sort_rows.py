"""Sort rows on disk, so that memory does not grow with their number."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.errors import UsageError
from cifake_ray.storage.io.paths import explain_errors

RUN_ROWS = 2**18  # that are in memory at once; a run is what was sorted together
RUN_BYTES = 2**28
BATCH_ROWS = 2**10  # of a run on disk
OUTPUT_ROWS = 2**14

SortKeys = Sequence[tuple[str, str]]  # a column, and ascending or descending


def sort_rows(
    tables: Iterable[pa.Table], keys: SortKeys, top: int | None = None, by: str | None = None
) -> Iterator[pa.Table]:
    """Yield the rows in order, equal ones by `key`; nulls come last.

    With `top` only so many, with `by` so many of each value of that column. All tables have the
    same columns. UsageError for a column that has no order.
    """
    keys = [*keys, ("key", "ascending")]
    runs: list[Iterator[pa.Table]] = []
    waiting: list[pa.Table] = []
    num_rows = num_bytes = 0
    with ExitStack() as stack:
        for table in tables:
            waiting.append(table)
            num_rows, num_bytes = num_rows + table.num_rows, num_bytes + table.nbytes
            if num_rows >= RUN_ROWS or num_bytes >= RUN_BYTES:
                rows = _cut(_sort(pa.concat_tables(waiting), keys), top, by, Counter())
                if rows.num_rows > RUN_ROWS // 2 or rows.nbytes > RUN_BYTES // 2:
                    runs.append(_read_run(stack.enter_context(_spill(rows))))
                    waiting = []
                else:
                    waiting = [rows]
                num_rows = sum(rows.num_rows for rows in waiting)
                num_bytes = sum(rows.nbytes for rows in waiting)
        if waiting:
            last = _cut(_sort(pa.concat_tables(waiting), keys), top, by, Counter())
            runs.append(iter([last]))
        seen: Counter[Any] = Counter()
        for rows in _merge(runs, keys):
            rows = _cut(rows, top, by, seen)
            for start in range(0, max(rows.num_rows, 1), OUTPUT_ROWS):  # none have columns too
                yield rows.slice(start, OUTPUT_ROWS)
            if by is None and top is not None and seen[None] >= top:
                return


def _sort(rows: pa.Table, keys: SortKeys) -> pa.Table:
    return rows.take(_find_order(rows, keys))


def _find_order(rows: pa.Table, keys: SortKeys) -> pa.Array:
    try:
        return pc.sort_indices(rows, sort_keys=list(keys))  # it is stable
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        names = ", ".join(f"{name} ({rows.schema.field(name).type})" for name, _ in keys[:-1])
        raise UsageError(f"--sort {names}: this type of column has no order ({error})") from error


def _cut(rows: pa.Table, top: int | None, by: str | None, seen: Counter[Any]) -> pa.Table:
    """Return the first `top` rows, of each value of `by`; count them in `seen`, which counts."""
    if top is None:
        return rows
    if by is None:
        kept = rows.slice(0, max(top - seen[None], 0))
        seen[None] += kept.num_rows
        # A slice would keep all that it was cut from in memory.
        return kept if kept.num_rows == rows.num_rows else kept.take(np.arange(kept.num_rows))
    encoded = rows.column(by).combine_chunks()
    if not pa.types.is_dictionary(encoded.type):
        encoded = encoded.dictionary_encode(null_encoding="encode")
    values = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    counts = np.bincount(codes, minlength=len(values))
    rank = np.empty(len(codes), np.int64)
    rank[order] = np.arange(len(codes)) - np.repeat(np.cumsum(counts) - counts, counts)
    before = np.array([seen[value] for value in values], np.int64)
    is_kept = rank + before[codes] < top if len(codes) else np.zeros(0, bool)
    seen.update(dict(zip(values, np.bincount(codes[is_kept], minlength=len(values)), strict=True)))
    return rows.filter(pa.array(is_kept))


def _spill(rows: pa.Table) -> IO[bytes]:
    """Write sorted rows to an unnamed temporary file, from its start."""
    with explain_errors(Path(tempfile.gettempdir())):
        file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
        with pa.ipc.new_stream(file, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=BATCH_ROWS)
        file.seek(0)
        return file


def _read_run(file: IO[bytes]) -> Iterator[pa.Table]:
    for batch in pa.ipc.open_stream(file):
        yield pa.Table.from_batches([batch])


def _merge(runs: Sequence[Iterator[pa.Table]], keys: SortKeys) -> Iterator[pa.Table]:
    """Yield the rows of sorted runs in order; of each run some batches are in memory."""
    waiting = [next(run) for run in runs]
    is_open = [True] * len(runs)
    while any(is_open) or any(rows.num_rows for rows in waiting):
        for number, run in enumerate(runs):
            while is_open[number] and waiting[number].num_rows < BATCH_ROWS:
                block = next(run, None)
                if block is None:
                    is_open[number] = False
                else:
                    waiting[number] = pa.concat_tables([waiting[number], block])
        counts = [rows.num_rows for rows in waiting]
        rows = pa.concat_tables(waiting)
        order = _find_order(rows, keys)
        # What comes behind the last row that was read of a run may come behind one not yet read.
        lasts = np.cumsum(counts)[is_open] - 1
        position = np.isin(order.to_numpy(), lasts)
        stop = int(np.argmax(position)) + 1 if len(lasts) else len(order)
        yield rows.take(order[:stop])
        run_of = np.repeat(np.arange(len(runs)), counts)[order[:stop].to_numpy()]
        taken = np.bincount(run_of, minlength=len(runs))
        waiting = [rows.slice(n) for rows, n in zip(waiting, taken.tolist(), strict=True)]
