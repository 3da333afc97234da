"""Training starts from other weights: all of them or a refusal, the classifier as said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from cifake_ray.config import TrainConfig
from cifake_ray.core.evaluation.calibration import Calibration
from cifake_ray.core.models.detector import Detector, build_detector
from cifake_ray.core.training.optimizer import build_for_training
from cifake_ray.errors import BundleError, StorageError
from cifake_ray.storage.bundles.pretrained import StartingWeights, load_starting_weights
from cifake_ray.storage.bundles.write_bundle import write_bundle

HEAD = ("fc.bias", "fc.weight")


def make_weights(num_classes: int = 1000, model: str = "test_resnet") -> dict[str, torch.Tensor]:
    torch.manual_seed(11)
    network = timm.create_model(model, num_classes=num_classes)
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def start(weights: Path | None, **settings: Any) -> tuple[Detector, StartingWeights | None]:
    values = {"model": "test_resnet", "image_size": 32, **settings}
    path = None if weights is None else str(weights)
    config = TrainConfig(shards="s", run="r", weights=path, **values)
    torch.manual_seed(0)
    detector = build_for_training(config)
    return detector, load_starting_weights(config, detector)


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    path = tmp_path / "resnet.safetensors"
    save_file(make_weights(), path)
    return path


def test_without_weights_all_are_fresh() -> None:
    detector, taken = start(None)
    assert taken is None
    torch.manual_seed(0)
    fresh = build_detector("test_resnet", image_size=32).network.state_dict()
    assert all(torch.equal(t, fresh[n]) for n, t in detector.network.state_dict().items())


def test_a_file_gives_all_but_a_classifier_of_other_classes(weights_file: Path) -> None:
    detector, taken = start(weights_file)
    given, fresh = make_weights(), start(None)[0].network.state_dict()
    for name, tensor in detector.network.state_dict().items():
        assert torch.equal(tensor, fresh[name] if name in HEAD else given[name]), name
    assert taken is not None
    assert (taken.num_loaded, taken.fresh) == (len(given) - 2, HEAD)
    assert str(taken) == (
        f"{len(given) - 2} tensors from {weights_file}; the classifier is fresh: fc.bias, fc.weight"
    )


def test_a_classifier_of_two_classes_comes_too(tmp_path: Path) -> None:
    save_file(make_weights(2), tmp_path / "two.safetensors")
    detector, taken = start(tmp_path / "two.safetensors")
    given = make_weights(2)
    assert all(torch.equal(t, given[n]) for n, t in detector.network.state_dict().items())
    assert taken is not None
    assert str(taken).endswith("two.safetensors, the classifier too")


def test_weights_without_a_classifier_are_taken(tmp_path: Path) -> None:
    save_file(make_weights(0), tmp_path / "body.safetensors")
    taken = start(tmp_path / "body.safetensors")[1]
    assert taken is not None
    assert taken.fresh == HEAD


@pytest.mark.parametrize("model", ["small_lite0_s2", "small_lite0_s2_residual"])
def test_a_small_lite_takes_its_stages_and_says_what_it_left_out(
    tmp_path: Path, model: str
) -> None:
    given = make_weights(model="tf_efficientnet_lite0")
    save_file(given, tmp_path / "lite0.safetensors", {"architecture": "tf_efficientnet_lite0"})
    detector, taken = start(tmp_path / "lite0.safetensors", model=model)
    for name, tensor in detector.network.state_dict().items():
        own = name.removeprefix("network.")
        if own == "conv_stem.weight":
            torch.testing.assert_close(tensor[:, :3], given[own], rtol=0, atol=0)
            assert not tensor[:, 3:].any()
        elif not own.startswith("classifier."):
            assert torch.equal(tensor, given[own]), name
    assert taken is not None
    kept = ("conv_stem.", "bn1.", "blocks.0.", "blocks.1.")
    num_kept = sum(name.startswith(kept) for name in given)
    assert taken.num_loaded == num_kept
    left_out = len(given) - num_kept - 2  # the classifier is not left out, but fresh
    assert f"(and not {left_out} of later stages)" in str(taken)
    with pytest.raises(BundleError, match=r"the weights of tf_efficientnet_lite0"):
        start(tmp_path / "lite0.safetensors", model="small_lite1")


def test_the_weights_of_the_plain_network_start_one_with_residual(tmp_path: Path) -> None:
    plain = build_detector("small_cnn_w8_d1")
    given = {name: tensor.clone() for name, tensor in plain.network.state_dict().items()}
    save_file(given, tmp_path / "w8.safetensors", {"architecture": "small_cnn_w8_d1"})
    detector, taken = start(tmp_path / "w8.safetensors", model="small_cnn_w8_d1_residual")
    assert taken is not None
    assert (taken.num_loaded, taken.fresh) == (len(given), ())
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(detector.eval()(images), plain.eval()(images))
    with pytest.raises(BundleError, match=r"the weights of small_cnn_w8_d1,"):
        start(tmp_path / "w8.safetensors", model="small_cnn_w16_d1_residual")


def test_a_folder_of_timm_brings_its_own_mean_and_deviation(tmp_path: Path) -> None:
    save_file(make_weights(), tmp_path / "model.safetensors")
    facts = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    config = {"architecture": "test_resnet", "num_classes": 1000, "pretrained_cfg": facts}
    (tmp_path / "config.json").write_text(json.dumps(config))
    detector, taken = start(tmp_path)
    assert taken is not None
    assert taken.fresh == HEAD
    assert detector.preprocessing.mean == (0.1, 0.2, 0.3)
    assert detector.preprocessing.std == (0.4, 0.5, 0.6)
    assert detector.preprocessing.image_size == 32
    assert torch.allclose(detector.scale, 1 / (255 * torch.tensor([0.4, 0.5, 0.6])))


@pytest.mark.parametrize("below", ["bundle", ""])
def test_a_bundle_and_a_run_that_holds_one_are_taken(tmp_path: Path, below: str) -> None:
    trained = build_detector("cnn")
    calibration = Calibration(
        temperature=1.0, threshold=0.5, threshold_fpr_1=0.9, threshold_fpr_01=0.99
    )
    write_bundle(
        tmp_path / "bundle",
        trained,
        calibration,
        training={},
        metrics={},
        history=[],
        model_card="",
    )
    detector, taken = start(tmp_path / below, model="cnn")
    expected = trained.network.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in detector.network.state_dict().items())
    assert taken is not None
    assert taken.fresh == ()


def test_the_digest_is_that_of_the_values_wherever_they_lie(
    weights_file: Path, tmp_path: Path
) -> None:
    save_file(make_weights(), tmp_path / "again.safetensors", metadata={"format": "pt"})
    other = make_weights()
    other[next(iter(other))].view(-1)[0] += 1
    save_file(other, tmp_path / "other.safetensors")
    paths = (weights_file, tmp_path / "again.safetensors", tmp_path / "other.safetensors")
    digests = [taken.digest for path in paths if (taken := start(path)[1])]
    assert digests[0] == digests[1] != digests[2]


def change(values: dict[str, torch.Tensor], how: str) -> None:
    name = next(iter(values))
    if how == "missing":
        del values[name]
    elif how == "unknown":
        values["extra.weight"] = torch.zeros(2)
    else:
        values[name] = torch.zeros(3, 3)


@pytest.mark.parametrize("how", ["missing", "unknown", "of another shape"])
def test_weights_that_do_not_fit_are_refused_with_their_names(tmp_path: Path, how: str) -> None:
    values = make_weights()
    name = "extra.weight" if how == "unknown" else next(iter(values))
    change(values, how)
    save_file(values, tmp_path / "odd.safetensors")
    with pytest.raises(BundleError, match=rf"1 {how} \({name}\); another --model"):
        start(tmp_path / "odd.safetensors")


def test_the_folder_of_another_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "test_vit"}')
    with pytest.raises(BundleError, match="the weights of test_vit; give --model test_vit"):
        start(tmp_path)


@pytest.mark.parametrize("text", ['{"model_type": "vit"}', "[]", "{", '{"architecture": 3'])
def test_a_folder_that_names_no_architecture_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BundleError, match="names no architecture of timm"):
        start(tmp_path)


def test_a_folder_without_weights_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no config\.json; --weights takes a \.safetensors file"):
        start(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "test_resnet"}')
    with pytest.raises(BundleError, match=r"no model\.safetensors"):
        start(tmp_path)


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.safetensors").write_bytes(b"weights, honestly")
    with pytest.raises(BundleError, match="damaged"):
        start(tmp_path / "odd.safetensors")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none\.safetensors: No such file"):
        start(tmp_path / "none.safetensors")


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "test_resnet"}')
    torch.save(make_weights(), tmp_path / "pytorch_model.bin")
    with pytest.raises(BundleError, match="a pickle, which may hold code"):
        start(tmp_path)
    with pytest.raises(BundleError, match="a pickle, which may hold code"):
        start(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("name", ["", "pytorch_model.bin", "checkpoint.pth.tar", "epoch-3"])
@pytest.mark.parametrize("around", [None, "state_dict", "model", "net"])
def test_a_pickle_is_taken_with_permission(tmp_path: Path, name: str, around: str | None) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "test_resnet"}')
    weights = make_weights(2)
    saved = weights if around is None else {around: weights, "epoch": 3}
    torch.save(saved, tmp_path / (name or "pytorch_model.bin"))
    if name:
        with pytest.raises(BundleError, match=r"a pickle, .*--allow-pickle"):
            start(tmp_path / name)
    detector, taken = start(tmp_path / name, allow_pickle=True)
    assert taken is not None
    assert taken.num_loaded == len(weights)
    assert all(torch.equal(t, weights[n]) for n, t in detector.network.state_dict().items())


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "backbone.", "module.model.", "_orig_mod."]
)
@pytest.mark.parametrize("head", ["", "head."])
def test_what_a_program_puts_before_every_name_is_dropped_and_said(
    tmp_path: Path, prefix: str, head: str
) -> None:
    """Some put the classifier beside the backbone."""
    weights = make_weights(2)
    named = {(prefix if n not in HEAD or not head else "") + n: t for n, t in weights.items()}
    save_file(named, tmp_path / "w.safetensors")
    detector, taken = start(tmp_path / "w.safetensors")
    assert all(torch.equal(t, weights[n]) for n, t in detector.network.state_dict().items())
    assert f"w.safetensors (named {prefix}...), the classifier too" in str(taken)
    save_file(weights, tmp_path / "plain.safetensors")
    plain = start(tmp_path / "plain.safetensors")[1]
    assert plain is not None
    assert taken is not None
    assert plain.digest == taken.digest


def test_two_networks_in_one_file_are_refused(tmp_path: Path) -> None:
    weights = make_weights(2)
    both = {f"{side}.{n}": t.clone() for side in ("model", "module") for n, t in weights.items()}
    save_file(both, tmp_path / "w.safetensors")
    with pytest.raises(BundleError, match=r"unknown \(model\."):
        start(tmp_path / "w.safetensors")


# --- timm's hub ----------------------------------------------------------------------------------


def test_the_hub_out_of_reach_is_said_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BundleError, match=r"cannot be fetched from timm's hub .*--weights FILE"):
        start(None, pretrained=True)


def test_weights_of_the_hub_come_with_a_fresh_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def create_offline(name: str, *, pretrained: bool, **options: Any) -> Any:
        network = create(name, pretrained=False, **options)
        if pretrained:
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.fill_(0.5)
        return network

    monkeypatch.setattr(timm, "create_model", create_offline)
    detector, taken = start(None, pretrained=True)
    assert taken is not None
    assert taken.fresh == HEAD
    for name, parameter in detector.network.named_parameters():
        assert bool((parameter == 0.5).all()) == (name not in HEAD), name


def test_an_architecture_that_the_hub_does_not_hold_is_refused() -> None:
    config = TrainConfig(shards="s", run="r", model="coatnet_0_224", pretrained=True)
    with pytest.raises(BundleError, match="timm has no weights of coatnet_0_224"):
        load_starting_weights(config, build_detector("cnn"))


def test_both_sources_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="--weights and --pretrained: give one"):
        TrainConfig(shards="s", run="r", weights="w", pretrained=True, model="resnet18")
    with pytest.raises(ValueError, match="--pretrained: timm has no weights of cnn"):
        TrainConfig(shards="s", run="r", pretrained=True)


def test_position_embeddings_are_resampled_to_the_input(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    given = make_weights(model="test_vit")
    save_file(given, path)
    whole = timm.create_model("test_vit")
    size = whole.patch_embed.img_size[0] // 2
    detector, _ = start(path, model="test_vit", image_size=size)
    taken = detector.network.state_dict()
    expected = timm.layers.resample_abs_pos_embed(
        given["pos_embed"],
        list(detector.network.patch_embed.grid_size),
        num_prefix_tokens=whole.num_prefix_tokens,
    )
    assert taken["pos_embed"].shape != given["pos_embed"].shape
    assert torch.equal(taken["pos_embed"], expected)
    assert torch.equal(taken["blocks.0.attn.qkv.weight"], given["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("model", ["small_vit_tiny", "small_vit_tiny_residual"])
def test_positions_of_a_network_with_residual_are_resampled_too(tmp_path: Path, model: str) -> None:
    given = build_detector(model, image_size=64).network.state_dict()
    save_file(given, tmp_path / "vit.safetensors")
    detector, _ = start(
        tmp_path / "vit.safetensors", model="small_vit_tiny_residual", image_size=32
    )
    name, before = "blocks.0.attn.qkv.weight", "network." * model.endswith("_residual")
    taken = detector.network.state_dict()[f"network.{name}"]
    assert torch.equal(taken, given[f"{before}{name}"])


def test_positions_of_no_square_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    given = make_weights(model="test_vit")
    save_file({**given, "pos_embed": given["pos_embed"][:, :-2].contiguous()}, path)
    with pytest.raises(BundleError, match="pos_embed"):
        start(path, model="test_vit", image_size=160)
