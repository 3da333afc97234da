"""Build networks for small images: a plain CNN, adapted ones of timm, and a fusion of two.

timm's stems shrink an image by 4 to 16 before the first block. That leaves too little of 32 x 32
pixels: generated images differ in the finest details.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

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
        "fusion": f"{FUSION[0]} and {FUSION[1]}, a learned head on both,"
        f" native {SMALL_SIZE}x{SMALL_SIZE}"
    }
)


def is_small(name: str) -> bool:
    """Return whether `build_small` builds this architecture."""
    return name in DESCRIPTIONS or SMALL_CNN.fullmatch(name) is not None


def build_small(name: str, image_size: int, drop_path: float, num_classes: int = 2) -> nn.Module:
    """Build float[B, 3, S, S] -> float[B, 2], or features for `num_classes` 0.

    UsageError for an image size or a drop_path it cannot take.
    """
    if match := SMALL_CNN.fullmatch(name):
        if drop_path:
            raise UsageError(f"--drop-path: {name} has no paths to drop; leave it out")
        return build_small_cnn(choose_channels(**match.groupdict()))
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
