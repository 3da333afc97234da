"""--limit and --sample: which rows of a listing they take, and what is counted of them."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from cifake_ray.config import ConvertConfig
from cifake_ray.core.labels import make_class_names
from cifake_ray.core.schema import FAKE, MANIFEST_FIELDS, REAL
from cifake_ray.errors import UsageError
from cifake_ray.storage.sources.choose_rows import choose_rows, sample_rows, share_out
from cifake_ray.storage.sources.open_source import open_source
from cifake_ray.storage.sources.source import Listing, batch_rows, make_label_reader

LABELS = [REAL] * 60 + [FAKE] * 30 + [None] * 10


def make_rows(labels: list[int | None]) -> list[tuple[object, ...]]:
    return [
        (f"{n:04d}", f"{n:04d}", None, 5, 1, None, label, None, None, None)
        for n, label in enumerate(labels)
    ]


def list_labels(labels: list[int | None], num_rows: int = 7, **facts: bool) -> Listing:
    rows = make_rows(labels)
    schema = pa.schema(MANIFEST_FIELDS)
    batches = (
        next(batch_rows(rows[n : n + num_rows], schema)) for n in range(0, len(rows), num_rows)
    )
    return Listing(batches, **facts)


def choose(listing: Listing, **options: int) -> list[str]:
    choose_rows(listing, ConvertConfig(src="a", out="b", **options))
    return [key for batch in listing.batches for key in batch.column("key").to_pylist()]


def test_a_limit_takes_the_first_and_lists_no_further() -> None:
    def refuse() -> Iterator[pa.RecordBatch]:
        yield from list_labels(LABELS[:14]).batches
        raise AssertionError("listed further")

    assert choose(Listing(refuse()), limit=9) == [f"{n:04d}" for n in range(9)]
    assert len(choose(list_labels(LABELS), limit=1000)) == 100


def test_a_limit_says_of_labels_what_was_read_and_refuses_none(tmp_path: Path) -> None:
    """Those behind the limit may be understood."""
    path, lines = tmp_path / "list.csv", [f"{n}.jpg,other" for n in range(20)]
    path.write_text("\n".join(["path,label", *lines]))
    config = ConvertConfig(src=str(path), out=str(tmp_path / "out"), limit=5)
    source = open_source(config, path, tmp_path / "out")
    listing = source.list_images()
    with pytest.raises(UsageError, match="label"):
        list(listing.batches)
    listing = source.list_images()
    choose_rows(listing, config)
    assert sum(batch.num_rows for batch in listing.batches) == 5
    assert "--limit: labels are counted in the 20 rows that were read" in listing.notes
    assert any("label" in note and "other" in note for note in listing.notes)


def test_a_sample_has_the_shares_of_the_labels_and_counts_the_rest() -> None:
    listing = list_labels(LABELS)
    keys = choose(listing, sample=10)
    assert Counter(LABELS[int(key)] for key in keys) == {REAL: 6, FAKE: 3, None: 1}
    assert listing.left_out == {"not in the sample": 90}


def test_a_sample_does_not_depend_on_the_order_of_the_listing_but_on_the_seed() -> None:
    rows = make_rows(LABELS)
    schema = pa.schema(MANIFEST_FIELDS)
    turned = Listing(batch_rows(rows[::-1], schema))
    keys = choose(list_labels(LABELS, 3), sample=20)
    assert sorted(choose(turned, sample=20)) == sorted(keys)
    assert sorted(choose(list_labels(LABELS), sample=20, seed=1)) != sorted(keys)
    assert set(choose(list_labels(LABELS), sample=10)) < set(keys)  # a larger one holds it


def test_a_sample_of_all_is_all_and_of_nothing_nothing() -> None:
    assert sorted(choose(list_labels(LABELS), sample=1000)) == [f"{n:04d}" for n in range(100)]
    assert choose(Listing(iter(())), sample=5) == []


def test_a_sample_of_a_limit() -> None:
    keys = choose(list_labels(LABELS), limit=20, sample=5)
    assert len(keys) == 5
    assert max(keys) < "0020"


def test_a_source_that_keeps_its_order_does_and_its_batches_are_shards() -> None:
    listing = list_labels(LABELS * 3, keeps_order=True)
    sample_rows(listing, 25, 0, 10)
    batches = list(listing.batches)
    keys = [key for batch in batches for key in batch.column("key").to_pylist()]
    assert keys == sorted(keys)
    assert [batch.num_rows for batch in batches] == [10, 10, 5]


@pytest.mark.parametrize(
    ("total", "sizes", "shares"),
    [
        (10, [60, 30, 10], [6, 3, 1]),
        (10, [1, 1, 1000], [1, 1, 8]),
        (3, [1, 1, 1000], [1, 1, 1]),
        (2, [1, 1, 1000], [0, 0, 2]),
        (1, [5, 5], [1, 0]),
        (100, [2, 3], [2, 3]),
        (7, [10, 10, 10], [3, 2, 2]),
    ],
)
def test_shares_are_in_proportion_and_none_is_forgotten(
    total: int, sizes: list[int], shares: list[int]
) -> None:
    assert share_out(total, sizes) == shares


def test_memory_is_that_of_the_sample() -> None:
    def measure(num_batches: int) -> int:
        schema = pa.schema(MANIFEST_FIELDS)
        batches = (
            next(batch_rows([(f"{b}/{n}" * 20, *row[1:]) for n, row in enumerate(rows)], schema))
            for b in range(num_batches)
        )
        pool_bytes = pa.total_allocated_bytes()
        tracemalloc.start()
        listing = Listing(batches)
        sample_rows(listing, 100, 0, None)
        list(listing.batches)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak_bytes + pa.total_allocated_bytes() - pool_bytes

    rows = make_rows([REAL] * 5000)
    measure(1)
    assert measure(30) < measure(8) + 2_000_000  # 22 more batches have 30 MB


def test_labels_splits_and_sources_are_counted() -> None:
    facts = [(REAL, "train", "a"), (FAKE, "train", None), (None, None, "a"), (FAKE, "test", "b")]
    rows = [(str(n), None, None, 5, 1, None, *fact, None) for n, fact in enumerate(facts)]
    listing = Listing(batch_rows(rows, pa.schema(MANIFEST_FIELDS)))
    listing.count_rows(describe=False)
    list(listing.batches)
    assert listing.counts.to_dict() == {
        "labels": {"FAKE": 2, "REAL": 1, "unlabelled": 1},
        "splits": {"train": 2, "none": 1, "test": 1},
        "sources": {"a": 2, "none": 1, "b": 1},
    }
    assert listing.notes == []


def describe(*keys: str) -> str:
    read = make_label_reader(make_class_names())
    rows = [(k, k, None, 5, 1, None, *read(k.rpartition("/")[0]), None) for k in keys]
    listing = Listing(batch_rows(rows, pa.schema(MANIFEST_FIELDS)))
    listing.count_rows(describe=True)
    list(listing.batches)
    return "\n".join(listing.notes)


def test_unlabelled_images_are_told_with_their_folders_and_the_options() -> None:
    note = describe("train/nature/a", "train/nature/b", "train/biggan/c", "d")
    assert "4 of 4 images have no label and none is labelled REAL or FAKE" in note
    assert "'nature' (2), 'biggan' (1)" in note
    assert "--real-name and --fake-name" in note
    assert "none is labelled REAL;" in describe("nature/a", "ai/b")
    assert "1 of 3 images have no label; their folders: 'c'" in describe("c/a", "real/b", "fake/b")
    assert describe("real/a", "fake/b", "train/real/c") == ""


def test_names_that_look_like_splits_and_are_not_used_are_told() -> None:
    note = describe("real/train_test_mix/a", "fake/fold_1/b", "fake/fold_2/c")
    assert "'fake/fold_1'" not in note
    assert "'train_test_mix', 'fold_1', 'fold_2'" in note
    assert describe("test/real/bullet_train/a", "fake/contest/b") == ""
