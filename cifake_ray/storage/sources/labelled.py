"""The images of a source that have a label, and perhaps are of one split or unseen in training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.errors import ImageError
from cifake_ray.storage.sources.source import Listing, Part, Source


@dataclass(frozen=True)
class LabelledSource:
    """Another source without the images that `evaluate` does not measure."""

    source: Source
    split: str | None = None
    seen: Mapping[str, np.ndarray] = field(default_factory=dict)  # rows to leave out, by location

    def list_images(
        self, parts: Sequence[Part] | None = None, max_rows: int | None = None
    ) -> Listing:
        listing = self.source.list_images(parts, max_rows)

        def choose(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                chosen = batch.filter(pc.is_valid(batch.column("label")))
                if self.split is not None:
                    is_split = pc.equal(chosen.column("split"), self.split)
                    chosen = chosen.filter(pc.fill_null(is_split, False))
                chosen = self._leave_out_seen(chosen)
                listing.left_out += Counter({"excluded": batch.num_rows - chosen.num_rows})
                if chosen.num_rows:
                    yield chosen

        listing.change_batches(choose)
        return listing

    def _leave_out_seen(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        for location in pc.unique(batch.column("location")).to_pylist() if self.seen else []:
            is_there = pc.equal(batch.column("location"), location)
            rows = pa.array(self.seen.get(location, np.empty(0, np.int64)))
            is_seen = pc.and_(is_there, pc.is_in(batch.column("row"), rows))
            batch = batch.filter(pc.invert(pc.fill_null(is_seen, False)))
        return batch

    def find_splits(self) -> set[str]:
        """Return the splits of the images that are listed."""
        splits: set[str | None] = set()
        for batch in self.list_images().batches:
            splits |= set(pc.unique(batch.column("split")).to_pylist())
        return {split for split in splits if split is not None}

    def read_images(self, rows: pa.Table) -> Iterator[bytes | ImageError]:
        return self.source.read_images(rows)
