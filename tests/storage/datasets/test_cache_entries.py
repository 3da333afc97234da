"""The cache of decoded images stays within its size, and shows and clears what it holds."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from test_pixel_cache import open_data, read_reds
from test_pixel_cache import shards as shards
from typer.testing import CliRunner

from cifake_ray import cli
from cifake_ray.storage.datasets import cache_entries
from cifake_ray.storage.datasets.cache_entries import list_entries, make_room

NUM_BYTES = 1000


def make_entry(folder: Path, name: str, age_s: float) -> Path:
    path = folder / (name * 32)
    path.with_suffix(".npy").write_bytes(b"\0" * NUM_BYTES)
    path.with_suffix(".lock").touch()
    record = path.with_suffix(".json")
    record.write_text(json.dumps({"unusable": {}, "about": f"images of {name}"}))
    os.utime(record, (time.time() - age_s,) * 2)
    return path


def list_names(folder: Path) -> list[str]:
    return [entry.path.name[0] for entry in list_entries(folder)]


def test_what_was_unused_for_longest_makes_room(tmp_path: Path) -> None:
    for name, age_s in (("b", 3000), ("a", 4000), ("d", 1000), ("c", 2000)):
        make_entry(tmp_path, name, age_s)
    assert list_names(tmp_path) == ["d", "c", "b", "a"]
    entry_bytes = list_entries(tmp_path)[0].size_bytes
    assert entry_bytes >= NUM_BYTES
    removed = make_room(tmp_path / ("b" * 32), 2 * entry_bytes)
    assert [entry.path.name[0] for entry in removed] == ["a", "c"], (
        "never the one that is made room for"
    )
    assert {path.stem[0] for path in tmp_path.iterdir()} == {"b", "d"}
    assert make_room(tmp_path / ("b" * 32), 2 * entry_bytes) == []


def test_what_was_used_just_now_stays(tmp_path: Path) -> None:
    """Another training may have found it there, and is about to map it."""
    for name in ("a", "b"):
        make_entry(tmp_path, name, cache_entries.MIN_IDLE_S / 2)
    assert make_room(tmp_path / "c", 0) == []


def test_a_training_makes_room_and_says_so(shards: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    old = make_entry(cache, "e", 3000)
    first = read_reds(open_data(shards, cache, val_split="val", cache_gb=6.5e-6).train)
    assert not old.with_suffix(".npy").exists()
    (entry,) = list_entries(cache)
    assert entry.about == f"31 images of {shards}, resize at 8 pixels"
    record = entry.path.with_suffix(".json")
    os.utime(record, (0, 0))
    assert read_reds(open_data(shards, cache, val_split="val").train) == first
    assert time.time() - list_entries(cache)[0].last_used < 100, "its last use is this one"


def test_entries_of_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_entry(tmp_path, "a", 3000)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert make_room(tmp_path / "c", 0) == []
    assert [entry.is_ours for entry in list_entries(tmp_path)] == [False]


def run_cache(*words: str) -> str:
    result = CliRunner().invoke(cli.app, ["cache", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_shows_and_clears(tmp_path: Path) -> None:
    words = ("--cache-dir", str(tmp_path))
    assert run_cache(*words) == f"0 entries, 0.00 GB, in {tmp_path}\n"
    make_entry(tmp_path, "a", 3000)
    (tmp_path / f"{'c' * 32}-12.npy").write_text("a kill came before its record")
    (tmp_path / f"{'c' * 32}-12.lock").touch()
    others = [f"{'b' * 32}.json", f"{'d' * 32}.npy", "mine.json"]  # many name files by MD5 sums
    for name in others:
        (tmp_path / name).write_text("{}")
    shown = run_cache(*words)
    assert "images of a" in shown
    assert "2 entries" in shown
    found = json.loads(run_cache(*words, "--json"))
    assert [entry["about"] for entry in found["entries"]] == ["", "images of a"]
    assert "removed from" in run_cache(*words, "--clear")
    assert sorted(path.name for path in tmp_path.iterdir()) == others
