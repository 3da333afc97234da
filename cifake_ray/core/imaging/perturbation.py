"""Perturb decoded images as a grid's cells say: what happens to copies on their way."""

from __future__ import annotations

import hashlib
import io

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from cifake_ray.config.grid import Cell
from cifake_ray.core.imaging.decode import MAX_IMAGE_PIXELS

# What the formats can hold, pixels a side.
MAX_SIDE = {"jpeg": 65_500, "webp": 16_383}
NOISE_ROWS_BYTES = 2**24  # of noise in memory at once
TEXT_SHARE, MIN_TEXT_PIXELS = 1 / 8, 8  # height of letters: of the shorter side, at least
ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


def seed_noise(data: bytes) -> int:
    """Return the seed of an image's noise, from its encoded bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def perturb_image(pixels: np.ndarray, cell: Cell, noise_seed: int) -> np.ndarray | None:
    """Do the steps of a cell to uint8[H, W, 3]; the input stays as it is.

    None where that is impossible: more pixels than the decode policy allows, or sides that a format
    cannot hold.
    """
    image = Image.fromarray(pixels)
    for name, value in cell.items():
        if isinstance(value, str):
            image = _write_text(image, value)
        elif name in MAX_SIDE:
            if max(image.size) > MAX_SIDE[name]:
                return None
            image = reencode(image, name, int(value))
        elif name == "resize":
            if image.width * image.height * value**2 > MAX_IMAGE_PIXELS:
                return None
            image = _scale(image, value)
        else:
            image = _apply(image, name, value, noise_seed)
    return np.asarray(image)


def _apply(image: Image.Image, name: str, value: float, noise_seed: int) -> Image.Image:
    match name:
        case "blur":
            return image.filter(ImageFilter.GaussianBlur(value))
        case "noise":
            return _add_noise(image, value, noise_seed)
        case "rescale":
            return _scale(image, value).resize(image.size, Image.Resampling.BICUBIC)
        case "max_side":
            longest = max(image.size)
            return image if longest <= value else _scale(image, value / longest)
        case "crop":
            return _crop(image, value)
        case "logo":
            return _draw_logo(image, value)
        case _:
            return ENHANCERS[name](image).enhance(value)


def _scale(image: Image.Image, factor: float) -> Image.Image:
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, share: float) -> Image.Image:
    width, height = (max(1, round(side * share)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def reencode(image: Image.Image, name: str, quality: int) -> Image.Image:
    """Encode as `jpeg` or `webp` with Pillow's defaults, and decode."""
    buffer = io.BytesIO()
    image.save(buffer, name, quality=quality)
    return Image.open(buffer).convert("RGB")


def _add_noise(image: Image.Image, sigma: float, seed: int) -> Image.Image:
    pixels, rng = np.array(image), np.random.default_rng(seed)
    rows = max(1, NOISE_ROWS_BYTES // (12 * image.width))
    for top in range(0, image.height, rows):
        some = pixels[top : top + rows]
        noisy = some + sigma * rng.standard_normal(some.shape, np.float32)
        some[:] = noisy.round().clip(0, 255)
    return Image.fromarray(pixels)


def _write_text(image: Image.Image, text: str) -> Image.Image:
    image, size = image.copy(), max(MIN_TEXT_PIXELS, round(min(image.size) * TEXT_SHARE))
    ImageDraw.Draw(image).text(
        (size // 4, image.height - size // 4),
        text,
        fill="white",
        anchor="lb",
        font=ImageFont.load_default(size),
        stroke_width=max(1, size // 16),
        stroke_fill="black",
    )
    return image


def _draw_logo(image: Image.Image, share: float) -> Image.Image:
    image, side = image.copy(), max(1, round(min(image.size) * share))
    left, top = image.width - side - side // 8, side // 8
    draw = ImageDraw.Draw(image)
    draw.ellipse((left, top, left + side, top + side), fill="#d02020", outline="white")
    third = side / 3
    x, y = left + third, top + third
    draw.polygon([(x, y), (x, y + third), (x + 1.2 * third, y + third / 2)], fill="white")
    return image
