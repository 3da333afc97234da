"""--precision: what auto becomes, that a run keeps it, and that scores say which it was."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cifake_ray.config import EvaluateConfig, ScoreConfig
from cifake_ray.core.models.precision import has_int8
from cifake_ray.core.schema import FOOTER_KEY
from cifake_ray.errors import ResourceError, RunMismatch, UsageError
from cifake_ray.stages import score
from cifake_ray.stages.batch.summary import BatchSummary
from cifake_ray.stages.resources import Node, Resources, read_cpu_flags
from cifake_ray.stages.score import resolve_precision, score_images
from cifake_ray.storage.bundles.built_ins import locate_bundle
from cifake_ray.storage.bundles.bundle import read_bundle_info

BUNDLE = read_bundle_info(locate_bundle(None))
INT8 = BUNDLE.checks["int8"]
VNNI, AMX = {"avx512_vnni", "GenuineIntel"}, {"amx_bf16", "avx512_bf16", "avx512_vnni"}
NOT_HARMLESS = replace(INT8, flips=0.1)
needs_int8 = pytest.mark.skipif(
    not (has_int8() and read_cpu_flags() & {"avx512_vnni", "avx_vnni"}),
    reason="without VNNI torch's sums of 8-bit products overflow, or there is no int8 at all",
)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(score, "read_cpu_flags", lambda: VNNI)


def use_gpus(monkeypatch: pytest.MonkeyPatch, num_gpus: int) -> None:
    def read(device: str) -> Resources:
        return Resources((Node(2, 0 if device == "cpu" else num_gpus),))

    monkeypatch.setattr(score, "read_local_resources", read)


@pytest.mark.parametrize(
    ("flags", "checks", "options", "expected"),
    [
        (VNNI, {"int8": INT8}, {}, "int8"),
        (VNNI, {"int8": INT8, "bf16": INT8}, {}, "int8"),
        (set(), {"int8": INT8}, {}, "float32"),
        ({"avx512f", "avx512_bf16", "GenuineIntel"}, {"bf16": INT8}, {}, "float32"),
        ({"avx512_bf16", "AuthenticAMD"}, {"bf16": INT8}, {}, "bf16"),
        (AMX, {"bf16": INT8}, {}, "bf16"),
        (AMX, {"int8": NOT_HARMLESS, "bf16": INT8}, {}, "bf16"),
        (VNNI, {"int8": NOT_HARMLESS}, {}, "float32"),
        (VNNI, {}, {}, "float32"),
        (VNNI, {"int8": INT8}, {"address": "head:6379"}, "int8"),
        (VNNI, {"int8": INT8}, {"address": "head:6379", "scale_timeout_s": 9.0}, "float32"),
        (VNNI, {"int8": INT8}, {"address": "head:6379", "dry_run": True}, "auto"),
        (VNNI, {"int8": INT8}, {"address": "head:6379", "num_workers": 0}, "int8"),
        (VNNI, {"int8": INT8}, {"address": "gpus:6379"}, "float32"),
        (VNNI, {"int8": INT8}, {"address": "gpus:6379", "dry_run": True}, "auto"),
        (VNNI, {"int8": INT8}, {"address": "gpus:6379", "device": "cpu"}, "int8"),
        (VNNI, {"int8": INT8}, {"device": "cuda"}, "float32"),
        (VNNI, {"int8": NOT_HARMLESS}, {"precision": "int8"}, "int8"),
        (set(), {}, {"precision": "bf16"}, "bf16"),
    ],
)
def test_auto_is_the_fastest_that_the_processor_has_and_the_bundle_allows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: set[str],
    checks: dict[str, Any],
    options: dict[str, Any],
    expected: str,
) -> None:
    monkeypatch.setattr(score, "read_cpu_flags", lambda: flags)
    monkeypatch.setattr(score, "_count_gpus", lambda config: int(config.address == "gpus:6379"))
    use_gpus(monkeypatch, 0)
    config = ScoreConfig(src="s", out="o", **options)
    assert resolve_precision(config, replace(BUNDLE, checks=checks), tmp_path) == expected


def test_gpus_compute_in_float32_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_gpus(monkeypatch, 1)
    assert resolve_precision(ScoreConfig(src="s", out="o"), BUNDLE, tmp_path) == "float32"
    for wanted in ("fp16", "tf32", "bf16"):
        config = ScoreConfig(src="s", out="o", precision=wanted)  # type: ignore[arg-type]
        assert resolve_precision(config, BUNDLE, tmp_path) == wanted


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("fp16", "needs a GPU"), ("tf32", "needs a GPU"), ("int8", "has no ranges for it")],
)
def test_a_precision_that_is_not_there_is_refused_before_anything_is_listed(
    tmp_path: Path, wanted: str, expected: str
) -> None:
    config = ScoreConfig(src="s", out="o", precision=wanted)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"--precision {wanted}.*{expected}.*float32"):
        resolve_precision(config, replace(BUNDLE, checks={}), tmp_path)


def test_the_flags_of_a_processor_are_those_of_its_first_core(tmp_path: Path) -> None:
    core = (
        "processor\t: {}\nvendor_id\t: GenuineIntel\nmodel name\t: X\nflags\t\t: fpu avx512_vnni\n"
    )
    (tmp_path / "cpuinfo").write_text(core.format(0) + "\n" + core.format(1))
    assert read_cpu_flags(tmp_path / "cpuinfo") == {"GenuineIntel", "fpu", "avx512_vnni"}
    assert read_cpu_flags(tmp_path / "none") == set()


def run_score(src: Path, out: Path, **options: Any) -> BatchSummary:
    config = ScoreConfig(src=str(src), out=str(out), num_workers=0, **options)
    bundle = locate_bundle(config.bundle)
    summary = score_images(config, src, out, bundle, lambda _: None, time.monotonic())
    assert isinstance(summary, BatchSummary)
    return summary


def read_p_fake(out: Path) -> np.ndarray:
    rows = pq.read_table(out / "scores").sort_by("key")
    p_fake: np.ndarray = rows["p_fake"].to_numpy()
    return p_fake


def read_footer(out: Path) -> dict[str, Any]:
    footer: dict[str, Any] = json.loads(
        pq.read_metadata(next(out.glob("scores/*.parquet"))).metadata[FOOTER_KEY]
    )
    return footer


@needs_int8
def test_scores_say_in_which_precision_they_are_and_a_run_keeps_it(
    sample_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, fast = tmp_path / "exact", tmp_path / "fast"
    assert run_score(sample_folder, exact, precision="float32").precision == "float32"
    assert run_score(sample_folder, fast).precision == "int8"
    difference = np.abs(read_p_fake(exact) - read_p_fake(fast)).max()
    assert 0 < difference < 0.5  # noise lattices: nothing like the images of the check
    footers = [read_footer(out) for out in (exact, fast)]
    assert [footer["precision"] for footer in footers] == ["float32", "int8"]
    assert [footer["bundle"] for footer in footers] == [
        BUNDLE.fingerprint,
        BUNDLE.checks_fingerprint,
    ]
    # Again, on a machine that would choose another one.
    assert run_score(sample_folder, exact).precision == "float32"
    monkeypatch.setattr(score, "read_cpu_flags", set)
    assert run_score(sample_folder, fast).precision == "int8"
    with pytest.raises(RunMismatch, match="precision: 'int8' there, 'float32' here"):
        run_score(sample_folder, fast, precision="float32")


@needs_int8
def test_a_run_of_before_is_one_in_float32(sample_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_score(sample_folder, out, precision="float32")
    record = json.loads((out / "_run.json").read_text())
    del record["settings"]["precision"]
    (out / "_run.json").write_text(json.dumps(record))
    assert run_score(sample_folder, out).done == 60
    with pytest.raises(RunMismatch, match="precision: 'float32' there, 'int8' here"):
        run_score(sample_folder, out, precision="int8")


@needs_int8
def test_a_processor_that_scores_otherwise_ends_the_run(
    sample_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = replace(INT8, probe=[-logit for logit in INT8.probe])
    wrong = replace(BUNDLE, checks={"int8": check})
    monkeypatch.setattr(score, "read_bundle_info", lambda *_, **__: wrong)
    with pytest.raises(ResourceError, match=r"--precision int8: .* differ by .* from those of"):
        run_score(sample_folder, tmp_path / "out")


def test_a_pin_that_does_not_cover_the_ranges_means_float32(
    sample_folder: Path, tmp_path: Path
) -> None:
    for sha256, expected in ((BUNDLE.fingerprint, "float32"), (BUNDLE.checks_fingerprint, "int8")):
        bundle = read_bundle_info(locate_bundle(None), expect_sha256=sha256)
        config = ScoreConfig(src="s", out="o", expect_sha256=sha256)
        assert resolve_precision(config, bundle, tmp_path) == expected


def test_evaluate_has_the_option_too() -> None:
    config = EvaluateConfig(shards="s", out="o", precision="int8")
    assert config.precision == "int8"
