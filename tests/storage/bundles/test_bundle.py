"""Bundles: what is written is what scores later, here and in timm."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save
from wrong_values import WRONG_KINDS, WRONG_VALUES, list_places, put

from cifake_ray.config import EvaluateConfig, ScoreConfig, StoreConfig
from cifake_ray.core.evaluation.calibration import Calibration, compute_p_fake
from cifake_ray.core.evaluation.metrics import compute_metrics
from cifake_ray.core.evaluation.precision_check import PrecisionCheck
from cifake_ray.core.imaging.training_domain import ANY_SIDE, TrainingDomain
from cifake_ray.core.models.detector import Detector, build_detector
from cifake_ray.core.schema import SCHEMA_VERSION
from cifake_ray.errors import BundleError, CifakeError, UsageError
from cifake_ray.report.text import model_card
from cifake_ray.storage.bundles.built_ins import locate_bundle
from cifake_ray.storage.bundles.bundle import load_bundle, read_bundle_info
from cifake_ray.storage.bundles.write_bundle import write_bundle
from cifake_ray.storage.io.files import write_bytes
from cifake_ray.storage.io.paths import AnyPath, resolve_path
from cifake_ray.storage.runs.train_run import read_history

CALIBRATION = Calibration(
    temperature=1.5, threshold=0.4, threshold_fpr_1=0.9, threshold_fpr_01=0.99
)
DOMAIN = TrainingDomain(sides=(32, 64), formats=("JPEG", "PNG"), jpeg_qualities=(75, 95))
HISTORY = [{"epoch": 1, "val_loss": 0.5}, {"epoch": 2, "val_loss": 0.25}]


def make_detector(architecture: str = "cnn", image_size: int | None = None) -> Detector:
    torch.manual_seed(0)
    return build_detector(architecture, image_size=image_size, fit="crop").eval()


def write(path: Path, detector: Detector, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "calibration": CALIBRATION,
        "domain": DOMAIN,
        "training": {"epochs": 2},
        "metrics": {"accuracy": 0.9},
        "history": HISTORY,
        "model_card": "# Card\n",
    }
    write_bundle(path, detector, **{**values, **changes})
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
    assert facts.domain == DOMAIN
    assert facts.training == {"epochs": 2}
    assert read_history(tmp_path / "b") == HISTORY


def test_a_rate_without_a_threshold_is_refused_when_it_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "b", make_detector(), calibration=replace(CALIBRATION, threshold_fpr_01=None))
    facts = read_bundle_info(tmp_path / "b")
    assert (facts.threshold(None), facts.threshold(0.01)) == (0.4, 0.9)
    with pytest.raises(UsageError, match=r"--target-fpr 0\.001: .* p_fake = 1\.0; leave it out"):
        facts.threshold(0.001)


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


@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        ("cnn", None),
        ("small_cnn", 48),
        ("small_cnn_w64_d3", None),
        ("small_lite1", 32),
        ("small_vit_tiny", 32),
        ("small_resnet18_residual", 32),
        ("fusion", 48),
        ("test_vit", 96),
        ("test_resnet", 64),
    ],
)
def test_the_python_of_the_card_gives_what_score_gives(
    tmp_path: Path, architecture: str, size: int | None
) -> None:
    torch.manual_seed(0)
    detector = build_detector(architecture, image_size=size).eval()
    is_flipped = architecture in ("cnn", "test_vit")
    detector.set_preprocessing(replace(detector.preprocessing, test_time_flip=is_flipped))
    card = model_card(
        name="x",
        architecture=architecture,
        num_parameters=1,
        trained_on="x",
        domain=None,
        preprocessing=detector.preprocessing.to_dict(),
        training={},
        calibration=CALIBRATION,
        metrics=compute_metrics(
            np.array([1.0, -1.0]), np.array([1, 0]), temperature=1, threshold=0.5, num_bootstrap=0
        ),
    )
    bundle = write(tmp_path / "b", detector, model_card=card)
    if architecture == "fusion":  # as in bundles of before, which do not name the size for timm
        edit_config(bundle, lambda config: config.pop("model_args"))
    check_card(bundle, tmp_path)


def test_the_python_of_the_built_in_card_gives_what_score_gives(tmp_path: Path) -> None:
    bundle = locate_bundle(None)
    assert isinstance(bundle, Path)
    check_card(bundle, tmp_path)


def check_card(bundle: Path, tmp_path: Path) -> None:
    """Run the Python of a card on a photo, and compare with what `score` gives."""
    photo = tmp_path / "photo.png"
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photo)
    text = (bundle / "README.md").read_text()
    snippet = text.split("```python\n")[1].split("```")[0]
    snippet = snippet.replace("BUNDLE", str(bundle)).replace("IMAGE", str(photo))
    names: dict[str, Any] = {}
    exec(snippet, names)
    detector, info = load_bundle(bundle)
    pixels = torch.from_numpy(detector.preprocessing.load_image(photo.read_bytes())[None])
    with torch.inference_mode():
        logit = detector.find_logit(pixels).numpy()
    expected = float(compute_p_fake(logit, info.calibration.temperature)[0])
    assert names["p_fake"] == pytest.approx(expected, abs=1e-5)


def edit_config(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((path / "config.json").read_bytes())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def test_a_bundle_need_not_say_what_it_learned_from(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b", make_detector(), domain=None)
    assert read_bundle_info(bundle).domain is None
    edit_config(bundle, lambda config: config["cifake_ray"].pop("domain"))  # an older one
    assert read_bundle_info(bundle).domain is None


def test_a_detector_of_crops_takes_images_that_hold_one(tmp_path: Path) -> None:
    """Such a bundle said nothing of sides at first; another may not leave them out."""
    bundle = write(tmp_path / "b", make_detector())
    edit_config(bundle, lambda config: config["cifake_ray"]["domain"].update(sides=None))
    with pytest.raises(BundleError, match="sides"):
        read_bundle_info(bundle)
    crops = {"fit": "crops", "num_crops": 4}
    edit_config(bundle, lambda config: config["cifake_ray"]["preprocessing"].update(crops))
    assert read_bundle_info(bundle).domain == replace(DOMAIN, sides=(32, ANY_SIDE))


@pytest.mark.parametrize(
    "domain",
    [{}, "JPEG", {"sides": [64, 32], "formats": ["JPEG"], "jpeg_qualities": None}],
)
def test_an_impossible_domain_is_refused(tmp_path: Path, domain: object) -> None:
    bundle = write(tmp_path / "b", make_detector())
    edit_config(bundle, lambda config: config["cifake_ray"].update(domain=domain))
    with pytest.raises(BundleError, match="not a bundle of cifake-ray"):
        read_bundle_info(bundle)


def set_architecture(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(architecture=name)


def append(path: Path, data: bytes) -> None:
    with open(path / "model.safetensors", "ab") as file:
        file.write(data)


def make_weights(**changes: Any) -> bytes:
    """One float in safetensors; as many bytes follow the header as it says."""
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}
    header = json.dumps({"a": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(tensor["data_offsets"][1])


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
    Wrong("weights with a tail", lambda b: append(b, b"more"), "model.safetensors: damaged"),
    Wrong(
        "weights without their tail",
        lambda b: os.truncate(
            b / "model.safetensors", (b / "model.safetensors").stat().st_size - 1
        ),
        "model.safetensors: damaged",
    ),
    Wrong(
        "no safetensors",
        lambda b: (b / "model.safetensors").write_bytes(b"<!DOCTYPE html>" * 9999),
        "model.safetensors: damaged",
    ),
    Wrong(
        "a header without end",
        lambda b: (b / "model.safetensors").write_bytes(
            (50_000).to_bytes(8, "little") + b"[" * 50_000
        ),
        "model.safetensors: damaged",
    ),
    *(
        Wrong(
            f"a header with {changes}",
            lambda b, changes=changes: (b / "model.safetensors").write_bytes(
                make_weights(**changes)
            ),
            "model.safetensors: damaged",
        )
        for changes in (
            {"data_offsets": [4, 8]},
            {"data_offsets": [0, 8]},
            {"shape": [-1]},
            {"shape": [2**62, 8]},
            {"dtype": "F33"},
        )
    ),
    Wrong(
        "a temperature of nothing",
        lambda b: edit_config(b, lambda c: c["cifake_ray"]["calibration"].update(temperature=0)),
        "temperature is 0",
    ),
    Wrong(
        "a threshold in words",
        lambda b: edit_config(b, lambda c: c["cifake_ray"]["calibration"].update(threshold="x")),
        "not a bundle",
    ),
    Wrong(
        "an architecture that lies elsewhere",
        lambda b: edit_config(b, set_architecture("hf-hub:someone/model")),
        "not the weights of hf-hub",
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
    for read in (read_bundle_info, load_bundle):  # noticed before any work is scheduled
        with pytest.raises(BundleError) as failure:
            read(bundle)
        assert wrong.says in str(failure.value)
        assert str(bundle) in str(failure.value)
        assert "\n" not in str(failure.value)


READ_WITHOUT_TORCH = """
import sys
from pathlib import Path
from cifake_ray.errors import BundleError
from cifake_ray.storage.bundles.bundle import read_bundle_info
for path in sys.argv[1:]:
    try:
        print(read_bundle_info(Path(path)).architecture)
    except BundleError as error:
        print(error)
    assert "torch" not in sys.modules
"""


def test_weights_are_checked_without_torch(tmp_path: Path) -> None:
    data = (write(tmp_path / "whole", make_detector()) / "model.safetensors").read_bytes()
    bundles = [tmp_path / "whole"]
    for number, damaged in enumerate((data[:-1], data + b"x", b"", data[:8] + b"]" + data[9:])):
        bundles.append(write(tmp_path / str(number), make_detector()))
        (bundles[-1] / "model.safetensors").write_bytes(damaged)
    process = subprocess.run(
        [sys.executable, "-c", READ_WITHOUT_TORCH, *map(str, bundles)],
        capture_output=True,
        text=True,
        check=False,
    )
    whole, *refused = process.stdout.splitlines()
    assert (process.returncode, whole, len(refused)) == (0, "cnn", 4), process.stderr
    for bundle, line in zip(bundles[1:], refused, strict=True):
        assert line.startswith(f"{bundle / 'model.safetensors'}: damaged")


def test_a_config_that_is_not_json_is_refused_by_name(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b", make_detector())
    (bundle / "config.json").write_text("{")
    with pytest.raises(CifakeError, match=r"config\.json"):
        load_bundle(bundle)


def test_a_header_of_other_tensors_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    """A bundle of an older version or of timm does not say in its weights whose they are."""
    bundle = write(tmp_path / "b", make_detector())
    state = make_detector("test_resnet", 32).network.state_dict()
    (bundle / "model.safetensors").write_bytes(save(state))
    with pytest.raises(BundleError, match=r"model\.safetensors: not the weights of cnn"):
        load_bundle(bundle)


def test_the_bundle_in_the_box_is_read_and_loaded() -> None:
    detector, facts = load_bundle(locate_bundle(None))
    assert facts == read_bundle_info(locate_bundle(None))
    assert facts.domain == TrainingDomain(
        sides=(32, 32), formats=("JPEG",), jpeg_qualities=(75, 75)
    )
    assert detector.architecture == facts.architecture


# --- which bundle it is --------------------------------------------------------------------------


def test_the_expected_bundle_is_read_and_no_other(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b", make_detector())
    found = read_bundle_info(bundle).fingerprint
    assert read_bundle_info(bundle, expect_sha256=found.upper()).fingerprint == found
    assert load_bundle(bundle, expect_sha256=found)[1].fingerprint == found
    for read in (read_bundle_info, load_bundle):
        with pytest.raises(BundleError) as failure:
            read(bundle, expect_sha256="0" * 64)
        assert found in str(failure.value)
        assert "0" * 64 in str(failure.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_bundle_that_is_replaced_after_the_start_is_refused(tmp_path: Path, name: str) -> None:
    bundle = write(tmp_path / "b", make_detector())
    facts = read_bundle_info(bundle)
    torch.manual_seed(1)
    other = build_detector("cnn", fit="resize")
    new = write(tmp_path / "new", other)
    (new / name).replace(bundle / name)
    with pytest.raises(BundleError, match=facts.fingerprint):
        load_bundle(bundle, expect_sha256=facts.fingerprint)


@pytest.mark.parametrize("value", ["", "abc", "g" * 64, "0" * 63, "0" * 65, f"{'0' * 64}\n"])
def test_an_expected_sha256_is_64_hex_digits(value: str) -> None:
    with pytest.raises(ValueError, match="--expect-sha256"):
        ScoreConfig(src="a", out="b", expect_sha256=value)
    with pytest.raises(ValueError, match="--expect-sha256"):
        EvaluateConfig(shards="a", out="b", expect_sha256=value)


# --- weights that could run code -----------------------------------------------------------------


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


def replace_weights(bundle: Path, name: str, state: Any) -> None:
    (bundle / "model.safetensors").unlink()
    if name.endswith(".pkl"):
        (bundle / name).write_bytes(pickle.dumps(state, protocol=2))  # torch's own protocol
    else:
        torch.save(state, bundle / name)


NAMES = ["pytorch_model.bin", "model.pt", "model.PTH", "last.ckpt", "model.pkl"]


@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_never_runs_code_with_or_without_permission(tmp_path: Path, name: str) -> None:
    bundle, mark = write(tmp_path / "b", make_detector()), tmp_path / "ran"
    replace_weights(bundle, name, {"weight": Bomb(mark)})
    for read in (read_bundle_info, load_bundle):
        with pytest.raises(BundleError, match=rf"{name}, a pickle.*--allow-pickle"):
            read(bundle)
    with pytest.raises(BundleError, match=f"{name}: damaged, or not weights alone"):
        load_bundle(bundle, allow_pickle=True)
    assert not mark.exists()
    with open(bundle / name, "rb") as file:  # it is one that works
        assert file.read(2) in (b"PK", b"\x80\x02")


@pytest.mark.parametrize("name", NAMES[:4])
def test_a_pickle_of_weights_alone_is_taken_with_permission(tmp_path: Path, name: str) -> None:
    detector = make_detector()
    bundle = write(tmp_path / "b", detector)
    safe = read_bundle_info(bundle)
    replace_weights(bundle, name, detector.network.state_dict())
    again, facts = load_bundle(bundle, allow_pickle=True)
    assert torch.equal(compute(again, make_images(32)), compute(detector, make_images(32)))
    assert facts.is_pickle
    assert not safe.is_pickle
    assert facts.fingerprint != safe.fingerprint
    with open(bundle / name, "ab") as file:
        file.write(b"x")
    assert read_bundle_info(bundle, allow_pickle=True).fingerprint != facts.fingerprint


def test_safetensors_go_before_pickles_and_two_pickles_are_one_too_many(tmp_path: Path) -> None:
    bundle, mark = write(tmp_path / "b", make_detector()), tmp_path / "ran"
    for name in ("a.pt", "b.pt"):
        torch.save({"weight": Bomb(mark)}, bundle / name)
    assert load_bundle(bundle, allow_pickle=True)[1].weights_name == "model.safetensors"
    (bundle / "model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"a\.pt, b\.pt"):
        load_bundle(bundle, allow_pickle=True)
    assert not mark.exists()


@pytest.mark.parametrize("state", [[1, 2], {"a": 1}, {1: torch.zeros(2)}, torch.zeros(3), None])
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, state: Any) -> None:
    bundle = write(tmp_path / "b", make_detector())
    replace_weights(bundle, "model.pt", state)
    with pytest.raises(BundleError, match=r"model\.pt"):
        load_bundle(bundle, allow_pickle=True)


@pytest.mark.parametrize("data", [b"", b"junk", b"PK\3\4 no archive", b"\x80\x02."])
def test_a_damaged_pickle_is_refused(tmp_path: Path, data: bytes) -> None:
    bundle = write(tmp_path / "b", make_detector())
    (bundle / "model.safetensors").unlink()
    (bundle / "model.pt").write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.pt: damaged"):
        load_bundle(bundle, allow_pickle=True)


# --- in a bucket ---------------------------------------------------------------------------------


@pytest.fixture
def store() -> Iterator[AnyPath]:
    place = resolve_path("memory://bundles")
    yield place
    place.fs.store.clear()  # type: ignore[union-attr]


def test_a_bundle_in_a_store_is_found_written_and_loaded(store: AnyPath) -> None:
    detector = make_detector()
    write(store / "run" / "bundle", detector)  # type: ignore[arg-type]
    place = locate_bundle(f"{store}/run", StoreConfig())
    assert place == store / "run" / "bundle" == locate_bundle(f"{store}/run/bundle")
    again, facts = load_bundle(place)
    assert torch.equal(compute(again, make_images(32)), compute(detector, make_images(32)))
    assert read_history(place) == HISTORY
    with pytest.raises(BundleError, match=facts.fingerprint):
        load_bundle(place, expect_sha256="0" * 64)
    (place / "model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"no model\.safetensors"):
        read_bundle_info(place)
    write_bytes(place / "model.pt", b"x")
    with pytest.raises(BundleError, match="--allow-pickle"):
        read_bundle_info(place)
    with pytest.raises(BundleError, match=r"no config\.json"):
        read_bundle_info(store / "nowhere")


def test_a_damaged_history_is_named(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b", make_detector())
    (bundle / "history.jsonl").write_text('{"epoch": 1}\n{"epo')
    with pytest.raises(BundleError, match=r"history\.jsonl: damaged"):
        read_history(bundle)


def test_the_fingerprint_follows_weights_and_config_alone(tmp_path: Path) -> None:
    detector = make_detector()
    first = read_bundle_info(write(tmp_path / "a", detector)).fingerprint
    assert read_bundle_info(write(tmp_path / "b", detector)).fingerprint == first
    other_papers = write(
        tmp_path / "c", detector, model_card="# Other\n", metrics={"accuracy": 0.1}, history=[]
    )
    assert read_bundle_info(other_papers).fingerprint == first

    edit_config(tmp_path / "b", lambda c: c["cifake_ray"]["calibration"].update(threshold=0.41))
    assert read_bundle_info(tmp_path / "b").fingerprint != first
    with torch.no_grad():
        next(detector.network.parameters()).view(-1)[0] += 1e-3
    assert read_bundle_info(write(tmp_path / "d", detector)).fingerprint != first


def test_thresholds_are_chosen_by_false_positive_rate(tmp_path: Path) -> None:
    facts = read_bundle_info(write(tmp_path / "b", make_detector()))
    assert [facts.threshold(fpr) for fpr in (None, 0.01, 0.001)] == [0.4, 0.9, 0.99]


def test_a_bundle_is_found_in_its_run_and_on_its_own(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
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
        read_bundle_info(tmp_path / "b")


@pytest.mark.parametrize("wrong", WRONG_VALUES)
def test_any_value_of_a_config_may_be_any_other(tmp_path: Path, wrong: str) -> None:
    bundle = write(tmp_path / "b", make_detector())
    record = json.loads((bundle / "config.json").read_bytes())
    places = [p for p in list_places(record) if p[:1] in ((), ("architecture",), ("cifake_ray",))]
    for place in places:  # pixels of any size would take long
        (bundle / "config.json").write_text(json.dumps(put(record, place, WRONG_VALUES[wrong])))
        try:
            info = read_bundle_info(bundle)
        except BundleError:
            continue
        assert all(0 <= threshold <= 1 for threshold in info.list_thresholds().values())
        if place == ("architecture",):
            with pytest.raises(BundleError, match="not the weights of"):
                load_bundle(bundle)


@pytest.mark.parametrize("name", ["hf-hub:timm/x", "local-dir:/etc", "../../x", "", "\x00"])
def test_a_name_of_a_network_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    bundle = write(tmp_path / "b", make_detector())
    edit_config(bundle, set_architecture(name))
    weights = load((bundle / "model.safetensors").read_bytes())
    (bundle / "model.safetensors").write_bytes(save(weights))  # they no longer name theirs
    monkeypatch.setattr(socket, "socket", None)
    with pytest.raises(BundleError, match="not the weights of"):
        load_bundle(bundle)


def test_a_name_of_a_network_of_any_size_takes_no_memory(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b", make_detector())
    edit_config(bundle, set_architecture("small_cnn_w9999_d99"))  # 350 GB
    weights = load((bundle / "model.safetensors").read_bytes())
    (bundle / "model.safetensors").write_bytes(save(weights))
    with pytest.raises(BundleError, match="not the weights of small_cnn_w9999_d99"):
        load_bundle(bundle)


@pytest.mark.parametrize("kind", WRONG_KINDS.values(), ids=WRONG_KINDS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.pt"])
def test_a_file_of_a_bundle_may_be_no_file(
    tmp_path: Path, name: str, kind: Callable[[Path], Any]
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "victim").write_bytes(b"mine")
    (tmp_path / "a").mkdir()
    bundle = write(tmp_path / "a" / "b", make_detector())
    if name == "model.pt":
        (bundle / "model.safetensors").unlink()
    (bundle / name).unlink(missing_ok=True)
    kind(bundle / name)
    with pytest.raises(CifakeError, match="a/b"):
        load_bundle(bundle, allow_pickle=True)


def test_a_bundle_in_the_cache_of_a_hub_is_one_of_links(tmp_path: Path) -> None:
    bundle = write(tmp_path / "blobs", make_detector())
    (tmp_path / "snapshot").mkdir()
    for path in bundle.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert load_bundle(tmp_path / "snapshot")[1].fingerprint == read_bundle_info(bundle).fingerprint


CHECKS = {
    "int8": PrecisionCheck(
        images=1000,
        flips=0.001,
        accuracy_loss=-0.001,
        auroc_loss=0.0,
        max_p_fake_difference=0.1,
        speedup=3.5,
        probe=[0.5, -0.5],
        ranges={"activation_post_process_0": [-1.0, 1.0]},
    )
}


def test_precisions_are_read_as_they_were_written_and_pinned_apart(tmp_path: Path) -> None:
    plain = read_bundle_info(write(tmp_path / "a", make_detector()))
    info = read_bundle_info(write(tmp_path / "b", make_detector(), checks=CHECKS))
    assert plain.checks == {}
    assert info.checks == CHECKS
    assert info.fingerprint == plain.fingerprint == info.identify("float32")
    assert info.identify("int8") not in (plain.fingerprint, "")
    assert read_bundle_info(tmp_path / "b", expect_sha256=info.fingerprint).checks == {}
    whole = read_bundle_info(tmp_path / "b", expect_sha256=info.identify("int8"))
    assert whole.checks == CHECKS
    with pytest.raises(BundleError, match=info.identify("int8")):
        read_bundle_info(tmp_path / "b", expect_sha256="0" * 64)
    (tmp_path / "b" / "precision.json").write_bytes(b'{"precisions": {}}')
    with pytest.raises(BundleError, match="expected is"):
        read_bundle_info(tmp_path / "b", expect_sha256=info.identify("int8"))


@pytest.mark.parametrize("wrong", WRONG_VALUES)
def test_any_value_of_the_precisions_may_be_any_other(tmp_path: Path, wrong: str) -> None:
    bundle = write(tmp_path / "b", make_detector(), checks=CHECKS)
    path = bundle / "precision.json"
    record = json.loads(path.read_bytes())
    for place in list_places(record):
        path.write_text(json.dumps(put(record, place, WRONG_VALUES[wrong])))
        try:
            info = read_bundle_info(bundle)
        except BundleError:
            continue
        for check in info.checks.values():
            str(check)
            assert check.is_harmless in (True, False)
