"""Fit pixels of any size to a detector's input: the same for training, evaluation and scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast, get_args

import numpy as np
from PIL import Image

from cifake_ray.config import MAX_IMAGE_SIZE, MAX_NUM_CROPS, Fit, SquareFit
from cifake_ray.core.imaging.crops import choose_crops, cut_crops
from cifake_ray.core.imaging.decode import (
    ImageHeader,
    StoredPixels,
    decode_stored,
    decode_with_header,
)
from cifake_ray.core.imaging.pillow_pixels import turn_upright
from cifake_ray.core.imaging.resize import Resize, parse_resize

# A JPEG decoded at a smaller scale has at least so many times the input's side. At 4 a network
# told such images from their whole twins, at 6 hardly (225 mixed generators of mostly 512 to 32
# pixels: 87% and 55% of pairs), and of the verdicts of `cifake` 1.6% and 0.3% were others.
MIN_SCALED_RATIO = 6


def fit_image(pixels: np.ndarray, *, size: int, fit: SquareFit) -> np.ndarray:
    """Fit an image to a square: uint8[H, W, 3] -> uint8[size, size, 3].

    An image of that shape is returned as it is, not copied.
    - resize: Pillow's antialiased bicubic until the shorter side is `size`, then the centre
      (torchvision's and timm's rounding). Of images longer than 4:1 only the middle is resized, so
      a 1 x 60,000,000 strip costs nothing.
    - crop: the centre, never resampled; an image smaller than `size` is padded by symmetric
      reflection.

    Raises ValueError for another shape or dtype.
    """
    _check_pixels(pixels)
    if pixels.shape == (size, size, 3):
        return pixels
    if fit == "resize":
        short = min(pixels.shape[:2])
        pixels = _resize(Image.fromarray(_crop_center(pixels, 4 * short, 4 * short)), size)
    else:
        missing = [max(size - side, 0) for side in pixels.shape[:2]]
        if any(missing):
            margins = [(n // 2, n - n // 2) for n in missing]
            cropped = _crop_center(pixels, size, size)  # else a long strip is padded all along
            pixels = np.pad(cropped, (*margins, (0, 0)), mode="symmetric")
    # A copy: a view would keep a 64-megapixel image alive for the sake of its centre.
    return np.array(_crop_center(pixels, size, size))


def _check_pixels(pixels: np.ndarray) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(
            f"an image is uint8[H, W, 3], got {pixels.dtype}{list(pixels.shape)}; "
            "decode_image gives it"
        )


def _resize(image: Image.Image, size: int, filled: tuple[float, float] | None = None) -> np.ndarray:
    """Resize the shorter side to `size`. Of the image only a part may be `filled`, from its corner.

    Powers of two divide `filled`, so its floats are exact, and the result has the shape it has for
    the whole image.
    """
    width, height = filled or image.size
    short = min(width, height)
    scaled = (int(size * width // short), int(size * height // short))
    return np.asarray(image.resize(scaled, Image.Resampling.BICUBIC, (0, 0, width, height)))


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How pixels become a detector's input."""

    image_size: int  # pixels: side of the square input, 1..MAX_IMAGE_SIZE
    fit: Fit  # "resize" or "crop", see `fit_image`; "crops", see `choose_crops`
    mean: tuple[float, float, float]  # RGB mean in [0, 1] units, as timm's
    std: tuple[float, float, float]  # RGB deviation in [0, 1] units, as timm's
    test_time_flip: bool = False  # the detector sees the mirror image too, see `find_logit`
    jpeg_scale: bool = False  # large JPEGs are decoded at a smaller scale, see `load_image`
    num_crops: int | None = None  # of an image at most, 1..MAX_NUM_CROPS; only with fit "crops"
    resize: Resize | None = None  # of another program's classifier, in place of `fit_image`

    def __post_init__(self) -> None:
        if type(self.image_size) is not int or not 1 <= self.image_size <= MAX_IMAGE_SIZE:
            raise ValueError(
                f"image_size={self.image_size!r} must be a whole number in 1..{MAX_IMAGE_SIZE}; "
                "give the side of the detector's input in pixels"
            )
        if self.fit not in get_args(Fit):
            raise ValueError(f"fit={self.fit!r} must be one of {get_args(Fit)}; choose one of them")
        if (self.fit == "crops") != (self.num_crops is not None):
            raise ValueError(
                f"num_crops={self.num_crops!r} with fit={self.fit!r}: give it with 'crops' only"
            )
        if self.num_crops is not None and (
            type(self.num_crops) is not int or not 1 <= self.num_crops <= MAX_NUM_CROPS
        ):
            raise ValueError(
                f"num_crops={self.num_crops!r} must be a whole number in 1..{MAX_NUM_CROPS}"
            )
        if self.resize is not None and (
            self.fit != "resize" or self.jpeg_scale or self.image_size > self.resize.side
        ):
            raise ValueError(
                f"{self.resize} with fit={self.fit!r}, jpeg_scale={self.jpeg_scale} and"
                f" image_size={self.image_size}: it is of fit 'resize', whole and no smaller"
            )
        if self.fit == "crops" and self.jpeg_scale:
            raise ValueError("jpeg_scale with fit='crops': crops are of the native resolution")
        for name in ("test_time_flip", "jpeg_scale"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false")
        for name, lowest in (("mean", "0 <= v"), ("std", "0 < v")):
            values = getattr(self, name)
            if (
                not isinstance(values, tuple)
                or len(values) != 3
                or not all(isinstance(v, int | float) and 0 <= v <= 1 for v in values)
                or (name == "std" and 0 in values)
            ):
                raise ValueError(
                    f"{name}={values!r} must be a tuple of three numbers, {lowest} <= 1; "
                    "divide by 255 if it is given in 0..255"
                )

    def load_image(self, data: bytes) -> np.ndarray:
        """Decode bytes to uint8[image_size, image_size, 3], 0..255. Raises ImageError.

        With `fit` "crops" uint8[k, image_size, image_size, 3], k in 1..num_crops.
        With `jpeg_scale` and `fit` "resize", JPEGs are decoded at 1/2, 1/4 or 1/8 of their size if
        that leaves MIN_SCALED_RATIO times the input's side. That takes a half to a fifth of the
        time and changes the result by 0.13 of 255 on average, 0.6 in the worst image, and by 10
        in single values (750 real images).
        """
        return self._fit(decode_stored(data, self._min_side))

    def load_with_header(self, data: bytes) -> tuple[ImageHeader, np.ndarray]:
        """Return what `inspect_image` and `load_image` return, in one pass. Raises ImageError."""
        header, stored = decode_with_header(data, self._min_side)
        return header, self._fit(stored)

    def load_whole(self, data: bytes) -> tuple[ImageHeader, np.ndarray, np.ndarray]:
        """Return what `load_with_header` and `decode_image` return. Raises ImageError.

        Only a JPEG of which `jpeg_scale` decodes less than the whole is decoded twice.
        """
        header, stored = decode_with_header(data, self._min_side)
        whole = decode_stored(data) if stored.scaled else stored
        return header, self._fit(stored), whole.to_array()

    def fit_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Fit uint8[H, W, 3], upright, to the input: the shapes of `load_image`."""
        if self.resize is not None:
            _check_pixels(pixels)
            return self.resize.fit(pixels, self.image_size)
        if self.num_crops is None:
            return fit_image(pixels, size=self.image_size, fit=cast(SquareFit, self.fit))
        _check_pixels(pixels)
        offsets = choose_crops(pixels, size=self.image_size, num_crops=self.num_crops)
        return cut_crops(pixels, offsets, size=self.image_size)

    def stack_images(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
        """Join the results of `load_image` for N images: uint8[M, image_size, image_size, 3].

        Return also the number of crops of each, int64[N], which add up to M; None with another
        `fit`, where M is N.
        """
        nothing = np.zeros((0, self.image_size, self.image_size, 3), np.uint8)
        if self.num_crops is None:
            return (np.stack(images) if images else nothing), None
        return np.concatenate([nothing, *images]), np.array([len(i) for i in images], np.int64)

    @property
    def _min_side(self) -> int | None:
        if self.jpeg_scale and self.fit == "resize":
            return MIN_SCALED_RATIO * self.image_size
        return None

    def _fit(self, stored: StoredPixels) -> np.ndarray:
        image, size = stored.pixels, self.image_size
        is_plain = (  # resized where it is, without two copies of a large image
            isinstance(image, Image.Image)
            and stored.orientation == 1
            and max(image.size) <= 4 * min(image.size)
        )
        if self.fit != "resize" or self.resize or not (stored.scaled or is_plain):
            return self.fit_pixels(stored.to_array())
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        pixels = turn_upright(_resize(image, size, stored.scaled), stored.orientation)
        return np.array(_crop_center(pixels, size, size))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, for a bundle's config; newer fields only if set."""
        values = {**asdict(self), "mean": list(self.mean), "std": list(self.std)}
        for name in ("num_crops", "resize"):
            if values[name] is None:  # as bundles were before the field: their bytes stay
                del values[name]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Invert `to_dict`. Raises ValueError for missing, unknown or impossible values."""
        names = set(cls.__dataclass_fields__)
        older = {"test_time_flip": False, "jpeg_scale": False, "num_crops": None, "resize": None}
        values = {**older, **values}
        if set(values) != names:
            raise ValueError(
                f"preprocessing has the keys {sorted(values)}, must have exactly {sorted(names)}; "
                "take them from the bundle's config.json"
            )
        mean, std = (
            tuple(v) if isinstance(v, list) else v for v in (values["mean"], values["std"])
        )
        resize = parse_resize(values["resize"])
        return cls(**{**values, "mean": mean, "std": std, "resize": resize})


def _crop_center(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a view of the centre, no larger than height x width."""
    # round(), half to even, is torchvision's center_crop: bundles must agree with timm.
    top = round(max(pixels.shape[0] - height, 0) / 2)
    left = round(max(pixels.shape[1] - width, 0) / 2)
    return pixels[top : top + height, left : left + width]
