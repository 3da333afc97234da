"""Generate a small labelled image folder in CIFAKE's layout, without a download.

It exercises the pipeline and is NOT evidence about real generators. REAL images are 32x32 crops of
photographs. FAKE images are other crops of them after one fixed encode-decode step, which halves
the resolution and restores it by a stride-2 transposed convolution with uneven kernels. Part of the
fine detail bypasses that step; the rest becomes lattice noise of the same Laplacian energy (the
period-2 spectral peaks of many generators), so that file size, smoothness, colour and contrast do
not separate the classes. A detector that scores well here detects that lattice and no more.

The photographs are files of installed packages; `PHOTOGRAPHS` has names and licences.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from cifake_ray.core.schema import FAKE, LABEL_NAMES, REAL, SPLITS
from cifake_ray.errors import CifakeError, UsageError

MIN_IMAGES = 20  # the least that gives every class of every split one image
IMAGE_SIZE = 32  # px, as CIFAKE
JPEG_QUALITY = 75  # with 4:2:0: the one pair of tables that all CIFAKE files share

# Split -> photographs, as paths inside installed packages. None may serve two splits: a detector
# must not meet the test pictures while it trains. china, flower: CC BY 2.0 (danielbuechele and
# vultilion, Flickr); chelsea: CC0 (Stefan van der Walt); coffee: CC0 (Rachel Michetti); rocket:
# public domain (SpaceX); astronaut: public domain (NASA).
PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "train": (
        "sklearn/datasets/images/china.jpg",
        "sklearn/datasets/images/flower.jpg",
        "skimage/data/chelsea.png",
        "skimage/data/rocket.jpg",
    ),
    "val": ("skimage/data/coffee.png",),
    "test": ("skimage/data/astronaut.png",),
}

_BLOCK = 256  # images computed at once; image i is of block i // _BLOCK whatever range is asked for
_NUM_LEVELS = 10  # scales of each photograph
_FINEST_CROP = 56  # px of the photograph below the smallest crop
_MIN_STD = 14.0  # grey levels: flatter crops (sky) hold neither content nor trace

# Columns of the uniforms drawn for each image.
_U_PHOTO, _U_PLACE, _U_FLIP, _U_JITTER, _U_DECODER = 0, 1, 2, slice(3, 8), slice(8, 13)
_U_SIZE, _U_ASPECT, _U_FORMAT, _U_LEFT, _U_TOP = 13, 14, 15, 16, 17
_NUM_DRAWS = 18

_KEPT_DETAIL = (0.25, 0.65)  # share of the fine detail that the decoder restores
_LATTICE_FLOOR = 0.8  # grey levels: decoders leave some lattice in flat areas too
# Amplitudes (row, column, diagonal) of the period-2 gain of a stride-2 decoder with uneven phases.
_LATTICES = np.array(
    [[0.9, 0.2, 0.4], [0.2, 0.9, 0.4], [0.6, 0.6, 0.5], [0.3, 0.3, 0.9]], dtype=np.float32
)

# Load generator: weight, extension, Pillow mode, Pillow's save options.
_FORMATS: tuple[tuple[float, str, str, dict[str, Any]], ...] = (
    (0.15, "jpg", "RGB", {"quality": 75}),
    (0.15, "jpg", "RGB", {"quality": 90}),
    (0.10, "jpg", "RGB", {"quality": 60}),
    (0.10, "jpeg", "RGB", {"quality": 95, "subsampling": 0}),
    (0.05, "jpg", "L", {"quality": 85}),
    (0.15, "png", "RGB", {"compress_level": 3}),
    (0.05, "png", "RGBA", {"compress_level": 3}),
    (0.05, "png", "P", {}),
    (0.05, "png", "L", {}),
    (0.07, "webp", "RGB", {"quality": 80, "method": 2}),
    (0.03, "webp", "RGBA", {"lossless": True, "method": 0}),
    (0.03, "gif", "P", {}),
    (0.02, "bmp", "RGB", {}),
)

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Draws = NDArray[np.float64]


@dataclass(frozen=True)
class SampleImage:
    """One file of the folder."""

    path: str  # posix, below the folder's root: `train/FAKE/0123456789abcdef0123.jpg`
    data: bytes  # encoded


def generate_images(
    *, num_images: int, seed: int = 0, mixed: bool = False, start: int = 0, stop: int | None = None
) -> Iterator[SampleImage]:
    """Generate images `start` to `stop` (default: all) of `num_images`, in order of index.

    Classes alternate; per class `num_images // 2 // 10` images are val, as many are test, the rest
    train; an odd last image is REAL and train. Image i depends on (seed, i, num_images, mixed)
    alone, so that processes can share the range. Names are hashes of seed and index. Images are
    32x32 RGB JPEGs (quality 75, 4:2:0, simplejpeg). `mixed` gives images for load tests instead:
    sides of about 27 to 600 px, most of them small, in formats and modes that are independent of
    the label; not meant for training.

    Raises UsageError for a number or range out of bounds, CifakeError if a photograph's package is
    not installed.
    """
    stop = num_images if stop is None else stop
    if num_images < MIN_IMAGES:
        raise UsageError(
            f"num_images is {num_images}, below {MIN_IMAGES}, the least that gives every class of "
            f"every split an image; ask for {MIN_IMAGES} or more"
        )
    if seed < 0:
        raise UsageError(f"seed is {seed}; give 0 or more")
    if not 0 <= start <= stop <= num_images:
        raise UsageError(
            f"range {start}:{stop} is not within 0:{num_images}; "
            f"give 0 <= start <= stop <= {num_images}"
        )
    return _generate_range(num_images, seed, mixed, start, stop)


def assign_image(index: int, num_images: int) -> tuple[str, int]:
    """Return split and label (REAL or FAKE) of an image, by the rule of `generate_images`."""
    pair, num_held_out = index // 2, num_images // 2 // 10
    label = FAKE if index % 2 else REAL
    if pair < num_held_out:
        return "val", label
    return ("test" if pair < 2 * num_held_out else "train"), label


def name_image(index: int, num_images: int, seed: int) -> str:
    """Return the path of an image below the folder of the sample, without its extension."""
    split, label = assign_image(index, num_images)
    name = hashlib.sha256(f"{seed}:{index}".encode()).hexdigest()[:20]
    return f"{split}/{LABEL_NAMES[label]}/{name}"


def find_photograph(name: str) -> Path:
    """Return the path of a `PHOTOGRAPHS` entry without importing its package.

    CifakeError if the package is not installed or lacks the file.
    """
    package, *rest = PurePosixPath(name).parts
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent.joinpath(*rest) if spec and spec.origin else None
    if path is None or not path.is_file():
        raise CifakeError(f"photograph {name} is missing; reinstall {package} from its wheel")
    return path


def _generate_range(
    num_images: int, seed: int, mixed: bool, start: int, stop: int
) -> Iterator[SampleImage]:
    for block in range(start // _BLOCK, -(-stop // _BLOCK)):
        # Always the whole block: sums over other groups of rows could round differently.
        indices = range(block * _BLOCK, min((block + 1) * _BLOCK, num_images))
        assigned = [assign_image(index, num_images) for index in indices]
        u = np.random.default_rng([seed, block]).random((_BLOCK, _NUM_DRAWS))[: len(indices)]
        images = None if mixed else _draw_block(assigned, u)
        for row, (index, (split, label)) in enumerate(zip(indices, assigned, strict=True)):
            if not start <= index < stop:
                continue
            if images is None:
                extension, data = _draw_mixed(split, label, u[row : row + 1])
            else:
                extension = "jpg"
                data = simplejpeg.encode_jpeg(
                    images[row], quality=JPEG_QUALITY, colorsubsampling="420"
                )
            yield SampleImage(f"{name_image(index, num_images, seed)}.{extension}", data)


# --- crops ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pyramids:
    """Every photograph at every scale as one list of pixels, and the corners of crops in it."""

    pixels: Bytes  # [P,3]
    corners: NDArray[np.int64]  # allowed top left corners as indices into pixels, level by level
    first: NDArray[np.int64]  # [L] index of a level's first corner
    count: NDArray[np.int64]  # [L] corners of a level
    width: NDArray[np.int64]  # [L] px: from one row of the level to the next
    levels: dict[str, tuple[int, int]]  # split -> its range of levels


@functools.cache
def _load_photograph(name: str) -> Image.Image:
    with Image.open(find_photograph(name)) as image:
        return image.convert("RGB")


@functools.cache
def _build_pyramids() -> _Pyramids:
    pixels: list[Bytes] = []
    corners: list[NDArray[np.int64]] = []
    widths: list[int] = []
    levels: dict[str, tuple[int, int]] = {}
    num_pixels = 0
    for split in SPLITS:
        first_level = len(widths)
        for name in PHOTOGRAPHS[split]:
            photo = _load_photograph(name)
            for crop in np.geomspace(_FINEST_CROP, 0.9 * min(photo.size), _NUM_LEVELS):
                width, height = (round(side * IMAGE_SIZE / crop) for side in photo.size)
                level = np.asarray(photo.resize((width, height), Image.Resampling.LANCZOS))
                rows, columns = np.nonzero(_measure_crops(level) >= _MIN_STD)
                corners.append(num_pixels + rows * width + columns)
                pixels.append(level.reshape(-1, 3))
                widths.append(width)
                num_pixels += width * height
        levels[split] = (first_level, len(widths))
    count = np.array([len(level) for level in corners])
    first = np.cumsum(count) - count
    return _Pyramids(
        np.concatenate(pixels), np.concatenate(corners), first, count, np.array(widths), levels
    )


def _measure_crops(level: Bytes) -> NDArray[np.float64]:
    """Return the standard deviation of grey in every 32x32 window, by an integral image."""
    grey = level.mean(axis=2)
    moments = []
    for power in (grey, grey * grey):
        total = np.pad(power, ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
        s = IMAGE_SIZE
        moments.append((total[s:, s:] - total[:-s, s:] - total[s:, :-s] + total[:-s, :-s]) / s**2)
    variance: NDArray[np.float64] = moments[1] - moments[0] ** 2
    return np.sqrt(np.maximum(variance, 0))


def _draw_block(assigned: list[tuple[str, int]], u: Draws) -> Bytes:
    """Return uint8[B,32,32,3]: crop, flip, jitter alike for both classes; then FAKE is decoded."""
    p = _build_pyramids()
    low, high = np.array([p.levels[split] for split, _ in assigned]).T
    level = low + (u[:, _U_PHOTO] * (high - low)).astype(np.int64)
    corner = p.corners[p.first[level] + (u[:, _U_PLACE] * p.count[level]).astype(np.int64)]
    step = np.arange(IMAGE_SIZE)
    crops = p.pixels[corner[:, None, None] + p.width[level][:, None, None] * step[:, None] + step]
    images = _jitter(crops.astype(np.float32), u)
    is_fake = np.array([label == FAKE for _, label in assigned])
    images[is_fake] = _synthesise(images[is_fake], u[is_fake])
    return np.rint(images).astype(np.uint8)


def _jitter(images: Floats, u: Draws) -> Floats:
    flip = u[:, _U_FLIP] < 0.5
    images[flip] = images[flip, :, ::-1]
    v = u[:, _U_JITTER].astype(np.float32)[:, None, None, :]
    gain = (0.85 + 0.3 * v[..., :1]) * (0.94 + 0.12 * v[..., 1:4])
    jittered: Floats = images * gain + (32 * v[..., 4:] - 16)
    return np.clip(jittered, 0, 255)


# --- the stand-in generator ----------------------------------------------------------------------


def _synthesise(images: Floats, u: Draws) -> Floats:
    """Give float32[B,H,W,3] in 0..255 a decoder's lattice; H and W must be even.

    Each image keeps its Laplacian energy (but for clipping): the lattice replaces lost detail.
    """
    v = u[:, _U_DECODER].astype(np.float32)
    base = _upsample(_halve(images))
    detail = images - base
    low, high = _KEPT_DETAIL
    kept = base + (low + (high - low) * v[:, 0])[:, None, None, None] * detail
    # Uneven phases of a transposed convolution multiply what it upsamples by a period-2 wave.
    row, column = np.indices(images.shape[1:3])
    waves = 1 - 2 * (np.stack([row, column, row + column]) % 2).astype(np.float32)
    amplitude = _LATTICES[(v[:, 1] * len(_LATTICES)).astype(np.int64) % len(_LATTICES)]
    sign = np.where(v[:, 2:5] < 0.5, -1, 1).astype(np.float32)
    wave = np.einsum("bk,khw->bhw", amplitude * sign, waves)
    activity = _upsample(_halve(np.abs(detail).mean(axis=3, keepdims=True)))
    lattice = wave[..., None] * (activity + _LATTICE_FLOOR)
    # The gain g >= 0 at which kept + g * lattice has the Laplacian energy of the original crop.
    lap_kept, lap_lattice = _measure_laplacian(kept), _measure_laplacian(lattice)
    lap_image = _measure_laplacian(images)
    a = np.square(lap_lattice).sum(axis=(1, 2))
    b = (lap_kept * lap_lattice).sum(axis=(1, 2))
    c = (np.square(lap_kept) - np.square(lap_image)).sum(axis=(1, 2))
    gain = np.maximum((np.sqrt(np.maximum(b * b - a * c, 0)) - b) / np.maximum(a, 1e-6), 0)
    decoded: Floats = kept + gain[:, None, None, None] * lattice
    return np.clip(decoded, 0, 255)


def _halve(images: Floats) -> Floats:
    """Average 2x2 cells: [B,H,W,C] -> [B,H/2,W/2,C]."""
    tall: Floats = images[:, ::2] + images[:, 1::2]
    cells: Floats = tall[:, :, ::2] + tall[:, :, 1::2]
    return cells * np.float32(0.25)


def _upsample(latent: Floats) -> Floats:
    """Convolve transposed, stride 2, by [1,3,3,1]/4 on both axes: [B,H,W,C] -> [B,2H,2W,C]."""
    b, h, w, c = latent.shape
    z = np.pad(latent, ((0, 0), (1, 1), (0, 0), (0, 0)), mode="edge")
    middle = 0.75 * latent
    phases = np.stack([middle + 0.25 * z[:, :-2], middle + 0.25 * z[:, 2:]], axis=2)
    tall = phases.reshape(b, 2 * h, w, c)
    z = np.pad(tall, ((0, 0), (0, 0), (1, 1), (0, 0)), mode="edge")
    middle = 0.75 * tall
    phases = np.stack([middle + 0.25 * z[:, :, :-2], middle + 0.25 * z[:, :, 2:]], axis=3)
    return phases.reshape(b, 2 * h, 2 * w, c)


def _measure_laplacian(images: Floats) -> Floats:
    grey: Floats = images.mean(axis=3)
    neighbours = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    laplacian: Floats = 4 * grey[:, 1:-1, 1:-1] - neighbours
    return laplacian


# --- the load generator --------------------------------------------------------------------------


def _draw_mixed(split: str, label: int, u: Draws) -> tuple[str, bytes]:
    """Return extension and encoded bytes of one image; u is float64[1,_NUM_DRAWS]."""
    draw = u[0]
    side = 32 * 16 ** (draw[_U_SIZE] ** 3)  # 32 to 512 px, half of them below 46
    aspect = 0.75 ** (2 * draw[_U_ASPECT] - 1)
    width, height = max(round(side * aspect**0.5), 8), max(round(side / aspect**0.5), 8)
    names = PHOTOGRAPHS[split]
    photo = _load_photograph(names[int(draw[_U_PHOTO] * len(names))])
    zoom = (0.25 + 0.7 * draw[_U_PLACE]) * min(photo.width / width, photo.height / height)
    left = draw[_U_LEFT] * (photo.width - width * zoom)
    top = draw[_U_TOP] * (photo.height - height * zoom)
    box = (left, top, left + width * zoom, top + height * zoom)
    # The decoder halves the sides, so it works on even ones.
    even = photo.resize((width + width % 2, height + height % 2), Image.Resampling.LANCZOS, box)
    pixels = _jitter(np.asarray(even)[None].astype(np.float32), u)
    if label == FAKE:
        pixels = _synthesise(pixels, u)
    image = Image.fromarray(np.rint(pixels[0, :height, :width]).astype(np.uint8))

    edges = np.cumsum([weight for weight, *_ in _FORMATS])
    choice = min(int(np.searchsorted(edges, draw[_U_FORMAT], side="right")), len(_FORMATS) - 1)
    _, extension, mode, options = _FORMATS[choice]
    if mode == "P":
        image = image.quantize(128, Image.Quantize.FASTOCTREE)
    elif mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    elif mode != "RGB":
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format=Image.registered_extensions()[f".{extension}"], **options)
    return extension, buffer.getvalue()
