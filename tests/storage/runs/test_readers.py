"""What pandas, pyarrow and Hugging Face datasets read when they are given the output folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from cifake_ray.core.schema import MANIFEST_FIELDS, SCORE_FIELDS
from cifake_ray.storage.runs.attempts import clear_attempts, follow_attempt, write_attempt
from cifake_ray.storage.runs.finish import finish_run
from cifake_ray.storage.runs.manifest import read_manifest_shard
from cifake_ray.storage.runs.run import Run
from cifake_ray.storage.runs.run_plan import RunPlan
from cifake_ray.storage.runs.shards import commit_shard
from cifake_ray.storage.runs.verify import verify_files
from cifake_ray.storage.sources.source import Listing, batch_rows

SPLITS = ["train"] * 6 + ["val"] * 2 + ["test"] * 3


def list_splits(splits: list[str | None], keeps_order: bool = False) -> Listing:
    rows = [
        (f"{n}", None, None, 1, None, None, 0, split, None, None) for n, split in enumerate(splits)
    ]
    return Listing(batch_rows(rows, pa.schema(MANIFEST_FIELDS)), keeps_order=keeps_order)


def make_scores(run: Run, shard: int) -> pa.Table:
    rows = read_manifest_shard(run.manifest_folder, run.find_file(shard), shard)
    known = {name: rows.column(name) for name in ("key", "label", "split")}
    columns = [known.get(f.name, pa.nulls(rows.num_rows, f.type)) for f in SCORE_FIELDS]
    return pa.table(columns, schema=pa.schema(SCORE_FIELDS))


def open_run(out: Path, listing: Listing) -> Run:
    return RunPlan(
        out=out, command="score", settings={}, config={}, list_source=lambda: listing, shard_rows=4
    ).open()


def finish(run: Run) -> None:
    for shard in range(run.manifest.num_shards):
        write_attempt(run, follow_attempt(None, shard, "session"))
    shards = range(run.manifest.num_shards)
    stats = [commit_shard(run, n, make_scores(run, n), {}, {}) for n in shards]
    clear_attempts(run)
    finish_run(run, stats, {})


def load_splits(out: Path, cache: Path, **options: Any) -> dict[str, list[str]]:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(str(out), cache_dir=str(cache), **options)
    return {name: sorted(rows["key"], key=int) for name, rows in loaded.items()}


def test_pandas_and_pyarrow_read_each_row_once(tmp_path: Path) -> None:
    finish(open_run(tmp_path / "out", list_splits(SPLITS)))
    table = pd.read_parquet(tmp_path / "out")
    assert sorted(table["key"], key=int) == [f"{n}" for n in range(11)]
    assert list(table.columns) == [field.name for field in SCORE_FIELDS]
    assert pa.dataset.dataset(tmp_path / "out").count_rows() == 11
    assert pq.read_table(tmp_path / "out").num_rows == 11


def test_they_do_while_the_run_is_not_finished(tmp_path: Path) -> None:
    run = open_run(tmp_path / "out", list_splits(SPLITS))
    write_attempt(run, follow_attempt(None, 1, "session"))
    commit_shard(run, 0, make_scores(run, 0), {}, {})
    assert len(pd.read_parquet(tmp_path / "out")) == make_scores(run, 0).num_rows


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (SPLITS, {"train": range(6), "validation": range(6, 8), "test": range(8, 11)}),
        ([None] * 9, {"train": range(9)}),
        (["test"] * 5, {"test": range(5)}),
        ([None, "test", None], {"unsplit": (0, 2), "test": (1,)}),
        (["fold1", "test", "fold2", "test"], {"mixed": range(4)}),
    ],
)
def test_load_dataset_tells_the_splits_apart(
    tmp_path: Path, splits: list[str | None], expected: dict[str, range]
) -> None:
    finish(open_run(tmp_path / "out", list_splits(splits)))
    found = load_splits(tmp_path / "out", tmp_path / "cache")
    assert found == {name: [f"{n}" for n in keys] for name, keys in expected.items()}


def test_a_source_that_keeps_its_order_may_mix_splits_and_a_filter_parts_them(
    tmp_path: Path,
) -> None:
    finish(open_run(tmp_path / "out", list_splits(["test", None, "train"], keeps_order=True)))
    assert load_splits(tmp_path / "out", tmp_path / "cache") == {"mixed": ["0", "1", "2"]}
    filters = [("split", "==", "test")]
    assert load_splits(tmp_path / "out", tmp_path / "2", filters=filters) == {"mixed": ["0"]}


def test_a_card_of_the_user_stays(tmp_path: Path) -> None:
    run = open_run(tmp_path, list_splits(SPLITS))
    (tmp_path / ".huggingface.yaml").write_text("mine")
    finish(run)
    assert (tmp_path / ".huggingface.yaml").read_text() == "mine"


def test_an_output_of_an_earlier_version_goes_on_in_its_own_folders(tmp_path: Path) -> None:
    made = open_run(tmp_path / "new", list_splits(SPLITS))
    older = tmp_path / "older"
    shutil.copytree(made.out / "_manifest", older / "manifest")
    record = json.loads((made.out / "_run.json").read_text())
    del record["has_private_folders"]
    (older / "_run.json").write_text(json.dumps(record))
    (older / "attempts").mkdir()
    run = open_run(older, list_splits(SPLITS))
    finish(run)
    assert verify_files(older) == []
    names = {path.name for path in older.iterdir() if not path.name.startswith(".")}
    assert names == {"_run.json", "manifest", "scores", "_files.parquet", "_SUCCESS"}
    (older / "manifest" / run.manifest.files[0].name).unlink()
    assert [item.name for item in verify_files(older)] == [f"manifest/{run.manifest.files[0].name}"]
