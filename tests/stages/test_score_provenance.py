"""score --provenance: columns beside the score, the same score, and a run that keeps its reader."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from cifake_ray.config import ExportConfig, ScoreConfig
from cifake_ray.core.schema import PROVENANCE_FIELDS, SCORE_FIELDS
from cifake_ray.errors import ResourceError, RunMismatch, UsageError
from cifake_ray.pipeline import run_verb
from cifake_ray.report.summary_text import split_summary
from cifake_ray.stages import score
from cifake_ray.stages.batch.summary import BatchSummary
from cifake_ray.stages.resources import Placement
from cifake_ray.stages.score import VERIFIER, MakeScoreProcessor, score_images
from cifake_ray.storage.bundles.built_ins import locate_bundle
from cifake_ray.storage.bundles.bundle import read_bundle_info

XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><x:a xmlns:e="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    b' e:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    b"</x:xmpmeta>"
)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """An image with a claim, one without, one that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, xmp in (("claim.jpg", XMP), ("plain.jpg", b"")):
        Image.effect_noise((32, 32), 90).convert("RGB").save(folder / name, xmp=xmp or None)
    (folder / "words.jpg").write_text("words")
    return folder


def run_score(src: Path, out: Path, **options: Any) -> BatchSummary:
    config = ScoreConfig(src=str(src), out=str(out), num_workers=0, **options)
    summary = score_images(config, src, out, locate_bundle(None), lambda _: None, time.monotonic())
    assert isinstance(summary, BatchSummary)
    return summary


def read_rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in pq.read_table(out / "scores").to_pylist()}


def test_columns_beside_the_same_score(photos: Path, tmp_path: Path) -> None:
    plain, asked = tmp_path / "plain", tmp_path / "asked"
    assert run_score(photos, plain).provenance == {}
    summary = run_score(photos, asked, provenance=True)
    score_names = [field.name for field in SCORE_FIELDS]
    names = [field.name for field in PROVENANCE_FIELDS]
    assert pq.read_table(plain / "scores").schema.names == score_names
    assert pq.read_table(asked / "scores").schema.names == [*score_names, *names]
    before, rows = read_rows(plain), read_rows(asked)
    for key, row in rows.items():
        assert {name: row[name] for name in score_names} == before[key]
    assert rows["claim.jpg"]["digital_source_type"] == "trainedAlgorithmicMedia"
    assert rows["claim.jpg"]["c2pa_present"] is False
    assert [rows["plain.jpg"][name] for name in names] == [False, *[None] * 7]
    assert [rows["words.jpg"][name] for name in names] == [None] * 8
    assert summary.provenance["any"] == summary.provenance["ai"] == 1
    is_real = rows["claim.jpg"]["is_fake"] is False
    assert summary.provenance["ai_called_real"] == is_real
    sentences, _ = split_summary(summary.__dict__)
    assert "Provenance: 1 of 2 images carry some (1 a digital source type)." in sentences
    assert (
        f"1 claim to be made or edited by AI; of these {is_real:d} are not called FAKE."
        in sentences
    )

    config = ExportConfig(src=str(asked), file=str(tmp_path / "scores.csv"))
    run_verb(config, time.monotonic())
    assert "digital_source_type" in (tmp_path / "scores.csv").read_text().splitlines()[0]


def test_other_verdicts_keep_the_columns_and_count_again(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_score(photos, out, provenance=True)
    summary = run_score(photos, out, provenance=True, target_fpr=0.001)
    assert summary.provenance["ai"] == 1
    row = read_rows(out)["claim.jpg"]
    assert row["digital_source_type"] == "trainedAlgorithmicMedia"
    assert summary.provenance["ai_called_real"] == (row["is_fake"] is False)


def test_a_run_without_the_option_stays_what_it_is(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_score(photos, out)
    with pytest.raises(RunMismatch, match="provenance: False there, True here"):
        run_score(photos, out, provenance=True)
    record = json.loads((out / "_run.json").read_text())
    assert "c2pa_reader" not in record["settings"]
    del record["settings"]["provenance"]  # as of a version without it
    (out / "_run.json").write_text(json.dumps(record))
    (out / "_SUCCESS").unlink()
    assert run_score(photos, out).done == 2


def test_a_run_keeps_what_it_was_begun_with(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "has_verifier", lambda: False)
    config = ScoreConfig(src=str(photos), out=str(tmp_path / "out"), provenance=True)
    assert score.choose_c2pa_reader(config, tmp_path / "out") == "presence"
    run_score(photos, tmp_path / "out", provenance=True)
    monkeypatch.setattr(score, "has_verifier", lambda: True)
    assert score.choose_c2pa_reader(config, tmp_path / "out") == "presence"
    assert score.choose_c2pa_reader(config, tmp_path / "other") == VERIFIER


def test_a_worker_without_the_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "has_verifier", lambda: False)
    bundle = read_bundle_info(locate_bundle(None))
    make = MakeScoreProcessor(bundle, 0.5, None, c2pa_reader=VERIFIER)
    with pytest.raises(ResourceError, match=r"install cifake-ray\[provenance\]"):
        make(Placement(1, 1, 0))


def test_a_column_of_one_of_its_names_is_refused(photos: Path, tmp_path: Path) -> None:
    (photos / "list.csv").write_text("path,generator\nclaim.jpg,mine\n")
    assert run_score(photos / "list.csv", tmp_path / "a").done == 1
    assert read_rows(tmp_path / "a")["claim.jpg"]["generator"] == "mine"
    with pytest.raises(UsageError, match=r"'generator'.*--drop-columns generator"):
        run_score(photos / "list.csv", tmp_path / "b", provenance=True)
    summary = run_score(
        photos / "list.csv", tmp_path / "b", provenance=True, drop_columns=("generator",)
    )
    assert summary.done == 1
