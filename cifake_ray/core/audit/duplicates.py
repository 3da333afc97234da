"""Find images that are the same, or nearly, and choose which of them to leave out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cifake_ray.core.schema import SPLITS

MAX_DISTANCE = 4  # bits of 64 in which the hashes of near duplicates differ
# With so many blocks, two of them are equal in any two hashes that differ in MAX_DISTANCE bits, so
# only images that share a pair of blocks, about 21 bits, are compared.
_BLOCK_BITS = (11, 11, 11, 11, 10, 10)
MAX_COMPARED = 32  # neighbours of an image, among those that share a pair of blocks
# Two thumbnails are of the same image if they differ by at most one of these.
MAX_DIFFERENCE = 1.5  # of 255, root mean square: flat images have no contrast to compare
MAX_RELATIVE_DIFFERENCE = 0.15  # of the lower contrast, which is a correlation of 0.99

GROUP_COLUMNS = ("bytes_group", "pixels_group", "near_group")


def find_duplicates(rows: pa.Table) -> pa.Table:
    """Return the rows that have a duplicate, with GROUP_COLUMNS instead of hashes.

    A group is a number that only duplicates share, null for a row that has none of that kind. Near
    duplicates include those with the same pixels, and these those with the same bytes.
    """
    same_bytes, same_pixels = (_group_equal(rows.column(n)) for n in ("sha256", "pixels_sha256"))
    near = _group_near(rows)
    groups = [same_bytes, _keep_shared(same_pixels), _keep_shared(near)]
    chosen = pa.array(groups[-1] >= 0)
    facts = rows.select(["key", "label", "split", "source"])
    for name, group in zip(GROUP_COLUMNS, (_keep_shared(same_bytes), *groups[1:]), strict=True):
        facts = facts.append_column(name, pa.array(group, mask=group < 0))
    return facts.filter(chosen)


def _group_equal(values: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Return int64[N]: the same number for the same value."""
    return np.asarray(values.combine_chunks().dictionary_encode().indices.to_numpy()).astype(int)


def _keep_shared(groups: np.ndarray) -> np.ndarray:
    """Return the groups, with -1 for those that have one row only."""
    return np.where(np.bincount(groups)[groups] > 1, groups, -1)


def _group_near(rows: pa.Table) -> np.ndarray:
    """Return int64[N]: the same number for images that near duplicates connect."""
    hashes = rows.column("phash").to_numpy()
    packed = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(8), len(hashes), [None, pa.py_buffer(np.ascontiguousarray(hashes))]
    )
    thumbnails = rows.column("thumbnail")
    looks = _group_equal(pc.binary_join_element_wise(packed.cast(pa.binary()), thumbnails, b""))
    first = np.unique(looks, return_index=True)[1]  # of each look: copies are not compared
    pixels = [np.frombuffer(data, np.uint8) for data in thumbnails.take(first).to_pylist()]
    pairs = find_near_pairs(hashes[first], np.stack(pixels))
    graph = coo_array((np.ones(len(pairs), bool), pairs.T), shape=(len(first), len(first)))
    components = connected_components(graph, directed=False)[1]
    return np.asarray(components[looks]).astype(int)


def find_near_pairs(hashes: np.ndarray, thumbnails: np.ndarray) -> np.ndarray:
    """Return int64[P, 2]: the rows of uint64[N] and uint8[N, T] that are near duplicates.

    Far less than all pairs are compared. Where many images share half of their hash, as flat ones
    do, each is compared only with MAX_COMPARED others of about its brightness.
    """
    brightness = thumbnails.mean(axis=1)
    starts = np.cumsum((0, *_BLOCK_BITS))
    masks = [
        np.uint64(((1 << bits) - 1) << int(start))
        for start, bits in zip(starts[:-1], _BLOCK_BITS, strict=True)
    ]
    found = [np.empty((0, 2), int)]
    for one, other in combinations(masks, 2):
        shared = hashes & (one | other)
        order = np.lexsort((brightness, shared))
        shared = shared[order]
        for offset in range(1, MAX_COMPARED + 1):
            places = np.flatnonzero(shared[offset:] == shared[:-offset])
            if not len(places):
                break
            pairs = np.column_stack([order[places], order[places + offset]])
            distances = np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]])
            pairs = pairs[distances <= MAX_DISTANCE]
            found.append(pairs[_look_same(thumbnails[pairs[:, 0]], thumbnails[pairs[:, 1]])])
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def _look_same(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return bool[P] for two uint8[P, T]."""
    a, b = one.astype(np.float32), other.astype(np.float32)
    difference = np.sqrt(np.square(a - b).mean(axis=1))
    contrast = np.minimum(a.std(axis=1), b.std(axis=1))
    return np.asarray(difference <= np.maximum(MAX_DIFFERENCE, MAX_RELATIVE_DIFFERENCE * contrast))


def count_duplicates(duplicates: pa.Table, group_column: str) -> dict[str, int]:
    """Count groups, the images in them, and pairs, those across splits and classes too."""
    rows = duplicates.filter(pc.is_valid(duplicates.column(group_column)))

    def count_pairs(rows: pa.Table, *names: str) -> int:
        sizes = rows.group_by([group_column, *names]).aggregate([([], "count_all")])
        counts = sizes.column("count_all").to_numpy()
        return int((counts * (counts - 1) // 2).sum())

    labelled = rows.filter(pc.is_valid(rows.column("label")))
    return {
        "groups": pc.count_distinct(rows.column(group_column)).as_py(),
        "images": rows.num_rows,
        "pairs": count_pairs(rows),
        "pairs_across_splits": count_pairs(rows) - count_pairs(rows, "split"),
        "pairs_across_classes": count_pairs(labelled) - count_pairs(labelled, "label"),
    }


def choose_duplicates(duplicates: pa.Table, group_column: str) -> dict[str, str]:
    """Return why a row is left out, by key, so that one row of each group stays.

    It is the row of test, else val, else train, else without a split, with the first key: what
    evaluates a detector stays whole, and the detector is not trained on it. No row stays of a group
    with both labels, since one of them is wrong.
    """
    rows = duplicates.filter(pc.is_valid(duplicates.column(group_column))).to_pylist()
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[group_column], []).append(row)
    return {key: reason for group in groups.values() for key, reason in _judge_group(group)}


def _judge_group(group: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    if len({row["label"] for row in group} - {None}) > 1:
        return [(row["key"], "duplicate with another label") for row in group]
    ranks = {split: rank for rank, split in enumerate(reversed(SPLITS))}
    # A row without a label is of less use than one with it.
    kept, *rest = sorted(
        group,
        key=lambda row: (ranks.get(row["split"], len(ranks)), row["label"] is None, row["key"]),
    )
    return [
        (
            row["key"],
            "duplicate" if row["split"] == kept["split"] else f"duplicate of {kept['split']}",
        )
        for row in rest
    ]
