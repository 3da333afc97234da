"""Tests of the benchmark of the networks: images, entries, rows and the page."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from measure import link_part
from model_results import ENTRIES, Bench, Entry, choose_entries, merge_rows, render_page

from cifake_ray.core.models.detector import find_own_size
from cifake_ray.core.training.model_cost import LISTED_MODELS, count_cost
from cifake_ray.storage.presets.model_results import locate_model_results, read_model_results


def make_row(
    model: str, image_size: int = 32, is_full: bool = False, **values: Any
) -> dict[str, Any]:
    interval = {"value": 0.9, "low": 0.8, "high": 0.95}
    return {
        "model": model,
        "image_size": image_size,
        "is_full": is_full,
        "num_parameters": 39_132,
        "macs": 6_927_220,
        "train_images_per_s": 1000.0,
        "score_images_per_s": 5000.0,
        "full_run_h": 0.28,
        "train_images": 1_800,
        "epochs": 2,
        "epochs_asked": 3,
        "resumed_after_epoch": 1,
        "stopped": "val_accuracy no better for 1 epochs",
        "val_accuracy": 0.91,
        "test_accuracy": interval,
        "test_auroc": interval,
        "num_cpus": 2,
        "torch": "2.14.1",
        "command": "python tests/benchmarks/model_results.py cnn@32",
        "train_command": "cifake-ray train SHARDS RUN --model cnn",
        **values,
    }


def test_a_part_is_balanced_and_shows_every_subject(tmp_path: Path) -> None:
    subjects = range(1, 11)
    for label in ("REAL", "FAKE"):
        (tmp_path / "all" / label).mkdir(parents=True)
        for number in range(30):
            for subject in subjects:
                (tmp_path / "all" / label / f"{number:04} ({subject}).jpg").touch()
    assert link_part(tmp_path / "all", tmp_path / "part", 120) == 120
    for label in ("REAL", "FAKE"):
        names = [path.stem for path in (tmp_path / "part" / label).iterdir()]
        assert len(names) == 60
        assert {name.partition(" ")[2] for name in names} == {f"({n})" for n in subjects}
    assert link_part(tmp_path / "all", tmp_path / "whole", None) == 600
    with pytest.raises(SystemExit, match="has 300 images, 400 are needed"):
        link_part(tmp_path / "all", tmp_path / "more", 800)


def test_names_choose_entries_with_and_without_a_size() -> None:
    assert [entry.image_size for entry in choose_entries(["resnet18"], False)] == [32, 96]
    (entry,) = choose_entries(["resnet18@96", "resnet18@96"], False)
    assert entry == next(entry for entry in ENTRIES if entry.name == "resnet18@96")
    assert choose_entries(["vgg11@64"], False) == [Entry("vgg11", 64)]
    with pytest.raises(ValueError, match="vgg11: give NAME@SIZE, or one of cnn@32"):
        choose_entries(["vgg11"], False)
    quick, everything = choose_entries([], False), choose_entries([], True)
    assert set(everything) - set(quick) == {entry for entry in ENTRIES if entry.slow}
    assert len(quick) < len(everything)


def test_every_network_of_the_zoo_has_an_entry_and_takes_its_size() -> None:
    assert {entry.model for entry in ENTRIES} == set(LISTED_MODELS)
    for entry in ENTRIES:
        if entry.image_size != find_own_size(entry.model):  # the catalogue's tests build those
            assert count_cost(entry.model, entry.image_size).image_size == entry.image_size


def test_new_rows_replace_those_of_the_same_kind_and_leave_the_others() -> None:
    old = [make_row("resnet18", 96), make_row("cnn"), make_row("cnn", is_full=True)]
    new = [make_row("cnn", val_accuracy=0.5), make_row("elsewhere"), make_row("resnet18", 32)]
    rows = merge_rows(old, new)
    assert [(row["model"], row["image_size"], row["is_full"]) for row in rows] == [
        ("cnn", 32, False),
        ("cnn", 32, True),
        ("resnet18", 32, False),
        ("resnet18", 96, False),
        ("elsewhere", 32, False),
    ]
    assert [row["val_accuracy"] for row in rows] == [0.5, 0.91, 0.91, 0.91, 0.91]


def test_the_page_shows_a_row_and_how_it_was_made() -> None:
    page = render_page([make_row("cnn"), make_row("fusion", resumed_after_epoch=None)])
    head, line, first, second = [part for part in page.splitlines() if part.startswith("|")]
    assert len({len(part) for part in (head, line, first, second)}) == 1
    cells = dict(zip(*([c.strip() for c in x.split("|")] for x in (head, first)), strict=True))
    assert cells["epochs"] == "2 of 3"
    assert cells["resumed after"] == "epoch 1"
    assert cells["test accuracy (95%)"] == "90.0% (80.0-95.0)"
    assert "    python tests/benchmarks/model_results.py cnn@32\n" in page


def test_the_page_in_the_package_is_that_of_its_rows() -> None:
    page = locate_model_results().with_name("MODELS.md").read_text(encoding="utf-8")
    assert page == render_page(read_model_results()["rows"])


class ScriptBench(Bench):
    """Runs a script in the place of every command."""

    script = ""

    def start(self, arguments: Iterable[object]) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", self.script, *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_training_is_killed_as_soon_as_an_epoch_is_done(tmp_path: Path) -> None:
    bench = ScriptBench(argparse.Namespace(), tmp_path)
    bench.script = (
        "import sys, time, pathlib\n"
        "time.sleep(0.2)\n"
        "pathlib.Path(sys.argv[1], 'history.jsonl').write_text('{}')\n"
        "time.sleep(60)\n"
        "pathlib.Path(sys.argv[1], '_SUCCESS').touch()\n"
    )
    assert bench.kill_after_first_epoch([tmp_path], tmp_path)
    assert (tmp_path / "history.jsonl").exists()
    assert not (tmp_path / "_SUCCESS").exists()


def test_training_that_ends_before_the_kill_is_not_called_killed(tmp_path: Path) -> None:
    bench = ScriptBench(argparse.Namespace(), tmp_path)
    bench.script = "print('done')"
    assert not bench.kill_after_first_epoch([tmp_path], tmp_path)
