"""Build networks for small images: a plain CNN, adapted ones of timm, and a fusion of two.

timm's stems shrink an image by 4 to 16 before the first block. That leaves too little of 32 x 32
pixels: generated images differ in the finest details.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from cifake_ray.errors import UsageError

SMALL_SIZE = 32
NUM_HIDDEN = 256

# Name -> timm's network, and the options that make its patches small.
SMALL_NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "small_resnet18": ("resnet18", {}),
    "small_resnet34": ("resnet34", {}),
    "small_resnet50": ("resnet50", {}),
    "small_convnext_atto": ("convnext_atto", {"patch_size": 1}),  # from 2 on it halves twice
    "small_vit_tiny": ("vit_tiny_patch16_224", {"patch_size": 4}),
    "small_vit_small": ("vit_small_patch16_224", {"patch_size": 4}),
}
STEMS = {"resnet": "3x3 stem of stride 1", "convnext": "stem of stride 1", "vit": "patches of 4"}
FUSION = ("small_vit_tiny", "small_resnet18")
SMALL_CNN = re.compile(r"small_cnn(?:_w(?P<width>[1-9]\d{0,3}))?(?:_d(?P<depth>[1-9]\d?))?")
SMALL_LITE = re.compile(r"small_lite(?P<variant>[0-4])(?:_s(?P<stages>[1-7]))?(?P<stem>_stride1)?")
LITE_STAGES = 5  # of 7: the last two have four of five parameters, for features of whole objects
RESIDUAL = "_residual"  # behind a name: the network sees 6 channels, see `WithResidual`
RESIDUAL_GAIN = 8.0  # residuals are small: most are within 8 of 255

DESCRIPTIONS = (
    {
        "small_cnn": "5 convolutions of 48 to 128 channels; small_cnn_w64_d3 is half as wide, one"
        f" deeper; native {SMALL_SIZE}x{SMALL_SIZE}"
    }
    | {
        name: f"timm's {timm_name}, {STEMS[name.split('_')[1].rstrip('0123456789')]},"
        f" native {SMALL_SIZE}x{SMALL_SIZE}"
        for name, (timm_name, _) in SMALL_NETWORKS.items()
    }
    | {
        "small_lite0": f"the first {LITE_STAGES} of 7 stages of timm's efficientnet_lite0, for"
        " crops; takes its ImageNet weights; small_lite1_s4_stride1 is lite1, 4 stages, no"
        " stride in the stem"
    }
    | {
        "small_cnn_residual": "small_cnn that also sees each pixel less the median of the 9 around"
        f" it; {RESIDUAL} works behind all small_* names"
    }
    | {
        "fusion": f"{FUSION[0]} and {FUSION[1]}, a learned head on both,"
        f" native {SMALL_SIZE}x{SMALL_SIZE}"
    }
)


def is_small(name: str) -> bool:
    """Return whether `build_small` builds this architecture."""
    inner = name.removesuffix(RESIDUAL)
    is_own = inner in SMALL_NETWORKS or SMALL_CNN.fullmatch(inner) or SMALL_LITE.fullmatch(inner)
    return name == "fusion" or bool(is_own)


def build_small(name: str, image_size: int, drop_path: float, num_classes: int = 2) -> nn.Module:
    """Build float[B, 3, S, S] -> float[B, 2], or features for `num_classes` 0.

    UsageError for an image size or a drop_path it cannot take.
    """
    if name.endswith(RESIDUAL):
        inner = build_small(name.removesuffix(RESIDUAL), image_size, drop_path, num_classes)
        return WithResidual(inner)
    if match := SMALL_CNN.fullmatch(name):
        if drop_path:
            raise UsageError(f"--drop-path: {name} has no paths to drop; leave it out")
        return build_small_cnn(choose_channels(**match.groupdict()))
    if match := SMALL_LITE.fullmatch(name):
        return _build_lite(drop_path=drop_path, num_classes=num_classes, **match.groupdict())
    if name == "fusion":
        return Fusion(image_size, drop_path)
    import timm

    timm_name, patches = SMALL_NETWORKS[name]
    options: dict[str, Any] = {**patches, "num_classes": num_classes, "drop_path_rate": drop_path}
    if "vit" in name:
        if image_size % patches["patch_size"]:
            raise UsageError(
                f"--image-size {image_size}: {name} takes multiples of {patches['patch_size']}"
            )
        options["img_size"] = image_size
    network: nn.Module = timm.create_model(timm_name, pretrained=False, **options)
    if "resnet" in name:
        # Source: He et al. 2016, section 4.2: the networks for CIFAR start with a 3x3 convolution
        # and have no pooling before the first block.
        stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        network.conv1, network.maxpool = stem, nn.Identity()
    return network


def choose_channels(width: str | None = None, depth: str | None = None) -> tuple[int, ...]:
    """Return small_cnn's widths: 3/8 and 3/4 at 16 x 16 pixels, then `depth` + 1 times all."""
    full = int(width or 128)
    return (-(-full * 3 // 8), -(-full * 3 // 4), *[full] * (int(depth or 2) + 1))


def build_small_cnn(channels: Sequence[int]) -> nn.Sequential:
    """Build float[B, 3, S, S] -> float[B, 2] for S from 8 on; small_cnn has 450,594 parameters.

    The stem halves the side at once: generated images differ in the finest pixels, which a window
    of 4 x 4 covers, and layers on 32 x 32 would cost four times as much. The second convolution
    works at that side, the last one at a quarter of it, the others between.
    """
    stem, second, *middle, last = channels
    layers = [*_convolve(3, stem, 4, stride=2), *_convolve(stem, second), nn.MaxPool2d(2)]
    for num_in, num_out in pairwise((second, *middle)):
        layers += _convolve(num_in, num_out)
    return nn.Sequential(
        *layers,
        nn.MaxPool2d(2),
        *_convolve(middle[-1], last),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(last, 2),
    )


def _convolve(num_in: int, num_out: int, side: int = 3, stride: int = 1) -> list[nn.Module]:
    """Build a convolution, batch norm and ReLU."""
    convolution = nn.Conv2d(num_in, num_out, side, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(num_out), nn.ReLU(inplace=True)]


def _build_lite(
    *, variant: str, stages: str | None, stem: str | None, drop_path: float, num_classes: int
) -> nn.Module:
    """Build the first stages of timm's efficientnet_lite; tensors keep timm's names."""
    import timm

    # The ImageNet weights are TensorFlow's, whose batch norms add 0.001. Its padding is not used:
    # it shifts the sampled pixels by one, but needs sums that cannot be traced for int8 and ONNX.
    network: Any = timm.create_model(
        f"efficientnet_lite{variant}", pretrained=False, bn_eps=1e-3, drop_path_rate=drop_path
    )
    network.blocks = network.blocks[: int(stages or LITE_STAGES)]
    network.conv_head, network.bn2 = nn.Identity(), nn.Identity()
    last = [module for module in network.blocks.modules() if isinstance(module, nn.Conv2d)][-1]
    network.num_features = network.head_hidden_size = last.out_channels
    if stem:
        network.conv_stem.stride = (1, 1)
    network.reset_classifier(num_classes)
    built: nn.Module = network
    return built


def list_weight_sources(name: str) -> set[str]:
    """Return the architectures whose weights this one can start from, itself included."""
    inner = name.removesuffix(RESIDUAL)
    names = {name, inner}
    if match := SMALL_LITE.fullmatch(inner):
        names |= {f"{prefix}efficientnet_lite{match['variant']}" for prefix in ("", "tf_")}
    return names


def fit_state(network: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of the network's source under its own names and in its shapes.

    Those of stages that `small_lite` leaves out are dropped; 3 input channels get 3 of 0 for
    the residual. Other weights stay as they are, fitting or not.
    """
    own, fitted = network.state_dict(keep_vars=True), dict(state)
    if isinstance(network, WithResidual):
        fitted = {name if name in own else f"network.{name}": t for name, t in fitted.items()}
        for name, tensor in fitted.items():
            if name in own and own[name] is find_stem(network).weight:
                missing = own[name].shape[1] - tensor.shape[1]
                if tensor.ndim == 4 and missing == tensor.shape[1]:
                    fitted[name] = torch.cat([tensor, torch.zeros_like(tensor)], dim=1)
    if is_lite(network):
        left_out = ("blocks.", "conv_head.", "bn2.")
        fitted = {
            name: tensor
            for name, tensor in fitted.items()
            if name in own or not name.removeprefix("network.").startswith(left_out)
        }
    return fitted


def is_lite(network: nn.Module) -> bool:
    """Return whether `network` is a small_lite, with a residual or without."""
    inner = network.network if isinstance(network, WithResidual) else network
    return isinstance(getattr(inner, "conv_head", None), nn.Identity)


class WithResidual(nn.Module):
    """A network that sees an image and its residual: what a 3 x 3 median takes away.

    Traces of generators are in the finest detail, which content covers. Source: FerretNet (Liang et
    al. 2025). Works on normalised pixels, whose order is that of the pixels.
    """

    def __init__(self, network: nn.Module) -> None:
        """Give the first convolution of `network`, of 3 channels, 3 more, with weights of 0."""
        super().__init__()
        self.network = network
        stem = find_stem(network)
        weight = torch.cat([stem.weight.data, torch.zeros_like(stem.weight)], dim=1)
        stem.weight, stem.in_channels = nn.Parameter(weight), 2 * stem.in_channels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map float[B, 3, S, S] to float[B, 2]; the residual is computed as exactly as `images`."""
        residual = RESIDUAL_GAIN * (images - find_median(images))
        both = torch.cat([images, residual], dim=1).to(find_stem(self.network).weight.dtype)
        outputs: torch.Tensor = self.network(both)
        return outputs


def find_stem(network: nn.Module) -> nn.Conv2d:
    """Return the first convolution."""
    return next(module for module in network.modules() if isinstance(module, nn.Conv2d))


# Comparisons that leave the median of 9 values in the middle. Source: Devillard 1998, "Fast median
# search", opt_med9.
MEDIAN_PAIRS = (
    *((1, 2), (4, 5), (7, 8), (0, 1), (3, 4), (6, 7), (1, 2), (4, 5), (7, 8), (0, 3)),
    *((5, 8), (4, 7), (3, 6), (1, 4), (2, 5), (4, 7), (4, 2), (6, 4), (4, 2)),
)


def find_median(images: torch.Tensor) -> torch.Tensor:
    """Return the median of each 3 x 3 window, float[B, C, H, W]; the border is repeated outside."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    values = [padded[..., y : y + height, x : x + width] for y in range(3) for x in range(3)]
    for low, high in MEDIAN_PAIRS:
        pair = values[low], values[high]
        values[low], values[high] = torch.minimum(*pair), torch.maximum(*pair)
    return values[4]


class Fusion(nn.Module):
    """A ViT and a CNN side by side; the head gets both feature vectors."""

    def __init__(self, image_size: int, drop_path: float) -> None:
        super().__init__()
        self.vit = build_small(FUSION[0], image_size, drop_path, num_classes=0)
        self.cnn = build_small(FUSION[1], image_size, drop_path, num_classes=0)
        num_features = int(self.vit.num_features) + int(self.cnn.num_features)  # type: ignore[arg-type]
        self.head = nn.Sequential(
            nn.LayerNorm(num_features),
            nn.Linear(num_features, NUM_HIDDEN),
            nn.GELU(),
            nn.Linear(NUM_HIDDEN, 2),
        )

    def get_classifier(self) -> nn.Module:
        """Return the head, under timm's name for it."""
        return self.head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map float[B, 3, S, S] to float[B, 2]."""
        outputs: torch.Tensor = self.head(torch.cat([self.vit(images), self.cnn(images)], dim=1))
        return outputs
