"""Choose a part of the images in which both classes have the same sizes or encodings."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from itertools import chain

import pyarrow as pa

from cifake_ray.core.schema import FAKE, REAL

TRAIT_COLUMNS = {
    "size": ("width", "height"),
    "quality": ("format", "mode", "quantization", "subsampling", "is_progressive"),
}


def choose_unmatched(
    rows: pa.Table, traits: Sequence[str], excluded: Collection[str], seed: int
) -> Iterator[str]:
    """Yield the keys to leave out so that each split has as many REAL as FAKE of each trait.

    Those with the smallest hashes of seed and key stay, so the same images make the same choice in
    whatever order they are. Rows without a label or with an error never stay; rows in `excluded`
    are left out already.
    """
    columns = list(chain.from_iterable(TRAIT_COLUMNS[trait] for trait in traits))
    cells: dict[tuple[object, ...], tuple[list[str], list[str]]] = {}
    facts = (rows.column(name).to_pylist() for name in ("key", "label", "error", "split", *columns))
    for key, label, error, *cell in zip(*facts, strict=True):
        if key in excluded:
            continue
        if label is None or error is not None:
            yield key
        else:
            cells.setdefault(tuple(cell), ([], []))[label].append(key)
    for classes in cells.values():
        num_kept = min(len(classes[REAL]), len(classes[FAKE]))
        for keys in classes:
            yield from sorted(keys, key=lambda key: _hash_key(seed, key))[num_kept:]


def _hash_key(seed: int, key: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
