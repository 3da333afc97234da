"""The verbs as functions and the detector for single images: `from cifake_ray import ...`."""

from __future__ import annotations

import doctest
import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cifake_ray
from cifake_ray import api
from cifake_ray.config import ScoreConfig
from cifake_ray.core.processing.decode_batch import decode_batch
from cifake_ray.errors import ImageError, UsageError


def test_the_names_of_the_package_are_those_it_lists() -> None:
    assert dir(cifake_ray) == cifake_ray.__all__
    assert all(getattr(cifake_ray, name) is not None for name in cifake_ray.__all__)
    with pytest.raises(AttributeError, match="no attribute 'wrong'"):
        cifake_ray.wrong  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = "import cifake_ray, sys; print({'torch', 'ray', 'numpy', 'typer'} & set(sys.modules))"
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert answer.stdout.strip() == "set()"


def test_a_verb_takes_the_keywords_of_its_config_and_checks_them() -> None:
    assert list(inspect.signature(cifake_ray.score).parameters) == [
        field.name for field in fields(ScoreConfig)
    ]
    assert "cifake-ray score" in str(cifake_ray.score.__doc__)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sorce'"):
        cifake_ray.score(sorce="x", out="y")  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="--target-fpr is"):
        cifake_ray.score(src="x", out="y", target_fpr=0.5)
    with pytest.raises(UsageError, match="--dry-run"):
        cifake_ray.train(shards="x", run="y", dry_run=True)


def test_a_detector_takes_bytes_pillow_images_and_arrays_alike(sample_folder: Path) -> None:
    path = next(sample_folder.rglob("*.jpg"))
    detector = cifake_ray.load_detector("cifake")
    image = Image.open(path)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    p_fake = detector.predict([path.read_bytes(), image, pixels], batch_size=2)
    assert p_fake.dtype == np.float32
    assert np.allclose(p_fake, p_fake[0], rtol=1e-5)  # another batch may round otherwise
    assert detector.predict([]).shape == (0,)


def test_a_detector_gives_what_score_writes(sample_folder: Path) -> None:
    from cifake_ray.core.evaluation.calibration import compute_p_fake

    images = [path.read_bytes() for path in sorted(sample_folder.rglob("*.jpg"))]
    detector = cifake_ray.load_detector("cifake")
    decoded = decode_batch(detector.detector.preprocessing, images)
    logit = detector.predict_logit(list(decoded.pixels), batch_size=7)
    expected = compute_p_fake(logit, detector.bundle.calibration.temperature)
    assert np.allclose(detector.predict(images), expected, atol=1e-6)
    assert np.ptp(expected) > 0.1


def test_an_image_that_cannot_be_used_is_named() -> None:
    detector = cifake_ray.load_detector("cifake")
    with pytest.raises(ImageError, match="not_an_image: image 1: no decoder knows"):
        detector.predict([Image.new("L", (8, 8)), b"text"])


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ("photo.jpg", "str"),
        (Path("photo.jpg"), "PosixPath"),
        (np.zeros((8, 8), np.uint8), r"uint8\[8, 8\]"),
        (np.zeros((8, 8, 4), np.uint8), r"uint8\[8, 8, 4\]"),
        (np.zeros((8, 8, 3), np.float32), r"float32\[8, 8, 3\]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_image_is_refused_by_its_kind(wrong: Any, kind: str) -> None:
    with pytest.raises(UsageError, match=f"image 1 is {kind}; give the bytes"):
        cifake_ray.load_detector("cifake").predict([Image.new("L", (8, 8)), wrong])


def test_the_examples_run(
    ray_cluster: None, sample_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").symlink_to(sample_folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    outcome = doctest.testmod(api)
    assert outcome.failed == 0
    assert outcome.attempted >= 9
