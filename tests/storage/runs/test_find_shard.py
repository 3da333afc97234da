"""What it costs to find out that a shard in a bucket is there."""

from __future__ import annotations

import os
from typing import Any

import pyarrow as pa
import pytest
import s3fs
from s3_server import S3Server
from test_run import make_result, open_here

from cifake_ray.config import StoreConfig
from cifake_ray.storage.runs import shards
from cifake_ray.storage.runs.shards import commit_shard, inspect_shard
from cifake_ray.storage.s3.location import open_path


def test_a_shard_is_found_by_a_head_and_a_get_of_its_end(
    s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    call_store = s3fs.S3FileSystem._call_s3

    async def count(system: Any, method: str, *args: Any, **options: Any) -> Any:
        start, _, end = options.get("Range", "").removeprefix("bytes=").partition("-")
        asked.append((method, int(end) - int(start) + 1 if end else 0))
        return await call_store(system, method, *args, **options)

    run = open_here(open_path(f"s3://{s3_env.make_bucket()}/out", StoreConfig()))
    rows = make_result(run, 0)
    noise = pa.array([os.urandom(50_000) for _ in range(rows.num_rows)])
    part = commit_shard(run, 0, rows.append_column("noise", noise), {}, {})
    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", count)
    assert inspect_shard(run, 0) == part
    assert part.size_bytes > 150_000
    assert asked == [("head_object", 0), ("get_object", shards.END_BYTES)]
