"""export BUNDLE model.onnx: a model that computes what its bundle does, or no file."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result
from upath import UPath

from cifake_ray import cli, load_detector
from cifake_ray.config import ExportConfig
from cifake_ray.core.evaluation.calibration import Calibration, compute_p_fake
from cifake_ray.core.models import onnx_model
from cifake_ray.core.models.detector import Detector, build_detector
from cifake_ray.core.models.onnx_model import load_onnx
from cifake_ray.core.models.precision import make_probe
from cifake_ray.core.processing import compare_onnx as compare_module
from cifake_ray.core.processing.compare_onnx import compare_onnx
from cifake_ray.core.processing.score import predict_logit
from cifake_ray.errors import CifakeError, UsageError
from cifake_ray.storage.bundles.built_ins import locate_bundle
from cifake_ray.storage.bundles.bundle import load_bundle
from cifake_ray.storage.bundles.write_bundle import write_bundle
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.runs import export_onnx as export_module
from cifake_ray.storage.runs.export_onnx import export_detector
from cifake_ray.version import __version__

BUILT_IN = locate_bundle(None)
README = Path(__file__).parents[3] / "README.md"
CALIBRATION = Calibration(
    temperature=1.7, threshold=0.45, threshold_fpr_1=0.9, threshold_fpr_01=None
)


@pytest.fixture
def onnx_packages() -> None:
    for name in onnx_model.PACKAGES:
        pytest.importorskip(name)


@cache
def encode_built_in() -> bytes:
    detector, info = load_bundle(BUILT_IN)
    return onnx_model.encode_onnx(detector, info.calibration.temperature, {"threshold": "0.5"})


@pytest.fixture
def encoded(onnx_packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in detector is encoded once for all tests that use this."""
    monkeypatch.setattr(export_module, "encode_onnx", lambda *_: encode_built_in())


def write(path: Path, architecture: str, size: int, flip: bool, card: str = "# Card\n") -> Path:
    torch.manual_seed(0)
    detector = build_detector(architecture, image_size=size, fit="crop").eval()
    values = {**detector.preprocessing.to_dict(), "test_time_flip": flip}
    detector.set_preprocessing(type(detector.preprocessing).from_dict(values))
    for module in detector.modules():  # fresh ones are nearly the identity
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    write_bundle(path, detector, CALIBRATION, training={}, metrics={}, history=[], model_card=card)
    return path


def export(bundle: AnyPath, file: AnyPath, **options: Any) -> Any:
    config = ExportConfig(src=str(bundle), file=str(file), **options)
    return export_detector(bundle, file, config)[1]


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["export", *map(str, words)])


def read_properties(data: bytes) -> dict[str, str]:
    import onnxruntime

    found: dict[str, str] = onnxruntime.InferenceSession(data).get_modelmeta().custom_metadata_map
    return found


@pytest.mark.usefixtures("onnx_packages")
@pytest.mark.parametrize(
    ("architecture", "size", "flip"),
    [
        (None, 32, True),
        ("resnet18", 64, False),
        ("vit_tiny_patch16_224", 48, True),
    ],
)
def test_the_model_computes_what_the_bundle_does(
    tmp_path: Path, architecture: str | None, size: int, flip: bool
) -> None:
    bundle: AnyPath = BUILT_IN
    if architecture is not None:
        bundle = write(tmp_path / "bundle", architecture, size, flip)
    file = tmp_path / "new" / "model.onnx"
    found = export(bundle, file)
    assert found.images > 3
    assert found.largest_logit_difference < 1e-3
    assert found.verdicts_changed == 0
    detector, info = load_bundle(bundle)
    assert detector.preprocessing.test_time_flip == flip
    run_model = load_onnx(file.read_bytes())
    images = np.random.default_rng(1).integers(0, 256, (7, size, size, 3), np.uint8)
    expected = predict_logit(detector, torch.from_numpy(images), "cpu")
    assert np.ptp(expected) > 0
    for count in (1, 4, 7):
        logit, p_fake = run_model(images[:count])
        assert (logit.dtype, p_fake.dtype) == (np.float32, np.float32)
        assert np.allclose(logit, expected[:count], atol=1e-4)
        temperature = info.calibration.temperature
        assert np.allclose(p_fake, compute_p_fake(expected[:count], temperature), atol=1e-5)


@pytest.mark.usefixtures("onnx_packages")
def test_the_model_says_what_it_is_and_nothing_of_this_machine(tmp_path: Path) -> None:
    card = "---\nlicense: cc-by-4.0\nlibrary_name: timm\n---\n\nlicense: of something else\n"
    bundle, file = write(tmp_path / "b", "cnn", 32, True, card), tmp_path / "m.onnx"
    export(bundle, file)
    info = load_bundle(bundle)[1]
    data = file.read_bytes()
    assert read_properties(data) == {
        "architecture": "cnn",
        "bundle_sha256": info.fingerprint,
        "cifake_ray_version": __version__,
        "image_size": "32",
        "fit": "crop",
        "test_time_flip": "True",
        "temperature": "1.7",
        "threshold": "0.45",
        "threshold_fpr_0.01": "0.9",
        "license": "cc-by-4.0",
    }
    assert str(tmp_path).encode() not in data
    assert b".py" not in data
    export(bundle, file, overwrite=True)
    assert file.read_bytes() == data


@pytest.mark.usefixtures("onnx_packages")
@pytest.mark.parametrize("card", [None, "# Card\n", "---\ntags: [x]\n---\nlicense: no\n"])
def test_a_license_that_the_card_does_not_name_is_not_made_up(
    tmp_path: Path, card: str | None
) -> None:
    bundle = write(tmp_path / "b", "cnn", 32, False, card or "")
    if card is None:
        (bundle / "README.md").unlink()
    export(bundle, tmp_path / "m.onnx")
    assert "license" not in read_properties((tmp_path / "m.onnx").read_bytes())


@pytest.mark.usefixtures("encoded")
def test_a_run_is_exported_and_the_command_says_how_far_it_agrees(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copytree(str(BUILT_IN), tmp_path / "run" / "bundle")
    result = run(tmp_path / "run", tmp_path / "m.onnx")
    assert result.exit_code == 0, result.output
    assert "Detector small_cnn written to" in result.stdout
    assert "uint8[N, 32, 32, 3]" in result.stdout
    assert "agrees with the bundle on 259 made-up images: logit within" in result.stdout
    result = run(tmp_path / "run", tmp_path / "model", "--format", "onnx", "--json")
    record = json.loads(result.stdout)
    assert record["images"] == 259
    assert 0 <= record["largest_p_fake_difference"] < 1e-4
    assert 0 <= record["largest_logit_difference"] < 1e-3
    assert record["verdicts_changed"] == 0
    assert (tmp_path / "model").read_bytes() == (tmp_path / "m.onnx").read_bytes()


@pytest.mark.usefixtures("onnx_packages")
def test_the_example_of_the_readme_gives_what_the_detector_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export(BUILT_IN, tmp_path / "model.onnx")
    pixels = make_probe(96)[8].numpy()
    Image.fromarray(pixels).save("photo.jpg")
    section = README.read_text().partition("### ONNX\n")[2].partition("\n## ")[0]
    lines = [line[4:] for line in section.splitlines() if line.startswith("    ") or not line]
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    expected = load_detector("cifake").predict([Path("photo.jpg").read_bytes()])
    assert np.allclose(names["p_fake"], expected, atol=1e-5)
    assert names["is_fake"].tolist() == (expected >= load_detector("cifake").threshold).tolist()


@pytest.mark.usefixtures("encoded")
def test_a_bucket_takes_it_too(tmp_path: Path) -> None:
    file = UPath("memory://models/m.onnx")
    export(BUILT_IN, file)
    export(BUILT_IN, tmp_path / "m.onnx")
    assert file.read_bytes() == (tmp_path / "m.onnx").read_bytes()
    with pytest.raises(UsageError, match="--overwrite"):
        export(BUILT_IN, file)


@pytest.mark.usefixtures("encoded")
@pytest.mark.parametrize("output", ["logit", "p_fake", "nan"])
def test_a_model_that_differs_from_its_bundle_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    def load_wrong(data: bytes) -> onnx_model.RunModel:
        run_model = load_onnx(data)

        def run_wrong(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            logit, p_fake = run_model(images)
            if output == "nan":
                return logit * np.float32(np.nan), p_fake
            return logit + 0.01 * (output == "logit"), p_fake + 0.01 * (output == "p_fake")

        return run_wrong

    monkeypatch.setattr(export_module, "load_onnx", load_wrong)
    with pytest.raises(CifakeError, match=r"small_cnn: the ONNX model differs .* on 259 images"):
        export(BUILT_IN, tmp_path / "new" / "m.onnx")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "m.onnx").write_bytes(b"old")
    with pytest.raises(CifakeError, match="differs"):
        export(BUILT_IN, tmp_path / "m.onnx", overwrite=True)
    assert (tmp_path / "m.onnx").read_bytes() == b"old"


def test_verdicts_that_change_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = load_bundle(BUILT_IN)[0]
    logit = predict_logit(detector, make_probe(32, 2), "cpu")
    p_fake = compute_p_fake(logit, 1.0)

    def run_model(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return logit, p_fake - np.float32(1e-4)

    found = compare_onnx(
        run_model, detector, temperature=1.0, threshold=float(p_fake[0]), batch_sizes=(2,)
    )
    assert (found.images, found.verdicts_changed) == (2, 1)
    assert found.largest_p_fake_difference == pytest.approx(1e-4, rel=0.01)
    monkeypatch.setattr(compare_module, "MAX_P_FAKE_DIFFERENCE", 1e-5)
    with pytest.raises(CifakeError, match="1e-05 are allowed"):
        compare_onnx(run_model, detector, temperature=1.0, threshold=0.5, batch_sizes=(2,))


@pytest.mark.usefixtures("onnx_packages")
def test_a_network_that_torch_cannot_export_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_logit(self: Detector, images: torch.Tensor) -> torch.Tensor:
        logit = self(images)[:, 0]
        return logit if logit.sum() > 0 else -logit

    monkeypatch.setattr(Detector, "find_logit", find_logit)
    with pytest.raises(CifakeError, match="small_cnn: torch cannot export it as ONNX"):
        export(BUILT_IN, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("onnx_packages")
def test_what_onnx_runtime_cannot_read_is_an_error_of_ours() -> None:
    with pytest.raises(CifakeError, match=r"ONNX Runtime [\d.]+ cannot run the model"):
        load_onnx(b"no model")


@pytest.mark.usefixtures("onnx_packages")
def test_a_network_beyond_what_one_file_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_model, "MAX_WEIGHT_BYTES", 1_000_000)
    result = run(BUILT_IN, tmp_path / "m.onnx")
    assert result.exit_code == 2
    assert "small_cnn has 0.0 GB of weights" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", onnx_model.PACKAGES)
def test_a_missing_package_is_named_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    origin = type("Spec", (), {"origin": "x"})
    monkeypatch.setattr(onnx_model, "find_spec", lambda name: None if name == missing else origin())
    result = run(BUILT_IN, tmp_path / "m.onnx")
    assert result.exit_code == 2
    assert f'needs the package {missing}: pip install "cifake-ray[onnx]"' in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_wrong_inputs_are_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "check_onnx_packages", lambda: None)
    scores, damaged = tmp_path / "scores", tmp_path / "damaged"
    scores.mkdir()
    pq.write_table(pa.table({"key": ["a"], "logit": [0.5]}), scores / "part-00000.parquet")
    shutil.copytree(str(BUILT_IN), damaged)
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[:-4])
    pickled = tmp_path / "pickled"
    shutil.copytree(str(BUILT_IN), pickled)
    (pickled / "model.safetensors").rename(pickled / "model.pt")
    old = tmp_path / "old.onnx"
    old.write_bytes(b"old")
    new = tmp_path / "m.onnx"
    cases: list[tuple[list[str | Path], int, str]] = [
        ([scores, new], 4, "scores: no config.json; give the bundle folder"),
        ([tmp_path / "nothing", new], 4, "nothing: no config.json"),
        ([BUILT_IN, tmp_path / "m.csv"], 4, "or for a bundle a file that ends in .onnx"),
        ([damaged, new], 4, "model.safetensors: damaged"),
        ([pickled, new], 4, "give --allow-pickle"),
        ([BUILT_IN, old], 2, "old.onnx exists; choose another file, or give --overwrite"),
        ([BUILT_IN, "-", "--format", "onnx"], 2, "a detector is written to an .onnx file"),
        ([BUILT_IN, new, "--columns", "key"], 2, "--sort, --top and - are for scores"),
        (
            [BUILT_IN, new, "--where", "key = a"],
            2,
            "--sort, --top and - are for scores",
        ),
    ]
    for words, code, expected in cases:
        result = run(*words)
        assert (result.exit_code, expected in result.stderr) == (code, True), result.output
    assert old.read_bytes() == b"old"
    assert not new.exists()


@pytest.mark.usefixtures("encoded")
def test_a_target_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run(BUILT_IN, tmp_path / "file" / "m.onnx")
    assert result.exit_code == 4
    assert "file" in result.stderr
    (tmp_path / "m.onnx").mkdir()
    result = run(BUILT_IN, tmp_path / "m.onnx", "--overwrite")
    assert result.exit_code == 4
    assert "m.onnx" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "m.onnx"]
