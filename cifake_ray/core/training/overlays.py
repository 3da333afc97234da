"""Draw text and logos over training images, as watermarks and captions do."""

from __future__ import annotations

import string
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cifake_ray.core.imaging.perturbation import MIN_TEXT_PIXELS

CHARACTERS = np.array(list(string.ascii_letters + string.digits + " @.-"))
Colour = tuple[int, int, int]


def draw_overlay(pixels: np.ndarray, seed: int) -> np.ndarray:
    """Return uint8[S, S, 3] with a line of text or a logo over it.

    Place, size, colours, opacity (0.3 to 1) and letters are random numbers of `seed`. Letters are
    an eighth to a third of the side high, 8 pixels at least; logos a tenth to a half. Both may be
    cut off by a border.
    """
    rng = np.random.default_rng(seed)
    image = Image.fromarray(pixels)
    drawn = image.copy()
    draw_one = _draw_text if rng.random() < 0.5 else _draw_logo
    draw_one(ImageDraw.Draw(drawn), len(pixels), rng, _draw_colour(rng), _draw_colour(rng))
    return np.asarray(Image.blend(image, drawn, rng.uniform(0.3, 1)))


def _draw_colour(rng: np.random.Generator) -> Colour:
    """Return white, black or any colour, a third of the time each."""
    red, green, blue = rng.integers(256, size=3).tolist()
    return ((0, 0, 0), (255, 255, 255), (red, green, blue))[rng.integers(3)]


def _draw_text(
    draw: ImageDraw.ImageDraw, side: int, rng: np.random.Generator, fill: Colour, outline: Colour
) -> None:
    height = max(MIN_TEXT_PIXELS, round(side * rng.uniform(1 / 8, 1 / 3)))
    text = "".join(rng.choice(CHARACTERS, size=rng.integers(2, 16)))
    x, y = rng.uniform(0, side, size=2)
    draw.text(
        (x, y),
        text,
        fill=fill,
        anchor="mm",
        font=_load_font(height),
        stroke_width=int(rng.integers(2)) * max(1, height // 16),
        stroke_fill=outline,
    )


@lru_cache(maxsize=64)
def _load_font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(height)


def _draw_logo(
    draw: ImageDraw.ImageDraw, side: int, rng: np.random.Generator, fill: Colour, outline: Colour
) -> None:
    """Draw an ellipse or a box, half of the time with a polygon in it."""
    size, middle = side * rng.uniform(0.1, 0.5, size=2), rng.uniform(0, side, size=2)
    corner = middle - size / 2
    draw_shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
    draw_shape([*corner, *(corner + size)], fill=fill, outline=outline)
    if rng.random() < 0.5:
        points = corner + size * rng.uniform(0.2, 0.8, size=(rng.integers(3, 6), 2))
        draw.polygon(points.ravel().tolist(), fill=outline)
