"""repair: redoes what differs, and leaves all as it was when it cannot."""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cifake_ray.config import ConvertConfig, RepairConfig
from cifake_ray.pipeline import run_verb
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
    run_verb(config, time.time())
    part = out / "shards" / "part-00002.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 1
    part.write_bytes(data)
    return out


@pytest.mark.smoke
def test_repair_makes_the_damaged_shard_again_and_only_that(damaged: Path) -> None:
    assert [item.name for item in verify_files(damaged)] == ["shards/part-00002.parquet"]
    summary, code = run_verb(RepairConfig(out=str(damaged)), time.time())
    assert (summary.shards_resumed, summary.shards_total, code) == (3, 4, 0)
    assert verify_files(damaged) == []
    assert pq.read_table(damaged / "shards").num_rows == 40
    assert not [path for path in damaged.rglob(".*") if path.is_file()]
