"""Networks for small images: their stems keep the pixels, their names are enough to build them."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from scipy.ndimage import median_filter
from torch import nn

from cifake_ray.config import TrainConfig
from cifake_ray.core.models.detector import build_detector, find_head, list_architectures
from cifake_ray.core.models.onnx_model import encode_onnx, load_onnx
from cifake_ray.core.models.precision import use_precision
from cifake_ray.core.models.small_networks import (
    DESCRIPTIONS,
    FUSION,
    Fusion,
    WithResidual,
    build_small,
    find_median,
    find_stem,
    fit_state,
)
from cifake_ray.core.training.model_cost import count_cost
from cifake_ray.core.training.optimizer import make_optimizer
from cifake_ray.errors import UsageError


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_each_takes_small_images_and_is_listed(name: str) -> None:
    detector = build_detector(name).eval()
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    with torch.inference_mode():
        assert detector(images).shape == (2, 2)
    assert detector.preprocessing.image_size == 32
    assert list_architectures(name)[name] == DESCRIPTIONS[name]


def test_the_small_cnn_has_the_parameters_it_promises_and_no_paths() -> None:
    assert build_detector("small_cnn").num_parameters == 450_594
    with pytest.raises(ValueError, match="--drop-path: small_cnn has no paths"):
        build_detector("small_cnn", drop_path=0.1)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("small_cnn", [48, 96, 128, 128, 128]),
        ("small_cnn_w128_d2", [48, 96, 128, 128, 128]),
        ("small_cnn_w64", [24, 48, 64, 64, 64]),
        ("small_cnn_d1", [48, 96, 128, 128]),
        ("small_cnn_w10_d3", [4, 8, 10, 10, 10, 10]),
    ],
)
def test_the_name_of_a_small_cnn_says_how_wide_and_deep_it_is(
    name: str, channels: list[int]
) -> None:
    network = build_small(name, 32, 0.0)
    found = [layer.out_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert found == channels


@pytest.mark.parametrize("name", ["small_cnn_w0", "small_cnn_", "small_cnn_d2_w64", "small_cnn_x"])
def test_another_name_of_a_small_cnn_is_none(name: str) -> None:
    with pytest.raises(ValueError, match=r"no such architecture; did you mean .*small_cnn"):
        build_detector(name)


@pytest.mark.parametrize(
    ("name", "side"),
    [("small_resnet18", 4), ("small_resnet50", 4), ("small_convnext_atto", 4)],
)
def test_the_stem_leaves_more_of_an_image_than_timm_does(name: str, side: int) -> None:
    network = build_small(name, 32, 0.0).eval()
    with torch.inference_mode():
        features = network.forward_features(torch.zeros(1, 3, 32, 32))  # type: ignore[operator]
    assert features.shape[-2:] == (side, side)


def test_the_patches_of_a_vit_are_four_pixels() -> None:
    network = build_small("small_vit_tiny", 32, 0.0).eval()
    with torch.inference_mode():
        features = network.forward_features(torch.zeros(1, 3, 32, 32))  # type: ignore[operator]
    assert features.shape[1] == 1 + (32 // 4) ** 2


def test_another_size_is_taken_or_refused() -> None:
    detector = build_detector("small_resnet18", image_size=48).eval()
    assert detector(torch.zeros(1, 48, 48, 3, dtype=torch.uint8)).shape == (1, 2)
    with pytest.raises(ValueError, match="--image-size 33: small_vit_tiny takes multiples of 4"):
        build_detector("fusion", image_size=33)


def test_fusion_rests_on_both_networks() -> None:
    torch.manual_seed(0)
    detector = build_detector("fusion").eval()
    network = detector.network
    assert isinstance(network, Fusion)
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    whole = detector(images)
    for part in (network.vit, network.cnn):
        hook = part.register_forward_hook(lambda module, given, features: 0 * features)
        assert not torch.allclose(detector(images), whole)
        hook.remove()
    assert torch.equal(detector(images), whole)


def test_every_weight_of_fusion_learns() -> None:
    detector = build_detector("fusion")
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    nn.functional.cross_entropy(detector(images), torch.tensor([0, 1, 0, 1])).backward()
    without = [n for n, p in detector.network.named_parameters() if p.grad is None]
    assert without == []


def test_the_head_of_fusion_is_found_whole() -> None:
    network = build_detector("fusion").network
    assert find_head(network) is network.get_submodule("head")
    config = TrainConfig(shards="s", run="r", model="fusion", layer_decay=0.5)
    with pytest.raises(ValueError, match="timm knows no layers of fusion"):
        make_optimizer(network, config)


@pytest.mark.parametrize("name", [FUSION[0], "small_resnet18", "fusion"])
def test_paths_are_dropped_where_asked(name: str) -> None:
    def has_paths(drop_path: float) -> bool:
        modules = build_detector(name, drop_path=drop_path).network.modules()
        return any(type(module).__name__ == "DropPath" for module in modules)

    assert has_paths(0.3)
    assert not has_paths(0.0)


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (17, 6)])
def test_the_median_of_each_window_is_scipys(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2, 3, *shape)).astype(np.float32)
    expected = median_filter(images, size=(1, 1, 3, 3), mode="nearest")
    np.testing.assert_array_equal(find_median(torch.from_numpy(images)).numpy(), expected)


@pytest.mark.parametrize(
    ("name", "num_parameters", "side"),
    [
        ("small_lite0", 700_994, 8),
        ("small_lite0_s4", 254_146, 8),
        ("small_lite1_s3_stride1", 0, 32),
    ],
)
def test_a_small_lite_is_the_first_stages_of_timms(
    name: str, num_parameters: int, side: int
) -> None:
    network = build_small(name, 128, 0.0).eval()
    assert num_parameters in (0, sum(each.numel() for each in network.parameters()))
    with torch.inference_mode():
        features = network.forward_features(torch.zeros(1, 3, 128, 128))
    assert features.shape[-1] == side
    whole = timm.create_model(f"efficientnet_{name.split('_')[1]}", bn_eps=1e-3).eval()
    own, theirs = network.state_dict(), fit_state(network, whole.state_dict())
    body = {key for key in own if not key.startswith("classifier.")}
    assert body == theirs.keys() - {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("name", ["small_lite0", "small_cnn", "small_vit_tiny"])
def test_a_residual_changes_nothing_until_it_is_trained(name: str) -> None:
    plain, detector = build_detector(name).eval(), build_detector(f"{name}_residual").eval()
    network = detector.network
    assert isinstance(network, WithResidual)
    network.load_state_dict(fit_state(network, plain.network.state_dict()))
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(detector(images), plain(images))
        nn.init.normal_(find_stem(network).weight[:, 3:])
        assert not torch.allclose(detector(images), plain(images))
        exact = detector.find_logit(images)
        rounded = use_precision(detector, "bf16").find_logit(images)
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["small_lite0_s2", "small_cnn_w8_d1_residual"])
def test_an_onnx_model_sees_the_same_residual(name: str) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    detector = build_detector(name, image_size=40).eval()
    nn.init.normal_(find_stem(detector.network).weight, std=0.2)
    images = torch.randint(0, 256, (3, 40, 40, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = detector.find_logit(images).numpy()
    logit, _ = load_onnx(encode_onnx(detector, 1.0, {}))(images.numpy())
    np.testing.assert_allclose(logit, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["small_lite0", "small_cnn_residual"])
def test_the_cost_of_a_network_for_crops_is_counted(name: str) -> None:
    small, large = count_cost(name, 64), count_cost(name, 128)
    assert small.num_parameters == large.num_parameters < 1_500_000
    assert 3.5 < large.macs / small.macs < 4.5


@pytest.mark.parametrize(
    "name",
    ["cnn_residual", "fusion_residual", "resnet18_residual", "small_lite9", "small_lite0_s8"],
)
def test_another_name_of_a_small_network_is_none(name: str) -> None:
    with pytest.raises(UsageError, match="no such architecture"):
        build_detector(name)
