"""Build detectors: a network together with its normalisation.

timm takes seconds to import, so it is imported only when one of its networks is asked for.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cifake_ray.config import NUM_CROPS, Fit
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.models.small_networks import (
    DESCRIPTIONS,
    SMALL_SIZE,
    WithResidual,
    build_small,
    is_small,
)
from cifake_ray.errors import UsageError

OWN_ARCHITECTURES = {
    "cnn": "3 convolutions, 39,132 parameters, native 32x32: the CIFAKE baseline",
    **DESCRIPTIONS,
}

HALF = (0.5, 0.5, 0.5)


def build_cnn() -> nn.Sequential:
    """Build the baseline: float[B, 3, 32, 32] -> float[B, 2]; 39,132 parameters, no batch norm.

    Three 3x3 convolutions without padding (80, 40, 20 channels), each with ReLU and 2x2 max
    pooling, then 80 -> 10 -> 2.
    """
    layers: list[nn.Module] = []
    for num_in, num_out in ((3, 80), (80, 40), (40, 20)):
        # ReLU after pooling is the same function and touches a quarter of the numbers.
        layers += [nn.Conv2d(num_in, num_out, 3), nn.MaxPool2d(2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(80, 10), nn.ReLU(), nn.Linear(10, 2))


class Detector(nn.Module):
    """uint8[B, S, S, 3] in, float32[B, 2] out: the outputs [z_REAL, z_FAKE].

    Normalisation is part of it, so that all callers feed the pixels of `Preprocessing.load_image`.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, architecture: str, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.architecture = architecture
        self.network = network
        self.dtype = torch.float32  # of the network
        self.set_preprocessing(preprocessing)

    def set_preprocessing(self, preprocessing: Preprocessing) -> None:
        """Use a bundle's own size, mean and standard deviation."""
        self.preprocessing = preprocessing
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # [B, S, S, 3] seen as [B, 3, S, S] is channels-last already; no copy is made.
        normalised = (images.float() * self.scale + self.shift).permute(0, 3, 1, 2)
        if not isinstance(self.network, WithResidual):  # it needs all digits for its residual
            normalised = normalised.to(self.dtype)
        outputs: torch.Tensor = self.network(normalised)
        return outputs.float()

    def find_logit(self, images: torch.Tensor) -> torch.Tensor:
        """Map uint8[B, S, S, 3] to float32[B]: z_FAKE - z_REAL, uncalibrated; FAKE above 0.

        Of a detector of crops these are of single crops; `pool_logits` makes an image's of them.
        With test-time flip the mean over an image and its mirror image.
        """
        logit = to_logit(self(images))
        if self.preprocessing.test_time_flip:
            logit = (logit + to_logit(self(images.flip(2)))) / 2
        return logit

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.network.parameters())


def to_logit(outputs: torch.Tensor) -> torch.Tensor:
    """Map float32[B, 2] to float32[B]: z_FAKE - z_REAL."""
    return outputs[:, 1] - outputs[:, 0]


def build_detector(
    architecture: str,
    *,
    image_size: int | None = None,
    fit: Fit = "resize",
    num_crops: int = NUM_CROPS,
    drop_path: float = 0.0,
) -> Detector:
    """Build a detector with fresh weights, drawn from torch's global generator.

    `image_size` None is the architecture's own; `num_crops` is for `fit` "crops". UsageError for
    an unknown architecture, or a size or a `drop_path` it cannot take.
    """
    network: nn.Module
    mean = std = HALF
    if architecture == "cnn":
        if drop_path:
            raise UsageError("--drop-path: cnn has no paths to drop; leave it out")
        if image_size not in (None, SMALL_SIZE):
            raise UsageError(f"--image-size {image_size}: cnn takes 32 only; leave it out")
        size, network = SMALL_SIZE, build_cnn()
    elif is_small(architecture):
        size = image_size or SMALL_SIZE
        network = build_small(architecture, size, drop_path)
    else:
        network, size, mean, std = _build_timm(architecture, image_size, drop_path)
    crops = num_crops if fit == "crops" else None
    preprocessing = Preprocessing(image_size=size, fit=fit, mean=mean, std=std, num_crops=crops)
    detector = Detector(architecture, network, preprocessing)
    check_size(detector)
    return detector


def _build_timm(architecture: str, image_size: int | None, drop_path: float) -> tuple[Any, ...]:
    """Return a network of timm, its image size, mean and standard deviation."""
    import timm

    if not timm.is_model(architecture):
        known = [*OWN_ARCHITECTURES, *timm.list_models()]
        close = difflib.get_close_matches(architecture, known, n=5)
        hint = f"did you mean {', '.join(close)}?" if close else "`cifake-ray models` lists them"
        raise UsageError(f"--model {architecture}: no such architecture; {hint}")
    cfg = timm.models.get_pretrained_cfg(architecture)
    options: dict[str, Any] = {"num_classes": 2, "pretrained": False}
    own_size = find_own_size(architecture)
    size = image_size or own_size
    if cfg and cfg.fixed_input_size and size != own_size:
        options["img_size"] = size
    if drop_path:
        options["drop_path_rate"] = drop_path
    try:
        network = timm.create_model(architecture, **options)
    except (TypeError, AssertionError) as error:
        asked = f"--image-size {size}" + (f" and --drop-path {drop_path}" if drop_path else "")
        raise UsageError(f"--model {architecture} with {asked}: {error}") from error
    mean, std = (cfg.mean, cfg.std) if cfg else (HALF, HALF)
    return network, size, tuple(mean), tuple(std)


def find_own_size(architecture: str) -> int:
    """Return the side in pixels of an architecture's images when none is asked for."""
    if architecture == "cnn" or is_small(architecture):
        return SMALL_SIZE
    import timm

    cfg = timm.models.get_pretrained_cfg(architecture)
    return int(cfg.input_size[-1]) if cfg else 224


def find_head(network: nn.Module) -> nn.Module:
    """Return the classifier: timm's `get_classifier`, else the last linear layer."""
    if isinstance(network, WithResidual):
        network = network.network
    find: Callable[[], Any] | None = getattr(network, "get_classifier", None)
    if find is not None:
        found: nn.Module | tuple[nn.Module, ...] = find()
        return nn.ModuleList(found) if isinstance(found, tuple) else found
    return [module for module in network.modules() if isinstance(module, nn.Linear)][-1]


def list_architectures(pattern: str) -> dict[str, str]:
    """Map the names that match a glob to one line each: ours first, then timm's."""
    from fnmatch import fnmatch

    import timm

    ours = {name: text for name, text in OWN_ARCHITECTURES.items() if fnmatch(name, pattern)}
    for name in timm.list_models(pattern):
        size = find_own_size(name)
        ours.setdefault(name, f"timm, {size}x{size}")
    if not ours:
        raise UsageError(f"no architecture matches {pattern!r}; try a glob such as '*resnet*'")
    return ours


def check_size(detector: Detector, train_size: int | None = None) -> None:
    """Raise UsageError when the network cannot take images of its size, or of `train_size`."""
    size = train_size or detector.preprocessing.image_size
    option = "--image-size" if train_size is None else "--train-size, or leave it out"
    was_training = detector.training
    detector.eval()
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = detector(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--model {detector.architecture} cannot take {size} x {size} images"
            f" ({str(error).splitlines()[0]}); choose another {option}"
        ) from error
    finally:
        detector.train(was_training)
    if outputs.shape != (1, 2):
        raise UsageError(
            f"--model {detector.architecture} gives {list(outputs.shape)} outputs, not [1, 2]; it"
            " is no image classifier"
        )
