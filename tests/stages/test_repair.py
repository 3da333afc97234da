"""repair: redoes what differs, and leaves all as it was when it cannot."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cifake_ray.config import ConvertConfig, RepairConfig
from cifake_ray.pipeline import run_verb
from cifake_ray.stages.batch import driver
from cifake_ray.storage.runs.verify import verify_files

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def damaged(sample_folder: Path, tmp_path: Path) -> Path:
    """Shards of a folder beside them, one with a flipped byte."""
    source = tmp_path / "source"
    for path in sorted(sample_folder.rglob("*.jpg"))[:40]:
        target = source / path.relative_to(sample_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    out = tmp_path / "out"
    config = ConvertConfig(src=str(source), out=str(out), shard_size=10)
    run_verb(config, time.monotonic())
    part = out / "shards" / "part-00002.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 1
    part.write_bytes(data)
    return out


@pytest.mark.smoke
def test_repair_makes_the_damaged_shard_again_and_only_that(damaged: Path) -> None:
    assert [item.name for item in verify_files(damaged)] == ["shards/part-00002.parquet"]
    summary, code = run_verb(RepairConfig(out=str(damaged)), time.monotonic())
    assert (summary.shards_resumed, summary.shards_total, code) == (4, 5, 0)
    assert verify_files(damaged) == []
    assert pq.read_table(damaged / "shards").num_rows == 40
    hidden = [path.name for path in damaged.rglob(".*") if path.is_file()]
    assert hidden == [".huggingface.yaml"]


def test_repair_of_an_undamaged_output_says_so_and_starts_nothing(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_verb(RepairConfig(out=str(damaged)), time.monotonic())
    monkeypatch.setattr(driver, "connect_cluster", None)
    result, code = run_verb(RepairConfig(out=str(damaged)), time.monotonic())
    assert code == 0
    assert result == {
        "command": "repair",
        "out": str(damaged),
        "files": 6,
        "rows": 40,
        "damaged": {},
    }
    record = json.loads((damaged / "_SUCCESS").read_text())
    del record["listed"]
    (damaged / "_SUCCESS").write_text(json.dumps(record))
    with pytest.raises(TypeError):  # it is made again
        run_verb(RepairConfig(out=str(damaged)), time.monotonic())
