"""review: one page of a run's scores, whatever has become of its images."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from s3_server import S3Server
from score_run import write_score_run

from cifake_ray.config import ExportConfig, ReviewConfig, ScoreConfig
from cifake_ray.errors import StorageError, UsageError
from cifake_ray.pipeline import run_verb
from cifake_ray.stages import review as review_module
from cifake_ray.stages.review import review_scores
from cifake_ray.storage.runs.export import export_scores

HOSTILE = ['<img src=x onerror="alert(1)">.png', "a\u202egnp.png", "new\nline.png", "{{ 7*7 }}.png"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two sources of each class; some names are hostile, one file does not decode."""
    rng = np.random.default_rng(0)
    for label in ("REAL", "FAKE"):
        for source in ("a", "<b>"):
            folder = tmp_path / "images" / label / source
            folder.mkdir(parents=True)
            for number, name in enumerate([*HOSTILE, *(f"{n}.png" for n in range(20))]):
                side = 300 if number % 2 else 32
                pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
                Image.fromarray(pixels).save(folder / name)
    (tmp_path / "images" / "REAL" / "a" / "bad.png").write_bytes(b"no image")
    return tmp_path / "images"


def make_logits(rows: pa.Table) -> np.ndarray:
    keys, label = rows["key"].to_pylist(), rows["label"].to_numpy()
    seed = sum(map(ord, keys[0]))
    logit = np.random.default_rng(seed).normal(label * 4.0 - 2, 2)
    return np.where([key.endswith("bad.png") for key in keys], np.nan, logit)


@pytest.fixture
def scores(images: Path, tmp_path: Path) -> Path:
    write_score_run(str(images), tmp_path / "scores", make_logits=make_logits, shard_rows=30)
    return tmp_path / "scores"


def review(scores: Path, **options: Any) -> tuple[dict[str, Any], str]:
    file = scores.parent / "page.html"
    config = ReviewConfig(src=str(scores), file=str(file), overwrite=True, **options)
    decisions = config.decisions and Path(config.decisions)
    result = review_scores(config, scores, file, decisions or None, lambda line: None)
    return result, file.read_text(encoding="utf-8")


def read_scores(scores: Path) -> pa.Table:
    return pa.concat_tables(map(pq.read_table, sorted((scores / "scores").glob("*.parquet"))))


def test_the_page_says_what_the_rows_say(scores: Path) -> None:
    result, page = review(scores)
    rows = read_scores(scores).to_pylist()
    scored = [row for row in rows if row["error"] is None]
    called = sum(row["is_fake"] for row in scored)
    wrong = sum(row["is_fake"] != row["label"] for row in scored)
    assert (result["images"], result["scored"]) == (97, 96)
    assert result["called_fake"] == called
    assert f"<dd>{called / 96:.1%}</dd>" in page
    assert f"<dd>{1 - wrong / 96:.1%}</dd>" in page
    assert "not_an_image" in page
    assert "REAL/a/bad.png" in page
    assert "<dd>p_fake &gt;= 0.4</dd>" in page
    for source, name in (("a", "a"), ("<b>", "&lt;b&gt;")):
        mine = [row for row in scored if row["source"] == source]
        count = sum(row["is_fake"] != row["label"] for row in mine)
        listed = len(mine) + (source == "a")
        row = rf'<th scope="row">{name}</th><td>{listed}</td><td>[^<]*</td><td>{count} of 48</td>'
        assert re.search(row, page)


def test_the_uncertain_are_the_nearest_of_each_source(scores: Path) -> None:
    _, page = review(scores, images=50)
    section = page.partition('id="uncertain"')[2].partition("<section>")[0]
    shown = re.findall(r"p_fake (0\.\d{4})</b>.*?<bdi>(.*?)</bdi>, ", section, re.DOTALL)
    assert len(shown) >= 4
    rows = [row for row in read_scores(scores).to_pylist() if row["error"] is None]
    logit = np.log(0.4 / 0.6)
    for source, name in (("a", "a"), ("<b>", "&lt;b&gt;")):
        mine = [row["p_fake"] for row in rows if row["source"] == source]
        mine.sort(key=lambda p: abs(np.log(p / (1 - p)) - logit))
        found = [p for p, of in shown if of == name]
        assert len(found) in (len(shown) // 2, len(shown) - len(shown) // 2)
        assert found == [f"{p:.4f}" for p in mine[: len(found)]]


def test_nothing_that_others_named_becomes_an_element(scores: Path) -> None:
    _, page = review(scores, images=1000)
    assert "<img src=x" not in page
    assert "<b>," not in page
    assert "\u202e" not in page
    assert "49.png" not in page
    assert "<script" not in page
    assert "default-src 'none'" in page
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert links
    assert [link for link in links if not link.startswith(("#", "data:image/webp;base64,"))] == []


def test_thumbnails_are_small_and_decode(scores: Path) -> None:
    result, page = review(scores, images=1000)
    found = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    assert result["shown"] == 96
    sides = set()
    for text in found:
        data = base64.b64decode(text)
        assert len(data) <= review_module.MAX_IMAGE_BYTES
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            sides.add(max(image.size))
    assert 32 in sides
    assert max(sides) <= 256


def test_many_images_share_the_bytes_of_a_page(
    scores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(review_module, "MAX_PAGE_IMAGE_BYTES", 300_000)
    _, page = review(scores, images=1000)
    data = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    assert len(data) > 96
    assert sum(map(len, data)) <= 400_000 + 4 * len(data)


def remove(images: Path) -> None:
    shutil.rmtree(images)


def change(images: Path) -> None:
    for path in images.rglob("*.png"):
        path.write_bytes(b"another")


@pytest.mark.parametrize(("spoil", "reason"), [(remove, "no such"), (change, "changed")])
def test_images_that_are_gone_are_said_in_their_place(
    scores: Path, images: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    spoil(images)
    result, page = review(scores, images=100)
    assert result["shown"] == 0
    assert result["not_shown"] > 0
    assert reason.lower() in page.lower()
    assert "data:image/webp" not in page


@pytest.mark.parametrize("most", [0, 3, 50, 90])
def test_no_more_images_than_asked_for_and_all_kinds_among_them(scores: Path, most: int) -> None:
    _, page = review(scores, images=most)
    assert page.count("<b>p_fake") == most
    # Uncertain, two kinds of mistakes, six ranges; what it was trained on is not known.
    assert page.count('<div class="sheet">') == min(most, 9)


def test_a_bucket_is_read_and_named(s3_env: S3Server, images: Path, tmp_path: Path) -> None:
    bucket = s3_env.make_bucket()
    s3_env.upload(bucket, images / "REAL" / "a", "photos/")
    write_score_run(f"s3://{bucket}/photos", tmp_path / "scores")
    result, _ = review(tmp_path / "scores")
    assert (result["shown"], result["not_shown"]) == (24, 1)  # one is no image
    file = tmp_path / "tasks.jsonl"
    config = ExportConfig(src="scores", file=str(file), format="label-studio")
    export_scores(tmp_path / "scores", file, config)
    urls = [json.loads(line)["data"]["image"] for line in file.read_text().splitlines()]
    assert f"s3://{bucket}/photos/0.png" in urls
    s3_env.client().delete_object(Bucket=bucket, Key="photos/0.png")
    result, page = review(tmp_path / "scores")
    assert (result["shown"], result["not_shown"]) == (23, 2)
    assert "not_found" in page


def test_a_slow_source_ends(scores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(review_module, "MAX_READ_S", 0.0)
    result, page = review(scores, images=100)
    assert result["shown"] == 1
    assert "more than 0 s in all" in page


def write_decisions(scores: Path, out: Path, settled: str) -> Path:
    (out / "decisions").mkdir(parents=True)
    for path in (scores / "scores").glob("*.parquet"):
        rows = pq.read_table(path)
        by = ["maria" if key == settled else "policy-12ab" for key in rows["key"].to_pylist()]
        verdicts = [
            "unsure" if p is None or 0.8 <= p < 0.95 else "FAKE" if p >= 0.95 else "REAL"
            for p in rows["p_fake"].to_pylist()
        ]
        threshold = pa.array(np.full(len(rows), 0.95, np.float32))
        columns = {"verdict": verdicts, "decided_by": by, "threshold": threshold}
        table = pa.table({"key": rows["key"], **columns})
        pq.write_table(table, out / "decisions" / path.name)
    return out


def test_decisions_take_the_place_of_verdicts(scores: Path) -> None:
    rows = [row for row in read_scores(scores).to_pylist() if row["error"] is None]
    unsure = sorted(
        (row for row in rows if 0.8 <= row["p_fake"] < 0.95), key=lambda r: -r["p_fake"]
    )
    settled = unsure[0]["key"]
    out = write_decisions(scores, scores.parent / "decided", settled)
    result, page = review(scores, images=1000, decisions=str(out))
    assert result["called_fake"] == sum(row["p_fake"] >= 0.95 for row in rows)
    assert f"<dt>Unsure</dt><dd>{len(unsure)}</dd>" in page
    assert '<th scope="row">maria</th><td>1</td>' in page
    assert f'<th scope="row">unsure</th><td>{len(unsure) + 1}</td>' in page  # and the one unscored
    section = re.findall('id="uncertain".*?</section>', page, re.DOTALL)[0]
    shown = re.findall(r"p_fake (0\.\d{4})</b>", section)
    first = shown[: len(unsure) - 1]
    assert sorted(first) == sorted(f"{row['p_fake']:.4f}" for row in unsure[1:])
    path = out / "decisions" / "part-00001.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(StorageError, match=r"no decisions on these scores; `cifake-ray decide"):
        review(scores, decisions=str(out))


def test_wrong_requests_are_named(scores: Path, tmp_path: Path) -> None:
    config = ReviewConfig(src=str(scores), file=str(tmp_path / "page.html"))
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(UsageError, match="--overwrite"):
        review_scores(config, scores, tmp_path / "page.html", None, print)
    assert (tmp_path / "page.html").read_text() == "mine"
    with pytest.raises(StorageError, match=r"_run\.json"):
        review(scores / "scores")
    with pytest.raises(StorageError, match="no decisions on these scores"):
        review(scores, decisions=str(tmp_path))
    with pytest.raises(UsageError, match="--images is 5,001"):
        review(scores, images=5_001)
    with pytest.raises(UsageError, match="give the page a name"):
        ReviewConfig(src=str(scores), file="-")


def test_no_images_and_no_scores_are_a_page_too(images: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    write_score_run(str(images), nothing, make_logits=lambda rows: np.full(len(rows), np.nan))
    result, page = review(nothing, images=0)
    assert (result["scored"], result["shown"]) == (0, 0)
    assert "97" in page


def test_thumbnails_of_score_need_no_source(images: Path, tmp_path: Path) -> None:
    """And they change no other column."""
    for name, thumbnails in (("plain", False), ("kept", True)):
        out = str(tmp_path / name)
        config = ScoreConfig(src=str(images), out=out, num_workers=0, thumbnails=thumbnails)
        run_verb(config, time.monotonic())
    plain, kept = (read_scores(tmp_path / name) for name in ("plain", "kept"))
    stored = kept.column("thumbnail_webp").to_pylist()
    assert kept.drop_columns("thumbnail_webp").equals(plain)
    assert [data is None for data in stored] == [e is not None for e in kept["error"].to_pylist()]
    assert max(len(data) for data in stored if data) <= 8192
    shutil.rmtree(images)
    result, page = review(tmp_path / "kept", images=1000)
    assert (result["shown"], result["not_shown"]) == (96, 0)
    shown = {base64.b64decode(text) for text in re.findall(r"base64,([^\"]+)", page)}
    assert shown == set(stored) - {None}
    file = tmp_path / "all.csv"
    export_scores(tmp_path / "kept", file, ExportConfig(src="kept", file=str(file)))
    assert "thumbnail" not in file.read_text()


@pytest.mark.parametrize(
    ("name", "value"),
    [("label", 9), ("width", None), ("p_fake", -7.0), ("p_fake", float("nan")), ("is_fake", None)],
)
def test_columns_may_hold_anything(scores: Path, name: str, value: object) -> None:
    path = scores / "scores" / "part-00000.parquet"
    rows = pq.read_table(path)
    field = rows.schema.field(name)
    column = pa.array([value] * len(rows), field.type)
    index = rows.schema.get_field_index(name)
    pq.write_table(rows.set_column(index, field, column), path)
    _, page = review(scores, images=50)
    assert "called FAKE" in page
