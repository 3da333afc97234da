"""What evaluate measures beside shards: labelled folders, others' scores, its own output again."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from score_run import THRESHOLD, write_score_run
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from cifake_ray.config import EvaluateConfig, ScoreConfig, TrainConfig
from cifake_ray.core.evaluation.buckets import MISSING, name_buckets
from cifake_ray.errors import CifakeError, NothingToDo, RunMismatch, UsageError
from cifake_ray.pipeline import run_verb
from cifake_ray.storage.datasets.training_rows import read_training_rows

RATES = {"tpr_at_fpr_1pct": 0.01, "tpr_at_fpr_0.1pct": 0.001}


def run_evaluate(src: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Evaluate with processes of this machine; return metrics.json."""
    options = {"num_workers": 0, "num_bootstrap": 20} | options
    config = EvaluateConfig(shards=str(src), out=str(out), **options)
    _, code = run_verb(config, time.monotonic())
    assert code == 0
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


def write_scores(path: Path, num: int = 14_000) -> Path:
    """Write scores of others: eight sources, one of both classes, one of a single image."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, num)
    source = np.where(label == 1, "gen", "cam").astype(object) + rng.integers(0, 4, num).astype(str)
    source[:40] = "both"
    source[40] = "=one"
    p_fake = 1 / (1 + np.exp(-np.round(rng.normal(label * 3 - 1.5, 1.5), 1)))
    columns = {
        "key": [f"images/{n}" for n in range(num)],
        "label": np.where(label == 1, "FAKE", "REAL"),
        "p_fake": p_fake,
        "source": source,
        "image_type": rng.choice(["photo", "art"], num),
        "width": rng.integers(20, 3000, num),
        "height": rng.integers(20, 3000, num),
        "jpeg_quality": np.where(rng.random(num) < 0.3, "", rng.integers(30, 101, num).astype(str)),
        "brightness": np.round(rng.random(num), 3),
    }
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


SLICES = ("size", "megapixels", "jpeg_quality", "image_type", "brightness", "label")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    src = write_scores(folder / "scores.csv")
    run_evaluate(src, folder / "out", slice=SLICES, threshold=0.3)
    return folder / "out"


def test_every_slice_has_the_numbers_of_scikit_learn_from_the_parquet(report: Path) -> None:
    rows = pq.read_table(report / "predictions")
    metrics = json.loads((report / "metrics.json").read_text())
    label, logit, p_fake = (rows.column(n).to_numpy() for n in ("label", "logit", "p_fake"))
    assert list(metrics["slices"]) == ["source", *SLICES]
    for column, slices in metrics["slices"].items():
        codes, names = name_buckets(rows, column)
        assert sorted(found["value"] for found in slices) == sorted(names)
        for found in slices:
            own = codes == names.index(found["value"])
            kinds = set(label[own].tolist())
            assert found["label"] == {(0,): "REAL", (1,): "FAKE", (0, 1): "both"}[(*sorted(kinds),)]
            assert found["num_images"] == own.sum()
            assert found["is_small"] == (own.sum() < 30)
            for name, threshold in (("accuracy", 0.5), ("accuracy_at_threshold", 0.3)):
                is_right = (p_fake[own] >= np.float32(threshold)) == label[own]
                assert found[name]["value"] == pytest.approx(is_right.mean())
            ranked = own | (label != min(kinds)) if len(kinds) == 1 else own
            fpr, tpr, _ = roc_curve(label[ranked], logit[ranked], drop_intermediate=False)
            assert found["auroc"]["value"] == pytest.approx(
                roc_auc_score(label[ranked], logit[ranked])
            )
            assert found["average_precision"]["value"] == pytest.approx(
                average_precision_score(label[ranked], logit[ranked])
            )
            num_real = int((label[ranked] == 0).sum())
            assert (found["ranked_real"], found["ranked_fake"]) == (
                num_real,
                ranked.sum() - num_real,
            )
            for name, rate in RATES.items():
                if rate * num_real < 5 or found["ranked_fake"] < 5:
                    assert found[name]["value"] is None
                    assert "images, there are" in found[name]["reason"]
                else:
                    assert found[name]["value"] == pytest.approx(tpr[fpr <= rate].max())
    reasons = [one["tpr_at_fpr_0.1pct"].get("reason") for one in metrics["slices"]["source"]]
    assert None in reasons, "some sources are ranked against enough REAL images"


def test_slices_are_ordered_and_complete_in_the_table_too(report: Path) -> None:
    metrics = json.loads((report / "metrics.json").read_text())
    sources = metrics["slices"]["source"]
    assert sources[-1]["value"] == "=one"
    assert sources[-1]["is_small"], "kept, last and marked"
    large = [found["auroc"]["value"] for found in sources[:-1]]
    assert large == sorted(large)
    with (report / "slices.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(map(len, metrics["slices"].values()))
    first, last = rows[0], rows[len(sources) - 1]
    assert float(first["auroc_low"]) == sources[0]["auroc"]["low"]
    assert last["value"] == "'=one", "no formula for a spreadsheet"
    assert last["tpr_at_fpr_1pct"] == ""
    assert last["tpr_at_fpr_1pct_reason"] == sources[-1]["tpr_at_fpr_1pct"]["reason"]
    values = {found["value"] for found in metrics["slices"]["jpeg_quality"]}
    assert {"95 or more", MISSING} <= values


def test_real_sources_are_compared_with_each_other(report: Path) -> None:
    rows = pq.read_table(report / "predictions")
    floor = json.loads((report / "metrics.json").read_text())["real_vs_real"]
    label, logit = rows.column("label").to_numpy(), rows.column("logit").to_numpy()
    source = np.array(rows.column("source").to_pylist())
    assert (floor["num_sources"], len(floor["pairs"])) == (4, 6)
    assert floor["left_out"] == len(set(source[label == 0])) - 4, "those of few images"
    values = []
    for pair in floor["pairs"]:
        chosen = (label == 0) & np.isin(source, [pair["higher"], pair["lower"]])
        expected = roc_auc_score(source[chosen] == pair["higher"], logit[chosen])
        assert pair["auroc"]["value"] == pytest.approx(expected)
        values.append(expected)
    assert values == sorted(values, reverse=True)
    assert values[-1] >= 0.5
    assert floor["auroc"]["value"] == pytest.approx(roc_auc_score(label, logit))


def test_scores_are_kept_as_they_are(report: Path) -> None:
    """A p_fake of exactly the threshold is FAKE, though its logit is rounded."""
    rows = pq.read_table(report / "predictions").to_pylist()
    with (report.parent / "scores.csv").open(newline="") as file:
        theirs = {row["key"]: row for row in csv.DictReader(file)}
    assert len(rows) == len(theirs)
    for row in rows:
        given = theirs[row["key"]]
        assert row["p_fake"] == np.float32(given["p_fake"])
        assert row["is_fake"] == (row["p_fake"] >= np.float32(0.3))
        assert (row["label"] == 1) == (given["label"] == "FAKE")
        assert row["image_type"] == given["image_type"]
        assert row["width"] == int(given["width"])


def test_rounded_scores_at_the_threshold_and_at_the_ends(tmp_path: Path) -> None:
    rows = [("a", 0.7, 1), ("b", 0.7, 0), ("c", 1.0, 1), ("d", 0.0, 0), ("e", 1 - 1e-12, 1)]
    table = pa.table(dict(zip(("key", "p_fake", "label"), zip(*rows, strict=True), strict=True)))
    pq.write_table(table, tmp_path / "scores.parquet")
    metrics = run_evaluate(tmp_path / "scores.parquet", tmp_path / "out", threshold=0.7)
    assert metrics["at_threshold"]["confusion"] == [[1, 1], [0, 3]]
    found = {row["key"]: row for row in pq.read_table(tmp_path / "out/predictions").to_pylist()}
    assert found["c"]["logit"] > found["e"]["logit"] > found["a"]["logit"]
    assert found["d"]["logit"] < -700


CASES = [
    ("a,REAL,0.5\nb,FAKE,nan", "line 3: p_fake is nan; give a number from 0 to 1"),
    ("a,REAL,1.5", "line 2: p_fake is 1.5; give a number from 0 to 1"),
    ("a,REAL,-0.1", "line 2: p_fake is -0.1"),
    ("a,REAL,high", "line 2: p_fake is 'high', no number"),
    ("a,REAL,", "line 2: neither p_fake nor logit"),
    ("a,REAL,0.5\nb,FAKE,0.5\na,FAKE,0.5", "line 4: the key 'a' is also in .*, line 2"),
    ("a,REAL,0.5\nb,dog,0.5", "line 3: the label 'dog' is neither REAL nor FAKE"),
    ("a,REAL,0.5\nb,,0.5", "line 3: the label None is neither"),
    (",REAL,0.5", "line 2: no key"),
    ("a,REAL", "line 2: 2 values for 3 columns"),
]


@pytest.mark.parametrize(("lines", "expected"), CASES)
def test_a_wrong_row_is_refused_by_its_line(tmp_path: Path, lines: str, expected: str) -> None:
    (tmp_path / "s.csv").write_text(f"key,label,p_fake\n{lines}\n")
    with pytest.raises(UsageError, match=expected):
        run_evaluate(tmp_path / "s.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "options", "expected"),
    [
        (
            ["key,label,score", "a,REAL,0.5"],
            {},
            "no column p_fake or logit, only key, label, score",
        ),
        (["key,p_fake", "a,0.5"], {}, "no column 'label', only key, p_fake"),
        (["key,label,p_fake", "a,REAL,0.5"], {"bundle": "x"}, "--bundle: .* holds scores"),
        (["key,label,p_fake", "a,REAL,0.5"], {"slice": ("hue",)}, "--slice hue: no such column"),
        (["key,label,p_fake", "a,REAL,0.5"], {"split": "val"}, "no such split, it has none"),
        (["key,label,p_fake,width", "a,REAL,0.5,wide"], {}, "line 2: width is 'wide', no number"),
        (["key,label,logit", "a,REAL,inf"], {}, "line 2: logit is inf; give a number that is fin"),
        (
            ["key,label,logit,p_fake", "a,REAL,-2,0.9", "b,FAKE,2,0.4"],
            {},
            "p_fake is not the sigmoid of logit / T",
        ),
    ],
)
def test_a_wrong_table_or_option_is_refused_by_name(
    tmp_path: Path, lines: list[str], options: dict[str, Any], expected: str
) -> None:
    (tmp_path / "s.csv").write_text("\n".join(lines))
    with pytest.raises(CifakeError, match=expected):
        run_evaluate(tmp_path / "s.csv", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_keys_may_be_whole_numbers(tmp_path: Path) -> None:
    scores: dict[str, list[Any]] = {"label": [0, 1], "p_fake": [0.1, 0.9]}
    pq.write_table(pa.table({"key": [1, 20], **scores}), tmp_path / "s.parquet")
    run_evaluate(tmp_path / "s.parquet", tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "predictions")
    assert rows.column("key").to_pylist() == ["1", "20"]
    pq.write_table(pa.table({"key": [0.5, 1.5], **scores}), tmp_path / "f.parquet")
    with pytest.raises(UsageError, match="row 0: the key is of type float; give words or"):
        run_evaluate(tmp_path / "f.parquet", tmp_path / "x")


def test_jsonl_with_other_names_and_a_calibrated_logit(tmp_path: Path) -> None:
    rows = [(f"{n}.jpg", "ai" if n % 2 else "human", (n % 2) * 2 - 1 + n / 50) for n in range(60)]
    lines = [
        json.dumps(
            {"file": f, "y": y, "logit": z, "p_fake": 1 / (1 + np.exp(-z / 2)), "error": None}
        )
        for f, y, z in rows
    ]
    lines.append(json.dumps({"file": "broken.jpg", "y": "ai", "error": "truncated"}))
    (tmp_path / "s.jsonl").write_text("\n".join(lines))
    options = {"path_column": "file", "label_column": "y", "real_name": ("human",)}
    metrics = run_evaluate(tmp_path / "s.jsonl", tmp_path / "out", **options)
    assert (metrics["num_images"], metrics["num_fake"]) == (60, 30)
    assert metrics["temperature"] == pytest.approx(2.0)
    assert metrics["slices"] == {}
    assert metrics["real_vs_real"] is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in folders of class and source, and two that have no label."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for place in ("REAL/cam", "FAKE/gen", "FAKE/other", "unsorted"):
        (root / place).mkdir(parents=True)
        for n in range(2 if place == "unsorted" else 8):
            pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(root / place / f"{n}.png")
    (root / "REAL/cam/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    return root


def test_a_labelled_folder_is_measured_and_its_output_again(folder: Path, tmp_path: Path) -> None:
    options = {"max_error_rate": 1.0, "slice": ("format",)}
    first = run_evaluate(folder, tmp_path / "first", **options)
    assert (first["num_real"], first["num_fake"]) == (8, 16)
    assert {found["value"] for found in first["slices"]["source"]} == {"cam", "gen", "other"}
    rows = pq.read_table(tmp_path / "first" / "predictions").to_pylist()
    assert sum(row["error"] is not None for row in rows) == 1
    score = ScoreConfig(src=str(folder), out=str(tmp_path / "scores"), num_workers=0)
    run_verb(score, time.monotonic())
    scores = {r["key"]: r for r in pq.read_table(tmp_path / "scores" / "scores").to_pylist()}
    assert {row["key"]: row["p_fake"] for row in rows} == {
        key: row["p_fake"] for key, row in scores.items() if row["label"] is not None
    }
    for name in ("first", "scores"):
        again = run_evaluate(tmp_path / name, tmp_path / f"{name}-2", **options)
        for metric in ("num_images", "accuracy", "auroc", "brier", "at_threshold", "slices"):
            assert again[metric] == first[metric], metric
        assert again["nll"] == pytest.approx(first["nll"])
        assert again["temperature"] == pytest.approx(first["temperature"], rel=1e-4)
        assert "built-in cifake (" in (tmp_path / f"{name}-2" / "report.html").read_text()


def test_other_slices_of_a_finished_report_ask_for_a_new_folder(
    folder: Path, tmp_path: Path
) -> None:
    write_score_run(str(folder), tmp_path / "scores")
    metrics = run_evaluate(tmp_path / "scores", tmp_path / "out")
    assert metrics["threshold"] == pytest.approx(THRESHOLD)
    again = run_evaluate(tmp_path / "scores", tmp_path / "out")
    assert again == metrics
    with pytest.raises(RunMismatch, match="slice: not given there, "):
        run_evaluate(tmp_path / "scores", tmp_path / "out", slice=("format",))


def test_scores_without_labels_and_unfinished_runs_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    write_score_run(str(folder / "unsorted"), tmp_path / "scores")
    with pytest.raises(NothingToDo, match="no labelled image"):
        run_evaluate(tmp_path / "scores", tmp_path / "out")
    (tmp_path / "scores" / "_SUCCESS").unlink()
    with pytest.raises(CifakeError, match="the run has not finished"):
        run_evaluate(tmp_path / "scores", tmp_path / "out")
    with pytest.raises(CifakeError, match="no such file or folder"):
        run_evaluate(tmp_path / "nowhere", tmp_path / "out")


def encode_image(value: int, seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 40, (32, 32, 3))
    buffer = io.BytesIO()
    Image.fromarray((noise + value).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """180 images of two cameras and three generators in two files."""
    folder = tmp_path_factory.mktemp("shards")
    values = {"cam1": 20, "cam2": 30, "a": 180, "b": 30, "c": 200}
    rows = [
        {
            "key": f"{source}/{n}",
            "image": {"bytes": encode_image(value, len(source) * 1000 + value * n), "path": None},
            "label": int(len(source) == 1),
            "source": source,
        }
        for n in range(36)
        for source, value in values.items()
    ]
    for name, some in (("a", rows[:100]), ("b", rows[100:])):
        pq.write_table(pa.Table.from_pylist(some), folder / f"{name}.parquet", row_group_size=40)
    return folder


def make_training(shards: Path, run: Path, **options: Any) -> TrainConfig:
    cache = str(shards.parent / "cache")
    common = {"epochs": 2, "batch_size": 16, "num_workers": "0", "cache_dir": cache} | options
    return TrainConfig(shards=str(shards), run=str(run), **common)


def test_unseen_images_are_those_that_no_step_of_the_training_used(
    shards: Path, tmp_path: Path
) -> None:
    options = {"exclude_source": ("b",), "test_fraction": 0.2, "val_fraction": 0.2}
    config = make_training(shards, tmp_path / "run", **options)
    run_verb(config, time.monotonic())
    rows = read_training_rows(config)
    files = {path.name: pq.read_table(path).column("key").to_pylist() for path, _ in rows.groups}
    used = set()
    for group, row in zip(rows.group, rows.row, strict=True):
        path, number = rows.groups[group]
        used.add(files[path.name][number * 40 + row])
    run_evaluate(shards, tmp_path / "report", bundle=str(tmp_path / "run"), unseen=True)
    found = set(pq.read_table(tmp_path / "report" / "predictions").column("key").to_pylist())
    everything = {key for keys in files.values() for key in keys}
    assert found == everything - used
    assert {f"b/{n}" for n in range(36)} < found
    assert len(used) < 0.9 * 144, "some of the others are kept for a test"
    part, bundle = tmp_path / "part.parquet", tmp_path / "bundle"
    pq.write_table(pq.read_table(shards / "a.parquet"), part)
    with pytest.raises(UsageError, match="are not the shards that"):
        run_evaluate(part, tmp_path / "x", bundle=str(tmp_path / "run"), unseen=True)
    table = pq.read_table(shards / "a.parquet")
    one = table.set_column(table.column_names.index("source"), "source", [["a"] * len(table)])
    pq.write_table(one, part)  # without the source that --exclude-source named
    with pytest.raises(UsageError, match="are not the shards that"):
        run_evaluate(part, tmp_path / "x", bundle=str(tmp_path / "run"), unseen=True)
    bundle.symlink_to(tmp_path / "run" / "bundle")
    with pytest.raises(UsageError, match="is not in the RUN of `train`"):
        run_evaluate(shards, tmp_path / "x", bundle=str(bundle), unseen=True)
    with pytest.raises(UsageError, match=r"--exclude-source d: .* has no labelled image of it"):
        read_training_rows(make_training(shards, tmp_path / "y", exclude_source=("d",)))


def test_what_a_training_over_balanced_sources_has_not_seen_is_known(
    shards: Path, tmp_path: Path
) -> None:
    """Its rows are hashed with their sources."""
    options = {"balance_sources": 0.5, "test_fraction": 0.2, "epochs": 1}
    run_verb(make_training(shards, tmp_path / "run", **options), time.monotonic())
    run_evaluate(shards, tmp_path / "report", bundle=str(tmp_path / "run"), unseen=True)
    assert 0 < pq.read_table(tmp_path / "report" / "predictions").num_rows < 180


def test_a_source_that_validates_is_not_left_out(shards: Path, tmp_path: Path) -> None:
    options = {"leave_one_source_out": True, "val_sources": ("b,cam2",), "dry_run": True}
    plan, _ = run_verb(make_training(shards, tmp_path / "run", **options), time.monotonic())
    assert plan["left_out"] == ["a", "c"]


def test_a_detector_without_each_generator_is_measured_on_all_and_resumes(
    shards: Path, tmp_path: Path
) -> None:
    options = {"leave_one_source_out": True, "exclude_source": ("c",), "epochs": 1}
    config = make_training(shards, tmp_path / "run", **options)
    result, code = run_verb(config, time.monotonic())
    assert code == 0
    matrix = json.loads((tmp_path / "run" / "matrix.json").read_text())
    assert [row["left_out"] for row in matrix["rows"]] == [None, "a", "b"]
    assert matrix["sources"] == {"a": "FAKE", "b": "FAKE", "cam1": "REAL", "cam2": "REAL"}
    for row in matrix["rows"]:
        assert set(row["slices"]) == {"a", "b", "c", "cam1", "cam2"}
        metrics = json.loads((tmp_path / "run" / row["folder"] / "report/metrics.json").read_text())
        assert {one["value"]: one for one in metrics["slices"]["source"]} == row["slices"]
        for name, found in row["slices"].items():
            is_unseen = name in ("c", row["left_out"])
            assert (found["num_images"] == 36) == is_unseen, "all of what is left out is unseen"
    with (tmp_path / "run" / "matrix.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 15
    page = (tmp_path / "run" / "matrix.html").read_text()
    assert 'href="without-02/report/report.html"' in page
    assert "--leave-one-source-out" in page
    assert "--exclude-source c" in page, "the whole command"
    assert " †</td>" in page, "few images are marked"
    assert [cell["left_out"] for cell in result["cells"]] == ["a", "b"]
    before = (tmp_path / "run" / "without-01" / "bundle" / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "run" / "without-02" / "report" / "_SUCCESS").unlink()
    again, _ = run_verb(config, time.monotonic())
    assert {**again, "elapsed_s": 0} == {**result, "elapsed_s": 0}
    after = (tmp_path / "run" / "without-01" / "bundle" / "model.safetensors").stat().st_mtime_ns
    assert after == before, "what was finished is kept"


def test_one_generator_makes_no_matrix(shards: Path, tmp_path: Path) -> None:
    options = {"leave_one_source_out": True, "exclude_source": ("a", "b")}
    with pytest.raises(UsageError, match="has 1 FAKE sources to train on, and it takes two"):
        run_verb(make_training(shards, tmp_path / "run", **options), time.monotonic())
