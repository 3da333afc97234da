"""Bundles: what is written is what scores later, here and in timm."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cifake_ray.core.calibration import Calibration
from cifake_ray.core.models import Detector, build_detector
from cifake_ray.core.schema import SCHEMA_VERSION
from cifake_ray.errors import BundleError, CifakeError
from cifake_ray.storage.bundle import (
    load_bundle,
    locate_bundle,
    read_bundle_facts,
    read_history,
    write_bundle,
)

CALIBRATION = Calibration(
    temperature=1.5, threshold=0.4, threshold_fpr_1=0.9, threshold_fpr_01=0.99
)
HISTORY = [{"epoch": 1, "val_loss": 0.5}, {"epoch": 2, "val_loss": 0.25}]


def make_detector(architecture: str = "cnn", image_size: int | None = None) -> Detector:
    torch.manual_seed(0)
    return build_detector(architecture, image_size=image_size, fit="crop").eval()


def write(path: Path, detector: Detector, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "training": {"epochs": 2},
        "metrics": {"accuracy": 0.9},
        "history": HISTORY,
        "model_card": "# Card\n",
    }
    write_bundle(path, detector, CALIBRATION, **{**values, **changes})
    return path


def make_images(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (4, size, size, 3), dtype=torch.uint8, generator=generator)


def compute(detector: Detector, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        outputs: torch.Tensor = detector(images)
    return outputs


@pytest.mark.parametrize(("architecture", "size"), [("cnn", 32), ("test_resnet", 48)])
def test_a_bundle_scores_as_the_detector_that_was_written(
    tmp_path: Path, architecture: str, size: int
) -> None:
    detector = make_detector(architecture, None if architecture == "cnn" else size)
    again, facts = load_bundle(write(tmp_path / "b", detector))
    assert torch.equal(compute(again, make_images(size)), compute(detector, make_images(size)))
    assert not again.training
    assert facts.architecture == again.architecture == architecture
    assert facts.preprocessing == again.preprocessing == detector.preprocessing
    assert facts.preprocessing.fit == "crop"
    assert facts.calibration == CALIBRATION
    assert facts.training == {"epochs": 2}
    assert read_history(tmp_path / "b") == HISTORY


def test_a_mean_and_deviation_of_its_own_come_back(tmp_path: Path) -> None:
    detector = make_detector()
    own = replace(detector.preprocessing, mean=(0.1, 0.2, 0.3), std=(0.7, 0.8, 0.9))
    detector.set_preprocessing(own)
    again, facts = load_bundle(write(tmp_path / "b", detector))
    assert facts.preprocessing == own
    assert torch.equal(compute(again, make_images(32)), compute(detector, make_images(32)))


def test_timm_loads_a_bundle_of_its_own_architecture(tmp_path: Path) -> None:
    import timm

    size = 48
    detector = make_detector("test_resnet", size)
    write(tmp_path / "b", detector)
    network = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True).eval()
    images = make_images(size)
    mean, std = (torch.tensor(network.pretrained_cfg[name]) for name in ("mean", "std"))
    normalised = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        outputs = network(normalised)
    assert torch.allclose(outputs, compute(detector, images), atol=1e-5)
    assert list(network.pretrained_cfg["input_size"]) == [3, size, size]
    assert list(network.pretrained_cfg["label_names"]) == ["REAL", "FAKE"]


def edit_config(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((path / "config.json").read_bytes())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def set_architecture(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(architecture=name)


@dataclass(frozen=True)
class Wrong:
    name: str
    damage: Callable[[Path], Any]
    says: str


WRONGS = [
    Wrong("no config", lambda b: (b / "config.json").unlink(), "no config.json"),
    Wrong("no weights", lambda b: (b / "model.safetensors").unlink(), "no model.safetensors"),
    Wrong(
        "cut weights",
        lambda b: os.truncate(b / "model.safetensors", 1000),
        "model.safetensors: damaged",
    ),
    Wrong(
        "empty weights",
        lambda b: (b / "model.safetensors").write_bytes(b""),
        "model.safetensors: damaged",
    ),
    Wrong(
        "other architecture",
        lambda b: edit_config(b, set_architecture("test_resnet")),
        "not the weights of test_resnet",
    ),
    Wrong(
        "unknown architecture",
        lambda b: edit_config(b, set_architecture("no_such_net")),
        "no_such_net",
    ),
    Wrong(
        "other version",
        lambda b: edit_config(b, lambda c: c["cifake_ray"].update(schema_version=9)),
        f"schema_version 9, this program reads {SCHEMA_VERSION}",
    ),
    Wrong("not ours", lambda b: edit_config(b, lambda c: c.pop("cifake_ray")), "not a bundle"),
    Wrong(
        "no threshold",
        lambda b: edit_config(b, lambda c: c["cifake_ray"]["calibration"].pop("threshold")),
        "not a bundle",
    ),
    Wrong(
        "odd preprocessing",
        lambda b: edit_config(
            b, lambda c: c["cifake_ray"]["preprocessing"].update(image_size="big")
        ),
        "not a bundle",
    ),
    Wrong(
        "calibration that is no object",
        lambda b: edit_config(b, lambda c: c["cifake_ray"].update(calibration=[1])),
        "not a bundle",
    ),
]


@pytest.mark.parametrize("wrong", WRONGS, ids=lambda wrong: wrong.name)
def test_a_bundle_that_is_incomplete_or_altered_is_refused_by_name(
    tmp_path: Path, wrong: Wrong
) -> None:
    bundle = write(tmp_path / "b", make_detector())
    wrong.damage(bundle)
    with pytest.raises(BundleError) as failure:
        load_bundle(bundle)
    assert wrong.says in str(failure.value)
    assert str(bundle) in str(failure.value)


def test_a_config_that_is_not_json_is_refused_by_name(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b", make_detector())
    (bundle / "config.json").write_text("{")
    with pytest.raises(CifakeError, match=r"config\.json"):
        load_bundle(bundle)


def test_the_fingerprint_follows_weights_and_config_alone(tmp_path: Path) -> None:
    detector = make_detector()
    first = read_bundle_facts(write(tmp_path / "a", detector)).fingerprint
    assert read_bundle_facts(write(tmp_path / "b", detector)).fingerprint == first
    other_papers = write(
        tmp_path / "c", detector, model_card="# Other\n", metrics={"accuracy": 0.1}, history=[]
    )
    assert read_bundle_facts(other_papers).fingerprint == first

    edit_config(tmp_path / "b", lambda c: c["cifake_ray"]["calibration"].update(threshold=0.41))
    assert read_bundle_facts(tmp_path / "b").fingerprint != first
    with torch.no_grad():
        next(detector.network.parameters()).view(-1)[0] += 1e-3
    assert read_bundle_facts(write(tmp_path / "d", detector)).fingerprint != first


def test_thresholds_are_chosen_by_false_positive_rate(tmp_path: Path) -> None:
    facts = read_bundle_facts(write(tmp_path / "b", make_detector()))
    assert [facts.threshold(fpr) for fpr in (None, 0.01, 0.001)] == [0.4, 0.9, 0.99]


def test_a_bundle_is_found_in_its_run_and_on_its_own(tmp_path: Path) -> None:
    bundle = write(tmp_path / "run" / "bundle", make_detector())
    assert locate_bundle(str(tmp_path / "run")) == bundle
    assert locate_bundle(str(bundle)) == bundle


def test_a_bundle_without_history_has_none(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b", make_detector())
    (bundle / "history.jsonl").unlink()
    assert read_history(bundle) == []


def test_a_write_that_breaks_off_leaves_no_bundle(tmp_path: Path) -> None:
    """config.json comes last, so a bundle that has one is complete."""
    (tmp_path / "b" / "README.md").mkdir(parents=True)  # the file cannot be written
    with pytest.raises(CifakeError):
        write(tmp_path / "b", make_detector())
    with pytest.raises(BundleError, match=r"no config\.json"):
        read_bundle_facts(tmp_path / "b")
