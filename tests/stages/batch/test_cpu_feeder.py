"""What prepares images for a GPU: who waits for a CPU is not taken for a process that has died."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import ray
from ray import cloudpickle
from ray.util.placement_group import placement_group, remove_placement_group

from cifake_ray.errors import ImageError
from cifake_ray.stages.batch.cpu_feeder import CpuFeeder
from cifake_ray.stages.batch.image_batches import PreparedBatch

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not know the tests
ROWS = pa.table({"row": pa.nulls(2, pa.int64())})


class Words:
    def read_images(self, rows: pa.Table) -> Iterator[bytes]:
        yield from [b"a", b"bc"]


def join_words(images: Iterable[bytes | ImageError]) -> bytes:
    return b"".join(image for image in images if isinstance(image, bytes))


def die(images: Iterable[bytes | ImageError]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def make_feeder(prepare: Any, timeout_s: float) -> CpuFeeder:
    source: Any = Words()
    work: Any = SimpleNamespace(prepare=prepare, image_bytes=10)
    return CpuFeeder(source, work, num_tasks=1, timeout_s=timeout_s)


def test_a_batch_that_waits_for_a_cpu_is_not_suspect(ray_cluster: None) -> None:
    others = placement_group([{"CPU": 2}])
    ray.get(others.ready())
    batches = make_feeder(join_words, timeout_s=1.0).prepare_slices([ROWS] * 1000)
    try:
        assert [next(batches) for _ in range(3)] == [PreparedBatch(ROWS, None, 0)] * 3
    finally:
        remove_placement_group(others)
    for batch in batches:
        time.sleep(0.05)  # the worker prepares it itself
        if batch.prepared is not None:
            break
    assert batch == PreparedBatch(ROWS, b"abc", 3), "free CPUs are not used"
    batches.close()  # type: ignore[attr-defined]


def test_a_batch_that_ends_its_process_is_suspect(ray_cluster: None) -> None:
    (batch,) = make_feeder(die, timeout_s=60.0).prepare_slices([ROWS])
    assert batch == PreparedBatch(ROWS, None, 0, is_suspect=True)
