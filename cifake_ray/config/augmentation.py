"""Define every step of an augmentation policy, and the policies that have a name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, get_type_hints

from cifake_ray.config.fields import Doc
from cifake_ray.errors import UsageError

# Share of degraded images. Source: Wang et al. 2020, CNNDetection, section 4.1: blur and JPEG on a
# tenth of the images each.
DEGRADED_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Steps applied to training images, in this order, but `downscale` comes first.

    0 skips a step, as JPEG and WebP quality 100 do.
    """

    flip: Annotated[float, Doc("Share of the images that are mirrored, 0 to 1")] = 0.0
    rotation: Annotated[float, Doc("Largest angle either way, degrees")] = 0.0
    shift: Annotated[float, Doc("Furthest shift on each axis, share of the side")] = 0.0
    crop: Annotated[float, Doc("Largest share of the area that is cut away")] = 0.0
    move_share: Annotated[float, Doc("Share of the images that rotation, shift and crop move")] = (
        1.0
    )
    brightness: Annotated[float, Doc("Factor is drawn from 1 - x to 1 + x")] = 0.0
    contrast: Annotated[float, Doc("Factor is drawn from 1 - x to 1 + x")] = 0.0
    saturation: Annotated[float, Doc("Factor is drawn from 1 - x to 1 + x")] = 0.0
    redraw_share: Annotated[
        float, Doc("Share of the images redrawn: as a pencil drawing, or in flat colours")
    ] = 0.0
    overlay_share: Annotated[float, Doc("Share of the images with text or a logo over them")] = 0.0
    rescale: Annotated[float, Doc("Largest share of the side lost by shrinking and back")] = 0.0
    rescale_share: Annotated[float, Doc("Share of the images that are rescaled")] = 0.0
    blur: Annotated[float, Doc("Largest deviation of the Gaussian, pixels")] = 0.0
    blur_share: Annotated[float, Doc("Share of the images that are blurred")] = 0.0
    noise: Annotated[float, Doc("Largest deviation of Gaussian noise, grey levels of 255")] = 0.0
    noise_share: Annotated[float, Doc("Share of the images that get noise")] = 0.0
    jpeg_quality: Annotated[int, Doc("Lowest quality of the re-encoded JPEG, 1 to 100")] = 100
    jpeg_share: Annotated[float, Doc("Share of the images that are re-encoded as JPEG")] = 0.0
    webp_quality: Annotated[int, Doc("Lowest quality of the re-encoded WebP, 1 to 100")] = 100
    webp_share: Annotated[float, Doc("Share of the images that are re-encoded as WebP, last")] = 0.0
    best_quality: Annotated[int, Doc("Highest quality of re-encoded JPEG and WebP, 1 to 100")] = 100
    downscale: Annotated[
        float, Doc("Crops: largest share of the side lost by shrinking a larger native region")
    ] = 0.0
    downscale_share: Annotated[float, Doc("Share of the crops that are shrunk")] = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, highest = getattr(self, field.name), LIMITS.get(field.name, 1.0)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value <= highest:
                raise UsageError(f"augmentation: {field.name} is {value}; give 0 to {highest:g}")
        for name in QUALITIES:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"augmentation: {name} is {value}; give 1 to 100")
        for step, is_off in (
            ("rescale", self.rescale == 0),
            ("blur", self.blur == 0),
            ("noise", self.noise == 0),
            ("jpeg", self.jpeg_quality == 100),
            ("webp", self.webp_quality == 100),
            ("downscale", self.downscale == 0),
        ):
            strength = f"{step}_quality" if step in ("jpeg", "webp") else step
            if not is_off and strength != step and getattr(self, strength) > self.best_quality:
                raise UsageError(f"augmentation: {strength} is above best_quality; lower it")
            if is_off != (getattr(self, f"{step}_share") == 0):
                raise UsageError(f"augmentation: give {strength} and {step}_share, or neither")

    def to_dict(self) -> dict[str, Any]:
        """Return the steps that change anything; `parse_augmentation` reads them."""
        nothing = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != nothing[name]}

    def __str__(self) -> str:
        """Return the text that `--augment` takes: the policy's name or, without one, its steps."""
        names = [name for name, policy in POLICIES.items() if policy == self]
        return names[0] if names else json.dumps(self.to_dict())

    @property
    def moves(self) -> bool:
        """Whether pixels change their position, other than by mirroring."""
        return max(self.rotation, self.shift, self.crop) > 0


QUALITIES = ("jpeg_quality", "webp_quality", "best_quality")
LIMITS = {
    **{"rotation": 180.0, "crop": 0.95, "rescale": 0.95, "downscale": 0.95},
    **{"blur": 10.0, "noise": 255.0},
    **dict.fromkeys(QUALITIES, 100.0),
}

POLICIES: dict[str, Augmentation] = {
    "none": Augmentation(),
    "flip": Augmentation(flip=0.5),
    "shift": Augmentation(flip=0.5, shift=1 / 16),  # of 32 pixels, up to two
    # Source: the Keras notebooks on CIFAKE: rotation_range=10, shifts of 0.1, horizontal_flip. Half
    # of the images stay in place: moving blurs the finest traces, which the others still show.
    "seed": Augmentation(flip=0.5, rotation=10, shift=0.1, move_share=0.5),
    "strong": Augmentation(
        flip=0.5,
        rotation=10,
        shift=0.1,
        crop=0.3,
        move_share=0.5,
        brightness=0.2,
        contrast=0.2,
        saturation=0.2,
        rescale=0.5,
        rescale_share=DEGRADED_SHARE,
        blur=3.0,
        blur_share=DEGRADED_SHARE,
        noise=10.0,
        noise_share=DEGRADED_SHARE,
        jpeg_quality=30,
        jpeg_share=DEGRADED_SHARE,
    ),
    # For `evaluate --grid default`: each range goes beyond the cell that it is for. EXPERIMENTS.md
    # has the others that were tried.
    "robust": Augmentation(
        flip=0.5,
        shift=1 / 16,
        brightness=0.6,
        contrast=0.3,
        saturation=0.3,
        overlay_share=0.15,
        rescale=0.6,
        rescale_share=0.15,
        blur=1.5,
        blur_share=0.15,
        noise=15.0,
        noise_share=0.15,
        jpeg_quality=30,
        jpeg_share=0.25,
    ),
    # What happens to photographs and generated images alike on their way through the web: drawn
    # without a look at the label, so that format, quality and scale say nothing of it. Qualities
    # end at 95, above which publishers seldom save. Most are saved again, many of them twice.
    # Images of both classes are redrawn, since REAL ones of training are mostly photographs: else
    # every drawing and cartoon would be called FAKE.
    "wild": Augmentation(
        flip=0.5,
        redraw_share=0.2,
        downscale=0.6,
        downscale_share=0.3,
        blur=1.5,
        blur_share=0.1,
        noise=6.0,
        noise_share=0.1,
        jpeg_quality=30,
        jpeg_share=0.6,
        webp_quality=30,
        webp_share=0.2,
        best_quality=95,
    ),
}


def parse_augmentation(values: Mapping[str, Any]) -> Augmentation:
    """Return the policy with these fields. UsageError for unknown names and invalid values."""
    known = get_type_hints(Augmentation)
    if unknown := sorted(str(name) for name in values if name not in known):
        raise UsageError(f"augmentation: no step {', '.join(unknown)}; it has {', '.join(known)}")
    return Augmentation(**values)
