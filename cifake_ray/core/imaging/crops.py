"""Choose crops of an image at its native resolution, and pool what a detector says of them.

The choice follows from the pixels alone, so it is everywhere the same.

Nothing is resized, since traces of a generator live in the finest detail.
"""

from __future__ import annotations

from math import sqrt

import numpy as np

BLOCK = 8  # pixels: offsets are multiples, so that a JPEG's blocks stay where they are
# So many times the crops asked for are looked at, to find others where some are flat.
CANDIDATES_PER_CROP = 4
# Neighbouring green values of a flat crop differ by less on average, of 255.
FLAT_DIFFERENCE = 1


def choose_crops(pixels: np.ndarray, *, size: int, num_crops: int) -> list[tuple[int, int]]:
    """Return the (top, left) of at most `num_crops` crops of uint8[H, W, 3], spread over it.

    Candidates stand on a grid over the whole image and hardly overlap. Flat ones are skipped, and
    of the others those are taken that are farthest from each other, from the centre outwards. If
    all are flat, it is the least flat one. Offsets are sorted, and 0 along a side of less than
    `size`.
    """
    height, width = pixels.shape[:2]
    grid = _count_cells(height, width, size, CANDIDATES_PER_CROP * num_crops)
    tops, lefts = (
        _place_crops(side, size, number) for side, number in zip((height, width), grid, strict=True)
    )
    offsets = np.array([(top, left) for top in tops for left in lefts])
    differences = np.array(
        [find_difference(pixels[top : top + size, left : left + size]) for top, left in offsets]
    )
    textured = offsets[differences >= FLAT_DIFFERENCE]
    if not len(textured):
        textured = offsets[[differences.argmax()]]
    center = np.array([height - size, width - size]) // 2
    chosen = _spread(textured, center, num_crops)
    return sorted((int(top), int(left)) for top, left in chosen)


def cut_crops(pixels: np.ndarray, offsets: list[tuple[int, int]], *, size: int) -> np.ndarray:
    """Cut uint8[H, W, 3] at k offsets (top, left): uint8[k, size, size, 3], a copy."""
    crops = np.empty((len(offsets), size, size, 3), np.uint8)
    for crop, (top, left) in zip(crops, offsets, strict=True):
        # Cut before it is padded: a strip of 1 x 60,000,000 pixels would become 23 GB.
        crop[:] = pad_to(pixels[top : top + size, left : left + size], size)
    return crops


def pad_to(pixels: np.ndarray, size: int) -> np.ndarray:
    """Pad each side of uint8[H, W, 3] that is below `size` to it, by symmetric reflection.

    The pixels are added at the bottom and on the right, so a JPEG's blocks stay where they are.
    """
    missing = [(0, max(size - side, 0)) for side in pixels.shape[:2]]
    return np.pad(pixels, (*missing, (0, 0)), mode="symmetric")


def find_difference(crop: np.ndarray) -> float:
    """Return how much neighbouring green values of uint8[H, W, 3] differ on average: 0..255."""
    green = crop[..., 1].astype(np.int16)  # it carries most of the brightness
    across, down = np.abs(np.diff(green, axis=1)), np.abs(np.diff(green, axis=0))
    return int(across.sum() + down.sum()) / max(across.size + down.size, 1)


def pool_logits(logit: np.ndarray, num_crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and population standard deviation of each image's logits: float32[N] both.

    `logit` is float32[M] of all crops in order, `num_crops` int64[N] of each image, 1 or more.
    """
    starts = np.cumsum(num_crops) - num_crops
    wide = logit.astype(np.float64)
    mean = np.add.reduceat(wide, starts) / num_crops
    squares = (wide - np.repeat(mean, num_crops)) ** 2
    std = np.sqrt(np.add.reduceat(squares, starts) / num_crops)
    return mean.astype(np.float32), std.astype(np.float32)


def _count_cells(height: int, width: int, size: int, most: int) -> tuple[int, int]:
    """Return the rows and columns of a grid of at most `most` cells, none much below `size`."""
    rows, columns = max(1, round(height / size)), max(1, round(width / size))
    if rows * columns > most:
        rows = max(1, int(rows * sqrt(most / (rows * columns))))
        columns = min(columns, max(1, most // rows))
        rows = min(rows, most // columns)
    return rows, columns


def _place_crops(side: int, size: int, number: int) -> list[int]:
    """Return the offsets of crops in the middle of `number` cells along a side."""
    middles = (2 * np.arange(number, dtype=np.int64) + 1) * side // (2 * number)
    found = np.clip(middles - size // 2, 0, max(side - size, 0)) // BLOCK * BLOCK
    return [int(offset) for offset in np.unique(found)]


def _spread(points: np.ndarray, center: np.ndarray, number: int) -> np.ndarray:
    """Return at most `number` of int64[N, 2]: each the farthest from those before it."""
    chosen = [int(((points - center) ** 2).sum(1).argmin())]
    nearest = ((points - points[chosen[0]]) ** 2).sum(1)
    while len(chosen) < min(number, len(points)):
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(1))
    return points[chosen]
