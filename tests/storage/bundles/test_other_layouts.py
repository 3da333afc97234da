"""Classifiers of others as bundles: their own preprocessing, and never a guess what FAKE is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data as photographs

from cifake_ray import load_detector
from cifake_ray.config import EvaluateConfig, ExportConfig, ScoreConfig
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.imaging.resize import Resize
from cifake_ray.core.labels import read_class_name
from cifake_ray.core.schema import FAKE, REAL
from cifake_ray.errors import BundleError, RunMismatch, UsageError
from cifake_ray.pipeline import run_verb
from cifake_ray.storage.bundles.bundle import load_bundle, read_bundle_info
from cifake_ray.storage.io.paths import resolve_path

HALF = [0.5, 0.5, 0.5]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
VIT = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "id2label": {"0": "artificial", "1": "human"},
    "label2id": {"artificial": 0, "human": 1},
}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 32, "width": 32},
    "resample": 2,
    "image_mean": MEAN,
    "image_std": STD,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real photographs of odd sizes, one of them turned by its EXIF."""
    folder = tmp_path_factory.mktemp("photographs")
    for label, name, box in (
        ("REAL", "astronaut", (0, 0, 511, 402)),
        ("REAL", "chelsea", (0, 0, 451, 300)),
        ("FAKE", "coffee", (7, 3, 600, 400)),
        ("FAKE", "rocket", (0, 0, 97, 427)),
    ):
        (folder / label).mkdir(exist_ok=True)
        image = Image.fromarray(getattr(photographs, name)()).crop(box)
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "rocket" else 1
        image.save(folder / label / f"{name}.png", exif=exif)
    return folder


def write_timm(folder: Path, **changes: Any) -> torch.nn.Module:
    """Write a tiny network in the layout of timm's `save_for_hf`, and return it."""
    import timm

    cfg = {
        "input_size": [3, 48, 48],
        "interpolation": "bilinear",
        "crop_pct": 0.8,
        "crop_mode": "center",
        "mean": MEAN,
        "std": STD,
        "num_classes": 2,
        "label_names": ["fake", "real"],
    }
    config = {"architecture": "test_resnet", "num_classes": 2, "model_args": {}}
    config |= {name: changes.pop(name) for name in list(changes) if name in config}
    config["pretrained_cfg"] = {**cfg, **changes}
    torch.manual_seed(3)
    network = timm.create_model("test_resnet", num_classes=config["num_classes"])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), folder / "model.safetensors")
    return network.eval()


def score(src: Path, out: Path, bundle: Path | str, **options: Any) -> dict[str, dict[str, Any]]:
    import pyarrow.parquet as pq

    run_verb(ScoreConfig(src=str(src), out=str(out), bundle=str(bundle), **options), 0.0)
    return {row["key"]: row for row in pq.read_table(out / "scores").to_pylist()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crop_pct": 1.0, "interpolation": "bicubic"},
        {"crop_mode": "squash", "interpolation": "lanczos"},
        {"crop_pct": 0.9, "label_names": ["Real photo", "AI-generated"]},
    ],
)
def test_a_classifier_of_timm_gives_what_timm_gives(
    tmp_path: Path, images: Path, changes: dict[str, Any]
) -> None:
    from timm.data import create_transform, resolve_data_config

    network = write_timm(tmp_path / "net", **changes)
    cfg = json.loads((tmp_path / "net" / "config.json").read_text())["pretrained_cfg"]
    transform = create_transform(**resolve_data_config(cfg | {"input_size": (3, 48, 48)}))
    rows = score(images, tmp_path / "out", tmp_path / "net")
    assert len(rows) == 4
    for key, row in rows.items():
        from PIL import ImageOps

        image = ImageOps.exif_transpose(Image.open(images / key)).convert("RGB")
        with torch.inference_mode():
            outputs = network(transform(image)[None])[0]
        fake = 0 if "label_names" not in changes else 1
        assert row["logit"] == pytest.approx(float(outputs[fake] - outputs[1 - fake]), abs=1e-4)
        assert row["p_fake"] == pytest.approx(float(outputs.softmax(-1)[fake]), abs=1e-5)
        assert row["is_fake"] == (row["p_fake"] >= 0.5)


def test_a_run_keeps_which_class_is_fake(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, out = tmp_path / "net", tmp_path / "out"
    write_timm(net, label_names=["a", "b"])
    with pytest.raises(UsageError, match=r"classes 0 \(a\), 1 \(b\): which one is FAKE"):
        score(images, out, net)
    ahead = score(images, out, net, fake_class="b")
    assert "FAKE is its output 1 (b); it has no calibration" in capsys.readouterr().err
    assert json.loads((out / "_run.json").read_text())["config"]["fake_class"] == "b"
    assert score(images, out, net, fake_class="1") == ahead
    with pytest.raises(RunMismatch, match="bundle"):
        score(images, out, net, fake_class="0")
    back = score(images, tmp_path / "back", net, fake_class="A")
    for key, row in back.items():
        assert row["logit"] == pytest.approx(-ahead[key]["logit"], abs=1e-5)
    with pytest.raises(UsageError, match="--fake-class 2"):
        score(images, out, net, fake_class="2")
    evaluated = EvaluateConfig(
        shards=str(images), out=str(tmp_path / "report"), bundle=str(net), fake_class="b"
    )
    assert run_verb(evaluated, 0.0)[0].done == 4
    assert load_detector(str(net), fake_class="b").predict(
        [(images / key).read_bytes() for key in ahead]
    ) == pytest.approx([row["p_fake"] for row in ahead.values()], abs=1e-5)


def test_one_output_needs_to_be_told(tmp_path: Path, images: Path) -> None:
    network = write_timm(tmp_path / "net", num_classes=1, label_names=["fake"])
    pixels = np.array(Image.open(images / "REAL" / "chelsea.png"))
    with pytest.raises(UsageError, match="one output"):
        load_detector(str(tmp_path / "net"))
    logits = {
        said: float(
            load_detector(str(tmp_path / "net"), fake_class=said).predict_logit([pixels])[0]
        )
        for said in ("0", "1", "fake")
    }
    assert logits["1"] == logits["fake"] == -logits["0"] != 0
    detector, _ = load_bundle(tmp_path / "net", fake_class="1")
    batch = torch.from_numpy(detector.preprocessing.fit_pixels(pixels))[None]
    with torch.inference_mode():
        inputs = ((batch.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(
            0, 3, 1, 2
        )
        assert logits["1"] == pytest.approx(float(network(inputs)), abs=1e-4)


def test_a_hub_is_read_as_a_folder_is(tmp_path: Path) -> None:
    write_timm(tmp_path / "net")
    place = resolve_path("memory://hub/owner/net")
    for path in (tmp_path / "net").iterdir():
        (place / path.name).parent.mkdir(parents=True, exist_ok=True)
        (place / path.name).write_bytes(path.read_bytes())
    there, here = read_bundle_info(place), read_bundle_info(tmp_path / "net")
    assert there.fingerprint == here.fingerprint
    load_bundle(place, expect_sha256=here.fingerprint)
    with pytest.raises(BundleError, match="sha256"):
        load_bundle(place, expect_sha256="0" * 64)
    flipped = read_bundle_info(place, fake_class="1").fingerprint
    assert flipped != here.fingerprint


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"num_classes": 1000, "label_names": None}, "1000 classes; a detector has two"),
        ({"num_classes": 3, "label_names": ["a", "b", "c"]}, "3 classes; a detector has two"),
        ({"label_names": ["real"]}, r"2 classes with the names \['real'\]"),
        ({"crop_mode": "border"}, "crop_mode 'border'"),
        ({"crop_pct": 1.1}, "crop_pct 1.1"),
        ({"input_size": [3, 48, 64]}, r"input_size \[3, 48, 64\]"),
        ({"input_size": [1, 48, 48]}, r"input_size \[1, 48, 48\]"),
        ({"interpolation": "random"}, "resample='random'"),
        ({"mean": [123.0, 117.0, 104.0]}, "mean="),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path"),
        ({"model_args": {"in_chans": 1}}, "in_chans"),
    ],
)
def test_what_cannot_be_reproduced_is_named(
    tmp_path: Path, changes: dict[str, Any], error: str
) -> None:
    write_timm(tmp_path / "net", **changes)
    with pytest.raises(BundleError, match=error):
        read_bundle_info(tmp_path / "net")


def test_other_weights_and_pickles_are_refused(tmp_path: Path) -> None:
    write_timm(tmp_path / "net", model_args={"block_args": 1})
    with pytest.raises(BundleError, match="not the weights of test_resnet"):
        load_bundle(tmp_path / "net")
    write_timm(tmp_path / "pickle")
    (tmp_path / "pickle" / "model.safetensors").rename(tmp_path / "pickle" / "model.pt")
    with pytest.raises(BundleError, match=r"no model.safetensors"):
        read_bundle_info(tmp_path / "pickle", allow_pickle=True)
    with pytest.raises(UsageError, match="says itself"):
        load_detector("cifake", fake_class="1")
    write_timm(tmp_path / "good")
    config = ExportConfig(src=str(tmp_path / "good"), file=str(tmp_path / "net.onnx"))
    with pytest.raises(UsageError, match="a classifier of timm"):
        run_verb(config, 0.0)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        *((name, FAKE) for name in ("Fake", "ai", "AI-generated", "artificial", "Deepfake")),
        *((name, FAKE) for name in ("ai_gen", "synthetic image", "fake photo", "AIGC", "1_fake")),
        *((name, REAL) for name in ("Real", "human", "hum", "photo", "natural", "Realism")),
        *((name, REAL) for name in ("authentic", "nature", "0_real", "Real Image", "Photograph")),
        *((name, None) for name in ("LABEL_0", "not ai", "non-fake", "real_fake", "cat", "")),
        *((name, None) for name in ("realistic", "unreal", "painting", "no AI", "human or AI")),
    ],
)
def test_names_of_classes(name: str, label: int | None) -> None:
    assert read_class_name(name) == label


def write_transformers(
    folder: Path, processor: dict[str, Any] | None = None, **changes: Any
) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**VIT, **changes}))
    (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **(processor or {})}))
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("processor", "size", "resize"),
    [
        ({}, 32, (32, False, "bilinear")),
        ({"size": 32}, 32, (32, False, "bilinear")),
        ({"do_center_crop": True, "crop_size": 24}, 24, (32, False, "bilinear")),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}},
            224,
            (256, True, "bilinear"),
        ),
        (
            {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 384, "resample": 3}
            | {"image_processor_type": None},
            384,
            (384, False, "bicubic"),
        ),
        (
            {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}}
            | {"crop_size": {"height": 224, "width": 224}, "resample": 1},
            224,
            (256, True, "lanczos"),
        ),
        ({"image_processor_type": "SiglipImageProcessorFast"}, 32, (32, False, "bilinear")),
    ],
)
def test_processors_are_obeyed(
    tmp_path: Path, processor: dict[str, Any], size: int, resize: tuple[Any, ...]
) -> None:
    write_transformers(tmp_path / "net", processor)
    found = read_bundle_info(tmp_path / "net")
    side, keeps_aspect, resample = resize
    assert found.preprocessing == Preprocessing(
        image_size=size,
        fit="resize",
        mean=tuple(MEAN),
        std=tuple(STD),
        resize=Resize(
            side=side, keeps_aspect=keeps_aspect, resample=resample, crop_rounding="down"
        ),
    )
    assert Preprocessing.from_dict(found.preprocessing.to_dict()) == found.preprocessing
    assert (found.fake_class, found.architecture) == ("0", "ViTForImageClassification")


@pytest.mark.parametrize(
    ("processor", "changes", "error"),
    [
        ({"image_processor_type": "MobileViTImageProcessor"}, {}, "MobileViTImageProcessor"),
        ({"do_normalize": False}, {}, "do_normalize False"),
        ({"do_pad": True}, {}, "do_pad"),
        ({"rescale_factor": 1 / 127.5}, {}, "rescale_factor"),
        ({"size": {"height": 32, "width": 48}}, {}, "squares and shortest_edge"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, {}, "squares and shortest_edge"),
        ({"size": {"shortest_edge": 32}}, {}, "without do_center_crop"),
        ({"do_center_crop": True, "crop_size": 64}, {}, "crop_size 64"),
        ({"resample": 9}, {}, "9 is not a valid"),
        ({"image_mean": None}, {}, "mean="),
        ({}, {"id2label": {"0": "a", "1": "b", "2": "c"}}, "3 classes"),
        ({}, {"id2label": {"1": "real", "2": "fake"}}, "keys must be 0 and 1"),
        ({}, {"id2label": ["real", "fake"]}, "is no object"),
        ({}, {"architectures": ["ViTModel"]}, "ForImageClassification"),
        ({}, {"architectures": None}, "ForImageClassification"),
        ({}, {"problem_type": "multi_label_classification"}, "multi_label"),
        ({}, {"num_channels": 1}, "num_channels 1"),
    ],
)
def test_what_a_processor_does_besides_is_named(
    tmp_path: Path, processor: dict[str, Any], changes: dict[str, Any], error: str
) -> None:
    write_transformers(tmp_path / "net", processor, **changes)
    with pytest.raises(BundleError, match=error):
        read_bundle_info(tmp_path / "net")


def test_labels_that_say_nothing_are_asked_for(tmp_path: Path) -> None:
    for number, names in enumerate((None, {"0": "LABEL_0", "1": "LABEL_1"}, {"0": "ai", "1": "x"})):
        write_transformers(tmp_path / f"{number}", id2label=names)
        with pytest.raises(UsageError, match="--fake-class 0 or 1"):
            read_bundle_info(tmp_path / f"{number}")
        assert read_bundle_info(tmp_path / f"{number}", fake_class="1").fake_class == "1"
    (tmp_path / "0" / "preprocessor_config.json").unlink()
    with pytest.raises(BundleError, match=r"no preprocessor_config.json"):
        read_bundle_info(tmp_path / "0")


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.parametrize("kind", ["ViT", "ConvNext"])
def test_a_classifier_of_transformers_gives_what_its_pipeline_gives(
    tmp_path: Path, images: Path, transformers: Any, kind: str
) -> None:
    torch.manual_seed(5)
    labels = {"id2label": {0: "Real", 1: "AI"}, "label2id": {"Real": 0, "AI": 1}}
    if kind == "ViT":
        sizes = {name: VIT[name] for name in list(VIT)[2:8]}
        network = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **labels))
        processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    else:
        sizes = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
        config = transformers.ConvNextConfig(**sizes, **labels)
        network = transformers.ConvNextForImageClassification(config)
        processor = transformers.ConvNextImageProcessorPil(size={"shortest_edge": 65}, resample=3)
    network.eval().save_pretrained(tmp_path / "net")
    processor.save_pretrained(tmp_path / "net")
    pipe = transformers.pipeline(
        "image-classification", model=network, image_processor=processor, function_to_apply="none"
    )
    keys = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
    expected = {}
    for key in keys:
        found = {each["label"]: each["score"] for each in pipe(str(images / key))}
        expected[key] = found["AI"] - found["Real"]
    detector = load_detector(str(tmp_path / "net"))
    logits = detector.predict_logit([(images / key).read_bytes() for key in keys])
    assert logits == pytest.approx([expected[key] for key in keys], abs=1e-4)
    assert np.std(logits) > 1e-3, "the images must make a difference"
    if kind == "ViT":  # in a worker too
        rows = score(images, tmp_path / "out", tmp_path / "net")
        assert [rows[key]["logit"] for key in keys] == pytest.approx(logits, abs=1e-4)
        config = json.loads((tmp_path / "net" / "config.json").read_text())
        (tmp_path / "net" / "config.json").write_text(json.dumps({**config, "hidden_size": 2**20}))
        with pytest.raises(BundleError, match="not the weights of ViTForImageClassification"):
            load_bundle(tmp_path / "net")
        (tmp_path / "net" / "config.json").write_text(
            json.dumps({**config, "num_hidden_layers": 10**9})
        )
        with pytest.raises(BundleError, match=r"more than .* parameters, the file has"):
            load_bundle(tmp_path / "net")
        resized = {**config, "intermediate_size": config["intermediate_size"] - 1}
        (tmp_path / "net" / "config.json").write_text(json.dumps(resized))
        with pytest.raises(BundleError, match=r"mismatched_keys: .*mlp"):
            load_bundle(tmp_path / "net")
        shutil.rmtree(tmp_path / "net")
