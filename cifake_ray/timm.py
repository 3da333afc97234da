"""Let timm open the bundles of our own architectures: `import cifake_ray.timm` is enough."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    register_model,
)
from torch import nn

from cifake_ray.core.models.detector import HALF, OWN_ARCHITECTURES, build_detector
from cifake_ray.core.models.small_networks import SMALL_SIZE

default_cfgs: dict[str, Any] = {}  # timm reads it


def register(architecture: str) -> None:
    """Let timm build one of our architectures by its name, such as small_cnn_w64_d3."""
    if is_model(architecture):
        return

    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        make = partial(_make_network, architecture)
        cfg = options.get("pretrained_cfg")
        if isinstance(cfg, dict) and "input_size" in cfg:  # of a bundle
            options.setdefault("img_size", cfg["input_size"][-1])
        network: nn.Module = build_model_with_cfg(make, architecture, pretrained, **options)
        return network

    size = (3, SMALL_SIZE, SMALL_SIZE)
    cfg = {"num_classes": 2, "input_size": size, "mean": HALF, "std": HALF}
    default_cfgs.update(generate_default_cfgs({architecture: cfg}))
    build.__name__ = architecture
    register_model(build)


def _make_network(
    architecture: str, *, img_size: int | None = None, drop_path_rate: float = 0.0, **options: Any
) -> nn.Module:
    if options.get("num_classes", 2) != 2:
        raise ValueError(f"{architecture} has two outputs, REAL and FAKE")
    return build_detector(architecture, image_size=img_size, drop_path=drop_path_rate).network


for _architecture in OWN_ARCHITECTURES:
    register(_architecture)
