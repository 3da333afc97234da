"""The cache of decoded pixels: shared, never half-written, never in the way."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cifake_ray.config import TrainConfig
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.schema import FAKE, FOOTER_KEY, REAL
from cifake_ray.errors import CacheError
from cifake_ray.storage.datasets import pixel_cache, training_set
from cifake_ray.storage.datasets.training_rows import read_training_rows
from cifake_ray.storage.datasets.training_set import TrainingData, open_training_data

SIZE = 8
PREPROCESSING = Preprocessing(image_size=SIZE, fit="resize", mean=(0.5,) * 3, std=(0.5,) * 3)


def make_image(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Image n has the red value n: to train on, for validation, for test, and without a label."""
    rows: list[dict[str, Any]] = []
    for split, label in (("train", 0), ("train", 1), ("val", 0), ("val", 1), ("test", 0)):
        rows += [{"split": split, "label": label} for _ in range(6)]
    rows.insert(3, {"split": "train", "label": None})
    rows = [{**row, "error": None, "image": {"bytes": make_image(n)}} for n, row in enumerate(rows)]
    rows[8]["image"] = {"bytes": b"no image"}
    rows[9]["error"] = "worker_crash"
    rows[10]["image"] = {"bytes": None}
    folder = tmp_path / "shards"
    folder.mkdir()
    table = pa.Table.from_pylist(rows).replace_schema_metadata({FOOTER_KEY: b"{}"})
    pq.write_table(table, folder / "a.parquet", row_group_size=7)
    return folder


def open_data(shards: Path, cache: Path, **options: Any) -> TrainingData:
    config = TrainConfig(shards=str(shards), run="r", cache_dir=str(cache), **options)
    return open_training_data(read_training_rows(config), PREPROCESSING, config, 1)


def read_reds(images: training_set.ImageSet) -> list[int]:
    pixels = images.read(np.arange(len(images.labels)))
    return pixels[:, 0, 0, 0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("cache_gb", [1.0, 0.0])
def test_every_image_is_its_own(shards: Path, tmp_path: Path, cache_gb: float) -> None:
    data = open_data(shards, tmp_path / "cache", val_split="val", cache_gb=cache_gb)
    streamed = [] if cache_gb else [11]  # in the place of 8
    assert read_reds(data.train) == [0, 1, 2, 4, 5, 6, 7, *streamed, 11, 12]
    assert data.train.labels.tolist() == [REAL] * 6 + [FAKE] * (3 + len(streamed))
    assert read_reds(data.val) == list(range(13, 25))
    assert data.unusable == {"not_an_image": 1}


def test_one_file_serves_every_split_and_label(shards: Path, tmp_path: Path) -> None:
    for options in ({"val_split": "val"}, {"val_fraction": 0.4}, {"val_fraction": 0.6}):
        open_data(shards, tmp_path / "cache", **options)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


@pytest.mark.parametrize("lost", ["*.json", "*.npy", "*.lock"])
def test_what_is_lost_is_made_again(shards: Path, tmp_path: Path, lost: str) -> None:
    """A kill may come between any two of the files."""
    cache = tmp_path / "cache"
    first = read_reds(open_data(shards, cache, val_split="val").train)
    for path in cache.glob(lost):
        path.unlink()
    data = open_data(shards, cache, val_split="val")
    assert read_reds(data.train) == first
    assert data.unusable == {"not_an_image": 1}


KILLED_WHILE_IT_DECODES = """
import os, sys, time
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from test_pixel_cache import open_data, training_set
from cifake_ray.storage.datasets import pixel_cache
if sys.argv[4] == "named":
    del os.O_TMPFILE
def decode(*args):
    print("decoding", flush=True)
    time.sleep(60)
    yield
training_set._decode_rows = decode
open_data(Path(sys.argv[1]), Path(sys.argv[2]), val_split="val")
"""


@pytest.mark.parametrize("how", ["unnamed", "named"])
def test_a_kill_leaves_no_file_that_stays(shards: Path, tmp_path: Path, how: str) -> None:
    cache = tmp_path / "cache"
    words = [KILLED_WHILE_IT_DECODES, shards, cache, Path(__file__).parent, how]
    command = [sys.executable, "-c", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "decoding\n"
        process.send_signal(signal.SIGKILL)
    if how == "unnamed":
        assert [path.suffix for path in cache.iterdir()] == [".lock"]
    open_data(shards, cache, val_split="val")
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".lock", ".npy"]


def test_no_allocation_is_asked_of_a_system_without_it(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.delattr(os, "O_TMPFILE")
    assert len(open_data(shards, tmp_path / "cache", val_split="val").train.labels) == 9
    usage = pixel_cache.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(pixel_cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CacheError, match="No space left on device"):
        open_data(shards, tmp_path / "other", val_split="val")
    assert [path.suffix for path in (tmp_path / "other").iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_used_is_told_with_the_remedy(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="--cache-dir or XDG_CACHE_HOME"):
        open_data(shards, tmp_path / "file" / "cache", val_split="val")


AS_ANOTHER_USER = """
import mmap, os, sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from test_pixel_cache import open_data
from cifake_ray.errors import CacheError
os.setuid(12345)
try:
    print(len(open_data(Path(sys.argv[1]), Path(sys.argv[2]), val_split="val").train.labels))
except CacheError as error:
    print(error)
"""


def test_another_user_reads_what_is_there_and_is_told_what_is_not(
    shards: Path, tmp_path: Path
) -> None:
    if os.getuid() != 0:
        pytest.skip("only root becomes another user")
    for path in (shards, *shards.parents[:4]):
        if path != Path("/tmp"):
            path.chmod(0o755)
    cache = tmp_path / "cache"

    def read_as_another_user() -> str:
        words = [AS_ANOTHER_USER, shards, cache, Path(__file__).parent]
        answer = subprocess.run(
            [sys.executable, "-c", *map(str, words)], capture_output=True, text=True, timeout=60
        )
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    open_data(shards, cache, val_split="val")
    assert read_as_another_user() == "9\n"
    for path in cache.glob("*.npy"):
        path.unlink()
    said = read_as_another_user()
    assert "belongs to another user" in said
    assert "--cache-dir" in said


@pytest.mark.parametrize("planted", [".npy", ".json", ".lock", ".writing", "a link"])
@pytest.mark.parametrize("owner", ["a stranger", "the owner of the folder"])
def test_pixels_of_a_stranger_in_a_shared_folder_are_not_learned_from(
    shards: Path, tmp_path: Path, planted: str, owner: str
) -> None:
    if os.getuid() != 0:
        pytest.skip("only root makes files of others")
    cache = tmp_path / "cache"
    good = read_reds(open_data(shards, cache, val_split="val").train)
    cache.chmod(0o1777)
    (pixels,) = cache.glob("*.npy")
    array = np.load(pixels)
    np.save(pixels, white := np.full_like(array, 255))
    record = json.loads(pixels.with_suffix(".json").read_bytes())
    record["crc32"]["pixels"] = zlib.crc32(white.data)
    pixels.with_suffix(".json").write_text(json.dumps(record))
    path = pixels.with_suffix(".npy" if planted == "a link" else planted)
    if planted == "a link":
        path = path.rename(tmp_path / "elsewhere.npy")
        pixels.symlink_to(path)
        path = pixels
    path.touch()
    os.chown(path, 12345, 12345, follow_symlinks=False)
    if owner != "a stranger":
        os.chown(cache, 12345, 12345)
    learned = read_reds(open_data(shards, cache, val_split="val").train)
    assert learned == (good if owner == "a stranger" else [255] * len(good))
    assert read_reds(open_data(shards, cache, val_split="val").train) == learned


def test_a_stranger_who_takes_our_name_too_is_refused(shards: Path, tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root makes files of others")
    cache = tmp_path / "cache"
    open_data(shards, cache, val_split="val")
    (pixels,) = cache.glob("*.npy")
    for path in (pixels, pixels.with_name(f"{pixels.stem}-0.npy")):
        path.touch()
        os.chown(path, 12345, 12345)
    with pytest.raises(CacheError, match=r"another user has put files there.*--cache-dir"):
        open_data(shards, cache, val_split="val")


def test_a_damaged_file_is_named(shards: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    open_data(shards, cache, val_split="val")
    (path,) = cache.glob("*.npy")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CacheError, match=f"{path.name}: damaged .*; delete it"):
        open_data(shards, cache, val_split="val")


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_no_damage_gives_other_pixels_or_other_images(
    shards: Path, tmp_path: Path, suffix: str
) -> None:
    """It is told, with what to delete; then the images are decoded again."""

    def read() -> tuple[bytes, dict[str, int]]:
        data = open_data(shards, tmp_path / "cache", val_split="val")
        pixels = data.train.read(np.arange(len(data.train.labels)))
        return pixels.tobytes(), data.unusable

    wanted, told = read(), list[str]()
    (path,) = (tmp_path / "cache").glob(f"*{suffix}")
    good = path.read_bytes()
    lengths = (0, 1, 60, len(good) // 2, len(good) - 1)
    damaged = [good[:length] for length in lengths if length < len(good)]
    end = len(good) if suffix == ".npy" else good.index(b'"about"')  # what is only for people
    for place in range(0, end, 1 + end // 100):
        damaged.append(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
    for data in damaged:
        path.write_bytes(data)
        try:
            assert read() == wanted
        except CacheError as error:
            told.append(str(error))
    assert all(path.stem in words and "delete it" in words for words in told)
    assert len(told) > 0.8 * len(damaged)
    path.unlink()
    assert read() == wanted


def test_pixels_of_jpegs_at_a_smaller_scale_are_kept_apart(shards: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "cache")
    config = TrainConfig(shards=str(shards), run="r", cache_dir=folder, val_split="val")
    for scales in (False, True, False):
        preprocessing = replace(PREPROCESSING, jpeg_scale=scales)
        open_training_data(read_training_rows(config), preprocessing, config, 1)
    assert len([*(tmp_path / "cache").glob("*.npy")]) == 2


def test_what_an_earlier_version_decoded_is_used(shards: Path, tmp_path: Path) -> None:
    first = read_reds(open_data(shards, tmp_path / "cache", val_split="val").train)
    (path,) = (tmp_path / "cache").glob("*.json")
    record = json.loads(path.read_text())
    del record["crc32"]
    path.write_text(json.dumps(record))
    pixels = path.with_suffix(".npy")
    before = pixels.stat().st_mtime_ns
    assert read_reds(open_data(shards, tmp_path / "cache", val_split="val").train) == first
    assert json.loads(path.read_text()) == record
    assert pixels.stat().st_mtime_ns == before


def test_decoding_says_how_far_it_is(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_set, "LOG_INTERVAL_S", 0.0)
    said: list[str] = []
    config = TrainConfig(
        shards=str(shards), run="r", cache_dir=str(tmp_path / "cache"), val_split="val"
    )
    open_training_data(read_training_rows(config), PREPROCESSING, config, 1, said.append)
    assert said[-1] == "train: decoded 31 of 31 images into the cache"
    record = json.loads(next((tmp_path / "cache").glob("*.json")).read_text())
    assert record["unusable"] == {"8": "not_an_image"}
